"""The cache of statistics gives what a plain collection gives, and computes only what nobody asked for before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masq.calibration.cache import Request, StatisticsCache
from masq.calibration.statistics import GroupStatistics, TokenSample
from masq.errors import DataError
from masq.models.base import GROUPS, Modality
from tests.nano_fixtures import Nano, nano_model  # noqa: F401

REAL = (Modality.TEXT, Modality.VISION, Modality.AUDIO)


def equal(first: dict[str, GroupStatistics], second: dict[str, GroupStatistics]) -> bool:
    def same(a: GroupStatistics, b: GroupStatistics) -> bool:
        parts = ("abs_max", "second_moment", "abs_mean", "rows", "low", "high", "centre", "mean")
        # A sample of no tokens gives rows of none, or no rows.
        held = [{part: {m: t for m, t in getattr(one, part).items() if t.numel()} for part in parts} for one in (a, b)]
        pairs = [(held[0][part], held[1][part]) for part in parts]
        return a.num_tokens == b.num_tokens and all(
            x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs
        )

    return first.keys() == second.keys() and all(same(first[group], second[group]) for group in first)


def collect(cache: StatisticsCache, nano: Nano, request: Request) -> dict[str, GroupStatistics]:
    return cache.collect(0, request, nano.adapter.blocks()[0], nano.hidden, nano.replay)


def plain(nano: Nano, request: Request) -> dict[str, GroupStatistics]:
    return request.collect(nano.adapter.blocks()[0], nano.hidden, nano.replay)


def sample(nano: Nano, limit: int) -> TokenSample:
    return TokenSample.draw([batch.modality for batch in nano.replay], limit, 0)


def test_same_bits_in_whatever_order_requests_come(nano_model: Nano, tmp_path: Path) -> None:  # noqa: F811
    requests = [
        Request(("qkv",)),
        Request(("qkv", "gate_up"), ("down",), (Modality.AUDIO,)),
        Request((), tuple(GROUPS)),
        Request(("qkv", "down"), ("qkv",), sample=sample(nano_model, 0)),
        Request(("qkv", "gate_up"), ("gate_up", "down"), sample=sample(nano_model, 5)),
        Request(("qkv",), ("output",), centres=("qkv", "down")),
        Request(centres=("gate_up",)),
        Request(),
    ]
    for order in (requests, requests[::-1]):
        cache = StatisticsCache(tmp_path / str(order is requests))
        for request in order:
            assert equal(collect(cache, nano_model, request), plain(nano_model, request))
        for request in order:
            assert cache.covers(0, request) == (not request.rows_of)
            assert equal(collect(cache, nano_model, request), plain(nano_model, request))


def test_what_is_known_is_not_computed_again(nano_model: Nano, tmp_path: Path) -> None:  # noqa: F811
    cache = StatisticsCache(tmp_path)
    request = Request(("qkv", "output"), ("output", "down"))
    assert not cache.covers(0, request)
    first = collect(cache, nano_model, request)
    assert cache.covers(0, request)
    assert not cache.covers(1, request)
    assert not cache.covers(0, replace(request, sample=sample(nano_model, 0)))
    block = nano_model.adapter.blocks()[0]
    again = cache.collect(0, request, block, nano_model.hidden[:1], nano_model.replay[:1])
    assert equal(again, first)


def test_moments_of_other_modalities_are_added(nano_model: Nano, tmp_path: Path) -> None:  # noqa: F811
    cache = StatisticsCache(tmp_path)
    assert set(collect(cache, nano_model, Request((), ("qkv",), (Modality.TEXT,)))["qkv"].second_moment) == {0}
    assert not cache.covers(0, Request((), ("qkv",)))
    assert set(collect(cache, nano_model, Request((), ("qkv",)))["qkv"].second_moment) == set(REAL)


def test_a_modality_that_never_occurs_is_not_missed(nano_model: Nano, tmp_path: Path) -> None:  # noqa: F811
    cache = StatisticsCache(tmp_path)
    block, index = nano_model.adapter.blocks()[0], len(nano_model.replay) - 1
    hidden, replay = nano_model.hidden[index:], nano_model.replay[index:]
    found = cache.collect(0, Request((), ("qkv",)), block, hidden, replay)
    assert set(found["qkv"].num_tokens) == {Modality.TEXT}
    assert cache.covers(0, Request((), ("qkv",)))


def test_a_damaged_file_is_named(nano_model: Nano, tmp_path: Path) -> None:  # noqa: F811
    cache = StatisticsCache(tmp_path)
    collect(cache, nano_model, Request((), ("qkv",)))
    for file in tmp_path.glob("*moment-vision*"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="moment-vision"):
        collect(cache, nano_model, Request((), ("qkv",)))
