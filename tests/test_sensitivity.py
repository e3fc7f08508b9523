"""Sensitivity profiles: what a part costs, that nothing else changes, that a record goes on where it stopped."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from experiments.sensitivity import measure as measure_module
from experiments.sensitivity import report
from experiments.sensitivity.chain import Chain
from experiments.sensitivity.measure import measure, profile
from experiments.sensitivity.parts import KINDS, Part, bits_of, format_of, kinds_of, parts_of
from experiments.sensitivity.rounded import rounded
from masq.config import RunConfig, decode
from masq.errors import ConfigError, DataError, NumericalError
from masq.evaluation.fidelity import fidelity, summarize
from masq.files import atomic_write_json, read_json
from masq.models.base import Modality, ModelAdapter, Role, Sample
from masq.models.qwen2_5_omni import Qwen25OmniAdapter
from masq.models.qwen2_5_vl import Qwen25VLAdapter
from masq.models.zoo import nano
from masq.modules.modality import ModalityContext, install
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import QuantizedTensor
from masq.numerics.scheme import LinearFormat, Override, Scheme, TensorFormat
from masq.pipeline import loop
from masq.pipeline.store import BlockStore
from masq.rounding.nearest import round_nearest
from tests.evaluation.conftest import naive_nll
from tests.nano_fixtures import stages

NUM_BLOCKS = nano.SIZES["num_hidden_layers"]
W4A6 = Scheme.preset("w4a6")
GROUPED = Scheme("w4_g8", TensorFormat(4, symmetric=False, granularity="per_group", group_size=8), None)
MEDIA = {"nano_omni": (("vision",), ("audio",), ("vision", "audio"), ()), "nano_vl": (("vision",), ())}


def model(name: str = "nano_omni") -> ModelAdapter:
    family = {"nano_omni": Qwen25OmniAdapter, "nano_vl": Qwen25VLAdapter}[name]
    adapter = family(*nano.build(name))
    adapter.model.requires_grad_(False)
    return adapter


def samples_of(name: str = "nano_omni", count: int = 2) -> list[list[Sample]]:
    """One batch of mixed lengths, and so of padding, per kind of sample."""
    return [nano.random_samples(kinds, count, seed=3 + index) for index, kinds in enumerate(MEDIA[name])]


def part(name: str, scheme: Scheme = W4A6) -> Part:
    return next(one for one in parts_of(scheme, NUM_BLOCKS) if one.name == name)


@pytest.fixture(scope="module")
def shared() -> ModelAdapter:
    """A float model that every test must leave as it was."""
    return model()


@pytest.fixture
def adapter(shared: ModelAdapter) -> Iterator[ModelAdapter]:
    before = {name: value.clone() for name, value in shared.model.state_dict().items()}
    yield shared
    assert all(torch.equal(before[name], value) for name, value in shared.model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in shared.model.modules())


def weights_of(adapter: ModelAdapter) -> list[torch.Tensor]:
    """Weights of all float linears."""
    linears = [block.linear(role) for block in adapter.blocks() for role in Role]
    return [linear.weight for linear in linears if isinstance(linear, nn.Linear)]


def stored_weights_of(adapter: ModelAdapter) -> list[torch.Tensor]:
    """Weights of all quantized linears, multiplied out."""
    layers: list[Any] = [block.linear(role) for block in adapter.blocks() for role in Role]
    return [
        QuantizedTensor(one.codes_text, one.scale_text, one.zero_point_text, one.weight_format).dequantize()
        for one in layers
    ]


def flat(values: Any, prefix: str = "") -> dict[str, float]:
    """Every number of nested dictionaries, by path."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {path: n for key, inner in values.items() for path, n in flat(inner, f"{prefix}.{key}").items()}


def measured(found: dict[str, Any]) -> dict[str, float]:
    return flat({name: found[name] for name in ("kl", "nll_delta", "sqnr")})


def by_fidelity(
    reference: ModelAdapter, other: ModelAdapter, batches: list[list[Sample]], at: Path
) -> dict[str, float]:
    """The same quantities of two whole models, by the code behind a run's record."""
    found = fidelity(reference, other, batches, at)
    last = {name: value for name, value in found["sqnr_by_block"][-1].items() if name != "first"}
    return measured({"kl": found["kl"], "nll_delta": found["nll_increase"], "sqnr": last})


