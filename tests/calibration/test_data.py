from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet

from masq.calibration import data
from masq.errors import DataError
from masq.models.base import Sample

SCHEMA = pa.schema(
    [(name, pa.string()) for name in data.TEXT_COLUMNS] + [(name, pa.binary()) for name in data.MEDIA_COLUMNS]
)


def png(value: int, compress_level: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()


def flac(value: float, kind: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(64, value, np.float32), 16000, format=kind, subtype="PCM_16")
    return buffer.getvalue()


def make(task: str, number: int) -> Sample:
    media: dict[str, Any] = {}
    content = number + 100 * (task == "joint")
    if task in ("digits", "joint"):
        media["image"] = png(content)
    if task in ("speech", "joint"):
        media["audio"] = flac(content / 256)
    prose = task == "prose"
    return Sample(f"{task}-test-{number}", task, "" if prose else "what?", f"answer {number}", **media)


TASKS = ("digits", "speech", "joint", "prose")
SAMPLES = [make(task, number) for task in TASKS for number in range(10)]


def write(path: Path, samples: list[Sample] = SAMPLES, schema: pa.Schema = SCHEMA) -> Path:
    rows = [{name: getattr(sample, name) for name in SCHEMA.names} for sample in samples]
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "data.parquet")


def ids(samples: list[Sample]) -> list[str]:
    return [sample.id for sample in samples]


def test_all_samples_come_back_as_written(file: Path) -> None:
    assert data.load_samples(file) == SAMPLES
    assert data.load_samples(str(file), samples_per_task=10) == SAMPLES


def test_tasks_follow_the_order_asked_for(file: Path) -> None:
    loaded = data.load_samples(file, tasks=("prose", "digits"), samples_per_task=2)
    assert [sample.task for sample in loaded] == ["prose", "prose", "digits", "digits"]


def test_choice_depends_on_seed_and_task_alone(file: Path, tmp_path: Path) -> None:
    chosen = data.load_samples(file, samples_per_task=4, seed=7)
    again = data.load_samples(file, tasks=("joint",), samples_per_task=4, seed=7)
    assert ids(again) == [name for name in ids(chosen) if name.startswith("joint")]
    others = [ids(data.load_samples(file, tasks=("joint",), samples_per_task=4, seed=seed)) for seed in range(6)]
    assert len({tuple(other) for other in others}) > 1
    numbers = {
        task: [name.split("-")[2] for name in ids(chosen) if name.startswith(task)] for task in ("joint", "prose")
    }
    assert numbers["joint"] != numbers["prose"]


def test_smaller_choice_is_part_of_larger_one_in_file_order(file: Path) -> None:
    small = ids(data.load_samples(file, samples_per_task=3, seed=1))
    large = ids(data.load_samples(file, samples_per_task=6, seed=1))
    assert set(small) < set(large)
    assert [name for name in ids(SAMPLES) if name in large] == large


def test_choice_is_fixed_for_good(file: Path) -> None:
    """Golden: a change of the drawing rule changes every published calibration set."""
    chosen = data.load_samples(file, tasks=("digits",), samples_per_task=3, seed=0)
    assert ids(chosen) == ["digits-test-1", "digits-test-4", "digits-test-5"]


@pytest.mark.parametrize(
    ("modalities", "tasks"),
    [
        (("text", "vision"), ["digits", "prose"]),
        (("text", "audio"), ["speech", "prose"]),
        (("text",), ["prose"]),
        (("text", "vision", "audio"), ["digits", "speech", "joint", "prose"]),
    ],
)
def test_inactive_modalities_are_left_out(file: Path, modalities: tuple[str, ...], tasks: list[str]) -> None:
    loaded = data.load_samples(file, modalities=modalities)
    assert list(dict.fromkeys(sample.task for sample in loaded)) == tasks
    assert all(data.fits(sample, modalities) for sample in loaded)


def test_task_that_the_modalities_exclude_cannot_be_asked_for(file: Path) -> None:
    with pytest.raises(DataError, match="task joint must have samples of the active modalities"):
        data.load_samples(file, tasks=("joint",), modalities=("text", "vision"))


def test_no_sample_fits(tmp_path: Path) -> None:
    file = write(tmp_path / "speech.parquet", [make("speech", 1)])
    with pytest.raises(DataError, match="none of 1 tasks"):
        data.load_samples(file, modalities=("text", "vision"))


def test_unknown_task_lists_near_matches(file: Path) -> None:
    with pytest.raises(DataError, match=r"got: digit\).*Did you mean digits"):
        data.load_samples(file, tasks=("digit",))


def test_more_samples_than_there_are(file: Path) -> None:
    with pytest.raises(DataError, match="11 asked for, 10 available.*at most 10"):
        data.load_samples(file, samples_per_task=11)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        data.load_samples(tmp_path / "nothing.parquet")
    with pytest.raises(DataError, match="a folder"):
        data.load_samples(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="must be a complete Parquet file"):
        data.load_samples(file)


def test_damaged_pages(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:200] = bytes(192)
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match="must be a complete Parquet file"):
        data.load_samples(file)


