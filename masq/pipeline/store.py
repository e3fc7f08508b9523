"""Finished blocks on disk: one safetensors file each, written atomically, found again after a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masq import parallel
from masq.models.base import GROUPS, Role
from masq.modules.quant_linear import QuantLinear
from masq.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from masq.models.base import BlockAdapter
    from masq.modules.modality import ModalityContext
    from masq.numerics.scheme import Scheme

ALL_ROLES = tuple(Role(role) for roles in GROUPS.values() for role in roles)


class BlockStore:
    """Tensors and a JSON note per block in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, index: int) -> Path:
        """File of block ``index``."""
        return self.folder / f"block-{index:03d}.safetensors"

    def has_all(self, num_blocks: int) -> bool:
        """Whether every block is finished."""
        return all(self.path(index).exists() for index in range(num_blocks))

    def save(self, index: int, tensors: dict[str, torch.Tensor], note: dict[str, Any]) -> None:
        """Write one block; a reader sees the whole file or none. Of several processes the first writes."""
        if parallel.rank() == 0:
            save_tensors(self.path(index), tensors, note)

    def load(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Read one block, None when it is not finished.

        Raises:
            DataError: the file is damaged.
        """
        return load_tensors(self.path(index))


def block_tensors(block: BlockAdapter) -> dict[str, torch.Tensor]:
    """Everything quantization may have changed in a block, by ``role.name`` and ``norm.group.name``."""
    tensors = {f"{role}.{key}": value for role in ALL_ROLES for key, value in block.linear(role).state_dict().items()}
    for group in GROUPS:
        norm = block.norm(group)
        if norm is not None:
            tensors |= {f"norm.{group}.{key}": value for key, value in norm.state_dict().items()}
    return tensors


def restore_block(
    block: BlockAdapter,
    tensors: dict[str, torch.Tensor],
    scheme: Scheme,
    context: ModalityContext,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put the tensors of ``block_tensors`` back, bit for bit.

    Args:
        block: of the float model, of the same quantized one, or of either without its weights.
        tensors: by ``role.name`` and ``norm.group.name``.
        scheme: of the block.
        context: token modalities for the quantized linears.
        dtype: of the model.
        device: where to put them.
    """
    formats = scheme.formats
    for role in ALL_ROLES:
        state = {k.split(".", 1)[1]: v.to(device) for k, v in tensors.items() if k.startswith(f"{role}.")}
        if "codes_text" not in state:
            block.linear(role).load_state_dict(state, assign=True)
            continue
        fmt = formats[role]
        layer = QuantLinear.from_state(
            state, weight=fmt.weight, activation=fmt.activation, context=context, dtype=dtype
        )
        block.set_linear(role, layer)
    for group in GROUPS:
        norm = block.norm(group)
        if norm is not None:
            prefix = f"norm.{group}."
            state = {k.removeprefix(prefix): v.to(device) for k, v in tensors.items() if k.startswith(prefix)}
            norm.load_state_dict(state, assign=True)