def test_nothing_rounded_costs_nothing(adapter: ModelAdapter) -> None:
    chain = Chain(adapter, samples_of())
    for index in range(NUM_BLOCKS):
        chain.move_to(index)
        found = summarize(chain.measure())
        assert found["kl"] == found["nll_increase"] == dict.fromkeys(("text", "vision", "audio", "joint"), 0.0)
        assert found["sqnr"] == dict.fromkeys(("text", "vision", "audio"), 200.0)


def test_the_float_chain_is_the_model(adapter: ModelAdapter) -> None:
    batches = samples_of()
    entries = Chain(adapter, batches).measure()
    values = [naive_nll(adapter, sample) for samples in batches for sample in samples]
    assert [entry["nll_float"] for entry in entries] == pytest.approx([sum(own) for own in values], rel=1e-5)
    assert [entry["num_answer_tokens"] for entry in entries] == [len(own) for own in values]


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(("all", "value", "block 1"), KINDS), ("down", "both")])
def test_a_profile_is_the_fidelity_of_the_whole_model(
    adapter: ModelAdapter, tmp_path: Path, name: str, kind: Any
) -> None:
    """Replayed from the part's first block or run from the input on, by this code or by that of records: the same."""
    batches, fmt = samples_of(), format_of(W4A6)
    chain = Chain(adapter, batches)
    chain.move_to(part(name).first)
    found = profile(chain, part(name), kind, fmt)
    other = model()
    with rounded(other.blocks(), part(name), kind, fmt):
        expected = by_fidelity(adapter, other, batches, tmp_path)
    assert measured(found) == pytest.approx(expected, rel=1e-9)
    assert all(value > 0 for value in found["kl"].values())


@pytest.mark.parametrize("name", ["nano_omni", "nano_vl"])
@pytest.mark.parametrize("scheme", [Scheme.preset("w8a8"), W4A6, GROUPED], ids=lambda scheme: scheme.name)
def test_both_of_all_is_the_pipelines_rtn(tmp_path: Path, name: str, scheme: Scheme) -> None:
    batches, reference, quantized = samples_of(name), model(name), model(name)
    fmt = format_of(scheme)
    found = profile(Chain(reference, batches), part("all", scheme), "both", fmt)
    context, _ = install(quantized)
    encoded = [quantized.encode(samples, with_answer=True) for samples in batches]
    blocks, factors = BlockStore(tmp_path / "blocks"), BlockStore(tmp_path / "factors")
    loop.quantize(quantized, encoded, stages("rtn", scheme), context, blocks=blocks, factors=factors)
    with rounded(reference.blocks(), part("all", scheme), "both", fmt):
        for ours, theirs in zip(weights_of(reference), stored_weights_of(quantized), strict=True):
            assert torch.equal(ours, theirs)
    expected = by_fidelity(reference, quantized, batches, tmp_path / "fidelity")
    # Scales come before the product here and after it there: an activation at a tie may go the other way.
    tolerance = 1e-5 if scheme.activation is None else 1e-2
    assert measured(found) == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert set(found["kl"]) == ({"text", "vision", "audio", "joint"} if name == "nano_omni" else {"text", "vision"})


@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_is_the_quantized_linear(bias: bool) -> None:
    """Odd sizes, a silent channel and a silent token included."""
    linear = nn.Linear(37, 11, bias=bias)
    linear.weight.data[3] = 0
    x = torch.randn(2, 5, 37)
    x[0, 0] = 0
    fmt, context = format_of(W4A6), ModalityContext()
    context.set(torch.zeros(2, 5, dtype=torch.int8))
    weight = round_nearest(linear.weight.data.double(), fmt.weight)
    layer = QuantLinear(weights={Modality.TEXT: weight}, bias=linear.bias, activation=fmt.activation, context=context)
    block: Any = type("Block", (), {"linear": lambda self, role: linear})()
    with torch.no_grad(), rounded([block], Part("one", (Role.QUERY,), (0,)), "both", fmt):
        torch.testing.assert_close(linear(x), layer(x), rtol=1e-5, atol=1e-6)


