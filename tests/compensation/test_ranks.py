"""Water-filling: within the budget, as good as every other choice of its cost, nothing worth taking left."""

from __future__ import annotations

import itertools

import pytest
import torch

from masq.compensation.ranks import Candidate, fill


def problem(seed: int) -> list[Candidate[int]]:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(2, 6, (3,), generator=generator).tolist()
    return [
        Candidate(key, sorted(torch.rand(4, generator=generator).tolist(), reverse=True), cost)
        for key, cost in enumerate(costs)
    ]


def value(candidates: list[Candidate[int]], ranks: dict[int, int]) -> float:
    return sum(sum(one.gains[: ranks[one.key]]) for one in candidates)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0, 7, 15, 30, 1000])
def test_nothing_of_the_same_cost_is_worth_more(seed: int, budget: int) -> None:
    candidates = problem(seed)
    taken = dict(fill(candidates, budget))
    spent = sum(taken[one.key] * one.cost for one in candidates)
    assert spent <= budget
    everything = all(taken[one.key] == len(one.gains) for one in candidates)
    assert everything or budget - spent < max(one.cost for one in candidates)
    best = max(
        value(candidates, dict(enumerate(ranks)))
        for ranks in itertools.product(range(5), repeat=3)
        if sum(rank * one.cost for rank, one in zip(ranks, candidates, strict=True)) <= budget
    )
    largest_step = max(one.gains[0] for one in candidates)
    assert value(candidates, taken) >= best - largest_step


@pytest.mark.parametrize("budget", range(0, 40, 4))
def test_with_equal_costs_it_is_optimal(budget: int) -> None:
    candidates = [Candidate(one.key, one.gains, 4) for one in problem(1)]
    taken = dict(fill(candidates, budget))
    gains = sorted((gain for one in candidates for gain in one.gains), reverse=True)
    assert value(candidates, taken) == pytest.approx(sum(gains[: budget // 4]))


def test_candidates_without_components_are_there_with_rank_zero() -> None:
    assert fill([Candidate("a", [], 3), Candidate("b", [1.0], 3)], 10) == {"a": 0, "b": 1}
