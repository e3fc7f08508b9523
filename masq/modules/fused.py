"""Norms and gates of decoder blocks computed in the pass that quantizes what they feed.

A norm writes what its linears read and nothing else does, a gate what ``down`` reads: neither has to be stored in 16
bits in between, and where it is not, it is not rounded to them either. Modules, names and state stay as they are; what
is exchanged is the ``forward`` of norms and of the feed-forward module, on the instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from masq.kernels.base import Norm
from masq.models.base import GROUPS, Role
from masq.models.rotated import RotatedInput
from masq.modules.packed_linear import PackedLinear, pack_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from masq.models.base import BlockAdapter, ModelAdapter
    from masq.modules.stack import Stack

_PROBE_ROWS = 2
_ROUNDED, _EXACT = 2.0**-5, 1e-5
"""How far a probe may be off: norms of models in 16 bits round several times, activations are asked in float32."""


class _FusedNorm:
    """What calls a norm whose output only the linears of one group read."""

    def __init__(self, module: Any, eps: float, layers: list[PackedLinear]) -> None:
        self.module, self.eps, self.layers = module, eps, layers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        stack = _joint(self.layers)
        if stack is None or not stack.fuses:
            return type(self.module).forward(self.module, x)
        return stack.normalized(x, Norm(self.module.weight, self.eps))


class _FusedGate:
    """What calls ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, module: Any, layers: list[PackedLinear], down: PackedLinear) -> None:
        self.module, self.layers, self.down = module, layers, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        stack, last = _joint(self.layers), self.down.stack
        if stack is None or not (stack.fuses and last.fuses):
            return type(self.module).forward(self.module, x)
        return last.gated(*stack.together(x))


def deploy(adapter: ModelAdapter, kernel: str, *, fused: bool) -> dict[str, Any]:
    """Pack a quantized model for good (``pack_model``), and fuse its blocks if asked to.

    Returns:
        For the provenance of a record: ``kernels``, how many linears each runs, and ``fused``, how many places are.
    """
    found: dict[str, Any] = {"kernels": pack_model(adapter, kernel)}
    return {**found, "fused": fuse_blocks(adapter.blocks())} if fused else found


def fuse_blocks(blocks: Iterable[BlockAdapter]) -> int:
    """Fuse norms and gates of packed blocks with the linears behind them, wherever that is what they are.

    A norm that is no RMSNorm, an activation that is no SiLU, linears that do not run as one, a rotation of their input,
    and kernels without such a pass (``Kernel.fuses``; asked in every call, so that a model may move) leave a place as
    it is. Hooks on the linears of a fused place no longer see what they read: nothing in it is defined.

    Args:
        blocks: with packed linears.

    Returns:
        How many places are fused now.
    """
    return sum(_fuse(block) for block in blocks)


def _fuse(block: BlockAdapter) -> int:
    places = 0
    for group, roles in GROUPS.items():
        norm, layers = block.norm(group), _layers(block, roles)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if norm is not None and layers and eps is not None and _is_rms_norm(norm, eps):
            norm.forward = _FusedNorm(norm, eps, layers)
            places += 1
    gated, layers, down = block.gated(), _layers(block, (Role.GATE, Role.UP)), _layers(block, (Role.DOWN,))
    if gated is not None and layers and down and _is_silu(gated[1]):
        module = gated[0]
        module.forward = _FusedGate(module, layers, down[0])
        places += 1
    return places


def _layers(block: BlockAdapter, roles: Iterable[Role]) -> list[PackedLinear]:
    """The packed linears of these roles, none unless all run as one on a kernel with such a pass."""
    rotated = {one.linear for one in block.module.modules() if isinstance(one, RotatedInput)}
    found = [block.linear(role) for role in roles]
    layers = [one for one in found if isinstance(one, PackedLinear) and one not in rotated]
    stack = _joint(layers) if len(layers) == len(tuple(roles)) else None
    return layers if stack is not None and stack.fuses else []


def _joint(layers: list[PackedLinear]) -> Stack | None:
    """The stack of these layers and no others, in their order."""
    return layers[0].stack if layers and layers[0].stack.members == layers else None


def _is_rms_norm(norm: Any, eps: float) -> bool:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or getattr(norm, "bias", None) is not None:
        return False

    def wanted(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight.float(), eps)

    return _agree(norm, len(weight), weight, wanted, _ROUNDED)


def _is_silu(activation: nn.Module) -> bool:
    return _agree(activation, 256, torch.empty(0), functional.silu, _EXACT)


@torch.no_grad()
def _agree(
    module: Any, width: int, like: torch.Tensor, wanted: Callable[[torch.Tensor], torch.Tensor], tolerance: float
) -> bool:
    """Whether a module computes that, on random rows whose mean is not zero."""
    probe = (torch.randn(_PROBE_ROWS, width, generator=torch.Generator().manual_seed(0)) + 1).to(like)
    expected = wanted(probe.float())
    error = (type(module).forward(module, probe).float() - expected).abs().max()
    return bool(error <= tolerance * expected.abs().max())
