"""compressed-tensors exports, as that package reads them, hold masq's weights and answer alike."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig

from masq.errors import ModelError, OutputError
from masq.export import compressed_tensors
from masq.export.compressed_tensors import pack_words, quantization_config, unsupported_format
from masq.modules.packed_linear import PackedLinear, pack_blocks
from masq.modules.quant_linear import QuantLinear
from masq.numerics.scheme import LinearFormat, Scheme, TensorFormat
from tests.export.conftest import CELLS, GROUPED, make_cell

SYMMETRIC = TensorFormat(4, granularity="per_group", group_size=8)
CHANNEL = TensorFormat(4, symmetric=False)
FORMATS = {"w8a8": None, "w4a16": GROUPED, "w4a16_symmetric": SYMMETRIC, "w4a16_channel": CHANNEL}
ASYMMETRIC = ("w4a16", "w4a16_channel")
DEPENDENCY = "install the extra: pip install 'masq[export]'"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Cells of the four formats (smoothed by folding at w8a8) with their compressed-tensors folders."""
    made = {}

    def of(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                if FORMATS[name] is not None:
                    patch.setitem(CELLS, name, ("rtn", Scheme(f"{name}_test", FORMATS[name], None), {}))
                cell = make_cell("smoothquant" if name == "w8a8" else name, root)
            compressed_tensors.save(cell.adapter, root / "ct", {"method": name})
            made[name] = cell, root / "ct"
        return made[name]

    return of


def dequantized(layer: QuantLinear) -> torch.Tensor:
    name = "codes_text", "scale_text"
    codes, scale = (layer.state_dict()[one] for one in name)
    zero = layer.zero_point_text
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    shifted = groups if zero is None else groups - zero.unsqueeze(2)
    return (shifted * scale.unsqueeze(2)).flatten(1)


def load(folder: Path, *, dequantize: bool):
    """By transformers. Packed zero points it (5.23, with compressed-tensors 0.20) only reads when it dequantizes.

    Left packed, it expects them in a shape that the format has not.
    """
    if not dequantize:
        return AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.warns(UserWarning, match="loading attributes"):
        return AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(dequantize=True)
        )


@torch.no_grad()
def logits(model, batch):
    return model(**batch.inputs).logits


@pytest.mark.parametrize("name", list(FORMATS))
def test_another_engine_computes_the_same(exported, name):
    """Loaded by transformers and compressed-tensors: the same weights, the same logits up to the rounding of inputs."""
    pytest.importorskip("compressed_tensors", reason=DEPENDENCY)
    cell, folder = exported(name)
    loaded = load(folder, dequantize=name in ASYMMETRIC)
    found, wanted = logits(loaded, cell.prompts), logits(cell.adapter.model, cell.prompts)
    real = cell.prompts.modality >= 0
    # Eight-bit inputs are rounded on another grid (127.5 for 127), which costs what eight bits cost.
    limit = 0.03 if name == "w8a8" else 1e-5
    assert (found - wanted)[real].norm() < limit * wanted[real].norm()
    layers = {key: one for key, one in cell.adapter.model.named_modules() if isinstance(one, QuantLinear)}
    assert len(layers) == 21
    for key, layer in layers.items():
        weight = loaded.get_submodule(key).weight.detach()
        assert torch.equal(weight.float(), dequantized(layer)), key
    ids = loaded.generate(**cell.prompts.inputs, max_new_tokens=4)[:, cell.prompts.inputs["input_ids"].shape[1] :]
    before = cell.adapter.model.generate(**cell.prompts.inputs, max_new_tokens=4)[:, -ids.shape[1] :]
    assert torch.equal(ids, before) or name == "w8a8"


