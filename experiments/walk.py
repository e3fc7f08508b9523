"""The float model on calibration samples, block by block: what measurements of layers alone have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from masq.calibration.data import batches as batches_of
from masq.calibration.data import dataset_hash, load_samples
from masq.calibration.replay import advance, capture
from masq.config import RunConfig, active_modalities
from masq.models.base import BlockAdapter, Role
from masq.models.fingerprint import fingerprint
from masq.models.loading import load
from masq.pipeline.progress import BlockClock
from masq.report.provenance import provenance


def float_weight(block: BlockAdapter, role: Role) -> torch.Tensor:
    """Weight [O, I] of a linear of a float block, float32."""
    weight = block.linear(role).weight
    assert isinstance(weight, torch.Tensor)
    return weight.float()


class FloatWalk:
    """The model of a configuration, with its calibration samples in front of the first block.

    Args:
        config: model, modalities and calibration samples.
        source: file of the samples.
    """

    def __init__(self, config: RunConfig, source: Path) -> None:
        wanted = config.calibration
        self.samples = load_samples(
            source, wanted.tasks, wanted.samples_per_task, wanted.seed, active_modalities(config)
        )
        self._config, self._adapter = config, load(config.model)
        batches = [self._adapter.encode(b, with_answer=True) for b in batches_of(self.samples, wanted.batch_size)]
        self._hidden, self.replay = capture(self._adapter, batches)

    def blocks(self) -> Iterator[tuple[BlockAdapter, Sequence[torch.Tensor]]]:
        """Every block with its inputs, once."""
        blocks = self._adapter.blocks()
        clock = BlockClock("measure", len(blocks))
        for index, block in enumerate(blocks):
            yield block, self._hidden
            pairs = zip(self._hidden, self.replay, strict=True)
            self._hidden = [advance(block, hidden, batch, f"block {index}") for hidden, batch in pairs]
            clock.tick("")

    def provenance(self) -> dict[str, Any]:
        """Where the measurements come from."""
        hashes = {"calibration": dataset_hash(self.samples), "model": fingerprint(self._config.model, None)}
        return provenance(self._config.seed, hashes, device=self._config.model.device)
