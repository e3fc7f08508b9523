"""Statistics of the input of a group of linears, by modality.

Shapes: N tokens, D input channels. Sums are float64 and run in the order of the updates, so the same batches in
the same order give the same bits; another order changes only the last bits of the second moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from masq import parallel
from masq.errors import ModelError, NumericalError
from masq.models.base import Modality

_TOKENS = tuple(which for which in Modality if which is not Modality.PADDING)
# Rows converted to float64 at a time: bounds the temporary without slowing the product.
_ROWS_PER_CHUNK = 4096
# The moment is symmetric: of 4 x 4 blocks of it, 10 are computed.
_COLUMN_BLOCKS = 4


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """What a stage may know of the input of a group of linears.

    A modality that never occurred has no key. ``second_moment``, ``abs_mean`` and ``rows`` hold those that were asked
    for.

    Attributes:
        abs_max: max |x_i| by channel, float32 [D].
        second_moment: X^T X / N, float64 [D, D], symmetric.
        num_tokens: N.
        abs_mean: mean |x_i| by channel, float64 [D].
        rows: inputs of the tokens of a ``TokenSample``, float32 [n, D].
        sensitivity: how much an error of the modality's rows counts; a modality without an entry counts 1.
        low: min x_i by channel, float32 [D], where centres were asked for.
        high: max x_i by channel, float32 [D], where centres were asked for.
        centre: c, the point with the least mean |x - c|^2 / max|x|^2, float64 [D], where it was asked for: what a
            scale per token rounds away is relative to the largest value of the token.
        mean: E x by channel, float64 [D], where centres were asked for.
    """

    abs_max: dict[Modality, torch.Tensor] = field(default_factory=dict)
    second_moment: dict[Modality, torch.Tensor] = field(default_factory=dict)
    num_tokens: dict[Modality, int] = field(default_factory=dict)
    abs_mean: dict[Modality, torch.Tensor] = field(default_factory=dict)
    rows: dict[Modality, torch.Tensor] = field(default_factory=dict)
    sensitivity: Mapping[Modality, float] = field(default_factory=dict)
    low: dict[Modality, torch.Tensor] = field(default_factory=dict)
    high: dict[Modality, torch.Tensor] = field(default_factory=dict)
    centre: dict[Modality, torch.Tensor] = field(default_factory=dict)
    mean: dict[Modality, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TokenSample:
    """Tokens whose inputs are kept as they are: of each modality at most so many, spread over the calibration set.

    Attributes:
        kept: by modality, bool [N] over its tokens in the order of the batches.
    """

    kept: Mapping[Modality, torch.Tensor]

    @property
    def size(self) -> int:
        """How many tokens are kept."""
        return sum(int(kept.sum()) for kept in self.kept.values())

    @classmethod
    def draw(cls, modalities: Iterable[torch.Tensor], limit: int, seed: int) -> TokenSample:
        """Draw at most ``limit`` tokens of each modality; the choice depends on (seed, modality) and the counts alone.

        Several processes draw what one would: tokens are numbered in the order of whole batches.

        Args:
            modalities: int8 [B, T] by batch, -1 where padded.
            limit: tokens to keep, all if there are no more.
            seed: of the run.
        """
        batches = [modality.cpu() for modality in modalities]
        kept = {}
        for which in Modality:
            if which is Modality.PADDING:
                continue
            own = [(batch == which).sum(1) for batch in batches]
            starts, total = _first_numbers(own)
            if total:
                digest = hashlib.sha256(f"tokens|{seed}|{which.name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                drawn = torch.zeros(total, dtype=torch.bool)
                drawn[torch.randperm(total, generator=generator)[:limit]] = True
                parts = zip(starts.tolist(), torch.cat(own).tolist(), strict=True)
                kept[which] = torch.cat([drawn[start : start + count] for start, count in parts])
        return cls(kept)


def _first_numbers(counts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Number of the first token of each sample among those of all processes, and how many there are.

    Args:
        counts: tokens of each sample [B] by batch; sample b of process r is number ``b * size + r`` of its batch.

    Returns:
        int64, one for every sample of this process; the total.
    """
    longest = int(parallel.greatest(torch.tensor(max((len(one) for one in counts), default=0))))
    own = torch.zeros(len(counts), longest, dtype=torch.long)
    for row, one in zip(own, counts, strict=True):
        row[: len(one)] = one
    every = parallel.stacked(own).permute(1, 2, 0)
    ends = every.flatten().cumsum(0)
    starts = (ends - every.flatten()).view(every.shape)[..., parallel.rank()]
    own_starts = [row[: len(one)] for row, one in zip(starts, counts, strict=True)]
    return torch.cat([*own_starts, own.new_zeros(0)]), int(every.sum())


