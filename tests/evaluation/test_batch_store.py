from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from masq.evaluation.batch_store import BatchStore, ProgressLog, named_batches, run_batches
from masq.models.base import Sample

SAMPLES = [Sample(f"s-{index}", "prose", "", "text") for index in range(3)]
RESULTS = [{"id": f"s-{index}", "value": 0.1 * (index + 1) / 3} for index in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    store = BatchStore(tmp_path / "answers", {"max_new_tokens": 5})
    store.save("prose-0000", SAMPLES, RESULTS)
    return store


def test_floats_come_back_to_the_last_bit(store: BatchStore) -> None:
    assert store.load("prose-0000", SAMPLES) == RESULTS
    assert [path.name for path in store.folder.iterdir()] == ["prose-0000.json"]


def test_absent_batch_is_no_warning(store: BatchStore, caplog: pytest.LogCaptureFixture) -> None:
    assert store.load("prose-0001", SAMPLES) is None
    assert not caplog.records


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("0.1", "0.7", 1),
        lambda text: text.replace("s-1", "s-9"),
        lambda text: text.replace("sha256", "sha255"),
    ],
)
def test_damage_is_noticed(store: BatchStore, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    path = store.path("prose-0000")
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    assert store.load("prose-0000", SAMPLES) is None
    assert "prose-0000.json is damaged and is computed again" in caplog.text


def test_bytes_that_are_no_text(store: BatchStore, caplog: pytest.LogCaptureFixture) -> None:
    store.path("prose-0000").write_bytes(b"\xff\xfe\x00garbage")
    assert store.load("prose-0000", SAMPLES) is None
    assert "damaged" in caplog.text


def test_other_samples_or_settings_do_not_count(store: BatchStore, caplog: pytest.LogCaptureFixture) -> None:
    assert store.load("prose-0000", SAMPLES[::-1]) is None
    assert BatchStore(store.folder, {"max_new_tokens": 6}).load("prose-0000", SAMPLES) is None
    assert caplog.text.count("belongs to other samples or settings") == 2


def test_names_count_within_each_task() -> None:
    tasks = ["a", "a", "b", "a"]
    batches = [[Sample(f"{i}", task, "", "x")] for i, task in enumerate(tasks)]
    assert [name for name, _ in named_batches(batches)] == ["a-0000", "a-0001", "b-0000", "a-0002"]


def test_only_missing_batches_are_computed(tmp_path: Path) -> None:
    batches = named_batches([[sample] for sample in SAMPLES])
    computed: list[str] = []
    seen: list[tuple[str, int, int]] = []

    def compute(samples: Any) -> list[dict[str, Any]]:
        computed.extend(sample.id for sample in samples)
        return [{"id": sample.id} for sample in samples]

    def progress(*event: Any) -> None:
        seen.append(event)

    store = BatchStore(tmp_path)
    first = run_batches("stage", batches, compute, store, progress)
    assert seen == [("stage", done, 3) for done in range(4)]
    store.path("prose-0001").unlink()
    assert run_batches("stage", batches, compute, store, progress) == first
    assert computed == ["s-0", "s-1", "s-2", "s-1"]


def test_progress_log_tells_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="masq"):
        log = ProgressLog()
        log("answers", 0, 2)
        log("answers", 1, 2)
        log("answers", 2, 2)
    assert [record.getMessage().split(" |")[0] for record in caplog.records] == ["answers 1/2", "answers 2/2"]
    assert caplog.records[-1].getMessage().endswith("| 0 s left")


def test_results_are_readable_json(store: BatchStore) -> None:
    content = json.loads(store.path("prose-0000").read_text())
    assert content["key"] == {"ids": ["s-0", "s-1", "s-2"], "max_new_tokens": 5}
    assert content["results"] == RESULTS
