"""Replay of decoder blocks on calibration batches: inputs of the first block, outputs of any, statistics inside one.

A batch runs through the towers and the embeddings once; afterwards blocks are called one at a time on cached hidden
states, so memory holds one block's temporaries plus the cached activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch

from masq.calibration.shares import encode_share
from masq.calibration.statistics import GroupAccumulator, GroupStatistics, TokenSample
from masq.errors import NumericalError
from masq.models.base import GROUPS, Modality, Role
from masq.numerics.finite import is_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from torch import nn

    from masq.models.base import BlockAdapter, EncodedBatch, ModelAdapter, Sample
    from masq.models.tensor_files import Collected


@dataclass(frozen=True)
class ReplayBatch:
    """What every block needs besides its hidden input.

    Attributes:
        kwargs: keyword arguments of the decoder layer (attention mask, position embeddings, ...).
        modality: int8 [B, T], -1 where padded.
    """

    kwargs: dict[str, Any]
    modality: torch.Tensor


@dataclass(frozen=True)
class BlockData:
    """Calibration data of one block, by batch.

    Attributes:
        hidden: inputs [B, T, d], of the quantized chain when a block is to see the errors before it.
        targets: float-chain outputs [B, T, d].
        batches: what else the block needs.
        collect: makes an empty list for outputs of all batches.
    """

    hidden: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]
    batches: Sequence[ReplayBatch]
    collect: Callable[[], Collected] = list


class EncodedBatches(Sequence["EncodedBatch"]):
    """Batches of samples that are encoded each time they are asked for: one lies in memory, with its pixels, not all.

    Args:
        adapter: encodes them, with answers.
        groups: the samples of each batch.
    """

    def __init__(self, adapter: ModelAdapter, groups: Sequence[Sequence[Sample]]) -> None:
        self._adapter, self._groups = adapter, groups

    @overload
    def __getitem__(self, index: int) -> EncodedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedBatches: ...
    def __getitem__(self, index: int | slice) -> EncodedBatch | EncodedBatches:
        """Encode one batch, of several processes each its share, or choose some."""
        if isinstance(index, slice):
            return EncodedBatches(self._adapter, self._groups[index])
        return encode_share(self._adapter, self._groups[index])

    def __len__(self) -> int:
        return len(self._groups)


class _FirstBlockReachedError(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


class _AllSeenError(Exception):
    """Ends a block's forward pass once every wanted input was seen."""


def capture(adapter: ModelAdapter, batches: Sequence[EncodedBatch]) -> tuple[Collected, list[ReplayBatch]]:
    """Run towers and embeddings on every batch.

    Args:
        adapter: the float model.
        batches: encoded samples, asked for once each.

    Returns:
        The input [B, T, d] of the first decoder block by batch, and what else the blocks need.
    """
    hidden = adapter.residence.collected()
    replay: list[ReplayBatch] = []
    modality = torch.empty(0)

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden.append((args[0] if args else rest.pop("hidden_states")).detach())
        rest.pop("past_key_values", None)
        replay.append(ReplayBatch({**rest, "use_cache": False}, modality))
        raise _FirstBlockReachedError

    handle = adapter.blocks()[0].module.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        # By number: an iterator would hold a batch while the next one is encoded, and so would its name.
        for index in range(len(batches)):
            batch = batches[index]
            modality = batch.modality
            with torch.no_grad(), suppress(_FirstBlockReachedError):
                adapter.model(**batch.inputs, use_cache=False)
            del batch
    finally:
        handle.remove()
    return hidden, replay


@torch.no_grad()
def advance(block: BlockAdapter, hidden: torch.Tensor, batch: ReplayBatch, name: str) -> torch.Tensor:
    """Output [B, T, d] of ``block``.

    Raises:
        NumericalError: a token that is not padding came out NaN or infinite.
    """
    output = block.forward(hidden, batch.kwargs)
    if not is_finite(output, batch.modality >= 0):
        raise NumericalError(
            f"the output of {name} must be finite",
            value="NaN or infinity",
            remedy="raise model.dtype to float32 or use a wider scheme; finished blocks are kept",
        )
    return output


@torch.no_grad()
def collect(
    block: BlockAdapter,
    hidden: Sequence[torch.Tensor],
    batches: Sequence[ReplayBatch],
    *,
    groups: Collection[str] = tuple(GROUPS),
    second_moment: Collection[str] = (),
    moments_of: Collection[Modality] = tuple(Modality),
    sample: TokenSample | None = None,
    centres: Collection[str] = (),
) -> dict[str, GroupStatistics]:
    """Statistics, by modality, of the inputs of groups of linears of a block.

    The block runs no further than the last group asked for: without ``down`` most of its arithmetic is saved.

    Args:
        block: a block with float linears.
        hidden: its input by batch, [B, T, d].
        batches: the matching replay batches.
        groups: groups whose absolute maximum is wanted.
        second_moment: groups whose second moment is wanted as well.
        moments_of: the modalities whose second moment is wanted there.
        sample: tokens of these batches whose inputs to ``groups`` are wanted, and with them the mean |x|.
        centres: groups whose centres are wanted, and with them both ends of each channel.

    Returns:
        Statistics by group name, of the groups asked for.
    """
    wanted = [group for group in GROUPS if group in groups or group in second_moment or group in centres]
    accumulators = {
        group: GroupAccumulator(
            moments_of if group in second_moment else False, sample if group in groups else None, group in centres
        )
        for group in wanted
    }
    if not wanted:
        return {}
    with _observed(block, accumulators) as current:
        for hidden_btd, batch in zip(hidden, batches, strict=True):
            current.clear()
            current.append(batch.modality)
            with suppress(_AllSeenError):
                block.forward(hidden_btd, batch.kwargs)
    return {group: accumulator.result() for group, accumulator in accumulators.items()}


@contextmanager
def _observed(block: BlockAdapter, accumulators: dict[str, GroupAccumulator]) -> Iterator[list[torch.Tensor]]:
    """Feed the accumulators from the first linear of each group while the context lasts; stop after the last group."""
    current: list[torch.Tensor] = []
    last = list(accumulators)[-1]

    def observer(group: str) -> Any:
        def observe(_module: nn.Module, args: tuple[Any, ...]) -> None:
            accumulators[group].update(args[0], current[0])
            if group == last:
                raise _AllSeenError

        return observe

    handles = [
        block.linear(Role(GROUPS[group][0])).register_forward_pre_hook(observer(group)) for group in accumulators
    ]
    try:
        yield current
    finally:
        for handle in handles:
            handle.remove()
