"""A part of a float decoder rounded to nearest while a context lasts, and afterwards as it was, bit for bit.

The arithmetic is that of ``masq.modules.quant_linear.QuantLinear`` up to the order of float operations: the same codes
and scales, multiplied out before the product instead of after it.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from masq.errors import numerical_errors_of
from masq.numerics.affine import quantize
from masq.rounding.nearest import round_nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from experiments.sensitivity.parts import Kind, Part
    from masq.models.base import BlockAdapter, Role
    from masq.numerics.scheme import LinearFormat, TensorFormat


@contextmanager
def rounded(blocks: Sequence[BlockAdapter], part: Part, kind: Kind, fmt: LinearFormat) -> Iterator[None]:
    """Round the weights of the linears of a part, or what they read, or both; everything else stays in float.

    Rounded weights are held besides the float ones, in the dtype of the model: a 16-bit dtype rounds them once more.

    Args:
        blocks: all blocks of the decoder, their linears float.
        part: the linears to round.
        kind: what of them.
        fmt: the grids; with activation None, activations stay as they are.

    Raises:
        NumericalError: a weight is not finite; the message names the linear.
        ConfigError: the group size does not divide the input channels.
    """
    with ExitStack() as undo:
        for index in part.blocks:
            for role in part.roles:
                linear = _linear(blocks[index], role)
                if kind != "activations":
                    with numerical_errors_of(f"block {index}.{role}"):
                        undo.enter_context(_rounded_weight(linear, fmt.weight))
                if kind != "weights" and fmt.activation is not None:
                    undo.callback(linear.register_forward_pre_hook(_rounded_input(fmt.activation)).remove)
        yield


def num_weights(blocks: Sequence[BlockAdapter], part: Part) -> int:
    """How many weights the linears of a part have; biases are never rounded."""
    return sum(_linear(blocks[index], role).weight.numel() for index in part.blocks for role in part.roles)


def _linear(block: BlockAdapter, role: Role) -> nn.Linear:
    linear = block.linear(role)
    assert isinstance(linear, nn.Linear), "only float linears can be rounded and restored"
    return linear


@contextmanager
def _rounded_weight(linear: nn.Linear, fmt: TensorFormat) -> Iterator[None]:
    original = linear.weight.data
    # float64 as in the pipeline, so that codes are the same there and here.
    linear.weight.data = round_nearest(original.double(), fmt).dequantize(original.dtype)
    try:
        yield
    finally:
        linear.weight.data = original


def _rounded_input(fmt: TensorFormat) -> Callable[..., tuple[torch.Tensor]]:
    """A pre-hook that rounds the input [..., d] of a linear, one scale per token, and keeps its dtype."""

    def before(_linear: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        x: torch.Tensor = args[0]
        return (quantize(x.float(), fmt).dequantize().to(x.dtype),)

    return before
