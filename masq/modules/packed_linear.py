"""The quantized linear layer as it is deployed: stored bits in memory, products by a kernel.

Shapes: B batch, T tokens, N = B*T rows, I input channels, O output channels, R rank, U distinct smoothing vectors,
n rows of one modality.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from masq.errors import ModelError
from masq.kernels import AUTO, select
from masq.kernels.base import Kernel, LinearSpec, PreparedWeight, RowAddend, RowSmoothing
from masq.models.base import GROUPS, Modality
from masq.modules.quant_linear import TOKEN_MODALITIES, QuantLinear
from masq.numerics.affine import QuantizedTensor
from masq.numerics.packing import NIBBLE_BITS, PackedWeight, concatenate, pack, split
from masq.numerics.scheme import LinearFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from masq.models.base import BlockAdapter
    from masq.modules.modality import ModalityContext
    from masq.numerics.scheme import TensorFormat

_FLOAT32 = ("scale", "inverse_smoothing")
"""Buffers that keep float32 whatever dtype the model is cast to."""


class PackedLinear(nn.Module):
    """``QuantLinear`` on packed weights: the same numbers from fewer bytes (arXiv 2603.04800, one stored weight).

    Its state is the plain stored layout (``masq.numerics.packing``). At the first forward pass a kernel takes the
    weight over in a layout of its own, together with those of the linears that read the same input (``stack``);
    ``state_dict`` and moves to another device give the plain layout back.

    Args:
        weight: the one stored weight.
        activation: per-token format of the input, None leaves it unquantized.
        context: tells the modality of every row.
        bias: [O] or None.
        inverse_smoothing: 1 / s, float32 [U, I], that of text first; None for no run-time smoothing.
        smoothing_rows: int64 [number of modalities], the row of ``inverse_smoothing`` that each uses.
        corrections: (L1 [I, R], L2 [R, O]) by modality.
        kernel: name of the kernel, ``auto`` for the best that can run it.
    """

    codes: torch.Tensor | None
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    bias: torch.Tensor | None
    inverse_smoothing: torch.Tensor | None
    smoothing_rows: torch.Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        *,
        activation: TensorFormat | None,
        context: ModalityContext,
        bias: torch.Tensor | None = None,
        inverse_smoothing: torch.Tensor | None = None,
        smoothing_rows: torch.Tensor | None = None,
        corrections: Mapping[Modality, tuple[torch.Tensor, torch.Tensor]] | None = None,
        kernel: str = AUTO,
    ) -> None:
        super().__init__()
        self.weight_format, self.activation = weight.format, activation
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.context, self.kernel = context, kernel
        self.register_buffer("bias", bias)
        self.register_buffer("inverse_smoothing", inverse_smoothing)
        self.register_buffer("smoothing_rows", smoothing_rows)
        self.correction_modalities = tuple(sorted(corrections or ()))
        self.set_plain(weight, corrections or {})
        self.stack = Stack([self])

    @classmethod
    def from_simulated(cls, layer: QuantLinear, kernel: str = AUTO) -> PackedLinear:
        """The packed form of a simulated layer; tensors that need no packing are shared with it.

        Raises:
            ModelError: it has a weight per modality, which cannot be deployed.
        """
        if len(layer.weight_modalities) > 1:
            raise ModelError(
                "a packed linear has one weight for all modalities",
                value=f"{len(layer.weight_modalities)} weights",
                remedy="use a method with rounding.per_modality=false, or execution=simulated",
            )
        state = layer.state_dict()
        name = Modality.TEXT.name.lower()
        zero_point = state.get(f"zero_point_{name}")
        weight = QuantizedTensor(state[f"codes_{name}"], state[f"scale_{name}"], zero_point, layer.weight_format)
        sides = ((m, m.name.lower()) for m in layer.correction_modalities)
        return cls(
            pack(weight),
            activation=layer.activation,
            context=layer.context,
            bias=state.get("bias"),
            inverse_smoothing=state.get("inverse_smoothing"),
            smoothing_rows=state.get("smoothing_rows"),
            corrections={m: (state[f"left_{side}"], state[f"right_{side}"]) for m, side in sides},
            kernel=kernel,
        )

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        fmt: LinearFormat,
        *,
        context: ModalityContext,
        bias: torch.dtype | None,
        num_smoothing: int,
        ranks: Mapping[Modality, tuple[int, torch.dtype]],
        kernel: str = AUTO,
    ) -> PackedLinear:
        """A layer without values on the device of ``torch.device(...)`` contexts, for a loader to fill.

        Args:
            in_features: I.
            out_features: O.
            fmt: of weight and input.
            context: tells the modality of every row.
            bias: its dtype, None for none.
            num_smoothing: U, 0 for no run-time smoothing.
            ranks: R and dtype of the corrections by modality.
            kernel: name of the kernel.
        """
        weight = fmt.weight
        halves, symmetric = weight.bits <= NIBBLE_BITS, weight.symmetric
        columns = (in_features + 1) // 2 if halves else in_features
        groups = (out_features, in_features // (weight.group_size or in_features))
        codes = torch.empty(out_features, columns, dtype=torch.int8 if symmetric and not halves else torch.uint8)
        zero_point = None if symmetric else torch.empty(groups, dtype=torch.uint8)
        packed = PackedWeight(codes, torch.empty(groups), zero_point, weight, in_features)
        return cls(
            packed,
            activation=fmt.activation,
            context=context,
            bias=None if bias is None else torch.empty(out_features, dtype=bias),
            inverse_smoothing=torch.empty(num_smoothing, in_features) if num_smoothing else None,
            smoothing_rows=torch.empty(len(TOKEN_MODALITIES), dtype=torch.int64) if num_smoothing else None,
            corrections={
                modality: (
                    torch.empty(in_features, rank, dtype=dtype),
                    torch.empty(rank, out_features, dtype=dtype),
                )
                for modality, (rank, dtype) in ranks.items()
            },
            kernel=kernel,
        )

    def set_plain(
        self, weight: PackedWeight, corrections: Mapping[Modality, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Hold the stored weight and the factors as buffers of this layer."""
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        for modality, (left, right) in corrections.items():
            self.register_buffer(f"left_{modality.name.lower()}", left.contiguous())
            self.register_buffer(f"right_{modality.name.lower()}", right.contiguous())

    def plain(self) -> PackedWeight:
        """The stored weight, while no kernel holds it."""
        assert self.codes is not None
        assert self.scale is not None
        return PackedWeight(self.codes, self.scale, self.zero_point, self.weight_format, self.in_features)

    def factors(self, modality: Modality) -> tuple[torch.Tensor, torch.Tensor]:
        """(L1, L2) of one modality, while no kernel holds them."""
        name = modality.name.lower()
        return getattr(self, f"left_{name}"), getattr(self, f"right_{name}")

    def release_plain(self) -> None:
        """Forget weight and factors, which a stack has taken over."""
        names = [f"{side}_{m.name.lower()}" for side in ("left", "right") for m in self.correction_modalities]
        for name in ("codes", "scale", "zero_point", *names):
            self.register_buffer(name, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, T, I] to [B, T, O] in the dtype of ``x``.

        Raises:
            ModelError: the modality of the tokens is unknown (see ``ModalityContext.current``).
            ConfigError: the kernel asked for cannot run this layer.
        """
        return self.stack.output(self, x)

    @property
    def kernel_in_use(self) -> str:
        """Name of the kernel that runs this layer, which takes the weight over now if it has not yet."""
        return self.stack.prepare().kernel.name

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.stack.plain_tensors(self).items():
            destination[prefix + name] = tensor
        # Members of a stack hold equal vectors once; a file holds them for each.
        if self.stack.members[0] is not self and self.inverse_smoothing is not None:
            destination[prefix + "inverse_smoothing"] = self.inverse_smoothing.clone()
            destination[prefix + "smoothing_rows"] = destination[prefix + "smoothing_rows"].clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.stack.release()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        # Another device may need another kernel: back to the plain layout, and chosen anew at the next forward.
        self.stack.release()
        kept = {name: getattr(self, name) for name in _FLOAT32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after is not None and after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        bits = self.activation.bits if self.activation is not None else 16
        return f"{self.in_features}, {self.out_features}, w{self.weight_format.bits}a{bits}, kernel={self.kernel}"


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a stack holds while a kernel has its weights.

    Attributes:
        kernel: that runs it.
        weight: of all members, one below the other.
        bias: float32 [sum of O], or None.
        left: L1 of all members side by side, [I, sum of R], by modality.
        right: L2 of each member, None where it has none, by modality.
    """

    kernel: Kernel
    weight: PreparedWeight
    bias: torch.Tensor | None
    left: dict[Modality, torch.Tensor]
    right: dict[Modality, list[torch.Tensor | None]]


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
        batch, tokens = x.shape[0], x.shape[1]
        first = self.members[0]
        context = first.context
        context.current(batch, tokens)
        rows_ni = x.reshape(-1, first.in_features).contiguous()
        smoothing = self._smoothing(context)
        activation = held.kernel.quantize(rows_ni, first.activation, smoothing)
        addend = self._addend(held, rows_ni, smoothing, context)
        y_no = held.kernel.gemm(activation, held.weight, bias=held.bias, addend=addend, dtype=x.dtype)
        return y_no.view(batch, tokens, -1)

    def _smoothing(self, context: ModalityContext) -> RowSmoothing | None:
        """The factors of every row; one for all where there is but one or every token is text."""
        first = self.members[0]
        if first.inverse_smoothing is None:
            return None
        if len(first.inverse_smoothing) == 1 or context.text_only:
            return RowSmoothing(first.inverse_smoothing[:1], None)
        assert first.smoothing_rows is not None
        return RowSmoothing(first.inverse_smoothing, first.smoothing_rows[context.indices])

    def _addend(
        self, held: _Prepared, rows_ni: torch.Tensor, smoothing: RowSmoothing | None, context: ModalityContext
    ) -> RowAddend | None:
        """Low-rank corrections of the rows of their modality; none for text, and so none in decoding."""
        if not held.left or context.text_only:
            return None
        rows, values = [], []
        for modality, left in held.left.items():
            own = context.rows_of(modality)
            if own.numel():
                u_nr = _smoothed(rows_ni, own, smoothing) @ left.to(rows_ni.dtype)
                rows.append(own)
                values.append(self._up(u_nr, held.right[modality]))
        if not rows:
            return None
        return RowAddend(rows[0], values[0]) if len(rows) == 1 else RowAddend(torch.cat(rows), torch.cat(values))

    def _up(self, u_nr: torch.Tensor, rights: list[torch.Tensor | None]) -> torch.Tensor:
        """L2 of every member on its columns of U: [n, sum of O]."""
        if len(rights) == 1 and rights[0] is not None:
            return u_nr @ rights[0].to(u_nr.dtype)
        values = u_nr.new_empty(len(u_nr), sum(self.sizes))
        column = 0
        for part, right in zip(values.split(self.sizes, dim=1), rights, strict=True):
            if right is None:
                part.zero_()
            else:
                torch.matmul(u_nr[:, column : column + len(right)], right.to(u_nr.dtype), out=part)
                column += len(right)
        return values

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
            left, right = self._take_factors()
            self._prepared = _Prepared(kernel, kernel.prepare(whole), self._bias(), left, right)
            for member in self.members:
                member.release_plain()
                member.inverse_smoothing, member.smoothing_rows = first.inverse_smoothing, first.smoothing_rows
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
        for modality, (left, right) in factors.items():
            tensors |= {f"left_{modality.name.lower()}": left, f"right_{modality.name.lower()}": right}
        return tensors

    @property
    def num_bytes(self) -> int:
        """Bytes in memory of everything that the members need."""
        held = self.prepare()
        first = self.members[0]
        kept = [held.bias, first.inverse_smoothing, first.smoothing_rows, *held.left.values()]
        kept += [right for rights in held.right.values() for right in rights]
        return held.weight.num_bytes + sum(one.numel() * one.element_size() for one in kept if one is not None)

    def _plain_of(self, index: int) -> tuple[PackedWeight, dict[Modality, tuple[torch.Tensor, torch.Tensor]]]:
        assert self._prepared is not None
        held = self._prepared
        weight = split(held.kernel.restore(held.weight), self.sizes)[index]
        factors = {}
        for modality, rights in held.right.items():
            right = rights[index]
            if right is not None:
                before = sum(len(other) for other in rights[:index] if other is not None)
                factors[modality] = held.left[modality][:, before : before + len(right)].clone(), right
        return weight, factors

    def _take_factors(self) -> tuple[dict[Modality, torch.Tensor], dict[Modality, list[torch.Tensor | None]]]:
        left: dict[Modality, torch.Tensor] = {}
        right: dict[Modality, list[torch.Tensor | None]] = {}
        for modality in sorted({m for member in self.members for m in member.correction_modalities}):
            has = [modality in member.correction_modalities for member in self.members]
            factors = [member.factors(modality) if own else None for member, own in zip(self.members, has, strict=True)]
            left[modality] = torch.cat([pair[0] for pair in factors if pair is not None], dim=1)
            right[modality] = [None if pair is None else pair[1] for pair in factors]
        return left, right

    def _bias(self) -> torch.Tensor | None:
        biases = [member.bias for member in self.members]
        like = next((bias for bias in biases if bias is not None), None)
        if like is None:
            return None
        sized = zip(biases, self.sizes, strict=True)
        return torch.cat([like.new_zeros(size).float() if bias is None else bias.float() for bias, size in sized])


