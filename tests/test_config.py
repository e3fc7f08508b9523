from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from masq.config import RunConfig, active_modalities, decode, load, notes, to_dict
from masq.errors import ConfigError
from masq.files import atomic_write_bytes
from masq.identity import folder_name, identity, run_folder, to_hashed_dict
from masq.numerics.scheme import Scheme, TensorFormat
from tests.composing import SLOTS, names, overrides_for, part, plain


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return plain()


def changed(base: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A deep copy of ``base`` with ``path`` set to ``value``."""
    copy = yaml.safe_load(yaml.safe_dump(base))
    *parents, last = path.split(".")
    node = copy
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return copy


def test_the_default_is_the_command_of_the_readme(base: dict[str, Any]) -> None:
    config = decode(base)
    assert (config.model.name, config.modality.name) == ("smol_omni", "tri")
    assert (config.scheme.name, config.method.name) == ("w4a8", "masquant")


def test_methods_are_what_the_papers_say() -> None:
    slots, methods = {}, {name: decode(plain(f"method={name}")).method for name in names("method")}
    for name, method in methods.items():
        assert method.name == name
        assert method.description
        slots[name] = (method.smoothing.kind, method.rounding.kind, method.compensation.kind)
    assert slots == {
        "none": ("none", "none", "none"),
        "masq": ("modality_convex", "gptq", "whitened_low_rank"),
        "masq_rot": ("none", "gptq", "whitened_low_rank"),
        "rtn": ("none", "nearest", "none"),
        "smoothquant": ("shared", "nearest", "none"),
        "mas": ("modality_learned", "nearest", "none"),
        "masquant": ("modality_learned", "nearest", "whitened_low_rank"),
        "masquant_gauged": ("modality_learned", "nearest", "whitened_low_rank"),
        "masquant_paper": ("modality_learned", "nearest", "whitened_low_rank"),
        "masquant_refcode": ("modality_learned", "nearest", "whitened_low_rank"),
        "qera": ("shared", "nearest", "whitened_low_rank"),
        "smoothquant_learned": ("shared_learned", "nearest", "none"),
        "gptq": ("none", "gptq", "none"),
        "quarot": ("none", "nearest", "none"),
        "quarot_gptq": ("none", "gptq", "none"),
        "awq": ("awq", "nearest", "none"),
        "mbq": ("mbq", "nearest", "none"),
        "rtn_clip": ("none", "nearest", "none"),
    }
    searched = {"awq", "mbq", "rtn_clip", "masq", "masq_rot"}
    assert {name for name, method in methods.items() if getattr(method.rounding, "clip", None)} == searched
    rotated = {name for name, method in methods.items() if method.rotation.kind == "hadamard"}
    assert rotated == {"quarot", "quarot_gptq", "masq_rot"}
    gauges = {name: methods[name].compensation.gauge for name in ("masquant", "masquant_gauged")}  # type: ignore[union-attr]
    assert gauges == {"masquant": "given", "masquant_gauged": "text"}


def test_methods_differ_where_they_should() -> None:
    smoothquant, qera = (decode(plain(f"method={name}")).method for name in ("smoothquant", "qera"))
    assert (smoothquant.smoothing.source, qera.smoothing.source) == ("all", "text")  # type: ignore[union-attr]
    assert smoothquant.smoothing.alpha == 0.5  # type: ignore[union-attr]
    mas, masquant = (decode(plain(f"method={name}")).method for name in ("mas", "masquant"))
    assert mas.smoothing == masquant.smoothing, "mas and masquant share their learned factors"
    assert (mas.rounding.per_modality, masquant.rounding.per_modality) == (True, False)  # type: ignore[union-attr]
    assert masquant.compensation == qera.compensation
    assert masquant.compensation.rank_ratio == 0.05  # type: ignore[union-attr]


@pytest.mark.parametrize("name", names("scheme"))
def test_scheme_files_are_the_presets(name: str) -> None:
    assert decode(plain(*overrides_for("scheme", name))).scheme == Scheme.preset(name)


def test_every_preset_has_a_file() -> None:
    assert sorted(Scheme.preset_names()) == names("scheme")


def test_every_cell_decodes_or_says_why_not() -> None:
    """Every model, modality set, scheme and method with one calibration, and every calibration with one model."""
    groups = ("model", "modality", "scheme", "method", "calibration", "evaluation", "output")
    parts = {group: {name: part(group, name) for name in names(group)} for group in groups}
    for name, other in parts["model"].items():
        if name not in ("nano_omni", "qwen2_5_vl_7b"):
            one = {"calibration": "default", "evaluation": "quick"}
            fixed = {group: {value: parts[group][value]} for group, value in one.items()}
            check_cells({**parts, **fixed, "model": {name: other}})
    two = {**parts, "model": {name: parts["model"][name] for name in ("nano_omni", "qwen2_5_vl_7b")}}
    check_cells({**two, **{group: dict([next(iter(two[group].items()))]) for group in ("evaluation", "output")}})
    few = {"scheme": ("w4a6",), "method": ("none", "masquant")}
    check_cells({**two, **{group: {name: two[group][name] for name in names} for group, names in few.items()}})


def check_cells(parts: dict[str, dict[str, Any]]) -> None:
    for cell in itertools.product(*parts.values()):
        chosen = dict(zip(parts, cell, strict=True))
        raw = {group: parts[group][name] for group, name in chosen.items()}
        embedded = raw["model"]["source"].startswith("zoo:")
        impossible = (
            (chosen["modality"] == "tri" and len(raw["model"]["modalities"]) < 3)
            or (chosen["method"] != "none" and chosen["scheme"] == "w16a16")
            or (chosen["method"] != "none" and "a16_g64" in chosen["scheme"] and "nano" in chosen["model"])
            or (chosen["method"] != "none" and chosen["scheme"] == "w4a16" and embedded)
        )
        try:
            config = decode(raw)
        except ConfigError:
            assert impossible, chosen
        else:
            assert not impossible, chosen
            assert decode(to_dict(config)) == config


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_file_is_named_after_its_kind(slot: str) -> None:
    for name in names(slot):
        assert getattr(decode(plain(*overrides_for(slot, name))).method, slot).kind in name


@pytest.mark.parametrize("name", names("preset"))
def test_presets_name_themselves_and_change_several_groups(name: str, base: dict[str, Any]) -> None:
    config = decode(plain(f"preset={name}"))
    assert config.preset == config.evaluation.name == name
    assert config.method == decode(base).method


def test_the_demo_preset_has_the_sizes_of_the_readme() -> None:
    config = decode(plain("preset=demo"))
    assert (config.calibration.samples_per_task, config.evaluation.samples_per_task) == (12, 32)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seeed", 1, r"unknown configuration key \(got: seeed\). Did you mean seed\?"),
        ("model.sorce", "x", r"got: model.sorce\). Did you mean model.source\?"),
        ("method.smoothing.alhpa", 1, r"got: method.smoothing.alhpa\). Did you mean method.smoothing.alpha\?"),
        ("scheme.weight.group", 8, r"got: scheme.weight.group\). Did you mean scheme.weight.group_size\?"),
        ("output.zzz", 1, r"got: output.zzz\). Known: output.root, output.wandb, output.wandb_checkpoint"),
        ("modality.name", "try", r"modality.name has an unknown value \(got: try\). Did you mean tri\?"),
        ("modality.name", True, "modality.name has an unknown value"),
        ("model.family", "qwen2_vl", "Did you mean qwen2_5_vl"),
        ("model.modalities", "text", "model.modalities must be a list"),
        ("model.modalities", ["text", "vison"], r"model.modalities\[1\] has an unknown value .*Did you mean vision"),
        ("model.modalities", ["vision"], "model: modalities must contain text"),
        ("model.modalities", ["text", "text"], "each once"),
        ("model.source", "", "model: name and source must not be empty"),
        ("model.source", 3, "model.source must be text"),
        ("model.trust_remote_code", 1, "must be true or false"),
        ("model.min_pixels", 0, "min_pixels must be positive"),
        ("model.max_pixels", -1, "max_pixels must be positive"),
        ("model.architecture.num_kv_heads", 2, "model.architecture: num_kv_heads must divide num_heads"),
        ("model.architecture.hidden_size", 0, "hidden_size must be positive"),
        ("model.architecture.hidden_size", 577, "num_heads must divide hidden_size"),
        ("seed", "3", "seed must be a whole number"),
        ("seed", True, "seed must be a whole number"),
        ("seed", 1.0, "seed must be a whole number"),
        ("seed", -1, "seed must not be negative"),
        ("threads", 0, "threads must be positive"),
        ("method", None, "method must be a group of keys"),
        ("method.name", "", "method.name must not be empty"),
        ("method.smoothing", "shared", "method.smoothing must be a group of keys with a kind, one of none, shared"),
        ("method.smoothing.kind", "modality_lerned", r"Did you mean modality_learned"),
        ("method.smoothing.alpha", "1e-1", r"must be a finite number \(YAML wants 1.0e-4, not 1e-4\)"),
        ("method.smoothing.alpha", float("inf"), "must be a finite number"),
        ("method.smoothing.alpha", 1.5, "method.smoothing: alpha must lie between 0 and 1"),
        ("method.smoothing.groups", [], "groups must name at least one"),
        ("method.smoothing.groups", ["qkv", "gateup"], r"groups\[1\] has an unknown value .*Did you mean gate_up"),
        ("method.smoothing.epochs", -1, "epochs must not be negative"),
        ("method.smoothing.learning_rate", 0, "learning_rate must be positive"),
        ("method.smoothing.loss_weights", {"text": 1, "vison": 1}, r"a key of method.smoothing.loss_weights .*vision"),
        ("method.smoothing.loss_weights", {"text": -1}, "not negative"),
        ("method.smoothing.loss_weights", {"text": 0, "vision": 0, "audio": 0}, "not all zero"),
        ("method.rounding.clip", {"min_ratio": 2}, r"method.rounding.clip: min_ratio must lie above 0"),
        ("method.rounding.clip", {"roles": ["q"]}, r"method.rounding.clip.roles\[0\] has an unknown value"),
        ("method.compensation.rank", 8, "exactly one of rank_ratio and rank"),
        ("method.compensation.rank_ratio", None, "exactly one of rank_ratio and rank"),
        ("method.compensation.rank_ratio", 2, "rank_ratio must lie between 0 and 1"),
        ("method.compensation.damping", 0, "damping must be positive"),
        ("scheme.weight.bits", 9, "scheme.weight: bits must lie between 2 and 8"),
        ("scheme.weight.bits", 3, "the name w4a8 stands for other formats"),
        ("scheme.weight.group_size", 64, "group_size belongs to granularity per_group"),
        ("scheme.weight.granularity", "per_token", "weight.granularity must be"),
        ("scheme.activation.granularity", "per_channel", "activation.granularity must be per_token"),
        ("scheme.weight", None, "activations are quantized only together with weights"),
        ("scheme.activation.symmetric", False, "activations are symmetric"),
        ("scheme.roles", ["query", "query"], "each once"),
        ("scheme.roles", ["query"], "the name w4a8 stands for other formats or roles"),
        ("scheme.overrides", [{"roles": ["down"], "weight_bits": 8}], "the name w4a8 stands for .*1 overrides"),
        ("scheme.overrides", [{"roles": ["down"]}], r"scheme.overrides\[0\]: an override must either skip"),
        (
            "scheme.overrides",
            [{"skip": True, "weight_bits": 8}],
            "must either skip its linears or give them other bits",
        ),
        ("scheme.overrides", [{"weight_bits": 16}], "bits must lie between 2 and 8"),
        ("scheme.overrides", [{"roles": ["dwon"], "skip": True}], r"overrides\[0\].roles\[0\] .*Did you mean down"),
        ("scheme.overrides", [{"blocks": [], "skip": True}], "blocks must name at least one"),
        ("scheme.overrides", [{"blocks": [1, 1], "skip": True}], "each once"),
        ("scheme.overrides", [{"block": [1], "skip": True}], "Did you mean scheme.overrides"),
        ("calibration.samples_per_task", 0, "samples_per_task must be positive"),
        ("calibration.batch_size", 0, "batch_size must be positive"),
        ("calibration.tasks", [], "tasks must name at least one task"),
        ("calibration.mix", {"text": 1.0}, "mix shares out a number of samples"),
        ("calibration.samples", 0, "samples must be positive"),
        ("calibration.samples", 128, "either samples or samples_per_task"),
        ("evaluation.samples_per_task", 0, "samples_per_task must be positive"),
        ("evaluation.max_new_tokens", 0, "max_new_tokens must be positive"),
        ("evaluation.max_failure_share", 1.5, "max_failure_share must lie between 0 and 1"),
        ("output.root", "", "output: root must not be empty"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(base: dict[str, Any], path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(changed(base, path, value))


@pytest.mark.parametrize("path", ["model", "model.family", "scheme.weight.bits", "method.name", "modality"])
def test_a_missing_key_is_named(base: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    copy = changed(base, "seed", 0)
    node = copy
    for parent in parents:
        node = node[parent]
    del node[last]
    with pytest.raises(ConfigError, match=rf"{path} must be given"):
        decode(copy)


def test_whole_numbers_are_accepted_for_real_ones(base: dict[str, Any]) -> None:
    config = decode(changed(base, "method.smoothing.alpha", 1))
    assert isinstance(config.method.smoothing.alpha, float)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=nano_vl", "modality=tri"], r"modality=tri needs vision and audio, and nano_vl has no audio"),
        (["scheme=w16a16"], "scheme w16a16 leaves nothing for method masquant to round.*Use method=none"),
        (["scheme=w4a16"], r"group size must divide .*128.*576.*w4a16_g64"),
        (["model=nano_omni", "scheme=w4a16"], r"with N a divisor of 8"),
        (["method=rtn", "rounding@method.rounding=nearest_per_modality"], "needs factors per modality"),
        (["method=smoothquant", "rounding@method.rounding=nearest_per_modality"], "needs factors per modality"),
        (["method=masquant", "rounding@method.rounding=nearest_per_modality"], "corrects one shared weight"),
        (["method=none", "smoothing@method.smoothing=shared"], "rounds nothing"),
        (["method=none", "smoothing@method.smoothing=awq"], "rounds nothing"),
        (["method=awq", "++method.rounding.per_modality=true"], "needs factors per modality"),
        (["method=none", "compensation@method.compensation=whitened_low_rank"], "rounds nothing"),
        (
            ["compensation@method.compensation=whitened_low_rank_searched", "++method.compensation.base=vision"],
            "where text is the base",
        ),
        (["method=masq_rot", "++method.compensation.base=vision"], "rounded to nearest"),
        (["execution=packed", "++method.compensation.base=vision"], "corrects no text"),
        (["model=smol_vl", "modality=dual", "++method.compensation.base=audio"], "Use one of text, vision"),
        (["model=nano_vl", "modality=dual", "++model.modalities=[text]"], "has no audio"),
        (["model=nano_vl", "modality=dual", "++model.modalities=[text,audio]"], "a qwen2_5_vl model has no audio"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(plain(*overrides))


@pytest.mark.parametrize("smoothing", ["awq", "mbq", "shared", "modality"])
@pytest.mark.parametrize("rounding", ["gptq", "gptq_clip", "nearest_clip"])
@pytest.mark.parametrize("compensation", ["none", "whitened_low_rank"])
def test_searches_compose_with_every_slot(smoothing: str, rounding: str, compensation: str) -> None:
    stages = {"smoothing": smoothing, "rounding": rounding, "compensation": compensation, "rotation": "hadamard"}
    told = plain("method=gptq")
    told["method"] |= {slot: part(slot, name) for slot, name in stages.items()}
    method = decode(told).method
    assert (method.smoothing.kind, method.compensation.kind) == (smoothing, compensation)


def test_act_order_needs_groups_that_are_fixed_before_which_a_clip_search_does() -> None:
    moving = ["scheme=w4a16_g64", "++method.rounding.act_order=true"]
    with pytest.raises(ConfigError, match="static_groups=true"):
        decode(plain("method=gptq", *moving))
    assert decode(plain("method=gptq", "rounding@method.rounding=gptq_clip", *moving)).method.rounding.clip is not None


def test_no_clip_search_leaves_identities_as_they_were(base: dict[str, Any]) -> None:
    config = decode(base)
    assert "clip" in to_dict(config)["method"]["rounding"]
    assert "clip" not in to_hashed_dict(config)["method"]["rounding"]
    clipped = decode(changed(base, "method.rounding.clip", {}))
    assert identity(clipped, {}) != identity(config, {})
    assert identity(decode(changed(base, "method.rounding.clip", {"steps": 9})), {}) != identity(clipped, {})


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("rtn", "[{blocks:[30],skip:true}]", r"from 0 to 29, or from -1 back to -30 \(got: scheme.overrides name 30\)"),
        ("rtn", "[{blocks:[-31,2],skip:true}]", "scheme.overrides name -31"),
        ("rtn", "[{skip:true}]", "must leave a linear to quantize"),
        ("awq", "[{roles:[query,key,value,output,gate,up,down],skip:true}]", "needs a quantized linear in one of its"),
        ("smoothquant_learned", "[{roles:[query,key,value,output,gate,up],skip:true}]", "needs a quantized linear in"),
    ],
)
def test_overrides_are_checked_against_the_model_before_any_work(method: str, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(plain(f"method={method}", f"++scheme.overrides={overrides}", "++scheme.name=mixed"))


def test_overrides_must_be_about_what_is_quantized() -> None:
    some = ("++scheme.name=mixed", "++scheme.overrides=[{roles:[output],weight_bits:8}]")
    with pytest.raises(ConfigError, match="about linears that the scheme quantizes .*got: output"):
        decode(plain("method=rtn", *some, "++scheme.roles=[down]"))
    with pytest.raises(ConfigError, match="activation_bits overrides the bits of quantized activations"):
        decode(
            plain("method=rtn", "scheme=w4a16_g64", some[0], "++scheme.overrides=[{roles:[down],activation_bits:8}]")
        )


def test_a_group_size_is_not_checked_on_linears_left_in_float() -> None:
    overrides = "++scheme.overrides=[{roles:[query,key,value,output,gate,up],skip:true}]"
    assert decode(plain("method=rtn", "scheme=w4a16", "++scheme.name=mixed", overrides)).scheme.overrides


def test_no_overrides_leave_identities_as_they_were(base: dict[str, Any]) -> None:
    assert "overrides" not in to_hashed_dict(decode(base))["scheme"]
    mixed = ("++scheme.name=mixed", "++scheme.overrides=[{blocks:[0],skip:true}]")
    config = decode(plain(*mixed))
    assert decode(to_dict(config)) == config
    assert identity(config, {}) != identity(decode(plain("++scheme.name=mixed")), {})


def test_active_modalities() -> None:
    assert active_modalities(decode(plain())) == ("text", "vision", "audio")
    assert active_modalities(decode(plain("modality=dual"))) == ("text", "vision")
    assert active_modalities(decode(plain("modality=dual", "++model.modalities=[text,audio]"))) == ("text", "audio")


def test_group_size_is_checked_on_the_quantized_roles_alone() -> None:
    roles = ("++scheme.roles=[down]", "++scheme.name=w4a16_down")
    assert decode(plain("method=rtn", "scheme=w4a16", *roles)).scheme.roles == ("down",), "128 divides 1536"


def test_a_rank_is_checked_against_the_smallest_corrected_linear() -> None:
    overrides = ("++method.compensation.rank_ratio=null", "++method.compensation.rank=193")
    with pytest.raises(ConfigError, match=r"192 for key of smol_omni.*rank=193"):
        decode(plain(*overrides))
    assert decode(plain(*overrides, "++method.compensation.groups=[gate_up]")).method.compensation.rank == 193


def test_a_size_without_a_hadamard_matrix_is_refused_with_the_part_to_leave_out() -> None:
    with pytest.raises(ConfigError, match=r"rotation\.down.*got: 1537.*rotation\.down=false"):
        decode(plain("method=quarot", "++model.architecture.intermediate_size=1537"))


def test_the_float_model_is_not_rotated() -> None:
    with pytest.raises(ConfigError, match="neither rotate nor centre nor smooth"):
        decode(plain("method=none", "rotation@method.rotation=hadamard"))


def test_learned_or_searched_factors_know_no_centres() -> None:
    for smoothing in ("modality_learned", "awq"):
        with pytest.raises(ConfigError, match="fitted in closed form"):
            decode(plain("centring@method.centring=modality", f"smoothing@method.smoothing={smoothing}"))
    assert decode(plain("centring@method.centring=modality", "method=smoothquant")).method.centring.kind == "modality"


def test_learned_smoothing_of_float_linears_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a quantized linear"):
        decode(plain("++scheme.roles=[down]", "++scheme.name=down"))


def test_the_float_model_is_one_experiment_for_every_scheme_and_seed() -> None:
    one, other = decode(plain("method=none", "scheme=w4a8")), decode(plain("method=none", "scheme=w8a8", "seed=3"))
    assert identity(one, {}) == identity(other, {})
    assert run_folder(one, "k") == run_folder(other, "k")
    assert identity(one, {}) != identity(decode(plain("method=none", "modality=dual")), {})


def test_notes_say_what_had_no_effect() -> None:
    assert notes(decode(plain())) == []
    assert "scheme w4a8 is ignored" in notes(decode(plain("method=none")))[0]
    assert notes(decode(plain("method=none", "scheme=w16a16"))) == []
    assert "upper bound" in notes(decode(plain("method=mas")))[0]


SETTINGS_WITHOUT_EFFECT: list[tuple[str, object]] = [
    ("output.root", "elsewhere"),
    ("output.wandb", True),
    ("threads", 2),
    ("preset", "demo"),
    ("evaluation.name", "x"),
    ("method.description", "x"),
    ("model.architecture", None),
    ("model.source", "/elsewhere"),
    ("calibration.source", "/elsewhere.parquet"),
    ("evaluation.source", "/elsewhere.parquet"),
    ("calibration.cache", False),
    ("evaluation.keep_float", True),
]
SETTINGS_WITH_EFFECT: list[tuple[str, object]] = [
    ("seed", 1),
    ("model.device", "cuda"),
    ("model.dtype", "bfloat16"),
    ("modality.name", "dual"),
    ("method.smoothing.alpha", 0.4),
    ("method.smoothing.loss_weights", {"text": 1, "vision": 0.5, "audio": 1}),
    ("calibration.samples_per_task", 4),
    ("calibration.chain", "float"),
    ("evaluation.samples_per_task", 4),
    ("evaluation.score", False),
]


@pytest.mark.parametrize(("path", "value"), SETTINGS_WITHOUT_EFFECT)
def test_identity_ignores_what_cannot_change_a_result(base: dict[str, Any], path: str, value: object) -> None:
    other = decode(changed(base, path, value))
    assert other != decode(base)
    assert identity(other, {"data": "x"}) == identity(decode(base), {"data": "x"})


@pytest.mark.parametrize(("path", "value"), SETTINGS_WITH_EFFECT)
def test_identity_sees_what_can(base: dict[str, Any], path: str, value: object) -> None:
    assert identity(decode(changed(base, path, value)), {}) != identity(decode(base), {})


def test_identity_sees_the_data_and_not_the_order_of_keys(base: dict[str, Any]) -> None:
    config = decode(base)
    assert identity(config, {"a": "x"}) != identity(config, {"a": "y"})
    assert identity(config, {"a": "x", "b": "y"}) == identity(config, {"b": "y", "a": "x"})
    assert identity(decode(dict(reversed(list(base.items())))), {}) == identity(config, {})


def test_a_default_written_out_has_the_same_identity(base: dict[str, Any]) -> None:
    assert identity(decode(changed(base, "calibration.samples_per_task", 12)), {}) == identity(decode(base), {})
    assert identity(decode(to_dict(decode(base))), {}) == identity(decode(base), {})


def test_the_folder_says_what_it_holds(base: dict[str, Any], tmp_path: Path) -> None:
    config = decode(changed(changed(base, "output.root", str(tmp_path)), "model.name", "a/b"))
    key = identity(config, {})
    assert folder_name(config, key) == f"a_b-tri-w4a8-masquant-{key[:10]}"
    assert run_folder(config, key) == tmp_path / folder_name(config, key)


def test_a_resolved_file_is_the_same_configuration(base: dict[str, Any], tmp_path: Path) -> None:
    config = decode(changed(base, "method.compensation.damping", 1e-7))
    path = tmp_path / "config.yaml"
    atomic_write_bytes(path, yaml.safe_dump(to_dict(config)).encode())
    assert load(path) == config
    moved = load(path, ["output.root=elsewhere", "evaluation.tasks=[digits]", "threads=2"])
    assert (moved.output.root, moved.evaluation.tasks, moved.threads) == ("elsewhere", ("digits",), 2)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (b"", [], "must hold the keys of a run"),
        (b"- 1", [], "must hold the keys of a run"),
        (b"model: {", [], "is not YAML"),
        (b"\xff\xfe\x00", [], "is not YAML"),
        (b"model: 1", ["seed"], "must be KEY=VALUE"),
        (b"model: 1", ["model.name=1"], "must be KEY=VALUE of an existing group"),
        (b"modle: {}", [], "Did you mean model"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: bytes, overrides: list[str], message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path, overrides)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*config.yaml"):
        load(tmp_path / "config.yaml")


def test_configurations_are_frozen(base: dict[str, Any]) -> None:
    config: RunConfig = decode(base)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


def test_formats_know_their_codes() -> None:
    assert (TensorFormat(4).qmin, TensorFormat(4).qmax) == (-7, 7)
    assert (TensorFormat(8).qmin, TensorFormat(8).qmax) == (-127, 127)
    assert (TensorFormat(4, symmetric=False).qmin, TensorFormat(4, symmetric=False).qmax) == (0, 15)


def test_an_unknown_scheme_lists_near_matches() -> None:
    with pytest.raises(ConfigError, match="Did you mean w4a8"):
        Scheme.preset("w4a9")
    assert Scheme.preset("w16a16").is_float
    assert not Scheme.preset("w4a16").is_float
