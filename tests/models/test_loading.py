"""Loading from folders in the published layout, from the zoo, and every way in which it must be refused."""

import json
import logging

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from masq.errors import ConfigError, ModelError
from masq.models import loading
from masq.models.base import Modality
from masq.models.config import TAKES, ModelConfig
from masq.models.zoo import nano
from tests.nano_fixtures import NANO, nano_adapter

KIND = {name: TAKES[family][1:] for name, family in NANO.items()}


def config(name, source, **changes):
    fields = {
        "name": name,
        "family": NANO[name],
        "source": str(source),
        "modalities": ("text", *KIND[name]),
        "dtype": "float32",
    }
    return ModelConfig(**{**fields, **changes})


@pytest.fixture(scope="module", params=[(name, tied) for name in nano.NAMES for tied in (True, False)], ids=str)
def published(request, tmp_path_factory):
    """A nano model's name, published folder, model and processor, with the head tied and untied."""
    name, tied = request.param
    folder = tmp_path_factory.mktemp(name)
    return name, folder, *nano.save_published(name, folder, 40_000, tied=tied)


@pytest.fixture
def folder(tmp_path):
    """A published Omni folder that a test may damage."""
    nano.save_published("nano_omni", tmp_path, 40_000)
    return tmp_path


@pytest.fixture
def no_weights_read(monkeypatch):
    """Fail if a load comes as far as the weights."""
    monkeypatch.setattr(loading, "_read_weights", lambda *_: pytest.fail("the weights were read"))


def test_published_layout_is_the_one_of_the_hub(published):
    name, folder, model, _ = published
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tops = {key.split(".")[0] for key in index}
    stored = json.loads((folder / "config.json").read_text())
    assert not any("language_model" in key for key in index)
    assert len(set(index.values())) > 5
    if name == "nano_vl":
        assert tops - {"lm_head"} == {"model", "visual"}
        assert "text_config" not in stored and stored["rope_scaling"]["type"] == "mrope"
        assert ("lm_head.weight" in index) != model.config.tie_word_embeddings
    else:
        assert tops == {"thinker", "talker", "token2wav"}
        assert {"thinker_config", "talker_config", "token2wav_config"} <= set(stored)
        mixed = {shard for key, shard in index.items() if key.startswith("thinker.")}
        assert mixed & {shard for key, shard in index.items() if key.startswith("talker.")}


def test_a_published_folder_loads_bit_for_bit(published):
    name, folder, model, processor = published
    adapter = loading.load(config(name, folder))
    expected, loaded = model.state_dict(), adapter.model.state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert (adapter.head().weight is adapter.embeddings().weight) == model.config.tie_word_embeddings
    assert adapter.model.config.text_config.rope_parameters["mrope_section"] == [1, 1, 2]

    reference = type(adapter)(model, processor)
    samples = nano.random_samples(KIND[name], 2)
    ours, theirs = (one.encode(samples, with_answer=True) for one in (adapter, reference))
    assert ours.inputs.keys() == theirs.inputs.keys()
    assert all(torch.equal(ours.inputs[key], value) for key, value in theirs.inputs.items())
    with torch.no_grad():
        assert torch.equal(adapter.model(**ours.inputs).logits, model(**theirs.inputs).logits)


def test_the_thinker_alone_is_loaded(folder):
    adapter = loading.load(config("nano_omni", folder))
    assert type(adapter.model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    assert not any("talker" in key or "token2wav" in key for key, _ in adapter.model.named_modules())


def test_loaded_models_are_ready(published):
    name, folder, _, _ = published
    adapter = loading.load(config(name, folder, dtype="bfloat16", attention="eager", max_pixels=999))
    assert not adapter.model.training
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())
    assert adapter.embeddings().weight.dtype == torch.bfloat16
    assert adapter.model.config.text_config._attn_implementation == "eager"
    assert (adapter.min_pixels, adapter.max_pixels) == (None, 999)
    batch = adapter.encode(nano.random_samples(KIND[name], 2), with_answer=False)
    assert all(len(answer) <= 3 for answer in adapter.generate(batch, 3))


