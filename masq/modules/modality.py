"""Which modality every token of the running forward pass has, where quantized linears can read it.

One pre-hook on the top model sets it from that call's own ``input_ids``, so prefill, chunked prefill, beams and
decoding steps need no state of their own. Nothing here ever assumes text.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from masq.errors import ModelError
from masq.kernels.base import Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from masq.models.base import Modality


class KnowsModality(Protocol):
    """What the hook needs of a ``ModelAdapter``: its model, and the modality of the tokens of a call.

    Attributes:
        model: the top module.
    """

    model: Any

    def modality_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Modality of every token of a call with these arguments, int8 [B, T]."""
        ...


class ModalityContext:
    """Modality ids of the tokens now being computed, in one fixed buffer per shape and device.

    A buffer is written in place, so a compiled or captured graph that read it once reads the right ids ever after.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int, torch.device], torch.Tensor] = {}
        self._current: torch.Tensor | None = None
        self._derived: dict[str, Any] = {}
        self._override: torch.Tensor | None = None

    def set(self, ids: torch.Tensor) -> None:
        """Make ``ids`` (int8 [B, T], values of ``Modality``) the current ones.

        Raises:
            ModelError: another dtype or number of dimensions.
        """
        if ids.dtype != torch.int8 or ids.dim() != 2:
            raise ModelError(
                "modality ids must be int8 [batch, tokens]",
                value=f"{ids.dtype} {tuple(ids.shape)}",
                remedy="use ModelAdapter.modality_of",
            )
        key = (ids.shape[0], ids.shape[1], ids.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(ids, memory_format=torch.contiguous_format)
        self._current = self._buffers[key].copy_(ids)
        self._derived.clear()

    def current(self, batch: int, tokens: int) -> torch.Tensor:
        """The current ids, int8 [batch, tokens]; the tensor is reused, do not keep or change it.

        Raises:
            ModelError: none are set, or they belong to another shape.
        """
        if self._current is None:
            self._none_set()
        if self._current.shape != (batch, tokens):
            raise ModelError(
                "the modality ids must belong to the tokens at hand",
                value=f"ids {tuple(self._current.shape)} for an input [{batch}, {tokens}]",
                remedy="set the ids of this very batch (ModalityContext.set)",
            )
        return self._current

    @property
    def text_only(self) -> bool:
        """Whether no current token is of another modality than text, padding aside; asked once for all layers."""
        return self._once("text_only", lambda ids: not bool((ids > 0).any()))

    @property
    def indices(self) -> torch.Tensor:
        """The current ids as int64 [B * T], padding (whose output is never read) as text."""
        return self._once("indices", lambda ids: ids.reshape(-1).clamp(min=0).long())

    def present(self, modalities: Iterable[Modality]) -> tuple[Modality, ...]:
        """Those of ``modalities`` that a current token has."""
        return tuple(modality for modality in modalities if len(self.rows_of(modality)))

    def selection(self, modalities: tuple[Modality, ...]) -> Selection:
        """The current tokens of these modalities, one modality after the other."""

        def make(ids: torch.Tensor) -> Selection:
            return Selection.of(torch.cat([self.rows_of(modality) for modality in modalities]), ids.numel())

        return self._once("selection " + " ".join(modality.name for modality in modalities), make)

    def rows_of(self, modality: Modality) -> torch.Tensor:
        """Numbers of the current tokens of one modality in the flattened batch, int64 [n]."""
        return self._once(modality.name, lambda ids: (ids.reshape(-1) == int(modality)).nonzero().squeeze(1))

    def _once(self, name: str, make: Callable[[torch.Tensor], Any]) -> Any:
        if self._current is None:
            self._none_set()
        if name not in self._derived:
            self._derived[name] = make(self._current)
        return self._derived[name]

    @staticmethod
    def _none_set() -> NoReturn:
        raise ModelError(
            "a quantized linear must know the modality of every token, and never assumes text",
            value="no modality ids are set",
            remedy="run the whole model with masq.modules.modality.install, or call ModalityContext.set first",
        )

    def clear(self) -> None:
        """Forget the current ids: until the next ``set``, ``current`` raises."""
        self._current = None
        self._derived.clear()

    @contextmanager
    def override(self, ids: torch.Tensor) -> Iterator[None]:
        """Ids (int8 [B, T]) for the model calls inside that have ``inputs_embeds`` and no ``input_ids``."""
        previous, self._override = self._override, ids
        try:
            yield
        finally:
            self._override = previous

    def set_from_call(self, adapter: KnowsModality, inputs: Mapping[str, Any]) -> None:
        """Set the ids of a call of the top model from its arguments.

        Raises:
            ModelError: the call has no ``input_ids`` and no override is active, or the override's shape is wrong.
        """
        if inputs.get("input_ids") is not None:
            self.set(adapter.modality_of(inputs))
            return
        embeds = inputs.get("inputs_embeds")
        if self._override is None or embeds is None:
            raise ModelError(
                "with inputs_embeds alone, the modality of the tokens must be given",
                value=f"arguments {sorted(name for name, value in inputs.items() if value is not None)}",
                remedy="pass input_ids, or wrap the call in ModalityContext.override(ids)",
            )
        if self._override.shape != embeds.shape[:2]:
            raise ModelError(
                "the modality ids must belong to the tokens at hand",
                value=f"override {tuple(self._override.shape)} for inputs_embeds {tuple(embeds.shape[:2])}",
                remedy="override with ids of this very call",
            )
        self.set(self._override.to(embeds.device))


class Unlabelled(ModalityContext):
    """The context of linears in towers, whose rows are no tokens: whoever asks for a modality gets that of text.

    Only for linears without factors, centres and corrections, which do the same to every row.
    """

    def current(self, batch: int, tokens: int) -> torch.Tensor:
        """int8 [batch, tokens], text."""
        return torch.zeros(batch, tokens, dtype=torch.int8)


@dataclass(frozen=True)
class HookHandle:
    """Removes every hook that ``install`` placed."""

    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        for handle in self.handles:
            handle.remove()


def install(adapter: KnowsModality) -> tuple[ModalityContext, HookHandle]:
    """Have every forward pass of ``adapter.model`` set the modality of its tokens, and clear it when it ends.

    Args:
        adapter: the model; its top module is hooked, its linears are left alone.

    Returns:
        The context for the quantized linears, and the handle that removes the hooks.
    """
    context = ModalityContext()
    names = list(inspect.signature(adapter.model.forward).parameters)

    def before(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context.set_from_call(adapter, {**dict(zip(names, args, strict=False)), **kwargs})

    def after(_model: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        context.clear()

    handles = (
        adapter.model.register_forward_pre_hook(before, with_kwargs=True),
        adapter.model.register_forward_hook(after, always_call=True),
    )
    return context, HookHandle(handles)