def stack(layers: Sequence[PackedLinear]) -> None:
    """Have layers that read the same input run as one, as far as they can: equal formats, smoothing and kernel."""
    kinds: list[list[PackedLinear]] = []
    for layer in layers:
        layer.stack.release()
        kin = next((kind for kind in kinds if can_stack(kind[0], layer)), None)
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
    pairs = [(one.inverse_smoothing, other.inverse_smoothing), (one.smoothing_rows, other.smoothing_rows)]
    return same[0] == same[1] and all(_equal(a, b) for a, b in pairs)


def pack_blocks(blocks: Iterable[BlockAdapter], kernel: str = AUTO) -> dict[str, int]:
    """Replace every simulated linear of ``blocks`` by its packed form, and let kernels take the weights over.

    Args:
        blocks: of a quantized model.
        kernel: name of the kernel, ``auto`` for the best that can run each.

    Returns:
        How many linears each kernel runs, by its name.

    Raises:
        ModelError: a linear has one weight per modality.
        ConfigError: the kernel cannot run a linear.
    """
    running: Counter[str] = Counter()
    for block in blocks:
        for roles in GROUPS.values():
            layers = []
            for role in roles:
                simulated = block.linear(role)
                if isinstance(simulated, QuantLinear):
                    layers.append(PackedLinear.from_simulated(simulated, kernel))
                    block.set_linear(role, layers[-1])
            stack(layers)
            running.update(layer.kernel_in_use for layer in layers)
    return dict(running)


def _smoothed(rows_ni: torch.Tensor, own: torch.Tensor, smoothing: RowSmoothing | None) -> torch.Tensor:
    """Smoothed, unquantized rows of one modality, [n, I] in the dtype of the model."""
    rows = rows_ni[own]
    if smoothing is None:
        return rows
    which = 0 if smoothing.rows is None else smoothing.rows[own]
    return (rows.float() * smoothing.inverse[which]).to(rows.dtype)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # Layers that a loader is still to fill cannot be compared: it stacks those that a checkpoint says share an input.
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))
