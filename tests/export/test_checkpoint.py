"""A packed checkpoint answers as the model did before, however often it is saved and wherever it is loaded from."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import masq.export
from masq.errors import ModelError, OutputError
from masq.export import checkpoint
from masq.export.files import read_config, read_headers
from masq.export.registration import register_with_transformers
from masq.models.base import EncodedBatch
from masq.models.config import ModelConfig
from masq.models.loading import load as load_model
from masq.models.qwen2_5_omni import Qwen25OmniAdapter
from masq.models.sample import Modality
from masq.models.zoo import nano
from masq.modules.footprint import footprint
from masq.modules.modality import install
from masq.modules.packed_linear import PackedLinear, pack_blocks
from masq.modules.quant_linear import QuantLinear
from masq.numerics.packing import unpack
from tests.export.conftest import CELLS, make_cell
from tests.nano_fixtures import NANO, stages

CLASSES = {
    "nano_omni": Qwen2_5OmniThinkerForConditionalGeneration,
    "nano_vl": Qwen2_5_VLForConditionalGeneration,
}
NUM_TOKENS = 5


def packed_twin(adapter, kernel):
    """The model before export, on the same kernel, with a hook of its own."""
    twin = copy.copy(adapter)
    twin.model = copy.deepcopy(adapter.model)
    twin.model._forward_pre_hooks.clear()
    twin.model._forward_hooks.clear()
    context, _ = install(twin)
    for module in twin.model.modules():
        if isinstance(module, QuantLinear):
            module.context = context
    pack_blocks(twin.blocks(), kernel)
    return twin


@torch.no_grad()
def logits(model, batch):
    return model(**batch.inputs).logits


def answers(model, batch):
    """New tokens as a user of transformers gets them."""
    ids = model.generate(**batch.inputs, max_new_tokens=NUM_TOKENS)
    return ids[:, batch.inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize(("name", "model"), [*((name, "nano_omni") for name in CELLS), ("masquant", "nano_vl")])
def test_the_loaded_model_is_the_one_that_was_exported(cell, name, model, kernel):
    made = cell(name, model)
    before = packed_twin(made.adapter, kernel)
    loaded = AutoModelForImageTextToText.from_pretrained(made.folder)
    assert type(loaded) is CLASSES[model]
    checkpoint.set_kernel(loaded, kernel)
    assert torch.equal(logits(loaded, made.prompts), logits(before.model, made.prompts))
    found = answers(loaded, made.prompts)
    assert torch.equal(found, answers(before.model, made.prompts))
    assert len({tuple(row) for row in found.tolist()}) > 1
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "nano_omni") for name in ("rtn", "masquant", "int8_factors", "centred", "quarot")),
        *((name, model) for name in ("masquant", "quarot") for model in NANO if model != "nano_omni"),
    ],
)
def test_the_simulation_answers_alike(cell, name, model):
    """Packed and simulated linears differ by rounding of the corrections' sums at most.

    What they add up in another order may round an activation to its other neighbour, and so move the logits of a token.
    """
    made = cell(name, model)
    loaded = checkpoint.load(made.folder, kernel="reference")
    assert type(loaded) is type(made.adapter.model)
    found, wanted = logits(loaded, made.prompts), logits(made.adapter.model, made.prompts)
    alike = torch.isclose(found, wanted, rtol=1e-4, atol=1e-4).all(-1)
    corrected = name not in ("rtn", "quarot")
    assert alike.float().mean() > 0.95 if corrected else alike.all()
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    assert torch.equal(answers(loaded, made.prompts), answers(made.adapter.model, made.prompts))


@pytest.mark.parametrize("name", ["run_time", "masquant", "int8_factors", "centred", "quarot", "w4a16", "mixed"])
def test_saved_again_it_is_the_same(cell, name, tmp_path):
    """transformers' own save_pretrained, after a kernel took the weights over, in one file and in several."""
    made = cell(name)
    loaded = checkpoint.load(made.folder)
    wanted = logits(loaded, made.prompts)
    loaded.save_pretrained(tmp_path / "whole")
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert checkpoint.check(tmp_path / "whole") == checkpoint.check(made.folder)
    for folder in ("whole", "shards"):
        again = checkpoint.load(tmp_path / folder)
        assert torch.equal(logits(again, made.prompts), wanted)
        state = again.state_dict()
        assert state.keys() == loaded.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())


