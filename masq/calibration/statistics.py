"""Statistics of the input of a group of linears, by modality.

Shapes: N tokens, D input channels. Sums are float64 and run in the order of the updates, so the same batches in
the same order give the same bits; another order changes only the last bits of the second moment.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from masq.errors import ModelError, NumericalError
from masq.models.base import Modality

# Rows converted to float64 at a time: bounds the temporary without slowing the product.
_ROWS_PER_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """What a stage may know of the input of a group of linears.

    A modality that never occurred has no key. ``second_moment`` holds those that were asked for.

    Attributes:
        abs_max: max |x_i| by channel, float32 [D].
        second_moment: X^T X / N, float64 [D, D], symmetric.
        num_tokens: N.
    """

    abs_max: dict[Modality, torch.Tensor] = field(default_factory=dict)
    second_moment: dict[Modality, torch.Tensor] = field(default_factory=dict)
    num_tokens: dict[Modality, int] = field(default_factory=dict)


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


class SecondMoment:
    """Running sum of x x^T."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._num_tokens = 0

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows [N, D] of one modality, N >= 1."""
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for chunk in rows.split(_ROWS_PER_CHUNK):
            exact = chunk.double()
            self._sum.addmm_(exact.t(), exact)
        self._num_tokens += rows.shape[0]

    def result(self) -> torch.Tensor:
        """Float64 [D, D], the mean over tokens, made exactly symmetric."""
        assert self._sum is not None
        return (self._sum + self._sum.t()) / (2 * self._num_tokens)


class GroupAccumulator:
    """Collects ``GroupStatistics`` batch by batch; padding touches nothing.

    Args:
        second_moment: whether X^T X is wanted besides the absolute maximum, or of which modalities.
    """

    def __init__(self, second_moment: bool | Collection[Modality]) -> None:
        everything = tuple(Modality) if second_moment else ()
        self._second_moment_of = everything if isinstance(second_moment, bool) else tuple(second_moment)
        self._abs_max: dict[Modality, AbsMax] = {}
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
        self._num_tokens[which] = self._num_tokens.get(which, 0) + rows.shape[0]
        self._abs_max.setdefault(which, AbsMax()).update(rows)
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
