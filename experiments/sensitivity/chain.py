"""The float model on every batch, and how far a changed decoder is from it.

Towers and embeddings run once. The input of one block is held, that of the first block which is not float, and moves
on from block to block, so that a change in block N costs the blocks from N on and memory does not grow with depth.

Shapes: B batch, T tokens, R answer tokens, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from masq.calibration.replay import ReplayBatch, advance, capture
from masq.evaluation.fidelity import sample_kind, token_groups
from masq.evaluation.likelihood import ROWS_PER_CHUNK, log_probabilities, picked, predicting_rows, sum_by_owner
from masq.numerics.sqnr import token_sqnr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.models.base import EncodedBatch, ModelAdapter, Sample


@dataclass
class _Batch:
    """One batch on its way through the decoder.

    Attributes:
        samples: what it holds.
        encoded: with answers.
        replay: what blocks need besides their input.
        hidden: float input [B, T, d] of the block at hand.
        output: float output [B, T, d] of the last block.
    """

    samples: Sequence[Sample]
    encoded: EncodedBatch
    replay: ReplayBatch
    hidden: torch.Tensor
    output: torch.Tensor


class Chain:
    """Float hidden states at one place of the decoder; blocks from there on may be changed and measured.

    Args:
        adapter: the float model. Its blocks may be changed while ``measure`` runs, and at no other time.
        batches: samples in batches.
    """

    def __init__(self, adapter: ModelAdapter, batches: Sequence[Sequence[Sample]]) -> None:
        self.adapter, self.blocks, self.at = adapter, adapter.blocks(), 0
        encoded = [adapter.encode(samples, with_answer=True) for samples in batches]
        hidden, replay = capture(adapter, encoded)
        outputs = [self._run(one, batch) for one, batch in zip(hidden, replay, strict=True)]
        columns = zip(batches, encoded, replay, hidden, outputs, strict=True)
        self._batches = [_Batch(*column) for column in columns]

    def move_to(self, index: int) -> None:
        """Hold the input of block ``index``, not before the present one; the blocks between must be float."""
        assert self.at <= index < len(self.blocks), f"cannot go from block {self.at} to block {index}"
        for batch in self._batches:
            batch.hidden = self._run(batch.hidden, batch.replay, index)
        self.at = index

    def measure(self) -> list[dict[str, Any]]:
        """Sums by sample, as ``masq.evaluation.fidelity.summarize`` takes them; SQNR is that of the last block alone.

        Raises:
            NumericalError: the output of a block or a logit is NaN or infinite.
        """
        return [
            entry for batch in self._batches for entry in self._compare(batch, self._run(batch.hidden, batch.replay))
        ]

    def _run(self, hidden: torch.Tensor, replay: ReplayBatch, stop: int | None = None) -> torch.Tensor:
        """Output [B, T, d] of the blocks from the present one on, up to ``stop``."""
        for index, block in enumerate(self.blocks[self.at : stop], start=self.at):
            hidden = advance(block, hidden, replay, f"block {index}")
        return hidden

    def _compare(self, batch: _Batch, output: torch.Tensor) -> list[dict[str, Any]]:
        """Sums of one batch by sample for the last block's ``output`` [B, T, d]."""
        groups = token_groups(batch.encoded.modality)
        tokens = token_sqnr(batch.output, output).cpu()
        likelihoods = self._likelihoods(batch.encoded, batch.output, output)
        entries = []
        for index, sample in enumerate(batch.samples):
            masks = {name: mask[index] for name, mask in groups.items() if bool(mask[index].any())}
            entries.append(
                {
                    "kind": sample_kind(sample),
                    "sqnr": {name: [float(tokens[index][mask].sum())] for name, mask in masks.items()},
                    "num_tokens": {name: int(mask.sum()) for name, mask in masks.items()},
                    **{name: values[index] for name, values in likelihoods.items()},
                }
            )
        return entries

    @torch.no_grad()
    def _likelihoods(self, encoded: EncodedBatch, expected: torch.Tensor, output: torch.Tensor) -> dict[str, list[Any]]:
        """By sample: summed answer NLL of both chains, summed KL(float || rounded), number of answer tokens."""
        owners, targets = predicting_rows(encoded)
        sums: dict[str, list[torch.Tensor]] = {"nll": [], "nll_float": [], "kl": []}
        chunks = zip(
            log_probabilities(self.adapter, self._head_inputs(encoded, expected)),
            log_probabilities(self.adapter, self._head_inputs(encoded, output)),
            targets.split(ROWS_PER_CHUNK),
            strict=True,
        )
        for log_p, log_q, ids in chunks:
            sums["nll_float"].append(-picked(log_p, ids))
            sums["nll"].append(-picked(log_q, ids))
            sums["kl"].append((log_p.exp() * (log_p - log_q)).sum(1))
        by_sample = {name: sum_by_owner(values, owners, len(encoded.answer_mask)) for name, values in sums.items()}
        return {**{name: total for name, (total, _) in by_sample.items()}, "num_answer_tokens": by_sample["nll"][1]}

    def _head_inputs(self, encoded: EncodedBatch, output: torch.Tensor) -> torch.Tensor:
        """What the head reads [R, d] at the positions that predict answer tokens."""
        return self.adapter.final_norm()(output)[:, :-1][encoded.answer_mask[:, 1:]]
