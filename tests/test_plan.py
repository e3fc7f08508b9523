from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from masq.config import RunConfig, decode
from masq.errors import ConfigError, ModelError
from masq.models.architecture import architecture, count_parameters, input_sizes, linear_shapes
from masq.models.config import Architecture
from masq.models.zoo import nano
from masq.plan import plan, render
from tests.composing import plain
from tests.nano_fixtures import NANO

TINY = Architecture(12, 2, 3, 1, 20, 50, tower_parameters=7)


def configured(*overrides: str) -> RunConfig:
    return decode(plain(*overrides))


def write_checkpoint(folder: Path, config: object, tensors: dict[str, list[int]]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in tensors.items()}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def test_parameters_of_a_small_model_by_hand() -> None:
    # q 12x12, k and v 4x12, o 12x12, gate, up and down 20x12; q, k, v biases; two norms a block, one at the end.
    block = 144 + 48 + 48 + 144 + 3 * 240 + (12 + 4 + 4) + 24
    assert count_parameters(TINY) == {"decoder": 2 * block + 12, "embedding": 2 * 600, "towers": 7}
    assert count_parameters(replace(TINY, tied_embeddings=True))["embedding"] == 600


def test_shapes_follow_an_explicit_head_size() -> None:
    shapes = linear_shapes(replace(TINY, head_dim=5))
    assert (shapes["query"], shapes["value"], shapes["output"]) == ((15, 12), (5, 12), (12, 15))
    assert input_sizes(replace(TINY, head_dim=5), ("query", "output", "down")) == [12, 15, 20]


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("qwen2_5_vl_3b", 3_754_622_976),
        ("qwen2_5_vl_7b", 8_292_166_656),
        ("qwen3_vl_2b", 2_127_532_032),
        ("qwen3_vl_4b", 4_437_815_808),
        ("qwen3_vl_8b", 8_767_123_696),
        ("qwen2_audio_7b", 8_397_094_912),
        ("llava_onevision_0_5b", 893_618_208),
        ("llava_onevision_7b", 8_030_348_832),
        ("internvl3_1b", 938_193_024),
        ("internvl3_2b", 2_088_957_440),
        ("internvl3_8b", 7_944_373_760),
    ],
)
def test_published_sizes_are_met_exactly(model: str, published: int) -> None:
    sizes = architecture(configured(f"model={model}", "modality=dual").model)
    assert sum(count_parameters(sizes).values()) == published


def test_the_decoder_of_smol_omni_is_smollm2_with_biases() -> None:
    parameters = count_parameters(architecture(configured().model))
    assert parameters["decoder"] + parameters["embedding"] == 134_515_008 + 30 * (576 + 2 * 192)


def test_smol_vl_is_smol_omni_without_ears() -> None:
    omni, vl = configured("modality=dual"), configured("model=smol_vl", "modality=dual")
    assert architecture(vl.model) == replace(architecture(omni.model), tower_parameters=3_000_000)
    planned = plan(vl)
    assert planned.seconds.keys() == plan(omni).seconds.keys()
    assert planned.effective_bits == plan(omni).effective_bits
    final = configured("model=smol_vl", "modality=dual", "+evaluation.split=final")
    assert any("the whole final split" in step for step in plan(final).steps)


def test_effective_bits_by_hand() -> None:
    sizes = architecture(configured("model=nano_vl", "modality=dual").model)
    assert (sizes.hidden_size, sizes.intermediate_size) == (48, 88)
    shapes = linear_shapes(sizes)
    weights = sum(a * b for a, b in shapes.values())
    rows = sum(a for a, _ in shapes.values())
    rtn = plan(configured("model=nano_vl", "modality=dual", "method=rtn"))
    assert rtn.num_weights == 3 * weights
    assert rtn.effective_bits == pytest.approx((4 * weights + 32 * rows) / weights)
    # qkv, output and gate_up for text and vision, float32 vectors and 16-bit rank-2 factors (0.05 * 48).
    masquant = plan(configured("model=nano_vl", "modality=dual", "method=masquant"))
    ranks = {role: int(0.05 * min(shape)) for role, shape in shapes.items() if role != "down"}
    adapters = sum(16 * rank * sum(shapes[role]) for role, rank in ranks.items())
    assert ranks == {"query": 2, "key": 0, "value": 0, "output": 2, "gate": 2, "up": 2}
    vectors = 32 * 2 * 3 * 48
    assert masquant.effective_bits == pytest.approx((4 * weights + 32 * rows + vectors + adapters) / weights)
    # A byte a code and a float32 scale a component; twice the rank costs as much as 16 bits, and the scales.
    given = ("model=nano_vl", "modality=dual", "method=masquant", "++method.compensation.rank_ratio=0.1")
    coded = plan(configured(*given, "++method.compensation.dtype=int8"))
    ranks = {role: int(0.1 * min(shape)) for role, shape in shapes.items() if role != "down"}
    codes = sum(8 * rank * sum(shapes[role]) for role, rank in ranks.items())
    more = codes + 32 * sum(ranks.values())
    assert coded.effective_bits == pytest.approx((4 * weights + 32 * rows + vectors + more) / weights)
    # A weight per modality, for the smoothed linears alone.
    mas = plan(configured("model=nano_vl", "modality=dual", "method=mas"))
    copied = sum(4 * a * b + 32 * a for role, (a, b) in shapes.items() if role != "down")
    assert mas.effective_bits == pytest.approx((4 * weights + 32 * rows + vectors + copied) / weights)