class AbsMax:
    """Running max |x_i| of each channel."""

    def __init__(self, num_channels: int, device: torch.device) -> None:
        self._value = torch.zeros(num_channels, device=device)

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows [N, D] of one modality, N >= 1."""
        self._value = torch.maximum(self._value, torch.maximum(rows.amax(0), -rows.amin(0)).float())

    def join(self) -> None:
        """Take in what other processes have seen."""
        self._value = parallel.greatest(self._value)

    def result(self) -> torch.Tensor:
        """Float32 [D]."""
        return self._value


class Centre:
    """Running ends and mean of each channel, and the mean of rows that are weighted by 1 / max|x|^2."""

    def __init__(self, num_channels: int, device: torch.device) -> None:
        zeros = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self.low, self.high = torch.full_like(zeros, torch.inf).float(), torch.full_like(zeros, -torch.inf).float()
        self._sum, self._weighted_sum = zeros, zeros.clone()
        self._weights, self._num_tokens = 0.0, 0.0

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows [N, D] of one modality, N >= 1; rows of zeros have no say."""
        self.low = torch.minimum(self.low, rows.amin(0).float())
        self.high = torch.maximum(self.high, rows.amax(0).float())
        exact = rows.double()
        largest = exact.abs().amax(1)
        weights = torch.where(largest > 0, largest.square().reciprocal(), 0.0)
        self._sum = self._sum + exact.sum(0)
        self._weighted_sum = self._weighted_sum + weights @ exact
        self._weights += float(weights.sum())
        self._num_tokens += len(rows)

    def join(self) -> None:
        """Take in what other processes have seen."""
        self.low, self.high = parallel.least(self.low), parallel.greatest(self.high)
        self._sum, self._weighted_sum = parallel.summed(self._sum), parallel.summed(self._weighted_sum)
        counts = torch.tensor([self._weights, self._num_tokens], dtype=torch.float64, device=self._sum.device)
        self._weights, self._num_tokens = parallel.summed(counts).tolist()

    @property
    def mean(self) -> torch.Tensor:
        """E x, float64 [D]."""
        return self._sum / self._num_tokens

    @property
    def centre(self) -> torch.Tensor:
        """The weighted mean, float64 [D]."""
        return self._weighted_sum / self._weights if self._weights > 0 else self._weighted_sum


class SecondMoment:
    """Running sum of x x^T."""

    def __init__(self, num_channels: int, device: torch.device) -> None:
        self._sum = torch.zeros(num_channels, num_channels, dtype=torch.float64, device=device)
        self._num_tokens = 0

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows [N, D] of one modality, N >= 1."""
        size = -(-rows.shape[1] // _COLUMN_BLOCKS)
        for chunk in rows.split(_ROWS_PER_CHUNK):
            exact = chunk.double()
            # Blocks on and right of the diagonal; the others mirror them.
            for start in range(0, rows.shape[1], size):
                self._sum[start : start + size, start:].addmm_(exact[:, start : start + size].t(), exact[:, start:])
        self._num_tokens += rows.shape[0]

    def join(self) -> None:
        """Take in what other processes have seen."""
        self._sum = parallel.summed(self._sum)
        self._num_tokens = int(parallel.summed(torch.tensor(self._num_tokens, device=self._sum.device)))

    def result(self) -> torch.Tensor:
        """Float64 [D, D], the mean over tokens, made exactly symmetric."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).t()) / self._num_tokens