@pytest.mark.parametrize("name", SCHEMA.names)
def test_missing_column(tmp_path: Path, name: str) -> None:
    schema = pa.schema([field for field in SCHEMA if field.name != name])
    with pytest.raises(DataError, match=f"must have the column {name}"):
        data.load_samples(write(tmp_path / "data.parquet", schema=schema))


def test_column_of_another_type(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**dict.fromkeys(SCHEMA.names, "a"), "image": "path.png", "audio": None}])
    parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(DataError, match="column image must be binary"):
        data.load_samples(tmp_path / "data.parquet")


def test_media_column_of_nulls_only(tmp_path: Path) -> None:
    row = {"id": "a", "task": "prose", "question": "", "answer": "once", "image": None, "audio": None}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    assert data.load_samples(tmp_path / "data.parquet") == [Sample("a", "prose", "", "once")]


def test_null_text_and_repeated_id(tmp_path: Path) -> None:
    broken = Sample("a", "prose", "", None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="column answer must have no null"):
        data.load_samples(write(tmp_path / "a.parquet", [broken]))
    with pytest.raises(DataError, match="every id must occur once.*prose-test-1"):
        data.load_samples(write(tmp_path / "b.parquet", [make("prose", 1), make("prose", 1)]))


def test_batches_hold_one_task_and_every_sample_once() -> None:
    mixed = [SAMPLES[index] for index in np.random.default_rng(0).permutation(len(SAMPLES))]
    cut = data.batches(mixed, 4)
    assert all(len({sample.task for sample in batch}) == 1 for batch in cut)
    assert [len(batch) for batch in cut] == [4, 4, 2] * 4
    for task in ("digits", "speech", "joint", "prose"):
        flat = [sample for batch in cut for sample in batch if sample.task == task]
        assert flat == [sample for sample in mixed if sample.task == task]


def test_limit_per_task() -> None:
    assert ids(data.limit_per_task(SAMPLES, 2)) == [f"{t}-test-{n}" for t in TASKS for n in range(2)]
    assert data.limit_per_task(SAMPLES, None) == SAMPLES
    assert data.limit_per_task(SAMPLES, 99) == SAMPLES


def test_dataset_hash_sees_content_order_and_ids() -> None:
    base = data.dataset_hash(SAMPLES)
    assert base == data.dataset_hash(list(SAMPLES))
    assert len(base) == 64
    changed = [
        SAMPLES[::-1],
        SAMPLES[1:],
        [*SAMPLES[:-1], Sample("other", "prose", "", SAMPLES[-1].answer)],
        [*SAMPLES[:-1], Sample(SAMPLES[-1].id, "prose", "", "other")],
        [Sample(SAMPLES[0].id, "digits", "what?", "answer 0", image=png(99)), *SAMPLES[1:]],
    ]
    assert len({base, *map(data.dataset_hash, changed)}) == len(changed) + 1


def test_content_hash_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample("counted", "digits", "q", "only here", image=png(17))
    calls: list[str] = []
    original: Callable[[Sample], dict[str, str]] = Sample.content_hashes
    monkeypatch.setattr(Sample, "content_hashes", lambda self: calls.append(self.id) or original(self))
    first = data.content_hashes(sample)
    assert data.content_hashes(Sample("again", "digits", "q", "only here", image=png(17))) == first
    assert calls == ["counted"]


def test_disjoint_sets_pass() -> None:
    data.check_disjoint(SAMPLES[:20], SAMPLES[20:])


def test_overlap_is_found_behind_other_ids_and_containers() -> None:
    calibration = [
        Sample("c-0", "digits", "q", "a", image=png(5, compress_level=0)),
        Sample("c-1", "speech", "q", "a", audio=flac(0.25)),
        Sample("c-2", "speech", "q", "b", audio=flac(0.25)),
    ]
    evaluation = [
        Sample("e-0", "digits", "q", "a", image=png(5, compress_level=9)),
        Sample("e-1", "speech", "q", "a", audio=flac(0.25, kind="WAV")),
        Sample("e-2", "speech", "put in other words", "c", audio=flac(0.25)),
        Sample("e-3", "joint", "q", "yes", image=png(5), audio=flac(0.5)),
        Sample("e-4", "joint", "q", "yes", image=png(6), audio=flac(0.5)),
    ]
    assert calibration[0].image != evaluation[0].image
    with pytest.raises(DataError) as caught:
        data.check_disjoint(calibration, evaluation)
    assert caught.value.value == "e-0 = c-0, e-1 = c-1, e-2 = c-1, e-3 = c-0"


def test_texts_are_compared_where_there_are_no_media() -> None:
    with pytest.raises(DataError, match="e-0 = c-0"):
        data.check_disjoint([Sample("c-0", "prose", "", "a passage")], [Sample("e-0", "prose", "", "a passage")])
    data.check_disjoint([Sample("c-0", "prose", "", "a passage")], [Sample("e-0", "prose", "", "another")])
    pictures = [[Sample(f"{n}", "read", "q", "a", image=png(n))] for n in (1, 2)]
    data.check_disjoint(*pictures)


