"""What stands for a GPU where there is none: graphs that repeat operations and not Python, and tensors without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from masq.models.step_graph import Step

# What makes the processor wait for a GPU, or sends it what Python knows: neither can be captured.
_HOST = ("_local_scalar_dense", "nonzero", "aten.equal.", "lift_fresh", "unique", "masked_select")
_READS = ("tolist", "numpy", "cpu")


def graph_of(step: Step) -> Step:
    """What a graph is to a GPU: the operations of a step, over again on the tensors of the captured one.

    Capturing leaves everything as it was, but for what the step itself allocates.
    """
    recording = _Recording()
    with recording, _nothing_is_read():
        output = step()
    recording.undo()

    def replay() -> Any:
        recording.replay()
        return output

    return replay


@contextmanager
def _nothing_is_read() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in _READS:
            patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name}: a GPU is waited for"))
        yield


class _Recording(TorchDispatchMode):
    """Every operation with what it read and made, and what was there before it wrote into it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        check_captured(func, args)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(given, torch.Tensor):
                place = given.untyped_storage()
                self.before.setdefault(place.data_ptr(), (place, place.clone()))
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def undo(self) -> None:
        """Put back what was written into."""
        for place, content in self.before.values():
            place.copy_(content)

    def replay(self) -> None:
        """All operations again, into the same places."""
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for to, new in zip(pytree.tree_leaves(made), pytree.tree_leaves(again), strict=True):
                if isinstance(to, torch.Tensor) and to.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    to.copy_(new)


def check_captured(func: Any, args: Any) -> None:
    """Fail on an operation of which a GPU alone does not know what it does."""
    name = str(func)
    indices = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
    masks = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
    assert not masks, f"{name} with a mask"
    assert not any(part in name for part in _HOST), name


class OnOneDevice(TorchDispatchMode):
    """Fails on what is not on the GPU, numbers aside: to a graph it would have to be sent."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        check_captured(func, args)
        made = func(*args, **(kwargs or {}))
        for one in pytree.tree_leaves((args, kwargs, made)):
            if isinstance(one, torch.Tensor) and one.dim():
                assert one.device.type == "cuda", f"{func} of {tuple(one.shape)} on {one.device}"
        return made
