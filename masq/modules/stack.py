"""Packed linears that read the same input, run as one.

Shapes: B batch, T tokens, N = B*T rows, I input channels, O output channels of a member, R rank, n rows of a modality.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.kernels import select
from masq.kernels.base import (
    Bias,
    Kernel,
    LinearSpec,
    LowRank,
    PreparedFactors,
    PreparedWeight,
    RowAddend,
    RowBias,
    RowSmoothing,
)
from masq.modules.quant_linear import leading
from masq.numerics.low_rank import Factors, project
from masq.numerics.packing import PackedWeight, concatenate, split
from masq.numerics.scheme import LinearFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.models.base import Modality
    from masq.modules.modality import ModalityContext
    from masq.modules.packed_linear import PackedLinear
    from masq.numerics.scheme import TensorFormat


SHARED = ("inverse_smoothing", "smoothing_rows", "centre", "centre_rows")
"""Buffers that members of a stack have alike, and hold once."""


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a stack holds while a kernel has its weights.

    Attributes:
        kernel: that runs it.
        weight: of all members, one below the other.
        bias: float32 [sum of O], or [K, sum of O] where inputs are centred, or None.
        left: L1 of all members side by side, [I, sum of R], by modality.
        right: L2 of each member, None where it has none, by modality; or all of them in the layout of the kernel.
        scale: of the components of all members, float32 [sum of R], by modality; none where factors are as they are.
    """

    kernel: Kernel
    weight: PreparedWeight
    bias: torch.Tensor | None
    left: dict[Modality, torch.Tensor]
    right: dict[Modality, list[torch.Tensor | None] | PreparedFactors]
    scale: dict[Modality, torch.Tensor]

    def plain_right(self, modality: Modality) -> list[torch.Tensor | None]:
        """L2 of each member as it is stored."""
        held = self.right[modality]
        return self.kernel.restore_factors(held) if isinstance(held, PreparedFactors) else held

    def fuse(self, sizes: Sequence[int], activation: TensorFormat | None, fused: bool) -> None:
        """Hand L2 over to the kernel, as far as it multiplies it itself, or take it back."""
        for modality, held in self.right.items():
            if fused and not isinstance(held, PreparedFactors):
                self.right[modality] = self.kernel.prepare_factors(held, sizes, activation) or held
            elif not fused and isinstance(held, PreparedFactors):
                self.right[modality] = self.kernel.restore_factors(held)


class Stack:
    """Linears that read the same input, run as one: the input is smoothed and quantized once, and multiplied once.

    Args:
        members: layers of one input size, formats, smoothing and kernel (see ``can_stack``).
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self.members = list(members)
        self.sizes = [member.out_features for member in members]
        self._prepared: _Prepared | None = None
        self._source: weakref.ref[torch.Tensor] | None = None
        self._version: int | None = None
        self._outputs: dict[PackedLinear, torch.Tensor] = {}

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
        held = self._prepared or self.prepare()
        first = self.members[0]
        context = first.context
        context.current(*leading(x))
        rows_ni = x.reshape(-1, first.in_features).contiguous()
        smoothing = self._smoothing(context)
        activation = held.kernel.quantize(rows_ni, first.activation, smoothing)
        low_rank, addend = self._corrections(held, rows_ni, smoothing, context)
        bias = self._bias_of(held, context)
        y_no = held.kernel.gemm(activation, held.weight, bias=bias, addend=addend, dtype=x.dtype, low_rank=low_rank)
        return y_no.view(*x.shape[:-1], -1)

    def _smoothing(self, context: ModalityContext) -> RowSmoothing | None:
        """Centres and factors of every row; one for all where there is but one or every token is text."""
        first = self.members[0]
        if first.inverse_smoothing is None and first.centre is None:
            return None
        inverse, rows = _by_row(first.inverse_smoothing, first.smoothing_rows, context)
        return RowSmoothing(inverse, rows, *_by_row(first.centre, first.centre_rows, context))

    def _bias_of(self, held: _Prepared, context: ModalityContext) -> Bias:
        """One for all rows where nothing is centred or every token is text, else by row."""
        if held.bias is None or held.bias.dim() == 1:
            return held.bias
        values, rows = _by_row(held.bias, self.members[0].centre_rows, context)
        assert values is not None
        return values[0] if rows is None else RowBias(values, rows)

    def _corrections(
        self, held: _Prepared, rows_ni: torch.Tensor, smoothing: RowSmoothing | None, context: ModalityContext
    ) -> tuple[list[LowRank], RowAddend | None]:
        """Low-rank corrections of the rows of their modality; none for text, and so none in decoding.

        Rows in bfloat16 leave the product with L2 to the kernel, if it offers that; others get it as an addend.
        """
        if not held.left or context.text_only:
            return [], None
        rows = {modality: own for modality in held.left if (own := context.rows_of(modality)).numel()}
        if not rows:
            return [], None
        held.fuse(self.sizes, self.members[0].activation, fused=rows_ni.dtype == torch.bfloat16)
        u = {
            m: project(held.kernel.smooth(rows_ni, own, smoothing), held.left[m], held.scale.get(m))
            for m, own in rows.items()
        }
        fused = {m: factors for m in rows if isinstance(factors := held.right[m], PreparedFactors)}
        low_rank = [LowRank(rows[m], u[m].contiguous(), factors) for m, factors in fused.items()]
        others = {m: own for m, own in rows.items() if m not in fused}
        return low_rank, self._addend(held, others, u) if others else None

    def _addend(
        self, held: _Prepared, rows: dict[Modality, torch.Tensor], u: dict[Modality, torch.Tensor]
    ) -> RowAddend:
        count, start = sum(len(own) for own in rows.values()), 0
        like = next(iter(u.values()))
        values = tuple(like.new_empty(count, size) for size in self.sizes)
        for modality, own in rows.items():
            parts = [part[start : start + len(own)] for part in values]
            self._up(u[modality], held.plain_right(modality), parts)
            start += len(own)
        return RowAddend(torch.cat(list(rows.values())) if len(rows) > 1 else next(iter(rows.values())), values)

    def _up(self, u_nr: torch.Tensor, rights: list[torch.Tensor | None], parts: list[torch.Tensor]) -> None:
        """Write L2 of every member on its columns of U into its part [n, O]."""
        column = 0
        for part, right in zip(parts, rights, strict=True):
            if right is None:
                part.zero_()
            else:
                torch.mm(u_nr[:, column : column + len(right)], right.to(u_nr.dtype), out=part)
                column += len(right)

    def prepare(self) -> _Prepared:
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
            self._prepared = _Prepared(kernel, kernel.prepare(whole, first.activation), self._bias(), *taken)
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
        self._outputs, self._source = {}, None

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
                own, scale = slice(before, before + len(right)), held.scale.get(modality)
                factors[modality] = Factors(
                    held.left[modality][:, own].clone(), right, None if scale is None else scale[own].clone()
                )
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
