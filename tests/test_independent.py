"""Other packages' outputs on a small slice are still what masq makes of it, and the committed record says so."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.independent import compare, factors, verdicts
from masq.files import read_json
from masq.numerics.affine import quantize
from masq.numerics.scheme import TensorFormat

FOLDER = Path(__file__).resolve().parents[1] / "results" / "independent"
FIXTURE, RECORD = FOLDER / "fixture.safetensors", FOLDER / "checks.json"
KINDS = {"grid", "gptq", "smooth", "awq", "hadamard"}


@pytest.fixture(scope="module")
def fixture() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    return compare.read(FIXTURE)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return read_json(RECORD)


def named(about: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in about["checks"] if one["name"] == name)


def test_masq_still_agrees_with_the_other_packages(fixture: Any, record: dict[str, Any]) -> None:
    about, tensors = fixture
    now = {one["name"]: one["verdict"] for one in compare.checks(about, tensors)}
    assert verdicts.DIFFERENT not in now.values()
    assert {one["kind"] for one in about["checks"]} == KINDS
    # Ties and the precision of a sweep are a matter of the numbers; rules are not.
    loose = {verdicts.EQUAL, verdicts.TIES, verdicts.PRECISION}
    recorded = {one["name"]: one["verdict"] for one in record["checks"]}
    for name in now.keys() & recorded.keys():
        assert now[name] == recorded[name] or {now[name], recorded[name]} <= loose, name


def test_the_fixture_is_small_and_made_by_the_versions_of_the_record(fixture: Any, record: dict[str, Any]) -> None:
    assert FIXTURE.stat().st_size < 300_000
    assert fixture[0]["packages"] == record["packages"]
    listed = (Path(compare.__file__).parent / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in listed if line and not line.startswith("#"))
    assert {name: version.split("+")[0] for name, version in record["packages"].items()} == pinned


def test_the_record_is_whole(record: dict[str, Any]) -> None:
    assert {"commit", "dirty", "libraries", "data"} <= record["provenance"].keys()
    assert len({one["name"] for one in record["checks"]}) == len(record["checks"])
    assert {one["kind"] for one in record["checks"]} == KINDS
    assert {one["package"] for one in record["checks"]} == {"torchao", "llmcompressor", "compressed-tensors"}
    for one in record["checks"]:
        assert one["verdict"] in verdicts.VERDICTS and one["verdict"] != verdicts.DIFFERENT, one["name"]
        assert one["shapes"] and one["figures"]
        assert one["explanation"] or one["verdict"] == verdicts.EQUAL
        if one["verdict"] == verdicts.EQUAL and one["kind"] in ("grid", "gptq"):
            assert one["figures"]["other_codes"] == 0
        if one["verdict"] == verdicts.EQUAL and one["kind"] == "grid":
            assert one["figures"]["scale_difference"] == 0


def test_every_row_of_the_readme_table_is_of_the_record(record: dict[str, Any]) -> None:
    text = (Path(compare.__file__).parent / "README.md").read_text()
    assert compare.table(record["checks"]) in text


@pytest.mark.parametrize("name", ["torchao/w4_sym_channel", "llmcompressor/w4_asym_16", "torchao/a6_token"])
def test_another_grid_is_noticed(fixture: Any, name: str) -> None:
    """A scale one bit larger, or one code off, ends in the verdict that no check has."""
    about, tensors = fixture
    spec = named(about, name)
    key = f"{name}/{spec['modules'][0]}"
    for field in ("scale", "codes"):
        changed = dict(tensors)
        value = changed[f"{key}/{field}"].clone()
        value[0, 0] = value[0, 0] + 1 if field == "codes" else value[0, 0] * (1 + 2**-22)
        changed[f"{key}/{field}"] = value
        assert compare.check(spec, changed, {})["verdict"] == verdicts.DIFFERENT


def test_another_factor_is_noticed(fixture: Any) -> None:
    about, tensors = fixture
    for spec in (one for one in about["checks"] if one["kind"] in ("smooth", "awq")):
        key = f"{spec['name']}/{spec['modules'][0]}/factor"
        other = tensors[key] * torch.where(torch.arange(len(tensors[key])) == 1, 1.001, 1.0)
        assert compare.check(spec, dict(tensors) | {key: other}, {})["verdict"] == verdicts.DIFFERENT


def test_a_gptq_that_spreads_no_error_is_noticed(fixture: Any) -> None:
    about, tensors = fixture
    spec = named(about, "llmcompressor/gptq_w4_asym_channel_float64")
    changed = dict(tensors)
    for module in spec["modules"]:
        nearest = quantize(tensors[f"weight/{module}"], TensorFormat(4, symmetric=False))
        changed[f"{spec['name']}/{module}/codes"] = (nearest.codes.int() - 8).to(torch.int8)
    assert compare.check(spec, changed, {})["verdict"] == verdicts.DIFFERENT


def test_a_matrix_that_is_not_orthogonal_is_noticed(fixture: Any) -> None:
    about, tensors = fixture
    spec = named(about, "compressed-tensors/hadamard")
    key = f"{spec['name']}/12/matrix"
    broken = tensors[key].clone()
    broken[0, 0] *= -1
    assert compare.check(spec, dict(tensors) | {key: broken}, {})["verdict"] == verdicts.DIFFERENT


def test_the_rule_of_a_package_by_hand() -> None:
    """Codes -8 to 7 over 7.5: the largest value of 7.5 rounds to 8, which is clamped; -7.5 becomes -8."""
    spec = {"kind": "grid", "bits": 4, "symmetric": True, "group": None, "codes": [-8, 7]}
    scale, level = compare.rule_of(spec, torch.tensor([[7.5, -7.5, 1.2, 0.0]]))
    assert scale.tolist() == [[1.0]]
    assert level.tolist() == [[7.0, -8.0, 1.0, 0.0]]


def test_ties_fall_another_way_where_the_zero_point_is_added_first() -> None:
    spec = {"kind": "grid", "bits": 4, "symmetric": False, "group": None, "codes": [-8, 7], "name": "x"}
    x = torch.tensor([[-7.0, 8.0, 0.5, 2.5]])
    first, after = (compare.rule_of(spec | {"added_first": early}, x)[1] for early in (True, False))
    assert after.tolist() == [[-7.0, 8.0, 0.0, 2.0]]
    assert first.tolist() == [[-7.0, 8.0, 1.0, 3.0]]
    theirs = {"scale": torch.ones(1, 1), "zero_point": torch.tensor([[-1]]), "codes": (first - 1).to(torch.int8)}
    found = compare.grid_figures(deepcopy(spec) | {"added_first": True}, x, theirs)
    assert compare.grid_verdict(spec | {"added_first": True}, found)[0] == verdicts.TIES


def test_members_of_a_group_follow_its_first() -> None:
    assert factors.members({"members": ["q_proj", "k_proj"]}, "a.q_proj") == ["a.q_proj", "a.k_proj"]
    assert factors.members({}, "a.down_proj") == ["a.down_proj"]
