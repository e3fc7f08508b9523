"""One run end to end on a tiny model: record, skipping, crashes, sweeps without Hydra."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lmms_eval.api.model import lmms

from masq import run as run_module
from masq.compose import compose
from masq.config import RunConfig, decode
from masq.errors import ConfigError, DataError
from masq.evaluation.evaluate import evaluate
from masq.finished import load_finished
from masq.inputs import load_data
from masq.models.base import Sample
from masq.models.zoo import nano
from masq.modules.footprint import footprint
from masq.plan import plan
from masq.report.record import RunRecord, comparable, read_record
from masq.report.table import table
from masq.run import run
from tests.killing import kill_all

TASKS = {"read": ("vision",), "speech": ("audio",), "same": ("vision", "audio"), "manual": (), "choice": ()}


def write_split(path: Path, split: str, count: int, seed: int) -> Path:
    """A Parquet split with random media and texts."""
    samples: list[Sample] = []
    for position, (task, kinds) in enumerate(TASKS.items()):
        for index, sample in enumerate(nano.random_samples(kinds, count, seed=seed + position)):
            sample = replace(sample, id=f"{task}-{split}-{index}", task=task)
            if task == "manual":
                text = f"{sample.question} {sample.answer} {sample.question}"
                sample = replace(sample, question="", answer=text)
            if task == "choice":
                sample = replace(sample, choices=(f"{sample.answer} again", sample.answer, "or not"))
            samples.append(sample)
    names = ("id", "task", "question", "answer", "image", "audio", "choices")
    columns = {
        key: [getattr(s, key) or None if key == "choices" else getattr(s, key) for s in samples] for key in names
    }
    types = [pa.string()] * 4 + [pa.binary()] * 2 + [pa.list_(pa.string())]
    pq.write_table(pa.table({k: pa.array(v, t) for (k, v), t in zip(columns.items(), types, strict=True)}), path)
    return path


METHODS = {
    "none": {"rounding": {"kind": "none"}},
    "rtn": {},
    "smoothquant": {"smoothing": {"kind": "shared"}},
    "mas": {
        "smoothing": {"kind": "modality_learned", "epochs": 1},
        "rounding": {"kind": "nearest", "per_modality": True},
    },
    "masquant": {
        "smoothing": {"kind": "modality_learned", "epochs": 1},
        "compensation": {"kind": "whitened_low_rank", "rank_ratio": 0.1},
    },
    "smoothquant_learned": {"smoothing": {"kind": "shared_learned", "epochs": 1}},
    "awq": {"smoothing": {"kind": "awq"}, "rounding": {"kind": "nearest", "clip": {}}},
    "mbq": {"smoothing": {"kind": "mbq"}, "rounding": {"kind": "nearest", "clip": {}}},
    "rtn_clip": {"rounding": {"kind": "nearest", "clip": {}}},
    "gptq": {"rounding": {"kind": "gptq", "act_order": True}},
    "quarot_gptq": {"rotation": {"kind": "hadamard"}, "rounding": {"kind": "gptq"}},
    "qera": {
        "smoothing": {"kind": "shared", "source": "text"},
        "compensation": {"kind": "whitened_low_rank", "rank_ratio": 0.1},
    },
    "qera_int8": {
        "smoothing": {"kind": "shared", "source": "text"},
        "compensation": {"kind": "whitened_low_rank", "rank_ratio": 0.2, "dtype": "int8"},
    },
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Calibration and evaluation data."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "calibration": write_split(folder / "calibration.parquet", "calibration", 4, 100),
        "evaluation": write_split(folder / "evaluation.parquet", "evaluation", 3, 200),
    }


def plain(splits: dict[str, Path], root: Path, method: str = "rtn", **changes: object) -> dict:
    """The configuration of a cell as a plain dictionary."""
    scheme = changes.pop("scheme", "w4a6")
    bits = {"w4a6": (4, 6), "w8a8": (8, 8)}[scheme]
    return {
        "model": {
            "name": "nano_omni",
            "family": "qwen2_5_omni",
            "source": "zoo:nano_omni",
            "modalities": ["text", "vision", "audio"],
            "dtype": "float32",
        },
        "modality": {"name": "tri"},
        "scheme": {
            "name": scheme,
            "weight": {"bits": bits[0]},
            "activation": {"bits": bits[1], "granularity": "per_token"},
        },
        "method": {"name": method, **METHODS[method]},
        "calibration": {"samples_per_task": 4, "batch_size": 3, "source": str(splits["calibration"])},
        "evaluation": {"batch_size": 2, "max_new_tokens": 3, "source": str(splits["evaluation"])},
        "output": {"root": str(root)},
        **changes,
    }


def config(splits: dict[str, Path], root: Path, method: str = "rtn", **changes: object) -> RunConfig:
    return decode(plain(splits, root, method, **changes))


def with_sizes(cell: dict) -> dict:
    """The cell with the sizes of its model, from which a plan is made."""
    sizes = {"hidden_size": 48, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "intermediate_size": 88}
    cell["model"]["architecture"] = {**sizes, "vocab_size": 277, "tower_parameters": 0, "tied_embeddings": False}
    return cell


@contextmanager
def one_thread() -> Iterator[None]:
    """As a process that is killed runs, whose record is compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