def test_float_activations_change_nothing(adapter: ModelAdapter) -> None:
    fmt = LinearFormat(format_of(W4A6).weight, None)
    chain = Chain(adapter, samples_of())
    nothing, weights, both = (measured(profile(chain, part("all"), kind, fmt)) for kind in ("activations", *KINDS[::2]))
    assert {value for path, value in nothing.items() if "sqnr" not in path} == {0.0}
    assert {value for path, value in nothing.items() if "sqnr" in path} == {200.0}
    assert weights == both
    assert kinds_of(fmt) == ("weights",)


def test_parts_are_told_apart(adapter: ModelAdapter) -> None:
    """Weights and activations are different profiles, and a part costs less than the whole of the same kind."""
    chain, fmt = Chain(adapter, samples_of()), format_of(W4A6)
    found = {
        (name, kind): profile(chain, part(name), kind, fmt)["sqnr"]["text"]
        for name in ("all", "key", "block 0")
        for kind in KINDS
    }
    assert len(set(found.values())) == len(found)
    for kind in KINDS:
        assert found["all", kind] < min(found["key", kind], found["block 0", kind])
        assert found["all", "both"] <= found["all", kind]


def test_only_the_blocks_from_the_part_on_run(adapter: ModelAdapter) -> None:
    batches = samples_of()
    chain = Chain(adapter, batches)
    chain.move_to(1)
    ran: list[int] = []
    handles = [
        block.module.register_forward_hook(lambda *_args, index=index: ran.append(index))
        for index, block in enumerate(chain.blocks)
    ]
    profile(chain, part("block 1"), "both", format_of(W4A6))
    for handle in handles:
        handle.remove()
    with pytest.raises(AssertionError, match="block 0 begins before the chain"):
        profile(chain, part("block 0"), "both", format_of(W4A6))
    assert ran == [1, 2] * len(batches)


def test_everything_is_restored_after_an_error(adapter: ModelAdapter) -> None:
    weights = weights_of(adapter)
    before = [(weight.data_ptr(), weight.clone()) for weight in weights]
    assert len(weights) == NUM_BLOCKS * len(Role)
    with (
        pytest.raises(RuntimeError, match="stop"),
        rounded(adapter.blocks(), part("all"), "both", format_of(W4A6)),
    ):
        assert not any(torch.equal(weight, old) for weight, (_, old) in zip(weights, before, strict=True))
        raise RuntimeError("stop")
    assert all(w.data_ptr() == at and torch.equal(w, old) for w, (at, old) in zip(weights, before, strict=True))


def test_a_weight_that_cannot_be_rounded_leaves_the_others_as_they_were() -> None:
    adapter = model()
    weights_of(adapter)[-2][0, 0] = float("nan")
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    with (
        pytest.raises(NumericalError, match=r"block 2\.up"),
        rounded(adapter.blocks(), part("all"), "both", format_of(W4A6)),
    ):
        pass
    after = adapter.model.state_dict()
    assert all(torch.equal(value.nan_to_num(7.0), after[name].nan_to_num(7.0)) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in adapter.model.modules())


def test_padding_does_not_matter(adapter: ModelAdapter) -> None:
    batches, fmt = samples_of(count=3), format_of(W4A6)
    alone = [[sample] for samples in batches for sample in samples]
    together, apart = (measured(profile(Chain(adapter, b), part("all"), "both", fmt)) for b in (batches, alone))
    # Rounding turns a last-bit difference into a step now and then.
    assert together == pytest.approx(apart, rel=2e-2, abs=2e-2)


def test_absent_modalities_are_absent(adapter: ModelAdapter) -> None:
    chain = Chain(adapter, [nano.random_samples(("vision",), 2, seed=1)])
    found = profile(chain, part("gate"), "both", format_of(W4A6))
    assert found["kl"].keys() == found["nll_delta"].keys() == found["nll_float"].keys() == {"vision"}
    assert found["sqnr"].keys() == found["standard_error"]["sqnr"].keys() == {"text", "vision"}
    assert found["num_weights"] == NUM_BLOCKS * nano.SIZES["hidden_size"] * nano.SIZES["intermediate_size"]
    assert found["bits"] == {"weight": 4, "activation": 6}