def test_shards_are_as_good_as_one_file(cell, tmp_path):
    made = cell("masquant")
    checkpoint.save(made.adapter, tmp_path / "shards", {"method": "masquant"}, max_shard_bytes=30_000)
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert checkpoint.check(tmp_path / "shards") == checkpoint.check(made.folder)
    loaded = checkpoint.load(tmp_path / "shards", kernel="reference")
    whole = checkpoint.load(made.folder, kernel="reference")
    assert torch.equal(logits(loaded, made.prompts), logits(whole, made.prompts))


def test_the_layout_is_the_documented_one(cell):
    """Names, dtypes, shapes and bits as the docstring of masq.export.checkpoint says, read without masq."""
    made = cell("masquant")
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"]) == ("masq", 1)
    assert config["made_by"] == {"masq": "0.1.0", "method": "masquant"}
    assert config["placeholders"] == {"vision": [259, 260], "audio": [261]}
    weight = {"bits": 4, "symmetric": True, "granularity": "per_channel", "group_size": None}
    activation = {"bits": 6, "symmetric": True, "granularity": "per_token", "group_size": None}
    assert config["formats"] == [{"weight": weight, "activation": activation}]
    name = "model.language_model.layers.1.mlp.up_proj"
    entry = config["linears"][name]
    assert entry == {
        "in_features": 48,
        "out_features": 88,
        "format": 0,
        "bias": None,
        "smoothing": 3,
        "ranks": {"vision": 4, "audio": 4},
        "factor_dtype": "bfloat16",
        "group": 6,
    }
    assert config["linears"][name.replace("up", "gate")]["group"] == 6
    layer = made.adapter.blocks()[1].linear("up")
    with safe_open(made.folder / "model.safetensors", framework="pt") as file:
        codes = file.get_tensor(f"{name}.codes")
        assert (codes.dtype, codes.shape) == (torch.uint8, (88, 24))
        low, high = (codes & 15).to(torch.int8), (codes >> 4).to(torch.int8)
        signed = torch.stack((low, high), dim=2).flatten(1)
        assert torch.equal(torch.where(signed > 7, signed - 16, signed), layer.codes_text)
        assert torch.equal(file.get_tensor(f"{name}.scale"), layer.scale_text)
        assert torch.equal(file.get_tensor(f"{name}.inverse_smoothing"), layer.inverse_smoothing)
        assert file.get_tensor(f"{name}.smoothing_rows").tolist() == [0, 1, 2]
        assert torch.equal(file.get_tensor(f"{name}.left_audio"), layer.left_audio)
        assert f"{name}.bias" not in file.keys()  # noqa: SIM118
        assert "lm_head.weight" in file.keys()  # noqa: SIM118


def test_coded_factors_are_the_documented_ones(cell):
    """Codes and scales as the docstring of masq.export.checkpoint says, in a version of their own."""
    made = cell("int8_factors")
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["version"] == 2
    name = "model.language_model.layers.1.mlp.up_proj"
    entry = config["linears"][name]
    assert (entry["factor_dtype"], entry["ranks"]) == ("int8", {"vision": 7, "audio": 7})
    layer = made.adapter.blocks()[1].linear("up")
    with safe_open(made.folder / "model.safetensors", framework="pt") as file:
        left, right, scale = (file.get_tensor(f"{name}.{part}_audio") for part in ("left", "right", "factor_scale"))
    assert (left.dtype, right.dtype, scale.dtype) == (torch.int8, torch.int8, torch.float32)
    assert (left.shape, right.shape, scale.shape) == ((48, 7), (7, 88), (7,))
    wanted = layer.low_rank(torch.eye(48), Modality.AUDIO)
    found = (left * scale) @ (scale[:, None] * right)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    # Other checkpoints stay of the version that older programs read.
    assert all(read_config(cell(other).folder)["quantization_config"]["version"] == 1 for other in ("rtn", "masquant"))


