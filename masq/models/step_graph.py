"""Decoding steps replayed as CUDA graphs: one launch for all kernels of a step, instead of hundreds by Python.

With a cache of fixed size every step reads and writes the memory that the step before did, but for what it is called
with, which is copied to where the captured step reads it. The first steps run as they are: they compile and load what
a graph is not to wait for. A graph serves one call of ``generate``, whose cache and position offsets it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from masq.errors import ModelError

Step: TypeAlias = "Callable[[], Any]"
WARM_UP = 2
"""Steps before one is captured."""


def cuda_graph(step: Step, device: torch.device) -> Step:
    """Capture a step, which this does not run, in a graph of a GPU; what is returned runs it, into the same output.

    Raises:
        ModelError: something in the step cannot be captured.
    """
    with torch.cuda.device(device):
        before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=_stream(torch.cuda.current_device())):
                output = step()
        except torch.OutOfMemoryError:
            torch.cuda.set_stream(before)
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            raise ModelError(
                "a step of an answer must leave the processor alone, to be captured as a CUDA graph",
                value=next(iter(str(error).splitlines()), type(error).__name__),
                remedy="set evaluation.decoding=eager for this model",
            ) from error

    def replay() -> Any:
        graph.replay()
        return output

    return replay


@functools.cache
def _stream(_gpu: int) -> torch.cuda.Stream:
    """One for all captures of a GPU, for libraries keep memory for each; torch's own belongs to the first GPU."""
    return torch.cuda.Stream()


class StepReplay:
    """Takes the place of a model's ``forward`` while it answers.

    Args:
        forward: of the model, called by names.
        is_text: whether all tokens of a call are text; a graph knows no others.
        capture: makes a step that can be repeated of one that reads tensors that stay where they are.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        is_text: Callable[[Mapping[str, Any]], bool],
        capture: Callable[[Step], Step],
    ) -> None:
        self.forward, self.is_text, self.capture = forward, is_text, capture
        self.num_steps = self.num_replayed = 0
        self._held: tuple[list[Any], Any] | None = None
        self._replay: Step | None = None

    def __call__(self, **inputs: Any) -> Any:
        """The output of ``forward``; that of a replayed step is valid until the next.

        Raises:
            ModelError: a step is called with something else than the one that was captured, tensors aside.
        """
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[1] != 1 or not self.is_text(inputs):
            return self.forward(**inputs)
        self.num_steps += 1
        if self.num_steps <= WARM_UP:
            return self.forward(**inputs)
        # A cache, which is a tree to torch, stays itself: its tensors are the memory that steps share.
        leaves, form = pytree.tree_flatten(inputs, is_leaf=lambda one: hasattr(one, "get_seq_length"))
        if self._held is None or self._replay is None:
            kept = [one.clone() if isinstance(one, torch.Tensor) else one for one in leaves]
            self._held = kept, form
            self._replay = self.capture(lambda: self.forward(**pytree.tree_unflatten(kept, form)))
        self._refill(leaves, form)
        self.num_replayed += 1
        return self._replay()

    def _refill(self, leaves: list[Any], form: Any) -> None:
        assert self._held is not None
        kept, known = self._held
        if form != known or not all(map(_alike, kept, leaves)):
            raise ModelError(
                "all steps of an answer must be called alike, but for what tensors say",
                value=f"{form}, {[getattr(one, 'shape', one) for one in leaves]}",
                remedy="set evaluation.decoding=eager for this model",
            )
        for to, given in zip(kept, leaves, strict=True):
            if isinstance(to, torch.Tensor):
                to.copy_(given)


def _alike(kept: Any, given: Any) -> bool:
    if isinstance(kept, torch.Tensor):
        same = isinstance(given, torch.Tensor) and (kept.shape, kept.dtype) == (given.shape, given.dtype)
        return same and kept.device == given.device
    return kept is given or (not isinstance(given, torch.Tensor) and bool(kept == given))


@contextmanager
def replayed_steps(
    model: Any, is_text: Callable[[Mapping[str, Any]], bool], capture: Callable[[Step], Step] | None = None
) -> Iterator[StepReplay]:
    """Inside, ``model.generate`` with a static cache replays its steps; for one call of it.

    Args:
        model: of transformers.
        is_text: see ``StepReplay``.
        capture: likewise, None for graphs of the GPU that the model is on.
    """
    plain, own = model.forward, model.__dict__.get("forward")
    capture = capture or functools.partial(cuda_graph, device=model.device)
    replay = StepReplay(plain, is_text, capture)

    # ``generate`` asks the signature of ``forward`` what it may be called with.
    @functools.wraps(plain)
    def forward(**inputs: Any) -> Any:
        return replay(**inputs)

    model.forward = forward
    try:
        yield replay
    finally:
        del model.forward
        if own is not None:
            model.forward = own
