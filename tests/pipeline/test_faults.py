"""What breaks under a streamed run: a clear error, finished blocks kept, and the same bits once it went on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from masq.config import to_dict
from masq.errors import DataError, MasqError, ModelError, OutputError, ShortOfMemoryError, memory_errors_of
from masq.export import checkpoint
from masq.finished import load_finished
from masq.models import checkpoint as layout
from masq.pipeline import loop
from masq.pipeline.store import BlockStore
from masq.report.record import comparable, read_record
from masq.run import run
from tests.killing import kill_all
from tests.pipeline.test_streamed import bits, cell, published, same  # noqa: F401
from tests.test_run import splits  # noqa: F401

METHOD = "masquant"
KILLED = (2, 5)


@pytest.fixture(scope="module")
def undisturbed(splits, published, tmp_path_factory):  # noqa: F811
    """Record and files of a run that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed") / "runs"
    record = run(cell(splits, root, published["nano_omni"], METHOD, "streamed"))
    return comparable(record), bits(root)


@pytest.fixture
def source(published, tmp_path) -> Path:  # noqa: F811
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(published["nano_omni"], tmp_path / "nano_omni"))


def after_saves(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> None:
    """Do something once ``number`` blocks of the second walk are stored."""
    real, left = BlockStore.save, iter(range(number - 1))

    def save(self: BlockStore, *args: Any) -> None:
        real(self, *args)
        if self.folder.name == "blocks" and next(left, None) is None:
            act()

    monkeypatch.setattr(BlockStore, "save", save)


def fails_then_goes_on(config: Any, monkeypatch: Any, undisturbed: Any, error: type[MasqError], says: str) -> None:
    """The run ends with ``error`` and a record that says so; the next one ends as if nothing had been."""
    with pytest.raises(error, match=says) as caught:
        run(config)
    assert caught.value.remedy
    monkeypatch.undo()
    root = Path(config.output.root)
    folder = next(root.glob("nano_omni-*"))
    assert read_record(folder).status == "failed"
    assert not list(folder.glob("scratch-*"))
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("blocks/*.safetensors")}
    assert kept, "finished blocks stay"
    again = run(config)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "and are not made again"
    assert comparable(again) == undisturbed[0]
    assert same(bits(root), undisturbed[1])


def test_a_full_disk_under_the_stored_blocks(splits, source, tmp_path, monkeypatch, undisturbed):  # noqa: F811
    real = os.fsync

    def full(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.parent.name == "blocks" and "block-001" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    config = cell(splits, tmp_path / "runs", source, METHOD, "streamed")
    fails_then_goes_on(config, monkeypatch, undisturbed, OutputError, r"block-001.*No space left.*space")


def test_a_full_disk_under_the_activations(splits, source, tmp_path, monkeypatch, undisturbed):  # noqa: F811
    from masq.models import tensor_files

    def full() -> None:
        monkeypatch.setattr(tensor_files, "header_bytes", no_space)

    def no_space(*_: Any) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_files, "MEMORY_BYTES", 0)
    after_saves(monkeypatch, 1, full)
    config = cell(splits, tmp_path / "runs", source, METHOD, "streamed")
    fails_then_goes_on(config, monkeypatch, undisturbed, OutputError, r"activations.*No space left.*finished blocks")


def test_a_shard_that_is_cut_while_the_run_lasts(splits, source, tmp_path, monkeypatch, undisturbed):  # noqa: F811
    where = json.loads((source / layout.INDEX).read_text())["weight_map"]
    [shard] = {file for key, file in where.items() if key.endswith("model.layers.2.mlp.down_proj.weight")}
    whole = (source / shard).read_bytes()
    after_saves(monkeypatch, 1, lambda: (source / shard).write_bytes(whole[:1000]))
    real = monkeypatch.undo

    def restored() -> None:
        real()
        (source / shard).write_bytes(whole)

    monkeypatch.undo = restored
    config = cell(splits, tmp_path / "runs", source, METHOD, "streamed")
    fails_then_goes_on(config, monkeypatch, undisturbed, DataError, rf"{shard}.*of \d+ bytes.*download it again")


@pytest.mark.parametrize("lost", [layout.INDEX, "shard", "cut"])
def test_a_checkpoint_that_is_not_whole_is_refused_at_once(splits, source, tmp_path, lost):  # noqa: F811
    shard = sorted(source.glob("*.safetensors"))[2]
    if lost == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (shard if lost == "shard" else source / lost).unlink()
    says = {layout.INDEX: layout.INDEX, "shard": shard.name, "cut": "header promises"}[lost]
    with pytest.raises(ModelError, match=says) as caught:
        run(cell(splits, tmp_path / "runs", source, METHOD, "streamed"))
    assert "ownload" in caught.value.remedy
    assert not (tmp_path / "runs").exists(), "nothing was begun"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 180355072 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=["python", "torch", "cuda"],
)
def test_out_of_memory_at_a_block(splits, source, tmp_path, monkeypatch, undisturbed, error):  # noqa: F811
    real = loop.quantize_one

    def short(block: Any, index: int, *args: Any) -> Any:
        if index == 1:
            raise error
        return real(block, index, *args)

    monkeypatch.setattr(loop, "quantize_one", short)
    config = cell(splits, tmp_path / "runs", source, METHOD, "streamed")
    says = r"block 1 .*must fit into memory.*finished blocks are kept"
    fails_then_goes_on(config, monkeypatch, undisturbed, ShortOfMemoryError, says)


def test_an_error_of_another_kind_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), memory_errors_of("block 0"):
        raise RuntimeError("shapes do not fit")


@pytest.fixture(scope="module")
def killed(splits, published, tmp_path_factory) -> dict[int, Path]:  # noqa: F811
    """The root of every run that was killed, by how many blocks it had stored."""
    roots = {after: tmp_path_factory.mktemp(f"killed-{after}") / "runs" for after in KILLED}
    cells = {after: cell(splits, root, published["nano_omni"], METHOD, "streamed") for after, root in roots.items()}
    kill_all([("block", after, to_dict(config)) for after, config in cells.items()])
    return roots


@pytest.mark.parametrize("after", KILLED)
def test_a_killed_worker(splits, published, killed, undisturbed, after):  # noqa: F811
    """Killed during either walk; what is left is swept up."""
    folder = next(killed[after].glob("nano_omni-*"))
    assert list(folder.glob("scratch-*"))
    record = run(cell(splits, killed[after], published["nano_omni"], METHOD, "streamed"))
    assert comparable(record) == undisturbed[0]
    assert same(bits(killed[after]), undisturbed[1])
    assert not list(folder.glob("scratch-*"))


def test_a_full_disk_under_an_export(splits, source, tmp_path, monkeypatch):  # noqa: F811
    run(cell(splits, tmp_path / "runs", source, METHOD, "streamed"))
    adapter = load_finished(next((tmp_path / "runs").glob("nano_omni-*")))
    from masq.export import shards

    real, left = shards.raw, iter(range(20))

    def raw(tensor: torch.Tensor) -> Any:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensor)

    monkeypatch.setattr(shards, "raw", raw)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.save(adapter, tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("runs", "nano_omni")] == []
    monkeypatch.undo()
    checkpoint.save(adapter, tmp_path / "out", {})
    checkpoint.check(tmp_path / "out")
