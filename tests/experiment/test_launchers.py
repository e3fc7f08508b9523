"""Launchers: their settings compose, and cells in other processes end like cells in one."""

from __future__ import annotations

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig

from masq.compose import config_folder


def composed(launcher: str) -> object:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = hydra.compose("run", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    HydraConfig.instance().set_config(content)
    return content.hydra.launcher


def test_several_processes_on_this_machine() -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    settings = composed("local")
    assert settings._target_ == "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    assert (settings.n_jobs, str(settings.batch_size)) == (2, "1")


def test_slurm() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    settings = composed("slurm")
    assert settings._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert (settings.gpus_per_node, settings.array_parallelism, settings.timeout_min) == (1, 16, 720)


def test_a_ray_cluster() -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    settings = composed("cluster")
    assert settings._target_ == "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    assert (settings.ray.init.num_cpus, settings.ray.remote.num_cpus) == (2, 1)