class GroupAccumulator:
    """Collects ``GroupStatistics`` batch by batch; padding touches nothing.

    Args:
        second_moment: whether X^T X is wanted besides the absolute maximum, or of which modalities.
        sample: tokens whose inputs are wanted, and with them the mean |x_i|.
        centre: whether centres are wanted, and with them both ends of each channel.
    """

    def __init__(
        self, second_moment: bool | Collection[Modality], sample: TokenSample | None = None, centre: bool = False
    ) -> None:
        everything = tuple(Modality) if second_moment else ()
        self._second_moment_of = everything if isinstance(second_moment, bool) else tuple(second_moment)
        self._sample = sample
        self._wants_centre = centre
        self._abs_max: dict[Modality, AbsMax] = {}
        self._centre: dict[Modality, Centre] = {}
        self._abs_sum: dict[Modality, torch.Tensor] = {}
        self._rows: dict[Modality, list[torch.Tensor]] = {}
        self._second_moment: dict[Modality, SecondMoment] = {}
        self._num_tokens: dict[Modality, int] = {}
        self._like = torch.empty(0)
        """Of no rows: the number of channels and where they are."""

    @torch.no_grad()
    def update(self, x: torch.Tensor, modality: torch.Tensor) -> None:
        """Take in one batch.

        Args:
            x: floating point [..., D].
            modality: int8 [...], -1 where padded.

        Raises:
            ModelError: the shapes do not match, or a modality number is unknown.
        """
        if x.shape[:-1] != modality.shape:
            raise ModelError(
                "every token needs one modality",
                value=f"activations {tuple(x.shape)}, modalities {tuple(modality.shape)}",
                remedy="pass the modality of the batch that produced the activations",
            )
        rows = x.reshape(-1, x.shape[-1])
        self._like = rows[:0]
        flat = modality.reshape(-1).to(rows.device)
        for number, count in zip(*(t.tolist() for t in flat.unique(return_counts=True)), strict=True):
            which = _known(number)
            if which is not Modality.PADDING:
                self._update_one(which, rows if count == rows.shape[0] else rows[flat == number])

    def _update_one(self, which: Modality, rows: torch.Tensor) -> None:
        start = self._num_tokens.get(which, 0)
        self._num_tokens[which] = start + rows.shape[0]
        self._abs_max.setdefault(which, AbsMax(rows.shape[1], rows.device)).update(rows)
        if self._sample is not None:
            total = rows.abs().sum(0, dtype=torch.float64)
            self._abs_sum[which] = total + self._abs_sum[which] if which in self._abs_sum else total
            kept = self._sample.kept[which][start : start + rows.shape[0]].to(rows.device)
            self._rows.setdefault(which, []).append(rows[kept].float())
        if self._wants_centre:
            self._centre.setdefault(which, Centre(rows.shape[1], rows.device)).update(rows)
        if which in self._second_moment_of:
            self._second_moment.setdefault(which, SecondMoment(rows.shape[1], rows.device)).update(rows)

    def _join(self) -> None:
        """Take in what other processes have seen, of modalities that this one may have no token of."""
        own = torch.tensor([self._num_tokens.get(which, 0) for which in _TOKENS])
        sizes = self._like.shape[-1], self._like.device
        for which, count in zip(_TOKENS, parallel.summed(own).tolist(), strict=True):
            if not count:
                continue
            self._num_tokens[which] = count
            self._abs_max.setdefault(which, AbsMax(*sizes)).join()
            if self._wants_centre:
                self._centre.setdefault(which, Centre(*sizes)).join()
            if which in self._second_moment_of:
                self._second_moment.setdefault(which, SecondMoment(*sizes)).join()
            if self._sample is not None:
                nothing = torch.zeros(sizes[0], dtype=torch.float64, device=sizes[1])
                self._abs_sum[which] = parallel.summed(self._abs_sum.get(which, nothing))
                self._rows[which] = [parallel.concatenated(torch.cat(self._rows.get(which, [self._like.float()])))]

    def result(self) -> GroupStatistics:
        """The statistics so far, of all processes, modalities in ascending order; nothing can be taken in afterwards.

        Raises:
            NumericalError: a token that counts held NaN or infinity.
        """
        if parallel.size() > 1:
            self._join()
        statistics = GroupStatistics(
            abs_max={which: self._abs_max[which].result() for which in sorted(self._abs_max)},
            second_moment={which: self._second_moment[which].result() for which in sorted(self._second_moment)},
            num_tokens={which: self._num_tokens[which] for which in sorted(self._num_tokens)},
            abs_mean={which: self._abs_sum[which] / self._num_tokens[which] for which in sorted(self._abs_sum)},
            rows={which: torch.cat(self._rows[which]) for which in sorted(self._rows)},
            low={which: one.low for which, one in sorted(self._centre.items())},
            high={which: one.high for which, one in sorted(self._centre.items())},
            centre={which: one.centre for which, one in sorted(self._centre.items())},
            mean={which: one.mean for which, one in sorted(self._centre.items())},
        )
        for which, abs_max in statistics.abs_max.items():
            if not bool(torch.isfinite(abs_max).all()):
                raise NumericalError(
                    f"{which.name.lower()} activations must be finite",
                    value="NaN or infinity",
                    remedy="raise model.dtype to float32, or check the sample that produced them",
                )
        return statistics


def _known(number: int) -> Modality:
    try:
        return Modality(number)
    except ValueError:
        raise ModelError(
            "a modality must be known",
            value=number,
            remedy=f"use one of {', '.join(f'{m.value} {m.name}' for m in Modality)}",
        ) from None