def test_parts_and_bits() -> None:
    parts = parts_of(W4A6, 2)
    assert [one.name for one in parts] == ["all", *(role.value for role in Role), "block 0", "block 1"]
    assert [one.first for one in parts] == [0] * 9 + [1]
    assert parts_of(replace(W4A6, name="few", roles=("down",)), 1)[0].roles == (Role.DOWN,)
    fmt = format_of(W4A6)
    assert [bits_of(fmt, kind)["weight"] for kind in KINDS] == [4, None, 4]
    assert [bits_of(fmt, kind)["activation"] for kind in KINDS] == [None, 6, 6]
    with pytest.raises(ConfigError, match="something to round.*w16a16"):
        format_of(Scheme.preset("w16a16"))
    with pytest.raises(ConfigError, match="one format"):
        format_of(replace(W4A6, name="mixed", overrides=(Override(roles=("down",), weight_bits=8),)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split with one sample of each of three tasks."""
    path = tmp_path_factory.mktemp("data") / "evaluation.parquet"
    names = ("id", "task", "question", "answer", "image", "audio")
    kinds = {"read": ("vision",), "speech": ("audio",), "same": ("vision", "audio")}
    samples = [replace(nano.random_samples(of, 1, seed=7)[0], id=task, task=task) for task, of in kinds.items()]
    types = [pa.string()] * 4 + [pa.binary()] * 2
    columns = [pa.array([getattr(one, name) for one in samples], kind) for name, kind in zip(names, types, strict=True)]
    pq.write_table(pa.table(columns, names=list(names)), path)
    return path


FEW = replace(W4A6, name="few", roles=("key", "down"))


def config(weight_bits: int = 4, **changes: Any) -> RunConfig:
    """Profiles of two roles: the others add nothing to what a record is."""
    model = {"name": "nano_omni", "family": "qwen2_5_omni", "source": "zoo:nano_omni"}
    plain = {
        "model": {**model, "modalities": ["text", "vision", "audio"], "dtype": "float32"},
        "modality": {"name": "tri"},
        "scheme": {
            "name": FEW.name,
            "weight": {"bits": weight_bits},
            "activation": {"bits": 6, "granularity": "per_token"},
            "roles": list(FEW.roles),
        },
        "method": {"name": "rtn"},
    }
    return decode({**plain, **changes})


@pytest.fixture(scope="module")
def record(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("record") / "record.json"
    found = measure(config(), data, output)
    assert found == read_json(output)
    return found


def test_the_record_is_complete(record: dict[str, Any]) -> None:
    found = [(one["part"], one["kind"]) for one in record["profiles"]]
    assert found == [(one.name, kind) for one in parts_of(FEW, NUM_BLOCKS) for kind in KINDS]
    assert record["samples"] == 3
    assert record["counts"]["num_samples"] == record["counts"]["num_samples"] | {"vision": 1, "audio": 1, "joint": 1}
    assert set(record["nll_float"]) == {"vision", "audio", "joint"}
    assert record["provenance"]["data"] == record["data"]
    assert record["provenance"]["finished"]
    blocks = [one["num_weights"] for one in record["profiles"] if one["part"].startswith("block")]
    assert sum(blocks) == 3 * record["profiles"][0]["num_weights"]


def test_an_interrupted_record_goes_on(
    record: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, left = tmp_path / "record.json", iter(range(15))

    def killed(path: Path, content: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        atomic_write_json(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure_module, "atomic_write_json", killed)
        measure(config(), data, output)
    stopped = read_json(output)
    assert stopped["provenance"]["finished"] is None
    assert len(stopped["profiles"]) == 15
    assert "Not finished: 15 profiles" in report.report(stopped)
    stopped["provenance"]["threads"] += 1
    atomic_write_json(output, stopped)
    resumed = measure(config(), data, output)
    assert resumed["profiles"] == record["profiles"]
    assert len(resumed["provenance"]["earlier_sessions"]) == 1
    assert any("threads" in warning for warning in resumed["warnings"])
    monkeypatch.setattr(measure_module, "load", lambda *_: pytest.fail("a finished record needs no model"))
    assert measure(config(), data, output) == resumed


def test_another_record_is_refused(record: dict[str, Any], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    atomic_write_json(output, record)
    with pytest.raises(DataError, match="another scheme under the name few"):
        measure(config(weight_bits=8), data, output)
    with pytest.raises(DataError, match="another hash of evaluation"):
        measure(config(evaluation={"tasks": ["read", "speech"]}), data, output)
    atomic_write_json(output, {**record, "data": {**record["data"], "model": "0"}})
    with pytest.raises(DataError, match="another hash of model"):
        measure(config(), data, output)
    atomic_write_json(output, {"profiles": []})
    with pytest.raises(DataError, match="must be a record of sensitivity profiles"):
        measure(config(), data, output)


def test_other_methods_are_refused(data: Path, tmp_path: Path) -> None:
    for slot in ({"smoothing": {"kind": "shared"}}, {"rounding": {"kind": "nearest", "clip": {}}}):
        with pytest.raises(ConfigError, match=r"rounds to nearest.*method other"):
            measure(config(method={"name": "other", **slot}), data, tmp_path / "record.json")


def test_command_line(record: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    output, tables = tmp_path / "record.json", tmp_path / "tables.md"
    named = ["--model", "nano_omni", "--scheme", "w4a6", "--samples-per-task", "1", "--output", str(output)]
    few = ["scheme.name=few", "scheme.roles=[key,down]"]
    measure_module.main([*named, f"evaluation.source={data}", *few])
    assert read_json(output)["profiles"] == record["profiles"]
    assert str(tmp_path) not in output.read_text()
    report.main([str(output), "--output", str(tables)])
    assert tables.read_text() == report.report(record)
    with pytest.raises(ConfigError, match="w16a16"):
        measure_module.main(["--model", "nano_omni", "--scheme", "w16a16", "--output", str(output)])


def toy_record() -> dict[str, Any]:
    def one(name: str, kind: str, kl: float, weights: int) -> dict[str, Any]:
        numbers = {"kl": {"audio": kl}, "nll_delta": {"audio": -kl}, "sqnr": {"text": 20.0}}
        return {"part": name, "kind": kind, "num_weights": weights, **numbers, "standard_error": dict(numbers)}

    costs = {"all": 0.9, "key": 0.1, "down": 0.6, "block 0": 0.5, "block 1": 0.3}
    sizes = {"all": 40, "key": 10, "down": 30, "block 0": 20, "block 1": 20}
    return {
        "model": "toy",
        "samples": 1,
        "scheme": {"name": "w4a6", "roles": ["key", "down"]},
        "warnings": ["two machines"],
        "provenance": {"finished": "now"},
        "profiles": [
            one(name, kind, kl * (2 if kind == "both" else 1), sizes[name])
            for name, kl in costs.items()
            for kind in ("weights", "both")
        ],
    }


def test_tables_of_the_report_add_up() -> None:
    record = toy_record()
    lines = [line.split("|") for line in report.part_table(record, ["key", "down"], "kl").splitlines()]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}
    assert rows["part"] == ["weights", "audio weights", "audio both"]
    assert rows["down"] == ["75.0 %", "0.6000", "1.2000"]
    assert rows["sum"] == ["", "0.7000", "1.4000"]
    assert rows["all"] == ["", "0.9000", "1.8000"]
    assert "down 1.2000, key 0.2000 | block 0 1.0000, block 1 0.6000" in report.worst_table(record)
    assert "sum" not in report.part_table(record, ["key", "down"], "sqnr")
    assert "sum" not in report.part_table(record, ["key"], "kl")
    assert "Warning: two machines." in report.report(record)
    record["profiles"] = [one for one in record["profiles"] if (one["part"], one["kind"]) != ("key", "both")]
    last = report.part_table(record, ["key", "down"], "kl").splitlines()[-2].split("|")
    assert [cell.strip() for cell in last[3:-1]] == ["0.7000", "-"]
