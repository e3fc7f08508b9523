from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from masq.report.provenance import code_version, library_version, provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    for name in ("masq", "conf", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_commit_of_a_clean_checkout(checkout: Path) -> None:
    assert code_version(checkout) == (git(checkout, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize(
    ("path", "dirty"), [("masq/file", True), ("masq/new", True), ("conf/file", True), ("notes/file", False)]
)
def test_dirty_means_code_or_configs_changed(checkout: Path, path: str, dirty: bool) -> None:
    (checkout / path).write_text("two")
    assert code_version(checkout)[1] is dirty


def test_someone_elses_checkout_around_the_package_is_not_ours(checkout: Path) -> None:
    inner = checkout / "masq" / "site-packages"
    inner.mkdir()
    assert code_version(inner) == (None, None)


def test_no_checkout_and_no_commit(tmp_path: Path) -> None:
    assert code_version(tmp_path) == (None, None)
    git(tmp_path, "init", "-q")
    assert code_version(tmp_path) == (None, None)


def test_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(tmp_path) == (None, None)


def test_absent_library_is_none() -> None:
    assert library_version("no-such-distribution-here") is None
    assert library_version("pytest") == pytest.__version__


def test_contents_and_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    content = provenance(7, {"evaluation": "ff00"}, threads=3)
    assert content["seed"] == 7
    assert content["data"] == {"evaluation": "ff00"}
    assert content["threads"] == 3
    assert content["device"] == "cpu"
    assert content["device_name"]
    assert content["libraries"]["torch"] is not None
    assert content["started"].endswith("+00:00")
    text = json.dumps(content)
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert platform.node() not in text
    # A user name such as "root" or "x" may be part of an ordinary word; as a value it would be a leak.
    assert f'"{getpass.getuser()}"' not in text


def test_threads_come_from_torch() -> None:
    import torch

    assert provenance(0, {})["threads"] == torch.get_num_threads()