Finished = Callable[[str], tuple[RunRecord, Path]]


@pytest.fixture(scope="module")
def finished(splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The record of a method that nothing interrupted, and its root, which is only read; made once."""

    @lru_cache
    def made(method: str) -> tuple[RunRecord, Path]:
        root = tmp_path_factory.mktemp(method)
        with one_thread():
            return run(config(splits, root, method)), root

    return made


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_end_to_end(splits: dict[str, Path], finished: Finished, method: str) -> None:
    record, root = finished(method)
    assert record.status == "finished"
    assert set(record.scores) == set(TASKS)
    assert record.scores["read"]["exact_match"]["n"] == record.scores["choice"]["acc_norm"]["n"] == 3
    assert set(record.fidelity["sqnr"]) == {"text", "vision", "audio"}
    assert set(record.fidelity["kl"]) == {"text", "vision", "audio", "joint"}
    folder = next(root.glob(f"nano_omni-tri-{'float' if method == 'none' else 'w4a6'}-*"))
    assert {"config.yaml", "log", "record.json"} <= {path.name for path in folder.iterdir()}
    assert comparable(read_record(folder)) == comparable(record)
    assert str(root) not in (folder / "record.json").read_text()
    sqnr = record.fidelity["sqnr"].values()
    if method == "none":
        assert set(sqnr) == {200.0}
        assert record.effective_bits["total"] == 32
        assert record.fidelity["kl"]["text"] == 0
        assert record.blocks == []
        assert any("ignored" in warning for warning in record.warnings)
    else:
        assert all(0 < value < 60 for value in sqnr)
        planned = plan(decode(with_sizes(plain(splits, root, method))))
        assert record.effective_bits["total"] == pytest.approx(planned.effective_bits)
        # mas stores three weights wherever it smooths, that is everywhere but in down.
        assert 4 < record.effective_bits["codes"] < 12 if method == "mas" else record.effective_bits["codes"] == 4
        assert (record.effective_bits["adapters"] > 0) == (method in ("masquant", "qera", "qera_int8"))
        assert len(record.blocks) == 3


@pytest.mark.parametrize("method", ["rtn", "masquant", "qera_int8", "quarot_gptq"])
def test_packed_execution_equals_the_simulation(
    splits: dict[str, Path], tmp_path: Path, finished: Finished, method: str
) -> None:
    simulated, _ = finished(method)
    packed = run(config(splits, tmp_path, method, execution="packed"))
    assert packed.identity != simulated.identity
    assert sum(packed.provenance["kernels"].values()) == 21
    # Corrections of linears that share their input are computed in one product, which may sum in another order.
    for task, metrics in simulated.scores.items():
        for metric, score in metrics.items():
            assert packed.scores[task][metric]["value"] == pytest.approx(score["value"], rel=1e-5)
    assert packed.effective_bits == simulated.effective_bits
    for name in ("sqnr", "nll", "kl"):
        assert packed.fidelity[name] == pytest.approx(simulated.fidelity[name], rel=1e-3)
    rows = table([simulated, packed]).splitlines()
    assert "simulated" in rows[2]
    assert "packed (" in rows[3]
    # What was packed answers as it did in the run.
    again = load_finished(next(tmp_path.glob(f"*-{packed.identity[:10]}")))
    assert footprint(again.blocks()).to_dict() == packed.effective_bits


def test_packed_execution_of_one_kernel(splits: dict[str, Path], tmp_path: Path) -> None:
    record = run(config(splits, tmp_path, execution="packed", kernel="reference"))
    assert record.provenance["kernels"] == {"reference": 21}
    with pytest.raises(ConfigError, match="a kernel runs packed weights"):
        config(splits, tmp_path, kernel="reference")
    with pytest.raises(ConfigError, match="Did you mean reference"):
        config(splits, tmp_path, execution="packed", kernel="refrence")
    with pytest.raises(ConfigError, match="one weight for all modalities"):
        config(splits, tmp_path, "mas", execution="packed")


def test_a_finished_run_is_skipped(
    splits: dict[str, Path], finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, root = finished("rtn")
    monkeypatch.setattr(run_module, "_fill", lambda *_args: pytest.fail("ran again"))
    assert run(config(splits, root)).to_dict() == first.to_dict()


def test_identity_follows_config_and_data(splits: dict[str, Path], tmp_path: Path, finished: Finished) -> None:
    first, root = finished("rtn")
    base = first.identity
    assert run(config(splits, tmp_path, seed=1)).identity != base
    assert run(config(splits, root, threads=torch.get_num_threads())).identity == base
    other = {**splits, "evaluation": write_split(tmp_path / "other.parquet", "evaluation", 3, 300)}
    assert run(config(other, tmp_path)).identity != base


def test_identity_follows_the_weights(splits: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run(config(splits, tmp_path, "mas"))
    monkeypatch.setattr(run_module, "_checked_model", lambda _config: "other weights")
    other = run(config(splits, tmp_path, "mas"))
    assert other.identity != base.identity
    assert other.provenance["data"]["model"] == "other weights"
    assert len(list(tmp_path.glob("artifacts/factors-*"))) == 2


def test_overrides_end_to_end(splits: dict[str, Path], tmp_path: Path) -> None:
    """The record counts what the plan promised, and a block left in float is as good as the float model."""
    cell = with_sizes(plain(splits, tmp_path, "awq"))
    cell["method"]["smoothing"]["groups"] = ["qkv", "output", "gate_up"]
    cell["scheme"] |= {
        "name": "mixed",
        "overrides": [{"blocks": [-1], "skip": True}, {"roles": ["down"], "weight_bits": 8}],
    }
    record = run(decode(cell))
    assert record.effective_bits["total"] == pytest.approx(plan(decode(cell)).effective_bits)
    assert "search" not in record.blocks[2]
    assert set(record.blocks[1]["search"]) == {"qkv", "output", "gate_up"}
    assert run(decode(cell)).to_dict() == record.to_dict()


def test_starts_from_its_own_config_yaml(splits: dict[str, Path], finished: Finished) -> None:
    import yaml

    record, root = finished("rtn")
    stored = yaml.safe_load(next(root.glob("nano*/config.yaml")).read_text())
    assert decode(stored) == config(splits, root)
    assert run(decode(stored)).to_dict() == record.to_dict()


def test_dual_never_sees_audio(splits: dict[str, Path], tmp_path: Path) -> None:
    record = run(config(splits, tmp_path, "masquant", modality={"name": "dual"}))
    planned = plan(decode(with_sizes(plain(splits, tmp_path, "masquant", modality={"name": "dual"}))))
    assert record.effective_bits["total"] == pytest.approx(planned.effective_bits)
    assert set(record.scores) == {"read", "manual", "choice"}
    assert set(record.fidelity["sqnr"]) == {"text", "vision"}
    assert all(set(block["sqnr"]) == {"text", "vision"} for block in record.blocks)
    stored = next(tmp_path.glob("artifacts/*/block-000.safetensors"))
    from safetensors import safe_open

    with safe_open(stored, "pt") as file:
        assert not [key for key in file.keys() if "audio" in key]  # noqa: SIM118
    assert not any("audio" in warning for warning in record.warnings)


def test_runs_share_what_is_known_of_the_float_model(splits: dict[str, Path], tmp_path: Path) -> None:
    """Gradients and statistics of the float chain lie beside the runs, by content; a run without them ends the same."""
    on_float = {"calibration": {"source": str(splits["calibration"]), "samples_per_task": 3, "chain": "float"}}
    alone = run(config(splits, tmp_path / "alone", "mbq", calibration={**on_float["calibration"], "cache": False}))
    assert not (tmp_path / "alone" / "artifacts").exists()
    shared = run(config(splits, tmp_path / "shared", "mbq", **on_float))
    assert (alone.identity, alone.blocks, alone.scores) == (shared.identity, shared.blocks, shared.scores)
    folders = sorted(folder.name.split("-")[0] for folder in (tmp_path / "shared" / "artifacts").iterdir())
    assert folders == ["gradients", "statistics"]
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "shared" / "artifacts").rglob("*.safetensors")}
    other = run(config(splits, tmp_path / "shared", "mbq", scheme="w8a8", **on_float))
    assert other.status == "finished"
    again = {file: file.stat().st_mtime_ns for file in (tmp_path / "shared" / "artifacts").rglob("*.safetensors")}
    assert files
    assert again == files


def test_runs_share_the_outputs_of_the_float_model(splits: dict[str, Path], tmp_path: Path) -> None:
    """They lie beside the runs, by content; a run that keeps none ends the same."""
    evaluation = {"batch_size": 2, "max_new_tokens": 3, "source": str(splits["evaluation"]), "score": False}
    alone = run(config(splits, tmp_path / "alone", evaluation=evaluation))
    kept = run(config(splits, tmp_path / "kept", evaluation={**evaluation, "keep_float": True}))
    assert (alone.identity, alone.fidelity) == (kept.identity, kept.fidelity)
    (folder,) = (tmp_path / "kept" / "artifacts").glob("outputs-*")
    files = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert files
    run(config(splits, tmp_path / "kept", scheme="w8a8", evaluation={**evaluation, "keep_float": True}))
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")} == files


@pytest.mark.parametrize("method", ["none", "masquant", "quarot_gptq"])
def test_a_finished_run_is_loaded_again(
    splits: dict[str, Path], tmp_path: Path, finished: Finished, method: str
) -> None:
    """From its stored blocks, without calibration, with the scores of its record; lmms-eval loads it by its folder."""
    from masq.calibration.data import load_samples
    from masq.plugin import MasqRun, manifest

    record, root = finished(method)
    assert set(record.provenance["harnesses"]) == {"lm-eval", "lmms-eval"}
    [made] = [path.parent for path in root.glob("*/record.json")]
    folder = Path(shutil.copytree(made, tmp_path / made.name))
    samples = load_samples(splits["evaluation"], None, None, 0, ("text", "vision", "audio"))
    evaluation = decode(plain(splits, tmp_path, method)).evaluation
    again = evaluate(load_finished(folder), samples, evaluation, tmp_path / "again")
    assert {t: {m: s.to_dict() for m, s in by.items()} for t, by in again.scores.items()} == record.scores
    assert isinstance(MasqRun(str(folder)), lmms)
    assert manifest().chat_class_path == "masq.plugin.MasqRun"
    if method != "none":
        next((folder / "blocks").glob("*.safetensors")).unlink()
        with pytest.raises(DataError, match="every block .* must be finished"):
            load_finished(folder)
    with pytest.raises(DataError, match="must hold a finished run"):
        load_finished(tmp_path)
    for arguments in ({}, {"path": str(folder), "pretrained": "x"}):
        with pytest.raises(ConfigError, match="model_args of masq"):
            MasqRun(**arguments)


def test_benchmarks_instead_of_tasks(splits: dict[str, Path], tmp_path: Path) -> None:
    """Scored through their harness; the samples at hand serve to compare with the float model, if there are any."""
    told = {
        "benchmarks": ["arc_easy", "scienceqa_img"],
        "records": str(Path(__file__).parent / "evaluation" / "fixtures"),
    }
    both = {"batch_size": 2, "max_failure_share": 1.0, **told}
    record = run(config(splits, tmp_path / "a", evaluation={**both, "source": str(splits["evaluation"])}))
    assert {name: list(by) for name, by in record.scores.items()} == {
        "arc_easy": ["acc_norm", "acc"],
        "scienceqa_img": ["acc"],
    }
    assert record.health["scienceqa_img"]["n"] == 2
    assert record.config["evaluation"]["records"] == "fixtures", "where they lay is nobody's business"
    assert record.fidelity["sqnr"]
    alone = run(config(splits, tmp_path / "b", evaluation=both))
    assert alone.scores == record.scores
    assert alone.fidelity == {}
    with pytest.raises(DataError, match="records of arc_easy must be in"):
        run(config(splits, tmp_path / "c", evaluation={**both, "records": str(tmp_path)}))
    assert not (tmp_path / "c").exists(), "nothing was begun"


def test_samples_shown_in_calibration_are_refused_or_stamped(splits: dict[str, Path], tmp_path: Path) -> None:
    same = {"batch_size": 2, "max_new_tokens": 3, "source": str(splits["calibration"]), "score": False}
    with pytest.raises(DataError, match="must not share samples"):
        run(config(splits, tmp_path, evaluation=same))
    record = run(config(splits, tmp_path, evaluation={**same, "allow_overlap": True}))
    assert record.warnings[0].startswith("contaminated: calibration and evaluation share samples (")
    assert "contaminated" in table([record])


def test_a_split_of_the_embedded_data_is_a_source_by_its_name() -> None:
    """Calibrating on what is evaluated, to see what it is worth."""
    given = ["++calibration.samples_per_task=1", "++evaluation.samples_per_task=1", "calibration.source=evaluation"]
    with pytest.raises(DataError, match="must not share samples"):
        load_data(compose(given))
    data, hashes, [warning] = load_data(compose([*given, "++evaluation.allow_overlap=true"]))
    assert hashes["calibration"] == hashes["evaluation"]
    assert len(data["calibration"]) == len(data["evaluation"])
    assert warning.startswith("contaminated")


def test_fidelity_alone(splits: dict[str, Path], tmp_path: Path, finished: Finished) -> None:
    """No task is scored, and the comparison with the float model is the one of a run with scores."""
    evaluation = {"batch_size": 2, "max_new_tokens": 3, "source": str(splits["evaluation"])}
    alone = run(config(splits, tmp_path, evaluation={**evaluation, "score": False}))
    both, _ = finished("rtn")
    assert (alone.scores, alone.health) == ({}, {})
    assert "evaluate" not in alone.timings
    assert both.scores
    assert alone.fidelity == both.fidelity


def test_overlapping_splits_stop_the_run(splits: dict[str, Path], tmp_path: Path) -> None:
    leaking = {**splits, "evaluation": splits["calibration"]}
    with pytest.raises(DataError, match="calibration"):
        run(config(leaking, tmp_path))
    assert not list(tmp_path.glob("nano*"))


def test_no_data_is_an_error_at_once(splits: dict[str, Path], tmp_path: Path) -> None:
    cell = plain(splits, tmp_path)
    cell["calibration"]["source"] = "auto"
    with pytest.raises(ConfigError, match="calibration.source"):
        run(decode(cell))


@pytest.mark.parametrize("source", ["zoo:smol_omni", "zoo:smol_vl"])
def test_embedded_data_serve_both_embedded_models(
    splits: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    from masq.models.zoo import smol_omni

    asked: list[str] = []
    monkeypatch.setattr(smol_omni, "data_path", lambda split: asked.append(split) or splits.get(split, "final"))
    cell = plain(splits, tmp_path, modality={"name": "dual"})
    cell["model"]["source"] = source
    cell["calibration"]["source"] = "auto"
    del cell["evaluation"]["source"]
    data, hashes, _ = load_data(decode(cell))
    assert asked == ["evaluation", "calibration"]
    assert {sample.task for sample in data["evaluation"]} == {"read", "manual", "choice"}
    cell["evaluation"]["split"] = "final"
    splits = {**splits, "final": write_split(tmp_path / "final.parquet", "final", 3, 400)}
    assert load_data(decode(cell))[1]["evaluation"] != hashes["evaluation"]
    assert asked[2:] == ["final", "calibration"]


def test_a_failure_is_recorded_and_tried_again(
    splits: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_quantize", broken)
        with pytest.raises(RuntimeError):
            run(config(splits, tmp_path))
    record = read_record(next(tmp_path.glob("nano*")))
    assert record.status == "failed"
    assert record.failure == {"kind": "RuntimeError", "message": "the disk is on fire"}
    assert run(config(splits, tmp_path)).status == "finished"


KILLED = [
    ("masquant", "block", 2),
    ("masquant", "block", 5),
    ("masquant", "batch", 3),
    ("smoothquant", "batch", 9),
    ("mbq", "block", 3),
]


@pytest.fixture(scope="module")
def killed(splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Path]:
    """The root of every run that was killed."""
    roots = {case: tmp_path_factory.mktemp("-".join(map(str, case))) for case in KILLED}
    kill_all([(where, after, plain(splits, root, method)) for (method, where, after), root in roots.items()])
    return roots


@pytest.mark.parametrize("case", KILLED, ids=lambda case: "-".join(map(str, case)))
def test_kill_and_resume_is_bit_identical(
    finished: Finished,
    killed: dict[tuple[str, str, int], Path],
    splits: dict[str, Path],
    case: tuple[str, str, int],
) -> None:
    """SIGKILL while calibrating and while evaluating: the resumed record equals an undisturbed one."""
    assert not list(killed[case].glob("*/record.json"))
    with one_thread():
        resumed = run(config(splits, killed[case], case[0]))
    assert same_result(resumed, finished(case[0])[0])


def same_result(a: RunRecord, b: RunRecord) -> bool:
    """Equal but for the folder that results went to."""
    left, right = comparable(a), comparable(b)
    del left["config"]["output"], right["config"]["output"]
    return left == right