def test_published_sampling_defaults_do_not_survive(published):
    name, folder, _, _ = published
    stored = json.loads((folder / "generation_config.json").read_text())
    assert stored["do_sample"] and stored["repetition_penalty"] == 1.5
    generation = loading.load(config(name, folder)).model.generation_config
    assert (generation.do_sample, generation.repetition_penalty, generation.temperature) == (False, 1.0, None)


@pytest.mark.parametrize("name", NANO)
def test_zoo_models(name):
    adapter = loading.load(config(name, f"zoo:{name}", dtype="float16", attention="eager"))
    assert adapter.embeddings().weight.dtype == torch.float16
    assert adapter.model.config.text_config._attn_implementation == "eager"
    assert torch.equal(adapter.head().weight, nano.build(name)[0].lm_head.weight.half())


def test_modalities_are_the_configured_ones():
    adapter = loading.load(config("nano_omni", "zoo:nano_omni", modalities=("vision", "text")))
    assert adapter.modalities == (Modality.TEXT, Modality.VISION)
    with pytest.raises(ModelError, match="has audio; the model takes text, vision"):
        adapter.encode(nano.random_samples(("audio",), 1), with_answer=False)
    assert loading.load(config("nano_omni", "zoo:nano_omni")).modalities == (
        Modality.TEXT,
        Modality.VISION,
        Modality.AUDIO,
    )


class Asked:
    """A configuration with fields that ``ModelConfig`` itself would refuse."""

    def __init__(self, base, **changes):
        self.__dict__.update({name: getattr(base, name) for name in base.__slots__} | changes)


@pytest.mark.usefixtures("no_weights_read")
class TestRefusedBeforeWeightsAreRead:
    """A mistake must not cost the minutes of reading a large model."""

    def test_audio_of_a_vl_model(self, folder):
        asked = Asked(config("nano_vl", folder), modalities=("text", "vision", "audio"))
        with pytest.raises(ModelError, match="audio of qwen2_5_vl, which takes text, vision"):
            loading.load(asked)

    def test_unknown_family(self, folder):
        with pytest.raises(ConfigError, match="qwen2_5_vl"):
            loading.load(Asked(config("nano_vl", folder), family="qwen2_5_v"))

    def test_wrong_family(self, folder):
        with pytest.raises(ModelError, match="expected qwen2_5_vl"):
            loading.load(config("nano_vl", folder))

    def test_truncated_shard(self, folder):
        path = sorted(folder.glob("*.safetensors"))[3]
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ModelError, match="model-00004.* header promises"):
            loading.load(config("nano_omni", folder))

    @pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
    def test_missing_processor_file(self, folder, name):
        (folder / name).unlink()
        if name == "tokenizer.json":
            (folder / "tokenizer_config.json").unlink()
        with pytest.raises(ModelError, match="processor's and tokenizer's files"):
            loading.load(config("nano_omni", folder))

    @pytest.mark.parametrize("device", ["cuda:99", "gpu", "xpu:7"])
    def test_device(self, folder, device):
        with pytest.raises(ModelError, match=device):
            loading.load(config("nano_omni", folder, device=device))

    @pytest.mark.parametrize("source", ["no/such/folder", "./nowhere", "nowhere", "zoo", "/a/b c"])
    def test_source_that_is_nothing(self, source):
        with pytest.raises(ModelError, match=r"zoo:NAME.*nano_omni"):
            loading.load(config("nano_omni", source))

    def test_source_that_is_a_file(self, folder):
        with pytest.raises(ModelError, match="existing checkpoint folder"):
            loading.load(config("nano_omni", folder / "config.json"))

    def test_unknown_zoo_model(self):
        with pytest.raises(ConfigError, match="nano_omni"):
            loading.load(config("nano_omni", "zoo:nano_omi"))

    def test_hub_that_cannot_be_reached(self, monkeypatch):
        def fail(*_, **__):
            raise OSError("offline\nand more")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ModelError, match=r"owner/name: offline\)"):
            loading.load(config("nano_omni", "owner/name"))


def test_zoo_model_of_another_family():
    with pytest.raises(ModelError, match="qwen2_5_omni_thinker"):
        loading.load(config("nano_vl", "zoo:nano_omni"))


