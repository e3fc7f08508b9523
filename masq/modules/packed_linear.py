"""The quantized linear layer as it is deployed: stored bits in memory, products by a kernel.

Shapes: B batch, T tokens, N = B*T rows, I input channels, O output channels, R rank, U distinct smoothing vectors,
n rows of one modality.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from masq.errors import ModelError
from masq.kernels import AUTO
from masq.models.base import GROUPS, Modality
from masq.modules.centres import STORED, Centres
from masq.modules.quant_linear import (
    TOKEN_MODALITIES,
    QuantLinear,
    bias_in,
    factors_in,
    register_bias,
    register_factors,
)
from masq.modules.stack import SHARED, Stack, stack
from masq.numerics.affine import QuantizedTensor
from masq.numerics.low_rank import Factors, Given, factors_of
from masq.numerics.packing import NIBBLE_BITS, PackedWeight, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from masq.models.base import BlockAdapter, ModelAdapter
    from masq.modules.modality import ModalityContext
    from masq.numerics.scheme import LinearFormat, TensorFormat

_FACTORS = ("left", "right", "factor_scale")
_KEPT = ("scale", "inverse_smoothing", "centre")
"""Buffers that keep their dtype whatever the model is cast to."""


class PackedLinear(nn.Module):
    """``QuantLinear`` on packed weights: the same numbers from fewer bytes (arXiv 2603.04800, one stored weight).

    Its state is the plain stored layout (``masq.numerics.packing``). At the first forward pass a kernel takes the
    weight over in a layout of its own, together with those of the linears that read the same input (``stack``);
    ``state_dict`` and moves to another device give the plain layout back.

    Args:
        weight: the one stored weight.
        activation: per-token format of the input, None leaves it unquantized.
        context: tells the modality of every row.
        bias: [O] or None, or centres with biases by modality.
        inverse_smoothing: 1 / s, float32 [U, I], that of text first; None for no run-time smoothing.
        smoothing_rows: int64 [number of modalities], the row of ``inverse_smoothing`` that each uses.
        corrections: (L1 [I, R], L2 [R, O]) by modality, or their codes and scales (``Factors``).
        kernel: name of the kernel, ``auto`` for the best that can run it.
    """

    codes: torch.Tensor | None
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    bias: torch.Tensor | None
    inverse_smoothing: torch.Tensor | None
    smoothing_rows: torch.Tensor | None
    centre: torch.Tensor | None
    centre_rows: torch.Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        *,
        activation: TensorFormat | None,
        context: ModalityContext,
        bias: torch.Tensor | Centres | None = None,
        inverse_smoothing: torch.Tensor | None = None,
        smoothing_rows: torch.Tensor | None = None,
        corrections: Mapping[Modality, Given] | None = None,
        kernel: str = AUTO,
    ) -> None:
        super().__init__()
        self.weight_format, self.activation = weight.format, activation
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.context, self.kernel = context, kernel
        register_bias(self, bias)
        self.register_buffer("inverse_smoothing", inverse_smoothing)
        self.register_buffer("smoothing_rows", smoothing_rows)
        factors = {modality: factors_of(given) for modality, given in (corrections or {}).items()}
        self.correction_modalities = tuple(sorted(factors))
        self.coded_modalities = tuple(m for m in self.correction_modalities if factors[m].scale is not None)
        self.set_plain(weight, factors)
        self.stack = Stack([self])

    @classmethod
    def from_simulated(cls, layer: QuantLinear, kernel: str = AUTO) -> PackedLinear:
        """The packed form of a simulated layer; tensors that need no packing are shared with it.

        Raises:
            ModelError: it has a weight per modality, a rotation behind smoothing or a correction of text, which cannot
                be deployed.
        """
        if len(layer.weight_modalities) > 1:
            raise ModelError(
                "a packed linear has one weight for all modalities",
                value=f"{len(layer.weight_modalities)} weights",
                remedy="use a method with rounding.per_modality=false, or execution=simulated",
            )
        if layer.rotation is not None:
            raise ModelError(
                "a packed linear has no rotation behind smoothing",
                value="rotation hadamard_smoothed",
                remedy="use execution=simulated, or rotation=hadamard, which lies before smoothing",
            )
        if Modality.TEXT in layer.correction_modalities:
            raise ModelError(
                "a packed linear corrects no text",
                value="a correction of text",
                remedy="use execution=simulated, or method.compensation.base=text",
            )
        state = layer.state_dict()
        name = Modality.TEXT.name.lower()
        zero_point = state.get(f"zero_point_{name}")
        weight = QuantizedTensor(state[f"codes_{name}"], state[f"scale_{name}"], zero_point, layer.weight_format)
        return cls(
            pack(weight),
            activation=layer.activation,
            context=layer.context,
            bias=bias_in(state),
            inverse_smoothing=state.get("inverse_smoothing"),
            smoothing_rows=state.get("smoothing_rows"),
            corrections=factors_in(state),
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
        num_rows: tuple[int, int],
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
            num_rows: U, 0 for no run-time smoothing, and K, the number of centres, 0 for none.
            ranks: R and dtype of the corrections by modality; int8 is codes with scales.
            kernel: name of the kernel.
        """
        weight = fmt.weight
        halves, symmetric = weight.bits <= NIBBLE_BITS, weight.symmetric
        columns = (in_features + 1) // 2 if halves else in_features
        groups = (out_features, in_features // (weight.group_size or in_features))
        codes = torch.empty(out_features, columns, dtype=torch.int8 if symmetric and not halves else torch.uint8)
        zero_point = None if symmetric else torch.empty(groups, dtype=torch.uint8)
        packed = PackedWeight(codes, torch.empty(groups, dtype=torch.float32), zero_point, weight, in_features)
        num_smoothing, num_centres = num_rows
        given = None if bias is None else torch.empty(*([num_centres] if num_centres else []), out_features, dtype=bias)
        if given is not None and num_centres:
            rows = torch.empty(len(TOKEN_MODALITIES), dtype=torch.int64)
            given = Centres(torch.empty(num_centres, in_features, dtype=STORED), rows, given)
        return cls(
            packed,
            activation=fmt.activation,
            context=context,
            bias=given,
            inverse_smoothing=torch.empty(num_smoothing, in_features, dtype=torch.float32) if num_smoothing else None,
            smoothing_rows=torch.empty(len(TOKEN_MODALITIES), dtype=torch.int64) if num_smoothing else None,
            corrections={
                modality: Factors(
                    torch.empty(in_features, rank, dtype=dtype),
                    torch.empty(rank, out_features, dtype=dtype),
                    torch.empty(rank, dtype=torch.float32) if dtype == torch.int8 else None,
                )
                for modality, (rank, dtype) in ranks.items()
            },
            kernel=kernel,
        )

    def set_plain(self, weight: PackedWeight, corrections: Mapping[Modality, Factors]) -> None:
        """Hold the stored weight and the factors as buffers of this layer."""
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        register_factors(self, corrections)

    def plain(self) -> PackedWeight:
        """The stored weight, while no kernel holds it."""
        assert self.codes is not None
        assert self.scale is not None
        return PackedWeight(self.codes, self.scale, self.zero_point, self.weight_format, self.in_features)

    def factors(self, modality: Modality) -> Factors:
        """L1 and L2 of one modality, while no kernel holds them."""
        name = modality.name.lower()
        return Factors(*(getattr(self, f"{part}_{name}") for part in _FACTORS))

    def release_plain(self) -> None:
        """Forget weight and factors, which a stack has taken over."""
        names = [f"{part}_{m.name.lower()}" for part in _FACTORS for m in self.correction_modalities]
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
        if self.stack.members[0] is not self:
            for name in SHARED:
                if getattr(self, name) is not None:
                    destination[prefix + name] = destination[prefix + name].clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.stack.release()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        # Another device may need another kernel: back to the plain layout, and chosen anew at the next forward.
        self.stack.release()
        scales = [f"factor_scale_{m.name.lower()}" for m in self.coded_modalities]
        kept = {name: getattr(self, name) for name in (*_KEPT, *scales)}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        bits = self.activation.bits if self.activation is not None else 16
        return f"{self.in_features}, {self.out_features}, w{self.weight_format.bits}a{bits}, kernel={self.kernel}"


def tower_linears(adapter: ModelAdapter) -> list[nn.Module]:
    """The quantized linears of the vision and audio towers."""
    towers = adapter.towers().values()
    return [one for tower in towers for one in tower.modules() if isinstance(one, QuantLinear | PackedLinear)]


def pack_model(adapter: ModelAdapter, kernel: str = AUTO) -> dict[str, int]:
    """Pack the quantized linears of blocks and towers for good; see ``pack_blocks``."""
    running = Counter(pack_blocks(adapter.visited_blocks("stay"), kernel))
    for name, tower in adapter.towers().items():
        with adapter.residence.present(tower, after="stay"):
            for path, simulated in list(tower.named_modules()):
                if isinstance(simulated, QuantLinear):
                    layer = PackedLinear.from_simulated(simulated, kernel)
                    adapter.model.set_submodule(f"{name}.{path}", layer)
                    running[layer.kernel_in_use] += 1
    return dict(running)


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