def test_centres_are_the_documented_ones(cell):
    """Their tensors as the docstring of masq.export.checkpoint says, in a version of their own."""
    made = cell("centred")
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["version"] == 3
    name = "model.language_model.layers.1.self_attn.o_proj"
    assert config["linears"][name]["centres"] == 3
    assert config["linears"][name]["bias"] == "float32"
    layer = made.adapter.blocks()[1].linear("output")
    with safe_open(made.folder / "model.safetensors", framework="pt") as file:
        centre, rows, bias = (file.get_tensor(f"{name}.{part}") for part in ("centre", "centre_rows", "bias"))
    assert (centre.dtype, tuple(centre.shape)) == (torch.bfloat16, (3, layer.in_features))
    assert torch.equal(centre, layer.centre)
    assert rows.tolist() == [0, 1, 2]
    assert torch.equal(bias, layer.bias)


def test_a_centre_that_is_not_there_is_refused(cell, tmp_path):
    made = cell("centred")
    folder = tmp_path / "copy"
    shutil.copytree(made.folder, folder)
    config = read_config(folder)
    config["quantization_config"]["linears"]["model.language_model.layers.1.self_attn.o_proj"]["centres"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        checkpoint.load(folder)


def test_bytes_of_coded_factors(cell):
    """In the file and in memory: a byte a code, four a component; other tensors are as many bytes as without."""
    made = cell("int8_factors")
    tensors, _ = read_headers(made.folder)
    factors = {name: one for name, one in tensors.items() if "left_" in name or "right_" in name}
    scales = {name: one for name, one in tensors.items() if "factor_scale_" in name}
    assert {one.dtype for one in factors.values()} == {"I8"}
    stored = sum(one.num_bytes for one in (*factors.values(), *scales.values()))
    assert footprint(made.adapter.blocks()).adapters == 8 * stored
    loaded = checkpoint.load(made.folder, kernel="reference")
    logits(loaded, made.prompts)
    stacks = {module.stack for module in loaded.modules() if isinstance(module, PackedLinear)}
    held = [one._prepared for one in stacks]
    in_memory = [
        *(left for one in held for left in one.left.values()),
        *(right for one in held for rights in one.right.values() for right in rights if right is not None),
        *(scale for one in held for scale in one.scale.values()),
    ]
    assert sum(one.numel() * one.element_size() for one in in_memory) == stored


def test_coded_factors_keep_their_scales_in_another_dtype(cell, tmp_path):
    """Cast after loading and asked for while loading; saved and loaded again, they are the same."""
    made = cell("int8_factors")
    cast = checkpoint.load(made.folder).to(torch.bfloat16)
    asked = AutoModelForImageTextToText.from_pretrained(made.folder, dtype=torch.bfloat16)
    stored = checkpoint.load(made.folder).state_dict()
    for number, model in enumerate((cast, asked)):
        model.save_pretrained(tmp_path / str(number))
        state = checkpoint.load(tmp_path / str(number)).state_dict()
        names = [name for name in stored if name.rpartition(".")[2].startswith(("left_", "right_", "factor_scale_"))]
        assert len(names) == 3 * 2 * 3 * 6
        assert all(state[name].dtype == stored[name].dtype for name in names)
        assert all(torch.equal(state[name], stored[name]) for name in names)


def test_rotations_are_tensors_and_names(cell):
    made = cell("quarot")
    config = read_config(made.folder)
    names = [f"model.language_model.layers.{index}.mlp.down_proj" for index in range(3)]
    assert config["quantization_config"]["rotation"] == {"inputs": names, "residual": True}
    assert config["tie_word_embeddings"] is False
    tensors, _ = read_headers(made.folder)
    assert tensors[f"{names[0]}.signs"].shape == (88,)
    assert tensors[f"{names[0]}.linear.codes"].shape == (48, 44)


def test_a_tied_head_is_stored_once(cell):
    made = cell("masquant", "nano_vl")
    tensors, _ = read_headers(made.folder)
    assert "lm_head.weight" not in tensors
    loaded = checkpoint.load(made.folder)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("model", ["nano_omni", "nano_vl"])
def test_the_processor_comes_along(cell, model):
    made = cell("masquant", model)
    processor = AutoProcessor.from_pretrained(made.folder)
    assert type(processor) is type(made.adapter.processor)
    text = "<|im_start|>user\nhow many?<|im_end|>\n"
    assert processor(text=[text])["input_ids"] == made.adapter.processor(text=[text])["input_ids"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert processor.apply_chat_template(messages) == made.adapter.processor.apply_chat_template(messages)


def test_the_pixel_budget_of_the_run_comes_along(cell, tmp_path):
    adapter = copy.copy(cell("rtn").adapter)
    adapter.max_pixels = 999
    checkpoint.save(adapter, tmp_path / "out", {})
    size = AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (256, 999)
    assert adapter.processor.image_processor.size["longest_edge"] == 1536


def test_casting_keeps_what_needs_float32(cell, tmp_path):
    made = cell("masquant")
    loaded = checkpoint.load(made.folder).to(torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    layer = next(module for module in loaded.modules() if isinstance(module, PackedLinear))
    assert layer.scale.dtype == layer.inverse_smoothing.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "cast")
    again = checkpoint.load(tmp_path / "cast")
    assert again.dtype == torch.bfloat16
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in loaded.state_dict().items())
    inputs = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in made.prompts.inputs.items()
    }
    # In sixteen bits it is still the same model.
    error = logits(again, EncodedBatch(inputs, made.prompts.modality, made.prompts.answer_mask)).float()
    wanted = logits(checkpoint.load(made.folder), made.prompts)
    assert (error - wanted).norm() < 0.3 * wanted.norm()


