"""The recipe behind the embedded models: its prompts, its questions, and a run of every stage at toy sizes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from experiments.tiny_models import constants as C

pytest.importorskip("sklearn", reason="the recipe wants scikit-learn")

from experiments.tiny_models import align, card, dataset, export, prompts, rerun, run, tasks, warmup  # noqa: E402
from masq.files import read_json  # noqa: E402
from masq.models.zoo import smol_omni  # noqa: E402
from masq.report.record import read_record  # noqa: E402

TOOLS = [
    *(f"{name} is not installed" for name in ("espeak-ng", "bible") if shutil.which(name) is None),
    *(f"{folder} is missing" for folder in [*C.FONT_FOLDERS, C.MANUAL_FOLDER] if not Path(folder).is_dir()),
]
HAND = {"text": "47", "kind": "hand"}


def ask(task: str, picture: dict | None, sound: dict | None) -> set[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return {tasks.question_answer(task, picture, sound, rng) for _ in range(60)}


def answers(task: str, picture: dict | None, sound: dict | None = None) -> set[str]:
    return {answer for _, answer in ask(task, picture, sound)}


def test_answers_follow_from_what_is_seen_and_heard() -> None:
    assert answers("digits", HAND) == {"47", "4", "7"}
    assert answers("sum", HAND) == {"11"}
    assert answers("speech", None, {"text": "305"}) == {"305"}
    assert answers("same", {"text": "river"}, {"text": "river"}) == {"river/river yes"}
    assert answers("same", {"text": "river"}, {"text": "water"}) == {"river/water no"}
    assert answers("larger", {"text": "45"}, {"text": "07"}) == {"45"}
    wanted = {"first": "4", "last": "7", "sum": "11", "highest": "7"}
    assert set(wanted) == set(C.COMMANDS.values())
    for command, answer in wanted.items():
        assert answers("ask", HAND, {"text": command}) == {answer}


def test_a_table_is_read_by_letter_by_value_and_as_a_whole() -> None:
    found = ask("table", {"text": "A37 B41 C90 D12"}, None)
    assert {answer for question, answer in found if " B" in question} == {"41"}
    assert {answer for question, answer in found if "90" in question} == {"C"}
    assert {answer for question, answer in found if question in C.QUESTIONS["table"]} == {"A37 B41 C90 D12"}


def test_shares_of_practice_change_at_their_steps() -> None:
    assert warmup.practice(0) == {}
    for step, shares in C.PRACTICE.items():
        assert warmup.practice(step) == shares
        assert sum(shares.values()) < 1


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> align.Alignment:
    """An alignment before its first step, with fresh towers and an adapter that is not zero."""
    folder = tmp_path_factory.mktemp("work")
    patch = pytest.MonkeyPatch()
    patch.setattr(align.Alignment, "resume", lambda _self: None)
    patch.setattr(align.prose, "passages", lambda *_args: [])
    # Branches agree to float32's rounding; processors that train in bfloat16 round a hundred times more.
    patch.setattr(align.architecture, "compute_dtype", lambda: torch.float32)
    made = align.Alignment(folder, 1)
    patch.undo()
    torch.manual_seed(0)
    for name, parameter in made.parameters.items():
        if name.endswith("up"):
            torch.nn.init.normal_(parameter, std=0.02)
    return made


@torch.no_grad()
def test_branches_predict_as_if_each_question_stood_alone(job: align.Alignment) -> None:
    torch.manual_seed(1)
    pictures = torch.randint(0, 256, (2, C.HEIGHT, C.WIDTH), dtype=torch.uint8)
    sounds = torch.randn(2, C.MELS, C.FRAMES)
    asked = [
        [("What is printed in the picture?", "river"), ("Read the printed text.", "K7R2")],
        [("What was said?", "305"), ("What do you hear?", "no")],
        [("Is the spoken word the written one?", "yes"), ("Do you hear the word in the picture?", "no")],
    ]
    media = ("image", "audio")
    packed = prompts.pack(job.core, job.tokenizer, media, asked)
    together = torch.zeros(*packed.targets.shape, job.model.config.text_config.vocab_size)
    together[packed.targets >= 0] = job.answer_logits(packed, pictures, sounds)
    for (first, last), pairs in zip(packed.branches, asked, strict=True):
        for row in range(2):
            alone = prompts.pack(job.core, job.tokenizer, media, [[pairs[row]]])
            expected = job.answer_logits(alone, pictures[row : row + 1], sounds[row : row + 1])
            wanted = packed.targets[row, first:last] >= 0
            torch.testing.assert_close(together[row, first:last][wanted], expected, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_positions_are_those_of_the_whole_prompt(job: align.Alignment) -> None:
    for media in (("image",), ("audio",), ("image", "audio")):
        packed = prompts.pack(job.core, job.tokenizer, media, [[("What is the sum of the two digits?", "11")]])
        whole, _ = job.core.get_rope_index(
            packed.ids,
            image_grid_thw=torch.tensor([[1, 4, 16]]) if "image" in media else None,
            attention_mask=torch.ones_like(packed.ids),
            audio_seqlens=torch.tensor([4 * C.AUDIO_TOKENS]),
        )
        torch.testing.assert_close(packed.positions, whole[:, 0].to(packed.positions))


def test_the_card_shows_the_float_scores() -> None:
    from masq.report.record import RunRecord

    record = RunRecord.start("x", {}, {})
    entry = {"value": 0.9, "n": 400, "standard_error": 0.015, "metric": "exact_match", "higher_is_better": True}
    record.scores = {"read": {"exact_match": {**entry, "valid": True}}}
    filled = card.fill(f"# Card\n{card.BEGIN}\nold\n{card.END}\nrest\n", record)
    assert "old" not in filled
    assert filled.endswith("\nrest\n")
    assert "| read   | exact_match | 400 | 0.900   | 0.015            |" in filled
    assert card.fill(filled, record) == filled


@pytest.mark.skipif(bool(TOOLS), reason="; ".join(TOOLS[:3]))
def test_every_stage_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = {
        "VISION_POOL": dict.fromkeys(C.VISION_POOL, 80) | {"word": 170},
        "AUDIO_POOL": dict.fromkeys(C.AUDIO_POOL, 64),
        "CLIPS": dict.fromkeys(C.CLIPS, 1),
        "SHIPPED_CLIPS": dict.fromkeys(C.CLIPS, 1),
        "WARM_BATCH": {"vision": 4, "audio": 4},
        "PRACTICE": {0: {}, 1: {"word": 0.5, "hand": 0.25}},
        "SCENES": {name: plan | {"batch": 1} for name, plan in C.SCENES.items()},
        "PROSE_BATCH": 1,
        "CHECK": 170,
        "ROUND": ("table", "words", "numbers", "ask", "speech", "prose"),
        "TOWERS_FROM": 2,
        "ALIGN_STEPS": 7,
        "MANUAL": {
            "train": ["tutorial/appetite*"],
            "calibration": ["tutorial/inputoutput*"],
            "evaluation": ["howto/unicode*"],
            "final": ["faq/design*"],
        },
        "TALE": {"train": ["Josh"], "calibration": ["Ruth"], "evaluation": ["Esth"], "final": ["2Kin"]},
    }
    for name, value in toy.items():
        monkeypatch.setattr(C, name, value)
    for tower in ("vision", "audio"):
        for steps in (1, 2):
            trained = warmup.Warmup(tower, tmp_path, steps)
            assert trained.step == steps - 1
            trained.load_pools()
            trained.run()
    data = align.Scenes("train", C.VISION_POOL, C.AUDIO_POOL, C.CLIPS)
    for steps in (3, 7):
        job = align.Alignment(tmp_path, steps)
        assert job.step == (0 if steps == 3 else 3)
        job.run(data, data)
    for tower in ("vision", "audio"):
        polished = warmup.Warmup(tower, tmp_path, 1, polish=True)
        aligned = load_file(tmp_path / "align.safetensors")
        start = {f"towers.{job_name(tower)}.{name}": value for name, value in polished.tower.state_dict().items()}
        assert all(torch.equal(value, aligned[name]) for name, value in start.items())
        polished.load_pools()
        polished.run()
    for steps in (8, 9):
        job = align.Alignment(tmp_path, steps, second=True)
        assert job.step == steps - 1
        wanted = load_file(tmp_path / ("polish_vision.safetensors" if steps == 8 else "align.safetensors"))
        prefix = "tower." if steps == 8 else "towers.visual."
        assert all(torch.equal(v, wanted[prefix + n]) for n, v in job.towers["visual"].state_dict().items())
        job.run(data, data)
    assert "ask.sum" in job.score(data, 1)
    (tmp_path / "files").mkdir()
    tokenizer = smol_omni.build_tokenizer(smol_omni.language_file())
    dataset.write(tmp_path / "files", tokenizer, {"calibration": 6, "evaluation": 6, "final": 6})
    _check_data(tmp_path / "files")
    weights = export.weights(tmp_path)
    shipped = load_file(smol_omni.FOLDER / smol_omni.WEIGHTS)
    assert {name: value.shape for name, value in weights.items()} == {n: v.shape for n, v in shipped.items()}
    assert any(value.abs().sum() > 0 for name, value in weights.items() if name.endswith(".up"))


def job_name(tower: str) -> str:
    return {"vision": "visual", "audio": "audio_tower"}[tower]


def _check_data(folder: Path) -> None:
    from masq.calibration.data import check_disjoint, load_samples

    samples = {split: load_samples(folder / f"{split}.parquet") for split in smol_omni.SPLITS}
    for split, found in samples.items():
        table = pq.read_table(folder / f"{split}.parquet")
        assert table.num_rows == len(found) == 6 * (len(C.MEDIA_TASKS) + 3)
        pairs = {(s.task, s.question, s.answer, s.image, s.audio) for s in found}
        assert len(pairs) == len(found)
    check_disjoint(samples["calibration"], samples["evaluation"])
    check_disjoint(samples["calibration"], samples["final"])
    check_disjoint(samples["evaluation"], samples["final"])


def test_the_one_command_runs_every_stage_in_order() -> None:
    done = [
        " ".join(one).replace("experiments.tiny_models.", "")
        for together in run.stages(Path("w"), 2)
        for one in together
    ]
    begins = ("warmup vision", "warmup audio", "align --work", "warmup vision --polish", "warmup audio --polish",
              "align --second", "export", "masq run", "card")  # fmt: skip
    assert len(done) == len(begins)
    assert all(one.startswith(start) for one, start in zip(done, begins, strict=True))
    labels = [[run.label(one) for one in together] for together in run.stages(Path("w"), 2)]
    assert labels[:4] == [
        *(["warmup vision", "warmup audio"], ["align"], ["warmup vision --polish", "warmup audio --polish"]),
        ["align --second"],
    ]


def test_a_rerun_of_the_recipe_tells_its_stages() -> None:
    at = "2026-11-30 11:24:20,201"
    log = "\n".join(
        f"{at} {line}" for line in ("warmup a, warmup b: 10 s", "a word", "warmup a, warmup b: 5 s", "align: 7 s")
    )
    assert rerun.stages(log) == [{"name": "warmup a, warmup b", "seconds": 15}, {"name": "align", "seconds": 7}]


def test_the_committed_rerun_is_that_of_its_record() -> None:
    if not rerun.FOUND.exists():
        pytest.skip("not run yet")
    table = rerun.render(read_json(rerun.FOUND), read_record(rerun.SHIPPED))
    assert rerun.TABLE.read_text() == table


def test_shipped_files_are_within_their_limits() -> None:
    listed = dict(line.split()[::-1] for line in (smol_omni.FOLDER / smol_omni.CHECKSUMS).read_text().splitlines())
    for name, digest in listed.items():
        path = smol_omni.FOLDER / name
        assert path.stat().st_size < 30e6
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
