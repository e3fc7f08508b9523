"""The quantized linear layer, simulated on integer codes.

Shapes: B batch, T tokens, N = B*T rows, I input channels, O output channels, R rank, M number of modalities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from masq.errors import ModelError
from masq.models.base import Modality
from masq.modules.centres import Centres
from masq.numerics.affine import QuantizedTensor, quantize
from masq.numerics.hadamard import rotate
from masq.numerics.integer_gemm import scaled_matmul
from masq.numerics.low_rank import Factors, Given, factors_of, project

if TYPE_CHECKING:
    from collections.abc import Mapping

    from masq.modules.modality import ModalityContext
    from masq.numerics.scheme import TensorFormat

TOKEN_MODALITIES = tuple(modality for modality in Modality if modality is not Modality.PADDING)
_TEXT = Modality.TEXT.name.lower()


class QuantLinear(nn.Module):
    """``y = Q(z) W_hat^T (+ z L1_m L2_m) + bias_m``, z = (x - c_m) / s_m, m the modality of a row (arXiv 2603.04800).

    The GEMM runs on the integer codes and is exact; scales are applied to the int32 result in float32, so the
    simulation equals what an integer kernel computes. Low-rank corrections run in the dtype of the model on
    the smoothed, unquantized rows of their modality only: text rows, and so every decoding step, never touch one.

    Args:
        weights: the stored integer weight, codes [O, I]. One entry (text) serves all modalities; one entry per
            modality is the non-deployable upper bound of modality-aware smoothing.
        bias: [O], None for none; centres bring biases by modality.
        activation: format of the activations, None leaves them unquantized.
        context: tells the modality of every row.
        smoothing: factor s_m [I] by modality, None for no run-time smoothing. Text must be present; a modality that
            calibration never saw uses the factor of text.
        rotation: signs [I] of a Hadamard rotation of the smoothed rows (``masq.numerics.hadamard.rotate``), None for
            none; the stored weight and the corrections read rotated rows.
        corrections: (L1 [I, R], L2 [R, O]) by modality, or their codes and scales (``Factors``), kept in the dtype they
            come in, multiplied in that of the rows.
        dtype: dtype of the bias.
    """

    bias: torch.Tensor | None
    inverse_smoothing: torch.Tensor | None
    smoothing_rows: torch.Tensor | None
    rotation: torch.Tensor | None
    centre: torch.Tensor | None
    centre_rows: torch.Tensor | None

    def __init__(
        self,
        *,
        weights: Mapping[Modality, QuantizedTensor],
        bias: torch.Tensor | Centres | None,
        activation: TensorFormat | None,
        context: ModalityContext,
        smoothing: Mapping[Modality, torch.Tensor] | None = None,
        rotation: torch.Tensor | None = None,
        corrections: Mapping[Modality, Given] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if Modality.TEXT not in weights:
            raise ModelError(
                "a quantized linear needs a weight for text",
                value=sorted(weights),
                remedy="pass weights[Modality.TEXT]",
            )
        self.activation = activation
        self.context = context
        self.weight_format = weights[Modality.TEXT].format
        self.out_features, self.in_features = weights[Modality.TEXT].codes.shape
        for modality, weight in weights.items():
            self._register_weight(modality.name.lower(), weight)
        self.weight_modalities = tuple(sorted(weights))
        register_bias(self, bias, dtype)
        table, rows = (None, None) if smoothing is None else _inverse_table(smoothing)
        self.register_buffer("inverse_smoothing", table)
        self.register_buffer("smoothing_rows", rows)
        self.register_buffer("rotation", None if rotation is None else rotation.float())
        self.correction_modalities = tuple(sorted(corrections or ()))
        register_factors(self, corrections or {})

    @property
    def derived_buffers(self) -> tuple[str, ...]:
        """Buffers that are made from others, and are made again when the layer is rebuilt."""
        return tuple(f"float_{modality.name.lower()}" for modality in self.weight_modalities)

    def _register_weight(self, name: str, weight: QuantizedTensor) -> None:
        self.register_buffer(f"codes_{name}", weight.codes.contiguous())
        self.register_buffer(f"scale_{name}", weight.scale)
        self.register_buffer(f"zero_point_{name}", weight.zero_point)
        integer = self.activation is not None and weight.format.symmetric and weight.scale.shape[-1] == 1
        # Only formats without an integer GEMM pay for a float copy of the weight.
        self.register_buffer(f"float_{name}", None if integer else weight.dequantize(torch.float32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, T, I] to [B, T, O], or rows [N, I] to [N, O], in the dtype of ``x``.

        Raises:
            ModelError: the modality of the tokens is unknown (see ``ModalityContext.current``).
        """
        batch, tokens = leading(x)
        modality = self.context.current(batch, tokens).reshape(-1).to(x.device)
        rows_ni, bias = x.reshape(-1, self.in_features), self.bias
        if self.centre is not None:
            assert self.centre_rows is not None
            # Padding rows (-1) take the centre of text; their output is never read.
            own = self.centre_rows[modality.clamp(min=0).long()]
            rows_ni = rows_ni.float() - self.centre[own].float()
            bias = None if self.bias is None else self.bias[own]
        rows_ni = rows_ni.float()
        if self.inverse_smoothing is not None:
            rows_ni = rows_ni * self._inverse_factors(modality)
        if self.rotation is not None:
            rows_ni = rotate(rows_ni, self.rotation)
        y_no = self._base(rows_ni, modality)
        for correction in self.correction_modalities:
            self._add_correction(y_no, rows_ni, modality, correction, x.dtype)
        if bias is not None:
            y_no += bias
        return y_no.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _inverse_factors(self, modality: torch.Tensor) -> torch.Tensor:
        """1 / s of rows [N] by modality: [N, I], or [1, I] where all share one."""
        assert self.inverse_smoothing is not None
        assert self.smoothing_rows is not None
        if len(self.inverse_smoothing) == 1:
            return self.inverse_smoothing
        # Padding rows (-1) take the factor of text; their output is never read.
        return self.inverse_smoothing[self.smoothing_rows[modality.clamp(min=0).long()]]

    def _base(self, rows_ni: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        """Product with the stored weight(s): [N, I] -> float32 [N, O]."""
        codes, scale = rows_ni, None
        if self.activation is not None:
            quantized = quantize(rows_ni, self.activation)
            codes, scale = quantized.codes, quantized.scale
        if len(self.weight_modalities) == 1:
            return self._product(codes, scale, _TEXT)
        y_no = rows_ni.new_zeros(rows_ni.shape[0], self.out_features)
        for name in TOKEN_MODALITIES:
            is_text = name is Modality.TEXT
            rows = ((modality <= 0) if is_text else (modality == name)).nonzero().squeeze(1)
            if rows.numel():
                weight = name.name.lower() if name in self.weight_modalities else _TEXT
                y_no[rows] = self._product(codes[rows], None if scale is None else scale[rows], weight)
        return y_no

    def _product(self, codes: torch.Tensor, scale: torch.Tensor | None, weight: str) -> torch.Tensor:
        dense = getattr(self, f"float_{weight}")
        if dense is not None:
            y_no = functional.linear(codes.float(), dense)
            return y_no if scale is None else y_no * scale
        assert scale is not None
        return scaled_matmul(codes, scale, getattr(self, f"codes_{weight}"), getattr(self, f"scale_{weight}"))

    def _add_correction(
        self, y_no: torch.Tensor, rows_ni: torch.Tensor, modality: torch.Tensor, which: Modality, dtype: torch.dtype
    ) -> None:
        rows = (modality == which).nonzero().squeeze(1)
        if rows.numel():
            y_no[rows] += self.low_rank(rows_ni[rows].to(dtype), which).float()

    def low_rank(self, rows: torch.Tensor, modality: Modality) -> torch.Tensor:
        """Correction of smoothed rows [n, I] of one modality: [n, O]."""
        name = modality.name.lower()
        u_nr = project(rows, getattr(self, f"left_{name}"), getattr(self, f"factor_scale_{name}"))
        return u_nr @ getattr(self, f"right_{name}").to(rows.dtype)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, torch.Tensor],
        *,
        weight: TensorFormat,
        activation: TensorFormat | None,
        context: ModalityContext,
        dtype: torch.dtype,
    ) -> QuantLinear:
        """Rebuild a layer from its ``state_dict()``, bit for bit."""
        by_name = {modality.name.lower(): modality for modality in TOKEN_MODALITIES}
        weights = {
            modality: QuantizedTensor(
                state[f"codes_{name}"], state[f"scale_{name}"], state.get(f"zero_point_{name}"), weight
            )
            for name, modality in by_name.items()
            if f"codes_{name}" in state
        }
        layer = cls(
            weights=weights,
            bias=bias_in(state),
            activation=activation,
            context=context,
            rotation=state.get("rotation"),
            corrections=factors_in(state),
            dtype=dtype,
        )
        for name in ("inverse_smoothing", "smoothing_rows"):
            layer.register_buffer(name, state.get(name))
        return layer

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        bits = self.activation.bits if self.activation is not None else 16
        return f"{self.in_features}, {self.out_features}, w{self.weight_format.bits}a{bits}"