def test_its_own_tools_agree_on_the_bits(exported):
    """Codes and zero points that compressed-tensors unpacks are ours, shifted by 8 to be signed."""
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason=DEPENDENCY)
    cell, folder = exported("w4a16")
    stored = load_file(folder / "model.safetensors")
    for key, layer in cell.adapter.model.named_modules():
        if isinstance(layer, QuantLinear):
            shape = torch.Size(stored[f"{key}.weight_shape"].tolist())
            codes = package.unpack_from_int32(stored[f"{key}.weight_packed"], 4, shape)
            assert torch.equal(codes, (layer.codes_text.to(torch.int16) - 8).to(torch.int8))
            zero_shape = torch.Size((shape[0], layer.scale_text.shape[1]))
            zero = package.unpack_from_int32(stored[f"{key}.weight_zero_point"], 4, zero_shape, packed_dim=0)
            assert torch.equal(zero.float() + 8, layer.zero_point_text)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 48])
def test_words_hold_eight_codes_lowest_first(columns):
    codes = torch.randint(0, 16, (5, columns), generator=torch.Generator().manual_seed(columns))
    codes[0] = 15
    words = pack_words(codes)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-columns // 8))
    for row in range(5):
        for column in range(columns):
            word = int(words[row, column // 8]) & 0xFFFFFFFF
            assert (word >> (4 * (column % 8))) & 15 == int(codes[row, column])


def test_the_configuration_says_what_is_stored(exported):
    cell, folder = exported("w8a8")
    config = json.loads((folder / "config.json").read_text())
    about = config["quantization_config"]
    assert (about["quant_method"], about["format"]) == ("compressed-tensors", "int-quantized")
    group = about["config_groups"]["group_0"]
    assert group["weights"] | {"num_bits": 8, "symmetric": True, "strategy": "channel"} == group["weights"]
    assert group["input_activations"]["dynamic"] is True
    assert config["masq_made_by"] == {"method": "w8a8"}
    stored = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert stored[f"{name}.weight"].dtype == torch.int8
    assert f"{name}.codes" not in stored
    assert "lm_head" in about["ignore"]
    assert not any(name in one for one in about["ignore"])
    assert type(AutoProcessor.from_pretrained(folder)) is type(cell.adapter.processor)


def test_a_packed_model_is_exported_alike(exported, tmp_path):
    cell, folder = exported("w8a8")
    twin = copy.copy(cell.adapter)
    twin.model = copy.deepcopy(cell.adapter.model)
    pack_blocks(twin.blocks(), "auto")
    assert any(isinstance(module, PackedLinear) for module in twin.model.modules())
    compressed_tensors.save(twin, tmp_path / "out", {"method": "w8a8"})
    found, wanted = (load_file(one / "model.safetensors") for one in (tmp_path / "out", folder))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rtn", "weights of 4 bits with inputs of 8 bits"),
        ("run_time", "no smoothing at run time"),
        ("masquant", "no smoothing at run time"),
        ("quarot", "no an input rotated|input rotated at run time"),
        ("mixed", "input rotated at run time"),
    ],
)
def test_what_the_format_cannot_say_is_refused(cell, tmp_path, name, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        compressed_tensors.save(cell(name).adapter, tmp_path / "out", {})
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_formats_and_reasons():
    token = TensorFormat(8, granularity="per_token")
    assert unsupported_format(LinearFormat(TensorFormat(8), token)) is None
    assert unsupported_format(LinearFormat(GROUPED, None)) is None
    for weight, activation in (
        (TensorFormat(8), None),
        (TensorFormat(8, symmetric=False), token),
        (TensorFormat(8, granularity="per_group", group_size=8), token),
        (TensorFormat(8), TensorFormat(6, granularity="per_token")),
    ):
        assert unsupported_format(LinearFormat(weight, activation))
        with pytest.raises(ModelError, match="W8A8 and W4A16"):
            quantization_config(LinearFormat(weight, activation), [])


def test_nothing_is_overwritten(cell, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="never overwrites"):
        compressed_tensors.save(cell("smoothquant").adapter, tmp_path, {})
    assert [path.name for path in Path(tmp_path).iterdir()] == ["notes.txt"]
