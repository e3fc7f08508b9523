"""Where the weights of a model are: all in memory, or on disk and in memory part by part.

A part is a decoder block, the embeddings, the head, the final norm, or a tower. Modules that are called bring their own
part into memory and let go of it after the call, so a streamed model runs like any other. Whoever reads or changes
weights itself says so with ``present``; ``ModelAdapter.visited_blocks`` does it for blocks.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from masq.errors import ModelError
from masq.files import SCRATCH
from masq.models.heap import give_back, map_large
from masq.models.tensor_files import Overflow, TensorFile, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from masq.models.tensor_files import Collected

After = Literal["forget", "spill", "stay"]
"""What becomes of a part when nobody needs it: its changes are forgotten (there are none, or they are kept elsewhere),
written to disk, or it stays in memory from now on."""


class Residence:
    """Everything in memory, always.

    Attributes:
        streamed: whether weights come and go.
        device: where weights are while they are used, None for where they are now.
    """

    streamed = False
    device: torch.device | None = None

    @contextmanager
    def present(self, *modules: nn.Module, after: After = "forget") -> Iterator[None]:
        """Have the parts with ``modules`` in memory while the context lasts.

        Args:
            modules: each inside one part, or a part.
            after: what then becomes of changes.
        """
        del modules, after
        yield

    def kept(self, module: nn.Module, fill: Callable[[], None]) -> None:
        """From now on the weights of the part ``module`` are those that ``fill`` puts there, as they are now."""
        del module, fill

    def portions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of pieces that make up ``model``, each with its weights in memory while it is looked at."""
        yield "", model

    def collected(self, tensors: Iterable[torch.Tensor] = ()) -> Collected:
        """An empty list for activations of all calibration batches, or one that begins with ``tensors``."""
        return list(tensors)


class WeightSource(Protocol):
    """Where the float weights of a streamed model are read from."""

    def read(self, name: str) -> torch.Tensor:
        """The parameter ``name`` of the model, in its dtype, on the CPU.

        Raises:
            DataError: it cannot be read any longer.
        """
        ...


