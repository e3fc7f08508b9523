"""Contexts with all their choices in one sequence each, so that a context is computed once.

A sequence is the context without its last token, then for each choice a branch: the context's last token again (it
predicts the first token of the choice), and the choice. A token sees the context and what comes before it in its own
branch, at the positions it would have if its choice alone followed the context. Four choices of 12 tokens after a
context of 32 cost 83 tokens instead of 176.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.errors import DataError
from masq.models import prompts
from masq.models.base import EncodedBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.models.base import ModelAdapter, Sample

_CONTEXT = -1
_PADDING = -2


@dataclass
class ChoiceBatch:
    """Samples with their choices as a model takes them.

    Attributes:
        encoded: the batch [B, T]; ``answer_mask`` marks the tokens of choices, each right after what predicts it.
        num_tokens: tokens of every choice, by sample and choice; in reading order they are the marked tokens.
    """

    encoded: EncodedBatch
    num_tokens: list[list[int]]


def encode(adapter: ModelAdapter, samples: Sequence[Sample]) -> ChoiceBatch:
    """Body of ``ModelAdapter.encode_choices``; see there."""
    lacking = next((sample.id for sample in samples if not sample.choices), None)
    if lacking is not None:
        raise DataError("every sample must have choices", value=lacking, remedy="correct the data")
    contexts = prompts.encode(adapter, samples, with_answer=False).inputs
    present = contexts["attention_mask"].bool()
    choices = [[prompts.choice_ids(adapter, choice) for choice in sample.choices] for sample in samples]
    sequences = [
        _sequence(row[real].tolist(), ids)
        for row, real, ids in zip(contexts["input_ids"], present, choices, strict=True)
    ]
    branches = prompts.left_pad([one.branches for one in sequences], _PADDING, torch.int64)
    inputs = {
        "input_ids": prompts.left_pad([one.ids for one in sequences], adapter.pad_id, torch.int64),
        "attention_mask": attention_mask(branches, adapter.model.dtype),
        "position_ids": prompts.left_pad([one.positions for one in sequences], 0, torch.int64),
    }
    scored = prompts.left_pad([one.scored for one in sequences], fill=False, dtype=torch.bool)
    batch = EncodedBatch(inputs, adapter.modality_of(inputs), scored)
    return ChoiceBatch(batch.to(adapter.model.device), [[len(choice) for choice in ids] for ids in choices])


@dataclass
class _Sequence:
    """Token by token of one sample: id, branch, position, and whether it belongs to a choice."""

    ids: list[int]
    branches: list[int]
    positions: list[int]
    scored: list[bool]


def _sequence(context: list[int], choices: list[list[int]]) -> _Sequence:
    *shared, last = context
    start = len(shared)
    sequence = _Sequence(list(shared), [_CONTEXT] * start, list(range(start)), [False] * start)
    for branch, choice in enumerate(choices):
        length = 1 + len(choice)
        sequence.ids += [last, *choice]
        sequence.branches += [branch] * length
        sequence.positions += range(start, start + length)
        sequence.scored += [False] + [True] * len(choice)
    return sequence


def attention_mask(branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask under which a token sees its context and its own branch up to itself.

    Args:
        branches: int64 [B, T], left-padded: number of the branch, -1 for the context, -2 for padding.
        dtype: of the mask, that of the model.

    Returns:
        [B, 1, T, T], 0 where attended. Padding sees the last token and not itself: no row is without a token to
        attend to, and what does not see itself counts as padding (``masq.models.tokens.real_tokens``).
    """
    size = branches.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool).tril()
    same = branches.unsqueeze(2) == branches.unsqueeze(1)
    seen = earlier & (same | (branches == _CONTEXT).unsqueeze(1))
    padded = branches == _PADDING
    last = torch.arange(size) == size - 1
    seen = torch.where(padded.unsqueeze(2), last, seen & ~padded.unsqueeze(1))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
