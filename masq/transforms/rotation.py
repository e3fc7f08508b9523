"""Hadamard rotation of a whole model: outliers are spread over all channels, the function stays what it was.

QuaRot, arXiv 2404.00456, sections 3 and 4. With x the residual stream and R orthogonal, every writer writes x R and
every reader reads it back through R^T; norms without weights commute with R, so their weights first move into the
linears they feed. Embeddings and the projectors of the towers write into the stream as well. Values and the output
linear share a rotation per head, and the input of ``down`` is rotated at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from masq.errors import ModelError
from masq.models.base import GROUPS, Role
from masq.models.rotated import RotatedInput
from masq.numerics.hadamard import random_signs, rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from masq.models.base import BlockAdapter, ModelAdapter
    from masq.transforms.frame import HadamardRotation


@torch.no_grad()
def rotate_model(adapter: ModelAdapter, config: HadamardRotation, seed: int, *, blocks_stored: bool = False) -> None:
    """Rotate a float model in place; its logits stay what they were, to rounding.

    Solved in float64, stored in the dtype of the model.

    Args:
        adapter: the float model, unquantized.
        config: which rotations.
        seed: of the random signs, keyed further by place.
        blocks_stored: the weights of blocks are about to be replaced by stored ones, which are rotated already: they
            are left alone, and only get their run-time rotations.

    Raises:
        ModelError: a norm that does not commute with a rotation (a bias, or no weight).
        ConfigError: a size without a Hadamard matrix.
    """
    signs = None
    if config.residual:
        signs = random_signs(adapter.embeddings().weight.shape[1], seed, "rotation", "residual")
        _rotate_ends(adapter, signs)
        adapter.residual_signs = signs.to(adapter.device)
    for index, block in enumerate(adapter.blocks() if blocks_stored else adapter.visited_blocks("spill")):
        if signs is not None and not blocks_stored:
            _rotate_residual(block, signs)
        if config.heads and not blocks_stored:
            _rotate_heads(block, random_signs(block.head_dim, seed, "rotation", "heads", index))
        if config.down:
            down = _linear(block, Role.DOWN)
            own = random_signs(down.in_features, seed, "rotation", "down", index)
            if not blocks_stored:
                _rotate_inputs(down, own)
            # At run time, between gate * up, which no weight can absorb.
            block.set_linear(Role.DOWN, RotatedInput(down, own.to(adapter.device, torch.float32)))


def _rotate_ends(adapter: ModelAdapter, signs: torch.Tensor) -> None:
    """Rotate what writes into the residual stream before the first block and reads it behind the last."""
    head, norm, embeddings = adapter.head(), adapter.final_norm(), adapter.embeddings()
    with adapter.residence.present(head, norm, after="spill"):
        # A tied weight is one tensor while both of its places are present.
        with adapter.residence.present(embeddings):
            _untie(adapter)
        _fold_norm(norm, [head])
        _rotate_inputs(head, signs)
    with adapter.residence.present(embeddings, after="spill"):
        _rotate_outputs(embeddings, signs)
    for projector in adapter.projectors():
        with adapter.residence.present(projector, after="spill"):
            _rotate_outputs(projector, signs)
    # They are beside the parts that come and go, so they are always present.
    for vectors in adapter.media_vectors():
        _rotate_outputs(vectors, signs)


def _rotate_residual(block: BlockAdapter, signs: torch.Tensor) -> None:
    """Fold the norms of a block into what they feed, and rotate what reads and writes the residual stream."""
    for group in ("qkv", "gate_up"):
        _fold_norm(block.norm(group), [block.linear(role) for role in GROUPS[group]])
    for role in (Role.OUTPUT, Role.DOWN):
        _rotate_outputs(block.linear(role), signs)
    for role in (*GROUPS["qkv"], *GROUPS["gate_up"]):
        _rotate_inputs(block.linear(role), signs)


def _linear(block: BlockAdapter, role: Role) -> nn.Linear:
    linear = block.linear(role)
    assert isinstance(linear, nn.Linear)
    return linear


def _untie(adapter: ModelAdapter) -> None:
    """Give the head a weight of its own: the last norm moves into it, and must not move into the embedding."""
    head = adapter.head()
    if head.weight is adapter.embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    # Others tie weights as the configuration says, whenever they like: lm-eval ties those of every model it is given.
    for config in (adapter.model.config, adapter.model.config.get_text_config()):
        config.tie_word_embeddings = False
    adapter.model.all_tied_weights_keys = {}


def _fold_norm(norm: nn.Module | None, readers: list[nn.Module]) -> None:
    """Multiply the inputs of the linears behind a norm by its weight, and set that to one."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or getattr(norm, "bias", None) is not None:
        raise ModelError(
            "a residual rotation needs norms with one weight per channel and no bias before q, k, v and gate, up",
            value=type(norm).__name__,
            remedy="set method.rotation.residual=false",
        )
    for reader in readers:
        assert isinstance(reader.weight, torch.Tensor)
        _store(reader.weight, reader.weight.double() * weight.double())
    weight.fill_(1.0)


def _rotate_outputs(module: nn.Module, signs: torch.Tensor) -> None:
    """``y -> y R``: rows of an embedding, columns of a linear's transposed weight, and its bias."""
    assert isinstance(module.weight, torch.Tensor)
    if isinstance(module, nn.Embedding):
        _apply(module.weight, lambda weight: rotate(weight, signs))
        return
    _apply(module.weight, lambda weight: rotate(weight.t(), signs).t())
    if isinstance(module.bias, torch.Tensor):
        _apply(module.bias, lambda bias: rotate(bias, signs))


def _rotate_inputs(module: nn.Module, signs: torch.Tensor) -> None:
    """``W x -> (W R) (x R)``; the bias of a reader is an output and stays."""
    assert isinstance(module.weight, torch.Tensor)
    _apply(module.weight, lambda weight: rotate(weight, signs))


def _rotate_heads(block: BlockAdapter, signs: torch.Tensor) -> None:
    """Rotate each head of the values, bias included, and of what the output linear reads.

    Attention mixes tokens, not channels, so a rotation inside a head passes through; query heads that share a KV head
    share its rotation.
    """
    value, output = _linear(block, Role.VALUE), _linear(block, Role.OUTPUT)
    size = block.head_dim
    _apply(value.weight, lambda w: rotate(w.t().unflatten(1, (-1, size)), signs).flatten(1).t())
    if value.bias is not None:
        _apply(value.bias, lambda bias: rotate(bias.unflatten(0, (-1, size)), signs).flatten())
    _apply(output.weight, lambda w: rotate(w.unflatten(1, (-1, size)), signs).flatten(1))


def _apply(parameter: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    _store(parameter, function(parameter.double()))


def _store(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))