class _Part:
    """A module that comes and goes as a whole, and where it is read from: ``fill`` first, then ``file``, then names."""

    def __init__(self, module: nn.Module, number: int) -> None:
        self.module, self.number = module, number
        # Who needs it, and how many of those are calls of the module itself.
        self.users = self.calls = 0
        self.file: TensorFile | None = None
        self.fill: Callable[[], None] | None = None

    def slots(self, *, derived: bool = False) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Name within the part, and place, of every stored tensor; with ``derived`` also what is made from those."""
        for prefix, module in self.module.named_modules():
            made = getattr(module, "derived_buffers", ()) if derived else ()
            volatile = module._non_persistent_buffers_set.difference(made)
            for place in (module._parameters, module._buffers):
                for leaf, tensor in place.items():
                    if tensor is not None and leaf not in volatile:
                        yield f"{prefix}.{leaf}" if prefix else leaf, place, leaf


class StreamedResidence(Residence):
    """Weights on disk; in memory are those parts that someone uses.

    Args:
        model: on the meta device or in memory; parts of it go to the meta device at once.
        parts: modules that come and go as a whole: those named, and the largest others beside them (the towers).
        source: of the weights as they are now.
        device: see ``Residence``.
        scratch: a folder on a disk; a working folder is made in it, and is gone when the model is.
    """

    streamed = True

    def __init__(
        self, model: Any, parts: Sequence[nn.Module], source: WeightSource, device: torch.device, scratch: Path
    ) -> None:
        self.device = device
        map_large()
        scratch.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=scratch))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._source = source
        self._overflow = Overflow(self.folder)
        # A tensor that two parts share (a tied head) is one object in both places, present or away.
        self._present: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._parts = {module: _Part(module, number) for number, module in enumerate(cover(model, parts))}
        for part in self._parts.values():
            self._evict(part)
            part.module.register_forward_pre_hook(self._before)
            part.module.register_forward_hook(self._after, always_call=True)
        self._settle(model)

    def _settle(self, model: nn.Module) -> None:
        """Tell what is away where to find it, and bring in what is in no part: buffers, weights beside the parts."""
        inside = {inner for part in self._parts for inner in part.modules()}
        for prefix, module in model.named_modules():
            places: list[dict[str, Any]] = [module._parameters, module._buffers]
            for place in places:
                for leaf, tensor in place.items():
                    if tensor is None:
                        continue
                    if tensor.is_meta and not hasattr(tensor, "masq_name"):
                        tensor.masq_name = f"{prefix}.{leaf}" if prefix else leaf  # type: ignore[attr-defined]
                    if tensor.is_meta and module not in inside:
                        place[leaf] = self._from_source(tensor)
                    elif not tensor.is_meta:
                        place[leaf] = tensor.to(self.device)

    @contextmanager
    def present(self, *modules: nn.Module, after: After = "forget") -> Iterator[None]:
        """See ``Residence.present``.

        Raises:
            DataError: a weight cannot be read any longer.
            OutputError: changed weights do not fit on the disk.
            ModelError: a module of no part, or a change of weights that two parts share.
        """
        parts = list(dict.fromkeys(self._part_of(module) for module in modules))
        entered: list[_Part] = []
        try:
            for part in parts:
                self._enter(part)
                entered.append(part)
            yield
            for part in entered:
                if after == "spill":
                    self._spill(part)
                part.users += after == "stay"
        finally:
            for part in entered:
                self._leave(part)

    def kept(self, module: nn.Module, fill: Callable[[], None]) -> None:
        """See ``Residence.kept``; what was spilled of the part is deleted."""
        part = self._part_of(module)
        part.fill = fill
        if part.file is not None:
            part.file.path.unlink(missing_ok=True)
            part.file = None
        if part.users == 0:
            self._evict(part)

    def portions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """See ``Residence.portions``: part by part, and of a module in no part what it holds itself."""
        if model in self._parts:
            with self.present(model):
                yield "", model
            return
        yield "", _alone(model)
        for child, module in model.named_children():
            for name, piece in self.portions(module):
                yield f"{child}.{name}" if name else child, piece

    def collected(self, tensors: Iterable[torch.Tensor] = ()) -> Collected:
        """See ``Residence.collected``; beyond a bound on memory they lie on disk."""
        return self._overflow.new(tensors)

    def _part_of(self, module: nn.Module) -> _Part:
        part = self._parts.get(module)
        if part is None:
            part = next((p for root, p in self._parts.items() if any(m is module for m in root.modules())), None)
        if part is None:
            raise ModelError("a module whose weights are asked for must be inside a part", value=type(module).__name__)
        return part

    def _before(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        part = self._parts[module]
        self._enter(part)
        part.calls += 1

    def _after(self, module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        part = self._parts[module]
        # A call that an earlier hook ended never came in.
        if part.calls:
            part.calls -= 1
            self._leave(part)

    def _enter(self, part: _Part) -> None:
        if part.users == 0:
            try:
                if part.fill is not None:
                    part.fill()
                for name, place, leaf in list(part.slots()):
                    if place[leaf].is_meta:
                        place[leaf] = self._read(part, name, place[leaf])
            except BaseException:
                self._evict(part)
                raise
        part.users += 1

    def _leave(self, part: _Part) -> None:
        part.users -= 1
        if part.users == 0:
            self._evict(part)

    def _read(self, part: _Part, name: str, away: torch.Tensor) -> torch.Tensor:
        if part.file is not None:
            return _like(away, part.file.read(name).to(self.device))
        found = self._present.get(id(away))
        if found is None:
            found = self._from_source(away)
            self._present[id(away)] = found
        return found

    def _from_source(self, away: torch.Tensor) -> torch.Tensor:
        name: str = away.masq_name  # type: ignore[attr-defined]
        return _like(away, self._source.read(name).to(self.device))

    def _evict(self, part: _Part) -> None:
        for _, place, leaf in list(part.slots(derived=True)):
            tensor = place[leaf]
            if not tensor.is_meta:
                if not hasattr(tensor, "masq_away"):
                    tensor.masq_away = _like(tensor, torch.empty_like(tensor, device="meta"))
                place[leaf] = tensor.masq_away
            # Else the part that was just let go of is still held, by this name.
            del tensor
        give_back()

    def _spill(self, part: _Part) -> None:
        tensors = {name: place[leaf] for name, place, leaf in part.slots()}
        others = {id(p[leaf]) for other in self._parts.values() if other is not part for _, p, leaf in other.slots()}
        for name, tensor in tensors.items():
            if others & {id(tensor), id(getattr(tensor, "masq_away", None))} - {id(None)}:
                raise ModelError(
                    "a weight that two parts of a model share must be untied before it is changed",
                    value=name,
                    remedy="give the head a weight of its own first",
                )
        path = self.folder / f"part-{part.number:04d}.safetensors"
        part.file = None
        write_tensors(path, tensors)
        part.file = TensorFile(path)


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new`` as a parameter where ``old`` is one; it knows what takes its place while it is away."""
    made = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    if old.is_meta:
        made.masq_away = old  # type: ignore[attr-defined]
    return made


def _alone(module: nn.Module) -> nn.Module:
    """A module with the stored tensors of ``module``, but for those of its children."""
    alone = nn.Module()
    for leaf, tensor in module.named_parameters(recurse=False):
        alone.register_parameter(leaf, tensor)
    for leaf, tensor in module.named_buffers(recurse=False):
        alone.register_buffer(leaf, tensor, persistent=leaf not in module._non_persistent_buffers_set)
    return alone


def cover(model: nn.Module, parts: Sequence[nn.Module]) -> list[nn.Module]:
    """``parts`` and, beside them, the largest modules with weights that hold none of them, in the model's order."""
    named = set(parts)

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module in named or not any(inner in named for inner in module.modules()):
            if any(True for _ in module.parameters()):
                yield module
            return
        for child in module.children():
            yield from walk(child)

    return list(walk(model))