def test_long_overlaps_are_cut() -> None:
    with pytest.raises(DataError, match=r"and 35 more"):
        data.check_disjoint(SAMPLES, SAMPLES)


CHOICE = Sample("choice-1", "choice", "The cat", "sat", choices=("flew", "sat"))
WITH_CHOICES = [make("digits", 1), CHOICE, make("prose", 1)]


def write_choices(path: Path, lists: list[Any], kind: pa.DataType | None = None) -> Path:
    """WITH_CHOICES with another column ``choices``."""
    rows = [{name: getattr(sample, name) for name in SCHEMA.names} for sample in WITH_CHOICES]
    kind = pa.list_(pa.string()) if kind is None else kind
    table = pa.Table.from_pylist(rows, schema=SCHEMA).append_column(data.CHOICES, pa.array(lists, kind))
    parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
@pytest.mark.parametrize("none", [None, []])
def test_choices_are_an_optional_column_of_lists(tmp_path: Path, kind: pa.DataType, none: Any) -> None:
    file = write_choices(tmp_path / "data.parquet", [none, ["flew", "sat"], none], kind)
    loaded = data.load_samples(file)
    assert loaded == WITH_CHOICES
    assert [sample.choices for sample in loaded] == [(), ("flew", "sat"), ()]
    assert data.load_samples(file, modalities=("text",)) == WITH_CHOICES[1:]


def test_a_column_of_choices_may_be_null_or_absent(tmp_path: Path) -> None:
    rows = [replace(sample, choices=()) for sample in WITH_CHOICES]
    assert data.load_samples(write_choices(tmp_path / "a.parquet", [None] * 3, pa.null())) == rows
    assert data.load_samples(write(tmp_path / "b.parquet", WITH_CHOICES)) == rows


def test_wrong_choices_are_refused(tmp_path: Path) -> None:
    def load(lists: list[Any], kind: pa.DataType | None = None) -> None:
        data.load_samples(write_choices(tmp_path / "data.parquet", lists, kind))

    with pytest.raises(DataError, match="column choices must be a list of strings"):
        load(["a", "b", None], pa.string())
    with pytest.raises(DataError, match="column choices must be a list of strings"):
        load([None, [1, 2], None], pa.list_(pa.int64()))
    with pytest.raises(DataError, match=r"no choice may be null \(got: row 1\)"):
        load([None, ["sat", None], None])
    with pytest.raises(DataError, match=r"answer must be among the choices \(got: sample choice-1: 'sat'\)"):
        load([None, ["flew", "sits"], None])
    with pytest.raises(DataError, match=r"text alone \(got: sample digits-test-1"):
        load([["answer 1", "other"], None, None])


def test_hashes_see_choices_and_the_cache_does_not_mix_them_up() -> None:
    variants = [
        CHOICE,
        replace(CHOICE, choices=("sat", "flew")),
        replace(CHOICE, choices=("flew", "sat", "ran")),
        replace(CHOICE, choices=()),
    ]
    assert len({data.dataset_hash([sample]) for sample in variants}) == len(variants)


def test_a_context_is_shown_whatever_follows_it() -> None:
    with pytest.raises(DataError, match="e-0 = choice-1"):
        data.check_disjoint(
            [CHOICE], [replace(CHOICE, id="e-0", answer="slept", choices=("slept", "swam"), task="other")]
        )
    data.check_disjoint([CHOICE], [replace(CHOICE, id="e-1", question="The dog")])


KINDS = {"read": "vision", "digits": "vision", "speech": "audio", "same": "joint", "tale": "text", "manual": "text"}


@pytest.mark.parametrize("total", [1, 7, 32, 128, 131])
@pytest.mark.parametrize("mix", [None, {"text": 1, "vision": 1, "audio": 1}, {"text": 0.2, "audio": 0.3, "joint": 3}])
def test_shares_sum_to_the_total_and_are_in_proportion(total: int, mix: Any) -> None:
    counts = data.share_out(total, mix, KINDS)
    assert list(counts) == list(KINDS)
    assert sum(counts.values()) == total
    shares = mix or {kind: list(KINDS.values()).count(kind) for kind in KINDS.values()}
    for kind in set(KINDS.values()):
        own = [count for task, count in counts.items() if KINDS[task] == kind]
        assert max(own) - min(own) <= 1
        assert abs(sum(own) - total * shares.get(kind, 0) / sum(shares.values())) < (1 if mix else len(own))


def test_a_share_for_a_kind_that_is_not_there() -> None:
    with pytest.raises(DataError, match="joint; there are text, vision"):
        data.share_out(8, {"text": 1, "joint": 1}, {"tale": "text", "read": "vision"})


def test_a_mix_is_drawn_from_the_tasks_of_each_kind(file: Path) -> None:
    drawn = data.load_samples(file, seed=3, total=9, mix={"text": 2, "vision": 1})
    held = [sample.modalities for sample in drawn]
    assert (len(drawn), sum(len(one) == 1 for one in held)) == (9, 6)
    alike = data.load_samples(file, seed=3, total=9)
    assert len(alike) == 9
    assert {sample.task for sample in alike} == {sample.task for sample in SAMPLES}
