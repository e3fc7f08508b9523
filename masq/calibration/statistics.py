"""Statistics of the input of a group of linears, by modality.

Shapes: N tokens, D input channels. Sums are float64 and run in the order of the updates, so the same batches in
the same order give the same bits; another order changes only the last bits of the second moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from masq.errors import ModelError, NumericalError
from masq.models.base import Modality

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

        Args:
            modalities: int8 [B, T] by batch, -1 where padded.
            limit: tokens to keep, all if there are no more.
            seed: of the run.
        """
        numbers = torch.cat([modality.reshape(-1).cpu() for modality in modalities]).long() + 1
        counts = torch.bincount(numbers, minlength=len(Modality)).tolist()
        kept = {}
        for which in Modality:
            count = counts[int(which) + 1]
            if which is not Modality.PADDING and count:
                digest = hashlib.sha256(f"tokens|{seed}|{which.name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                kept[which] = torch.zeros(count, dtype=torch.bool)
                kept[which][torch.randperm(count, generator=generator)[:limit]] = True
        return cls(kept)


class AbsMax:
    """Running max |x_i| of each channel."""

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows [N, D] of one modality, N >= 1."""
        highest = torch.maximum(rows.amax(0), -rows.amin(0)).float()
        self._value = highest if self._value is None else torch.maximum(self._value, highest)

    def result(self) -> torch.Tensor:
        """Float32 [D]."""
        assert self._value is not None
        return self._value


class Centre:
    """Running ends and mean of each channel, and the mean of rows that are weighted by 1 / max|x|^2."""

    def __init__(self, num_channels: int, device: torch.device) -> None:
        zeros = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self.low, self.high = torch.full_like(zeros, torch.inf).float(), torch.full_like(zeros, -torch.inf).float()
        self._sum, self._weighted_sum = zeros, zeros.clone()
        self._weights, self._num_tokens = 0.0, 0

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

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._num_tokens = 0

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows [N, D] of one modality, N >= 1."""
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        size = -(-rows.shape[1] // _COLUMN_BLOCKS)
        for chunk in rows.split(_ROWS_PER_CHUNK):
            exact = chunk.double()
            # Blocks on and right of the diagonal; the others mirror them.
            for start in range(0, rows.shape[1], size):
                self._sum[start : start + size, start:].addmm_(exact[:, start : start + size].t(), exact[:, start:])
        self._num_tokens += rows.shape[0]

    def result(self) -> torch.Tensor:
        """Float64 [D, D], the mean over tokens, made exactly symmetric."""
        assert self._sum is not None
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
        flat = modality.reshape(-1).to(rows.device)
        for number, count in zip(*(t.tolist() for t in flat.unique(return_counts=True)), strict=True):
            which = _known(number)
            if which is not Modality.PADDING:
                self._update_one(which, rows if count == rows.shape[0] else rows[flat == number])

    def _update_one(self, which: Modality, rows: torch.Tensor) -> None:
        start = self._num_tokens.get(which, 0)
        self._num_tokens[which] = start + rows.shape[0]
        self._abs_max.setdefault(which, AbsMax()).update(rows)
        if self._sample is not None:
            total = rows.abs().sum(0, dtype=torch.float64)
            self._abs_sum[which] = total + self._abs_sum[which] if which in self._abs_sum else total
            kept = self._sample.kept[which][start : start + rows.shape[0]].to(rows.device)
            self._rows.setdefault(which, []).append(rows[kept].float())
        if self._wants_centre:
            self._centre.setdefault(which, Centre(rows.shape[1], rows.device)).update(rows)
        if which in self._second_moment_of:
            self._second_moment.setdefault(which, SecondMoment()).update(rows)

    def result(self) -> GroupStatistics:
        """The statistics so far, modalities in ascending order.

        Raises:
            NumericalError: a token that counts held NaN or infinity.
        """
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
