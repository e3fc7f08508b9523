"""Packed linears that read the same input, run as one.

Shapes: B batch, T tokens, N = B*T rows, I input channels, O output channels of a member, R rank, n rows of a modality.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from masq.errors import ModelError
from masq.kernels import select
from masq.kernels.base import (
    Bias,
    LinearSpec,
    LowRank,
    PreparedFactors,
    RowAddend,
    RowBias,
    RowSmoothing,
)
from masq.modules.prepared import Prepared
from masq.modules.quant_linear import leading
from masq.numerics.low_rank import Factors, project
from masq.numerics.packing import PackedWeight, concatenate, split
from masq.numerics.scheme import LinearFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.kernels.base import Norm, QuantizedActivation, Selection
    from masq.models.base import Modality
    from masq.modules.modality import ModalityContext
    from masq.modules.packed_linear import PackedLinear


SHARED = ("inverse_smoothing", "smoothing_rows", "centre", "centre_rows")
"""Buffers that members of a stack have alike, and hold once."""


class Stack:
    """Linears that read the same input, run as one: the input is smoothed and quantized once, and multiplied once.

    Args:
        members: layers of one input size, formats, smoothing and kernel (see ``can_stack``).
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self.members = list(members)
        self.sizes = [member.out_features for member in members]
        self._prepared: Prepared | None = None
        self._source: weakref.ref[torch.Tensor] | None = None
        self._version: int | None = None
        self._outputs: dict[PackedLinear, torch.Tensor] = {}
        # Rows that a norm has quantized already, and the tensor that stands for them until they are read.
        self._made: tuple[weakref.ref[torch.Tensor], QuantizedActivation | None] | None = None

    @property
    def fuses(self) -> bool:
        """Whether rows can be quantized as they come out of the layer before."""
        return self.members[0].activation is not None and (self._prepared or self.prepare()).kernel.fuses

    def normalized(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """RMSNorm of ``x`` [B, T, I] in the pass that quantizes it, where ``fuses``.

        Returns:
            What the members are to be called with, once, in place of the normalized rows; nothing in it is defined.
        """
        held, first = self._prepared or self.prepare(), self.members[0]
        assert first.activation is not None
        first.context.current(*leading(x))
        rows_ni = x.reshape(-1, first.in_features).contiguous()
        stand_in = torch.empty_like(x)
        made = held.kernel.quantize_norm(rows_ni, norm, first.activation, *self._of_rows(held, first.context))
        self._made = weakref.ref(stand_in), made
        return stand_in

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Output [B, T, O] of the one member for SiLU(gate) * up, both [B, T, I], in the pass that quantizes them.

        Where ``fuses``.
        """
        held, [member] = self._prepared or self.prepare(), self.members
        member.context.current(*leading(gate))
        assert member.activation is not None
        rows = gate.flatten(0, -2), up.flatten(0, -2)
        made = held.kernel.quantize_gate(*rows, member.activation, *self._of_rows(held, member.context))
        return self._multiply(held, made, gate.dtype).view(*gate.shape[:-1], -1)

    def together(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs of all members for ``x`` [B, T, I]: views of one matrix [B * T, sum of O]."""
        return self._run(x).split(self.sizes, dim=-1)

    def output(self, member: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """Output [B, T, O] of ``member`` for ``x`` [B, T, I]; that of the others is kept until they ask for it."""
        if len(self.members) == 1:
            return self._run(x)
        version = None if x.is_inference() else x._version
        known = self._source is not None and self._source() is x and self._version == version
        if not known or member not in self._outputs:
            parts = self._run(x).split(self.sizes, dim=-1)
            self._outputs = dict(zip(self.members, parts, strict=True))
            self._source, self._version = weakref.ref(x), version
        return self._outputs.pop(member)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        held, first, made = self._prepared or self.prepare(), self.members[0], self._made
        first.context.current(*leading(x))
        if made is not None and made[0]() is x:
            activation, self._made = made[1], (made[0], None)
            if activation is None:
                raise ModelError(
                    "rows that a norm has quantized are read once, by the linears behind it",
                    value=f"a second call with one tensor {list(x.shape)}",
                    remedy="use execution=packed for a model whose linears are called again or otherwise",
                )
        else:
            rows_ni = x.reshape(-1, first.in_features).contiguous()
            activation = held.kernel.quantize(rows_ni, first.activation, *self._of_rows(held, first.context))
        return self._multiply(held, activation, x.dtype).view(*x.shape[:-1], -1)

    def _of_rows(self, held: Prepared, context: ModalityContext) -> tuple[RowSmoothing | None, Selection | None]:
        """What is done to every row before it is quantized, and the rows that corrections read."""
        corrected = self._corrected(held, context)
        return self._smoothing(context), context.selection(corrected) if corrected else None

    def _multiply(self, held: Prepared, activation: QuantizedActivation, dtype: torch.dtype) -> torch.Tensor:
        """Quantized rows times the weights, corrected, [N, sum of O]."""
        context = self.members[0].context
        low_rank, addend = self._corrections(held, activation.taken, context)
        bias = self._bias_of(held, context)
        return held.kernel.gemm(activation, held.weight, bias=bias, addend=addend, dtype=dtype, low_rank=low_rank)

    def _smoothing(self, context: ModalityContext) -> RowSmoothing | None:
        """Centres and factors of every row; one for all where there is but one or every token is text."""
        first = self.members[0]
        if first.inverse_smoothing is None and first.centre is None:
            return None
        inverse, rows = _by_row(first.inverse_smoothing, first.smoothing_rows, context)
        return RowSmoothing(inverse, rows, *_by_row(first.centre, first.centre_rows, context))

    def _bias_of(self, held: Prepared, context: ModalityContext) -> Bias:
        """One for all rows where nothing is centred or every token is text, else by row."""
        if held.bias is None or held.bias.dim() == 1:
            return held.bias
        values, rows = _by_row(held.bias, self.members[0].centre_rows, context)
        assert values is not None
        return values[0] if rows is None else RowBias(values, rows)

    @staticmethod
    def _corrected(held: Prepared, context: ModalityContext) -> tuple[Modality, ...]:
        """Modalities of current tokens that have a correction; none for text, and so none in decoding."""
        return () if not held.left or context.text_only else context.present(held.left)

    def _corrections(
        self, held: Prepared, taken: torch.Tensor | None, context: ModalityContext
    ) -> tuple[list[LowRank], RowAddend | None]:
        """Low-rank corrections from smoothed rows [n, I], one modality after the other.

        Rows in bfloat16 leave the product with L2 to the kernel, if it offers that; others get it as an addend.
        """
        if taken is None:
            return [], None
        held.fuse(self.sizes, self.members[0].activation, fused=taken.dtype == torch.bfloat16)
        modalities = self._corrected(held, context)
        parts = taken.split([len(context.rows_of(modality)) for modality in modalities])
        u = {
            modality: project(rows, held.left[modality], held.scale.get(modality))
            for modality, rows in zip(modalities, parts, strict=True)
        }
        fused = {m: factors for m in modalities if isinstance(factors := held.right[m], PreparedFactors)}
        low_rank = [LowRank(context.selection((m,)), u[m].contiguous(), factors) for m, factors in fused.items()]
        others = tuple(m for m in modalities if m not in fused)
        return low_rank, self._addend(held, context.selection(others), {m: u[m] for m in others}) if others else None

    def _addend(self, held: Prepared, selected: Selection, u: dict[Modality, torch.Tensor]) -> RowAddend:
        like, start = next(iter(u.values())), 0
        values = tuple(like.new_empty(len(selected), size) for size in self.sizes)
        for modality, u_nr in u.items():
            parts = [part[start : start + len(u_nr)] for part in values]
            self._up(u_nr, held.plain_right(modality), parts)
            start += len(u_nr)
        return RowAddend(selected, values)

    def _up(self, u_nr: torch.Tensor, rights: list[torch.Tensor | None], parts: list[torch.Tensor]) -> None:
        """Write L2 of every member on its columns of U into its part [n, O]."""
        column = 0
        for part, right in zip(parts, rights, strict=True):
            if right is None:
                part.zero_()
            else:
                torch.mm(u_nr[:, column : column + len(right)], right.to(u_nr.dtype), out=part)
                column += len(right)

    def prepare(self) -> Prepared:
        """Hand the weights to the kernel.

        Raises:
            ConfigError: no kernel can run them, or not the one asked for.
        """
        if self._prepared is None:
            first = self.members[0]
            whole = concatenate([member.plain() for member in self.members])
            fmt = LinearFormat(first.weight_format, first.activation)
            spec = LinearSpec(whole.in_features, whole.out_features, fmt, whole.codes.device.type)
            kernel = select(first.kernel, spec)
            taken = self._take_factors()
            self._prepared = Prepared(kernel, kernel.prepare(whole, first.activation), self._bias(), *taken)
            for member in self.members:
                member.release_plain()
                for name in SHARED:
                    setattr(member, name, getattr(first, name))
        return self._prepared

    def release(self) -> None:
        """Give the plain layout back to the members."""
        if self._prepared is not None:
            plain = [self._plain_of(index) for index in range(len(self.members))]
            self._prepared = None
            for member, (weight, factors) in zip(self.members, plain, strict=True):
                member.set_plain(weight, factors)
        self._outputs, self._source, self._made = {}, None, None

    def plain_tensors(self, member: PackedLinear) -> dict[str, torch.Tensor]:
        """What of the state of ``member`` a kernel holds now, in the plain layout."""
        if self._prepared is None:
            return {}
        weight, factors = self._plain_of(self.members.index(member))
        tensors = {"codes": weight.codes, "scale": weight.scale}
        if weight.zero_point is not None:
            tensors["zero_point"] = weight.zero_point
        for modality, (left, right, scale) in factors.items():
            name = modality.name.lower()
            tensors |= {f"left_{name}": left, f"right_{name}": right}
            if scale is not None:
                tensors[f"factor_scale_{name}"] = scale
        return tensors

    @property
    def num_bytes(self) -> int:
        """Bytes in memory of everything that the members need."""
        held = self.prepare()
        first = self.members[0]
        shared = [getattr(first, name) for name in SHARED]
        kept = [held.bias, *shared, *held.left.values(), *held.scale.values()]
        for rights in held.right.values():
            kept += rights.tensors.values() if isinstance(rights, PreparedFactors) else rights
        return held.weight.num_bytes + sum(one.numel() * one.element_size() for one in kept if one is not None)

    def _plain_of(self, index: int) -> tuple[PackedWeight, dict[Modality, Factors]]:
        assert self._prepared is not None
        held = self._prepared
        weight = split(held.kernel.restore(held.weight), self.sizes)[index]
        factors = {}
        for modality in held.right:
            rights = held.plain_right(modality)
            right = rights[index]
            if right is not None:
                before = sum(len(other) for other in rights[:index] if other is not None)
                own, (left, scale) = slice(before, before + len(right)), held.plain_left(modality)
                factors[modality] = Factors(left[:, own].clone(), right, None if scale is None else scale[own].clone())
        return weight, factors

    def _take_factors(
        self,
    ) -> tuple[
        dict[Modality, torch.Tensor],
        dict[Modality, list[torch.Tensor | None] | PreparedFactors],
        dict[Modality, torch.Tensor],
    ]:
        left: dict[Modality, torch.Tensor] = {}
        scale: dict[Modality, torch.Tensor] = {}
        right: dict[Modality, list[torch.Tensor | None] | PreparedFactors] = {}
        for modality in sorted({m for member in self.members for m in member.correction_modalities}):
            has = [modality in member.correction_modalities for member in self.members]
            factors = [member.factors(modality) if own else None for member, own in zip(self.members, has, strict=True)]
            there = [one for one in factors if one is not None]
            left[modality] = torch.cat([one.left for one in there], dim=1)
            right[modality] = [None if one is None else one.right for one in factors]
            scales = [one.scale for one in there if one.scale is not None]
            if scales:
                scale[modality] = torch.cat(scales)
        return left, right, scale

    def _bias(self) -> torch.Tensor | None:
        biases = [member.bias for member in self.members]
        like = next((bias for bias in biases if bias is not None), None)
        if like is None:
            return None
        sized = zip(biases, self.sizes, strict=True)
        parts = [like.new_zeros(size).float() if bias is None else bias.float() for bias, size in sized]
        return torch.cat(parts, dim=-1)


def _by_row(
    values: torch.Tensor | None, of_modality: torch.Tensor | None, context: ModalityContext
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Vectors and which of them every row takes; the first, that of text, alone where all rows take it."""
    if values is None or len(values) == 1 or context.text_only:
        return None if values is None else values[:1], None
    assert of_modality is not None
    return values, of_modality[context.indices]


def stack(layers: Sequence[PackedLinear]) -> None:
    """Have layers that read the same input run as one, as far as they can: equal formats, smoothing and kernel."""
    kinds: list[list[PackedLinear]] = []
    for layer in layers:
        layer.stack.release()
        kin = next((kind for kind in kinds if all(can_stack(other, layer) for other in kind)), None)
        if kin is None:
            kinds.append([layer])
        else:
            kin.append(layer)
    for kind in kinds:
        joint = Stack(kind)
        for layer in kind:
            layer.stack = joint


def can_stack(one: PackedLinear, other: PackedLinear) -> bool:
    """Whether two layers that read the same input can be run as one."""
    same = [
        (layer.in_features, layer.weight_format, layer.activation, layer.kernel, id(layer.context))
        for layer in (one, other)
    ]
    pairs = [(getattr(one, name), getattr(other, name)) for name in SHARED]
    coded = {m in layer.coded_modalities for layer in (one, other) for m in layer.correction_modalities}
    return same[0] == same[1] and len(coded) <= 1 and all(_equal(a, b) for a, b in pairs)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # Layers that a loader is still to fill cannot be compared: it stacks those that a checkpoint says share an input.
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))