def test_a_dtype_may_be_asked_for(cell):
    loaded = AutoModelForImageTextToText.from_pretrained(cell("masquant").folder, dtype=torch.bfloat16)
    layer = next(module for module in loaded.modules() if isinstance(module, PackedLinear))
    assert loaded.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32


@pytest.mark.gpu
def test_devices_can_be_changed(cell):
    made = cell("masquant")
    loaded = checkpoint.load(made.folder, kernel="reference")
    wanted = logits(loaded, made.prompts)
    loaded.to("cuda")
    found = logits(loaded, made.prompts.to("cuda")).cpu()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(loaded.to("cpu"), made.prompts), wanted)


def mapped_ranges(name):
    """Addresses at which files of this name are mapped into the process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    pairs = (line.split()[0].split("-") for line in lines if line.endswith(name))
    return [(int(low, 16), int(high, 16)) for low, high in pairs]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_codes_stay_in_the_file_until_a_kernel_takes_them(cell):
    loaded = AutoModelForImageTextToText.from_pretrained(cell("rtn").folder)
    layers = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 21
    assert all(layer.codes is not None for layer in layers)
    mapped = mapped_ranges("model.safetensors")
    assert all(any(low <= layer.codes.data_ptr() < high for low, high in mapped) for layer in layers)
    assert all(layer.scale.data_ptr() % 64 == 0 for layer in layers)
    assert layers[0].stack.members == layers[:3]


def test_every_code_survives(cell):
    made = cell("w4a16")
    loaded = checkpoint.load(made.folder)
    for name, layer in made.adapter.model.named_modules():
        if isinstance(layer, QuantLinear):
            found = unpack(loaded.get_submodule(name).plain())
            assert torch.equal(found.codes, layer.codes_text)
            assert torch.equal(found.zero_point, layer.zero_point_text)


def test_nothing_is_overwritten_and_nothing_is_left_behind(cell, tmp_path, monkeypatch):
    adapter = cell("rtn").adapter
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="never overwrites"):
        checkpoint.save(adapter, tmp_path / "there", {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="never overwrites"):
        checkpoint.save(adapter, tmp_path / "file", {})
    (tmp_path / "empty").mkdir()
    checkpoint.save(adapter, tmp_path / "empty", {})
    assert checkpoint.check(tmp_path / "empty")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("masq.export.checkpoint.write_portions", full)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.save(adapter, tmp_path / "full", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "there"]


def test_files_have_the_permissions_of_the_user(cell, tmp_path):
    mask = os.umask(0o027)
    try:
        checkpoint.save(cell("rtn").adapter, tmp_path / "out", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize("name", nano.NAMES)
def test_a_model_of_published_files_is_stored_under_its_names_in_memory(tmp_path, name, monkeypatch):
    """transformers renames the tensors of such a model when it saves it; a packed checkpoint has one set of names."""
    nano.save_published(name, tmp_path / "published", 40_000)
    family = {"nano_omni": "qwen2_5_omni", "nano_vl": "qwen2_5_vl"}[name]
    modalities = ("text", "vision", "audio") if name == "nano_omni" else ("text", "vision")
    config = ModelConfig(name, family, str(tmp_path / "published"), modalities, dtype="float32")

    def build(_name):
        adapter = load_model(config)
        return adapter.model, adapter.processor

    monkeypatch.setattr(nano, "build", build)
    made = make_cell("masquant", tmp_path, name)
    assert "model.language_model.layers.0.mlp.up_proj.codes" in read_headers(made.folder)[0]
    loaded = checkpoint.load(made.folder, kernel="reference")
    wanted = logits(packed_twin(made.adapter, "reference").model, made.prompts)
    assert torch.equal(logits(loaded, made.prompts), wanted)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(checkpoint.load(tmp_path / "again", kernel="reference"), made.prompts), wanted)


def test_the_exported_model_is_left_alone(cell, tmp_path):
    adapter = cell("masquant").adapter
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    checkpoint.save(adapter, tmp_path / "out", {})
    assert not hasattr(adapter.model.config, "quantization_config")
    assert not hasattr(adapter.model, "hf_quantizer")
    after = adapter.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_weight_per_modality_is_refused(tmp_path, monkeypatch):
    chosen = stages("mas", CELLS["rtn"][1])
    changes = {"smoothing": chosen.smoothing, "rounding": chosen.rounding}
    monkeypatch.setitem(CELLS, "mas", ("mas", chosen.scheme, changes))
    with pytest.raises(ModelError, match="one stored weight for all modalities.*per_modality"):
        make_cell("mas", tmp_path)
    assert not (tmp_path / "exported").exists()


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="every linear is in float"):
        checkpoint.save(Qwen25OmniAdapter(*nano.build("nano_omni")), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_calls_that_hide_their_tokens_are_refused(cell):
    """The loaded model never assumes text, and a picture must come with its token types."""
    made = cell("masquant", "nano_vl")
    loaded = checkpoint.load(made.folder)
    embeds = loaded.get_input_embeddings()(made.prompts.inputs["input_ids"])
    with pytest.raises(ModelError, match="the modality of the tokens must be given"):
        loaded(inputs_embeds=embeds)
    inputs = {name: value for name, value in made.prompts.inputs.items() if name != "mm_token_type_ids"}
    with pytest.raises(ModelError, match="mm_token_type_ids"):
        loaded(**inputs)


def test_a_fresh_process_loads_it_with_one_line(cell):
    """Light as it is, ``import masq`` is enough; and no trace of the registration is left on the import path."""
    made = cell("masquant")
    script = f"""
import sys
import masq
assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(made.folder)!r})
assert not [one for one in sys.meta_path if "masq" in type(one).__module__]
print(type(model).__name__, model.quantization_method)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert answer.stdout.split() == ["Qwen2_5OmniThinkerForConditionalGeneration", "masq"], answer.stderr


def test_registered_at_once_where_transformers_came_first(monkeypatch):
    for table in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(table, "masq")
    monkeypatch.delitem(sys.modules, "masq.export.transformers_quantizer")
    # Importing it once more sets it as an attribute of the package, too: both are put back.
    monkeypatch.setattr(masq.export, "transformers_quantizer", None, raising=False)
    finders = list(sys.meta_path)
    register_with_transformers()
    assert AUTO_QUANTIZER_MAPPING["masq"].__name__ == "MasqHfQuantizer"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["masq"].__name__ == "MasqConfig"
    assert sys.meta_path == finders


def test_printing_the_model_says_what_it_is(cell):
    loaded = checkpoint.load(cell("masquant").folder)
    assert "PackedLinear(48, 88, w4a6" in repr(loaded)
    assert Path(loaded.config.name_or_path) == cell("masquant").folder
