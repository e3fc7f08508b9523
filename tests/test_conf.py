"""Every file under conf/ composes and decodes, and every combination of models and modality sets decides clearly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from masq.config import RunConfig, active_modalities, decode, to_dict
from masq.errors import ConfigError

CONF = Path(__file__).parents[1] / "conf"
# The stages of a method are groups of their own, mounted inside `method`.
SLOTS = ("rotation", "centring", "smoothing", "rounding", "compensation")
APART = ("experiment", "hydra")
# Experiments are lists of sweeps, tests/experiment composes their cells; launchers are Hydra's.
FILES = [path for path in sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml")) if path.parts[0] not in APART]


@pytest.fixture(scope="module", autouse=True)
def config_folder() -> Iterator[None]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@cache
def plain(*overrides: str) -> dict[str, Any]:
    content = OmegaConf.to_container(hydra.compose("run", overrides=list(overrides)), resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def compose(*overrides: str) -> RunConfig:
    return decode(plain(*overrides))


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def of_model(name: str) -> tuple[str, ...]:
    """The modalities in a model's file."""
    return tuple(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["modalities"])


def overrides_for(path: Path) -> list[str]:
    """The command line that brings in one file."""
    group, name = path.parent.as_posix(), path.stem
    if group in SLOTS:
        # Some stages only make sense together, for example rounding per modality and smoothing per modality.
        partner = ["smoothing@method.smoothing=modality_learned"] if name == "nearest_per_modality" else []
        return ["method=rtn", *partner, f"{group}@method.{group}={name}"]
    if group == "model" and len(of_model(name)) < 3:
        return ["modality=dual", f"model={name}"]
    if group == "scheme":
        return ["method=none" if name == "w16a16" else "method=rtn", "model=qwen2_5_omni_3b", f"scheme={name}"]
    return [] if group == "." else [f"{group}={name}"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.as_posix())
def test_every_file_composes_and_survives_a_round_trip(path: Path) -> None:
    config = compose(*overrides_for(path))
    assert decode(to_dict(config)) == config


@pytest.mark.parametrize("group", ["model", "modality", "scheme", "method"])
def test_a_file_is_named_like_what_it_holds(group: str) -> None:
    for name in names(group):
        overrides = overrides_for(Path(group) / f"{name}.yaml")
        assert getattr(compose(*overrides), group).name == name


@pytest.mark.parametrize("method", names("method"))
@pytest.mark.parametrize("scheme", names("scheme"))
def test_method_and_scheme_decode_or_say_why_not(method: str, scheme: str) -> None:
    try:
        config = decode({**plain(f"method={method}"), "scheme": plain(f"scheme={scheme}")["scheme"]})
    except ConfigError as error:
        assert error.remedy, str(error)
        assert scheme in ("w16a16", "w4a16"), str(error)
    else:
        assert (config.method.name, config.scheme.name) == (method, scheme)


@pytest.mark.parametrize("model", names("model"))
def test_tri_needs_a_model_that_hears(model: str) -> None:
    if len(of_model(model)) < 3:
        with pytest.raises(ConfigError, match="needs vision and audio"):
            active_modalities(compose(f"model={model}", "modality=tri"))
    else:
        assert active_modalities(compose(f"model={model}", "modality=tri")) == ("text", "vision", "audio")
    assert active_modalities(compose(f"model={model}", "modality=dual")) == of_model(model)[:2]


def test_the_demo_is_the_preset_of_the_makefile() -> None:
    config = compose("preset=demo", "scheme=w4a6")
    assert config.preset == "demo"
    assert (config.calibration.samples_per_task, config.evaluation.samples_per_task) == (12, 32)
    makefile = (CONF.parent / "Makefile").read_text()
    demo = next(line for line in makefile.splitlines() if line.startswith("DEMO_METHODS")).partition(":= ")[2].split()
    assert demo == ["none", "rtn", "smoothquant", "quarot_gptq", "masquant", "masquant_gauged"]
    assert set(demo) <= set(names("method"))
