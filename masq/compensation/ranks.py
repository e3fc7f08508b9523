"""Ranks of the corrections of a block where they pay most: water-filling under one budget of bytes."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Key = TypeVar("Key")


@dataclass(frozen=True)
class Candidate(Generic[Key]):
    """A correction that can be given components.

    Attributes:
        key: which it is.
        gains: what the first, second, .. component is worth, descending: squared singular values, weighted.
        cost: of one component: d_in + d_out.
    """

    key: Key
    gains: Sequence[float]
    cost: int


def fill(candidates: Sequence[Candidate[Key]], budget: int) -> Mapping[Key, int]:
    """Number of components of each candidate, the whole within ``budget``.

    Components are taken by gain per cost. Gains of a candidate descend, so that is optimal for what it spends; what it
    leaves of the budget is less than the largest cost, unless every component is taken.

    Args:
        candidates: with gains that descend.
        budget: sum of costs at most.

    Returns:
        By key, every candidate among them.
    """
    taken = {one.key: 0 for one in candidates}
    heap = [(-one.gains[0] / one.cost, index) for index, one in enumerate(candidates) if len(one.gains)]
    heapq.heapify(heap)
    left = budget
    while heap:
        _, index = heapq.heappop(heap)
        one = candidates[index]
        if one.cost > left:
            # Others may still fit; this one never will.
            continue
        left -= one.cost
        taken[one.key] += 1
        if taken[one.key] < len(one.gains):
            heapq.heappush(heap, (-one.gains[taken[one.key]] / one.cost, index))
    return taken