def test_a_hub_id_is_downloaded_without_pickles_and_code(folder, monkeypatch):
    asked = {}

    def download(repository, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loading.load(config("nano_omni", "Owner/Model-3B", revision="abc"))
    assert (asked["repository"], asked["revision"]) == ("Owner/Model-3B", "abc")
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["patterns"])


def rewrite(folder, change):
    """Apply ``change`` to the tensors of all shards, and write one file."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "thinker.model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), r"1 missing.*layers\.1\.input_layernorm"),
        (lambda tensors: tensors.pop("thinker.lm_head.weight"), r"1 missing.*lm_head"),
        (lambda tensors: tensors.update({NORM: torch.ones(47)}), r"input_layernorm|mismatched"),
        (lambda tensors: tensors.update({"thinker.model.layers.3.mlp.up_proj.weight": torch.ones(2)}), "unexpected"),
        (lambda tensors: tensors.update({"thinker.model.layers.0.mlp.up_proj.bias": torch.ones(88)}), "unexpected"),
    ],
    ids=["missing", "missing head", "mismatched", "extra block", "extra bias"],
)
def test_weights_that_do_not_fit_are_an_error(folder, change, message, caplog):
    caplog.set_level(logging.CRITICAL)
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        loading.load(config("nano_omni", folder))


def test_a_single_file_without_speech_parts_loads(folder):
    def keep_thinker(tensors):
        for key in [key for key in tensors if not key.startswith("thinker.")]:
            del tensors[key]

    rewrite(folder, keep_thinker)
    adapter = loading.load(config("nano_omni", folder))
    assert isinstance(adapter.head(), nn.Linear)


def test_models_saved_by_transformers_itself_load_too(tmp_path):
    model, processor = nano.build("nano_omni", seed=4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    adapter = loading.load(config("nano_omni", tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(adapter.model.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", nano.FURTHER)
def test_a_folder_of_every_further_family_loads_bit_for_bit(tmp_path, name):
    """As transformers writes it, in several files; the processor with it."""
    model, processor = nano.build(name)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    processor.save_pretrained(tmp_path)
    adapter = loading.load(config(name, tmp_path))
    expected, loaded = model.state_dict(), adapter.model.state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    reference = nano_adapter(name)
    samples = nano.random_samples(KIND[name], 2)
    ours, theirs = (one.encode(samples, with_answer=True) for one in (adapter, reference))
    assert ours.inputs.keys() == theirs.inputs.keys()
    assert all(torch.equal(ours.inputs[key], value) for key, value in theirs.inputs.items())


# Names of tensors as the hub has them, where they are not those of memory.
OLD_NAMES = {
    "nano_internvl": ("vision_tower", "multi_modal_projector"),
    "nano_llava_onevision": ("vision_tower", "multi_modal_projector", "image_newline"),
    "nano_qwen2_audio": ("audio_tower", "multi_modal_projector"),
}


@pytest.mark.parametrize("name", OLD_NAMES)
@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_names_of_older_checkpoints_are_understood(tmp_path, name, weights):
    """Towers without ``model.``, and the language model with a ``model`` and a head of its own."""
    model, processor = nano.build(name)
    state = {}
    for key, value in model.state_dict().items():
        old = key.removeprefix("model.")
        if old.startswith("language_model."):
            old = old.replace("language_model.", "language_model.model.", 1)
        state["language_model.lm_head.weight" if key == "lm_head.weight" else old] = value.clone()
    assert {key.split(".")[0] for key in state} == {"language_model", *OLD_NAMES[name]}
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    adapter = loading.load(config(name, tmp_path, weights=weights))
    batch = adapter.encode(nano.random_samples(KIND[name], 2), with_answer=True)
    with torch.no_grad():
        assert torch.equal(adapter.model(**batch.inputs).logits, model(**batch.inputs).logits)


def test_families_take_what_the_configuration_says():
    """``masq plan`` must know it before torch is imported, and the adapter is where it is true."""
    assert sorted(TAKES) == loading.FAMILIES.names()
    for name, takes in TAKES.items():
        assert tuple(one.name.lower() for one in loading.FAMILIES.get(name).modalities) == takes