def test_effective_bits_follow_overrides() -> None:
    """By hand: down in 8 bits, output in float32, and the first of three blocks in float32."""
    shapes = linear_shapes(architecture(configured("model=nano_vl", "modality=dual").model))
    elements = {role: a * b for role, (a, b) in shapes.items()}
    total = sum(elements.values())
    overrides = "[{roles:[down],weight_bits:8},{roles:[output],skip:true},{blocks:[0],skip:true}]"
    config = configured(
        "model=nano_vl", "modality=dual", "method=rtn", f"++scheme.overrides={overrides}", "++scheme.name=mixed"
    )
    quantized = {role: count for role, count in elements.items() if role != "output"}
    codes = sum(count * (8 if role == "down" else 4) for role, count in quantized.items())
    scales = 32 * sum(a for role, (a, _) in shapes.items() if role != "output")
    bits = 2 * (codes + scales + 32 * elements["output"]) + 32 * total
    planned = plan(config)
    assert planned.effective_bits == pytest.approx(bits / (3 * total))
    assert planned.num_weights == 2 * sum(quantized.values())


def test_estimates_move_the_right_way() -> None:
    rtn, learned = plan(configured("method=rtn")), plan(configured("method=masquant"))
    upper = plan(configured("method=mas"))
    assert sum(rtn.seconds.values()) < sum(learned.seconds.values())
    assert rtn.effective_bits < learned.effective_bits < upper.effective_bits
    demo, dual = plan(configured("preset=demo")), plan(configured("modality=dual"))
    assert sum(demo.seconds.values()) < sum(learned.seconds.values())
    few = plan(configured("++calibration.samples_per_task=8"))
    assert few.memory_bytes["calibration"] < learned.memory_bytes["calibration"]
    everything = plan(configured("++calibration.samples_per_task=null"))
    assert everything.memory_bytes["calibration"] > learned.memory_bytes["calibration"]
    assert dual.effective_bits < learned.effective_bits
    assert plan(configured("scheme=w8a8")).effective_bits == pytest.approx(learned.effective_bits + 4)
    assert plan(configured("model=qwen2_5_vl_7b", "modality=dual")).peak_memory_bytes > 8.29e9 * 2


def test_a_search_costs_time_and_nothing_else_where_it_folds() -> None:
    rtn, searched = plan(configured("method=rtn")), plan(configured("method=awq", "++method.smoothing.steps=5"))
    finer = plan(configured("method=awq"))
    assert set(searched.seconds) - set(rtn.seconds) == {"search", "rounding"}
    clip, gptq = plan(configured("method=rtn_clip")).seconds["rounding"], plan(configured("method=gptq"))
    assert clip == searched.seconds["rounding"]
    both = plan(configured("method=gptq", "rounding@method.rounding=gptq_clip")).seconds["rounding"]
    assert both == pytest.approx(clip + gptq.seconds["rounding"])
    assert finer.seconds["search"] == pytest.approx(4 * searched.seconds["search"])
    folded = plan(configured("method=awq", "++method.smoothing.groups=[qkv,output,gate_up]"))
    assert rtn.effective_bits == folded.effective_bits < finer.effective_bits
    weights_only = plan(configured("method=awq", "scheme=w4a16_g64"))
    assert weights_only.seconds["search"] > 0
    assert set(plan(configured("method=mbq")).seconds) - set(finer.seconds) == {"gradients"}


def test_the_float_model_is_only_scored() -> None:
    planned = plan(configured("method=none", "scheme=w16a16"))
    assert planned.num_weights == 0
    assert planned.effective_bits == 32
    assert set(planned.seconds) == {"evaluation", "fidelity"}
    assert not any("calibrate" in step or "quantize" in step for step in planned.steps)
    assert planned.disk_bytes < 1e7
    kept = plan(configured("method=none", "scheme=w16a16", "evaluation=fidelity", "+evaluation.keep_float=true"))
    assert 1e9 < kept.disk_bytes < 1e10