def leading(x: torch.Tensor) -> tuple[int, int]:
    """B and T of an input [B, T, I]; rows of any other shape, as towers have them, are one sequence."""
    return (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.numel() // x.shape[-1])


def register_bias(layer: nn.Module, bias: torch.Tensor | Centres | None, dtype: torch.dtype | None = None) -> None:
    """Hold a bias, or centres with theirs, as buffers of a layer; biases as a copy in ``dtype`` if one is given."""
    given, biases = (bias, bias.bias) if isinstance(bias, Centres) else (None, bias)
    if biases is not None and dtype is not None:
        biases = biases.detach().to(dtype).clone()
    layer.register_buffer("bias", biases)
    layer.register_buffer("centre", None if given is None else given.centre)
    layer.register_buffer("centre_rows", None if given is None else given.rows)


def bias_in(state: Mapping[str, torch.Tensor]) -> torch.Tensor | Centres | None:
    """What ``register_bias`` was given, from the state of a layer."""
    bias = state.get("bias")
    if bias is None or "centre" not in state:
        return bias
    return Centres(state["centre"], state["centre_rows"], bias)


def register_factors(layer: nn.Module, corrections: Mapping[Modality, Given]) -> None:
    """Hold corrections as buffers of a layer; those as they are have no scale."""
    for modality, given in corrections.items():
        factors, name = factors_of(given), modality.name.lower()
        layer.register_buffer(f"left_{name}", factors.left.contiguous())
        layer.register_buffer(f"right_{name}", factors.right.contiguous())
        layer.register_buffer(f"factor_scale_{name}", factors.scale)


def factors_in(state: Mapping[str, torch.Tensor]) -> dict[Modality, Factors]:
    """The corrections in a state that ``register_factors`` made."""
    names = {modality: modality.name.lower() for modality in TOKEN_MODALITIES}
    return {
        modality: Factors(state[f"left_{name}"], state[f"right_{name}"], state.get(f"factor_scale_{name}"))
        for modality, name in names.items()
        if f"left_{name}" in state
    }


def _inverse_table(smoothing: Mapping[Modality, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows 1 / s in float32 [U, I], and the row of every modality, int64 [M].

    Modalities with the same factor, and those without one, which take the factor of text, share a row.
    """
    distinct: list[torch.Tensor] = []
    rows = []
    for modality in TOKEN_MODALITIES:
        inverse = smoothing.get(modality, smoothing[Modality.TEXT]).double().reciprocal().float()
        row = next((index for index, other in enumerate(distinct) if torch.equal(inverse, other)), len(distinct))
        if row == len(distinct):
            distinct.append(inverse)
        rows.append(row)
    table = torch.stack(distinct)
    return table, torch.tensor(rows, device=table.device)
