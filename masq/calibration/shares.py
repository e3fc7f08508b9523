"""The share of a process in every calibration batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from masq import parallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.models.base import EncodedBatch, ModelAdapter, Sample


def encode_share(adapter: ModelAdapter, batch: Sequence[Sample]) -> EncodedBatch:
    """Encode, with answers, the samples of a batch that this process takes.

    Batches keep their number and order in every process, for they are steps of learning. A process that has no sample
    of one takes the first, all of it as padding: it keeps step, and adds nothing to any sum.
    """
    own = parallel.share(batch)
    if own:
        return adapter.encode(own, with_answer=True)
    stand_in = adapter.encode(batch[:1], with_answer=True)
    nothing = torch.full_like(stand_in.modality, -1)
    return replace(stand_in, modality=nothing, answer_mask=torch.zeros_like(stand_in.answer_mask))