def test_benchmarks_are_named_and_their_time_is_not_guessed() -> None:
    planned = plan(configured("evaluation=paper_text"))
    assert any(
        step == "score wikitext, hellaswag, winogrande, arc_easy, records from the hub" for step in planned.steps
    )
    assert "evaluation" not in planned.seconds
    assert "the time of benchmarks is not counted" in planned.notes


def test_the_text_names_what_matters(tmp_path: Path) -> None:
    config = configured(f"output.root={tmp_path}")
    (tmp_path / "smol_omni-tri-w4a8-masquant-0123456789").mkdir()
    (tmp_path / "smol_omni-tri-w4a8-rtn-0123456789").mkdir()
    text = render(plan(config))
    for words in ("Parameters", "Peak memory", "Disk", "Time", "text, vision, audio", "w4a8 with masquant"):
        assert words in text
    assert "Folders there already: smol_omni-tri-w4a8-masquant-0123456789\n" in text


def test_a_local_checkpoint_tells_its_own_sizes(tmp_path: Path) -> None:
    text = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 20,
        "vocab_size": 50,
    }
    write_checkpoint(tmp_path / "vl", {**text, "tie_word_embeddings": True}, {"visual.x": [3, 4], "model.y": [5]})
    config = configured("model=qwen2_5_vl_3b", "modality=dual", f"model.source={tmp_path / 'vl'}")
    assert architecture(config.model) == replace(TINY, tower_parameters=12, tied_embeddings=True)
    omni = {"thinker_config": {"text_config": text}, "talker_config": {"text_config": {"hidden_size": 1}}}
    tensors = {
        "thinker.visual.x": [3, 4],
        "thinker.audio_tower.x": [2],
        "token2wav.visual.x": [9],
        "talker.visual.": [9],
    }
    write_checkpoint(tmp_path / "omni", omni, tensors)
    config = configured("model=qwen2_5_omni_3b", f"model.source={tmp_path / 'omni'}")
    assert architecture(config.model) == replace(TINY, tower_parameters=14)
    assert plan(config).num_parameters["towers"] == 14


@pytest.mark.parametrize("name", NANO)
def test_a_folder_of_every_family_tells_the_sizes_of_its_configuration(tmp_path: Path, name: str) -> None:
    """From config.json and the headers alone: what the configuration's file says of the same model."""
    model, _ = nano.build(name, tied=False)
    model.save_pretrained(tmp_path)
    config = configured(f"model={name}", "modality=dual")
    assert config.model.architecture is not None
    local = replace(config.model, source=str(tmp_path))
    assert architecture(local) == replace(config.model.architecture, tied_embeddings=False)


def test_a_broken_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    def source(path: Path) -> RunConfig:
        return configured("model=qwen2_5_vl_3b", "modality=dual", f"model.source={path}")

    with pytest.raises(ModelError, match="must be an existing folder"):
        plan(source(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"needs a readable config\.json"):
        plan(source(tmp_path))
    write_checkpoint(tmp_path / "a", {"hidden_size": 3}, {})
    with pytest.raises(ModelError, match="no num_hidden_layers"):
        plan(source(tmp_path / "a"))
    full = dict.fromkeys(
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"), 4
    )
    write_checkpoint(tmp_path / "b", {**full, "vocab_size": 9}, {})
    (tmp_path / "b" / "model.safetensors").write_bytes(b"\xff\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ModelError, match=r"must be complete \(got: model.safetensors\)"):
        plan(source(tmp_path / "b"))
    write_checkpoint(tmp_path / "c", [1], {})
    with pytest.raises(ModelError, match=r"must be a JSON object"):
        plan(source(tmp_path / "c"))


def test_a_hub_id_without_sizes_says_what_to_give() -> None:
    config = configured()
    config = replace(config, model=replace(config.model, architecture=None, source="someone/some-model"))
    with pytest.raises(ConfigError, match="model.architecture"):
        plan(config)


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    there = tmp_path / "there.parquet"
    there.touch()

    def absent(config: RunConfig) -> list[str]:
        evaluation = replace(config.evaluation, source=str(there))
        calibration = replace(config.calibration, source="elsewhere.parquet")
        planned = plan(replace(config, evaluation=evaluation, calibration=calibration))
        return [note for note in planned.notes if "not on this machine" in note]

    assert absent(configured()) == ["calibration.source=elsewhere.parquet is not on this machine"]
    assert absent(configured("method=none")) == []
