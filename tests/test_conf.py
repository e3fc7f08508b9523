"""Every file under conf/ composes and decodes, and every combination of models and modality sets decides clearly."""

from __future__ import annotations

from pathlib import Path

import pytest

from masq.config import RunConfig, active_modalities, decode, to_dict
from masq.errors import ConfigError
from tests.composing import CONF, modalities_of, names, overrides_for, part, plain

APART = ("experiment", "hydra")
# Experiments are lists of sweeps, tests/experiment composes their cells; launchers are Hydra's.
FILES = [path for path in sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml")) if path.parts[0] not in APART]


def compose(*overrides: str) -> RunConfig:
    return decode(plain(*overrides))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.as_posix())
def test_every_file_composes_and_survives_a_round_trip(path: Path) -> None:
    config = compose(*overrides_for(path.parent.as_posix(), path.stem))
    assert decode(to_dict(config)) == config


@pytest.mark.parametrize("group", ["model", "modality", "scheme", "method"])
def test_a_file_is_named_like_what_it_holds(group: str) -> None:
    for name in names(group):
        assert getattr(compose(*overrides_for(group, name)), group).name == name


@pytest.mark.parametrize("method", names("method"))
@pytest.mark.parametrize("scheme", names("scheme"))
def test_method_and_scheme_decode_or_say_why_not(method: str, scheme: str) -> None:
    try:
        config = decode({**plain(f"method={method}"), "scheme": part("scheme", scheme)})
    except ConfigError as error:
        assert error.remedy, str(error)
        assert scheme in ("w16a16", "w4a16"), str(error)
    else:
        assert (config.method.name, config.scheme.name) == (method, scheme)


@pytest.mark.parametrize("model", names("model"))
def test_tri_needs_a_model_that_hears(model: str) -> None:
    def active(modality: str) -> tuple[str, ...]:
        cell = plain(*overrides_for("model", model))
        return active_modalities(decode({**cell, "modality": part("modality", modality)}))

    if len(modalities_of(model)) < 3:
        with pytest.raises(ConfigError, match="needs vision and audio"):
            active("tri")
    else:
        assert active("tri") == ("text", "vision", "audio")
    assert active("dual") == modalities_of(model)[:2]


def test_the_demo_is_the_preset_of_the_makefile() -> None:
    config = compose("preset=demo", "scheme=w4a6")
    assert config.preset == "demo"
    assert (config.calibration.samples_per_task, config.evaluation.samples_per_task) == (12, 32)
    makefile = (CONF.parent / "Makefile").read_text()
    demo = next(line for line in makefile.splitlines() if line.startswith("DEMO_METHODS")).partition(":= ")[2].split()
    assert demo == ["none", "rtn", "smoothquant", "quarot_gptq", "masquant", "masquant_gauged"]
    assert set(demo) <= set(names("method"))
