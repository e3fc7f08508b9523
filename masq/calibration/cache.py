"""Statistics of the float chain on disk, shared by every run that sees the same activations.

A folder belongs to one float model (its rotation included) on one calibration set; whoever makes the folder puts all of
that into its name. Inside are small files by block and group of linears, so that a run computes only what no run before
it asked for: ranges, means, and the second moment of each modality.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from masq.calibration.replay import collect
from masq.calibration.statistics import GroupStatistics
from masq.models.base import GROUPS, Modality
from masq.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import torch

    from masq.calibration.replay import ReplayBatch
    from masq.calibration.statistics import TokenSample
    from masq.models.base import BlockAdapter


@dataclass(frozen=True)
class Request:
    """What is asked of the inputs of one block, as ``collect`` takes it.

    Attributes:
        groups: groups whose ranges are wanted.
        second_moment: groups whose second moment is wanted as well.
        moments_of: the modalities whose second moment is wanted there.
        sample: tokens whose inputs to ``groups`` are wanted, and with them the mean |x|.
        centres: groups whose centres are wanted, and with them both ends of each channel.
    """

    groups: Collection[str] = ()
    second_moment: Collection[str] = ()
    moments_of: Collection[Modality] = tuple(Modality)
    sample: TokenSample | None = None
    centres: Collection[str] = ()

    @property
    def wanted(self) -> list[str]:
        """Every group that is looked at, in the order of a block."""
        return [group for group in GROUPS if {group} & {*self.groups, *self.second_moment, *self.centres}]

    @property
    def rows_of(self) -> Collection[str]:
        """Groups of which single tokens are wanted: those are never kept on disk."""
        return self.groups if self.sample is not None and self.sample.size else ()

    def means_of(self, group: str) -> bool:
        """Whether the mean |x| of ``group`` is wanted."""
        return self.sample is not None and group in self.groups

    def moment_of(self, group: str, which: Modality) -> bool:
        """Whether the second moment of ``which`` in ``group`` is wanted."""
        return group in self.second_moment and which in self.moments_of

    def collect(
        self, block: BlockAdapter, hidden: Sequence[torch.Tensor], batches: Sequence[ReplayBatch]
    ) -> dict[str, GroupStatistics]:
        """Run the block for it."""
        return collect(
            block,
            hidden,
            batches,
            groups=self.groups,
            second_moment=self.second_moment,
            moments_of=self.moments_of,
            sample=self.sample,
            centres=self.centres,
        )


def _moment_of(which: Modality) -> str:
    return f"moment-{which.name.lower()}"


def _moved(found: GroupStatistics, device: torch.device) -> GroupStatistics:
    def to(tensors: Mapping[Modality, torch.Tensor]) -> dict[Modality, torch.Tensor]:
        return {which: tensor.to(device) for which, tensor in tensors.items()}

    tensors = ("abs_max", "second_moment", "abs_mean", "low", "high", "centre", "mean")
    return replace(found, **{name: to(getattr(found, name)) for name in tensors})


class StatisticsCache:
    """The files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def covers(self, index: int, request: Request) -> bool:
        """Whether ``request`` of block ``index`` can be answered without running the block.

        Raises:
            DataError: a file is damaged.
        """
        return not request.rows_of and all(self._counts(index, group, request) for group in request.wanted)

    def collect(
        self,
        index: int,
        request: Request,
        block: BlockAdapter,
        hidden: Sequence[torch.Tensor],
        batches: Sequence[ReplayBatch],
    ) -> dict[str, GroupStatistics]:
        """What ``request.collect`` gives, bit for bit; only what no file holds is computed, and then kept.

        Raises:
            DataError: a file is damaged.
        """
        known = {
            group: _moved(found, hidden[0].device)
            for group in request.wanted
            if (found := self._load(index, group, request))
        }
        missing = replace(
            request,
            groups=[group for group in request.groups if group not in known or group in request.rows_of],
            second_moment=[group for group in request.second_moment if group not in known],
            centres=[group for group in request.centres if group not in known],
        )
        fresh = missing.collect(block, hidden, batches)
        for group, statistics in fresh.items():
            if group not in known:
                self._save(index, group, statistics)
        rows = {group: replace(known[group], rows=one.rows) for group, one in fresh.items() if group in known}
        every = {**known, **fresh, **rows}
        return {group: every[group] for group in request.wanted}

    def _path(self, index: int, group: str, what: str) -> Path:
        return self.folder / f"block-{index:03d}.{group}.{what}.safetensors"

    def _counts(self, index: int, group: str, request: Request) -> dict[Modality, int] | None:
        """Tokens by modality if all that is asked of one group, but for rows, is there."""
        stored = load_tensors(self._path(index, group, "ranges"))
        if stored is None:
            return None
        counts = {Modality[name]: count for name, count in stored[1]["num_tokens"].items()}
        parts = ["means"] if request.means_of(group) else []
        parts += ["centres"] if group in request.centres else []
        parts += [_moment_of(which) for which in counts if request.moment_of(group, which)]
        return counts if all(self._path(index, group, part).exists() for part in parts) else None

    def _load(self, index: int, group: str, request: Request) -> GroupStatistics | None:
        """All that is asked of one group, but for rows, or None."""
        counts = self._counts(index, group, request)
        if counts is None:
            return None
        ranges = self._read(index, group, "ranges")
        means = self._read(index, group, "means") if request.means_of(group) else {}
        centres = self._read(index, group, "centres") if group in request.centres else {}
        moments = {
            which: self._read(index, group, _moment_of(which))["second_moment"]
            for which in counts
            if request.moment_of(group, which)
        }
        return GroupStatistics(
            abs_max={which: ranges[which.name] for which in counts},
            second_moment=moments,
            num_tokens=counts,
            abs_mean={which: means[which.name] for which in counts if means},
            low={which: centres[f"{which.name}.low"] for which in counts if centres},
            high={which: centres[f"{which.name}.high"] for which in counts if centres},
            centre={which: centres[f"{which.name}.centre"] for which in counts if centres},
            mean={which: centres[f"{which.name}.mean"] for which in counts if centres},
        )

    def _read(self, index: int, group: str, what: str) -> dict[str, torch.Tensor]:
        stored = load_tensors(self._path(index, group, what))
        assert stored is not None
        return stored[0]

    def _save(self, index: int, group: str, found: GroupStatistics) -> None:
        """Second moments first: ranges tell that the rest of an entry may be there."""
        for which, moment in found.second_moment.items():
            save_tensors(self._path(index, group, _moment_of(which)), {"second_moment": moment}, {})
        if found.abs_mean:
            means = {which.name: mean for which, mean in found.abs_mean.items()}
            save_tensors(self._path(index, group, "means"), means, {})
        if found.centre:
            parts = {"low": found.low, "high": found.high, "centre": found.centre, "mean": found.mean}
            tensors = {f"{which.name}.{part}": one for part, by in parts.items() for which, one in by.items()}
            save_tensors(self._path(index, group, "centres"), tensors, {})
        counts = {which.name: count for which, count in found.num_tokens.items()}
        ranges = {which.name: found.abs_max[which] for which in found.num_tokens}
        save_tensors(self._path(index, group, "ranges"), ranges, {"num_tokens": counts})
