from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masq import files
from masq.errors import DataError, OutputError
from masq.files import (
    atomic_write_bytes,
    atomic_write_json,
    canonical_hash,
    find_files,
    read_json,
    require_writable_folder,
    sha256_file,
)


def test_bytes_are_written_into_new_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c.bin"
    atomic_write_bytes(target, b"one")
    atomic_write_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert [path.name for path in target.parent.iterdir()] == ["c.bin"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "c.bin"
    atomic_write_bytes(target, b"old")

    def no_space(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OutputError, match="No space left"):
        atomic_write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["c.bin"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_bytes(tmp_path / "c", b"")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o640


def test_a_file_in_the_way_of_a_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        atomic_write_bytes(tmp_path / "file" / "c", b"")
    with pytest.raises(OutputError, match=r"must be writable.*output\.root"):
        require_writable_folder(tmp_path / "file")


def test_require_writable_folder_creates_it_and_leaves_it_empty(tmp_path: Path) -> None:
    folder = require_writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert [path.name for path in folder.iterdir()] == []


def test_json_round_trip_keeps_text_readable(tmp_path: Path) -> None:
    content = {"name": "größe", "values": [1, 2.5, None, True]}
    atomic_write_json(tmp_path / "c.json", content)
    assert read_json(tmp_path / "c.json") == content
    assert "größe" in (tmp_path / "c.json").read_text(encoding="utf-8")


def test_json_refuses_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(tmp_path / "c.json", {"x": float("nan")})
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("text", ['{"a": 1', "", "\x00\x01", '{"a": "\xff"'])
def test_a_truncated_file_is_a_data_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="not complete JSON"):
        read_json(tmp_path / "c.json")


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path / "c.json")
    with pytest.raises(DataError, match="cannot read"):
        sha256_file(tmp_path / "c.json")


def test_sha256_of_a_file_longer_than_a_chunk(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "c").write_bytes(content)
    assert sha256_file(tmp_path / "c") == hashlib.sha256(content).hexdigest()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_canonical_hash_ignores_order_and_survives_json(content: dict[str, object]) -> None:
    shuffled = dict(reversed(list(content.items())))
    assert canonical_hash(shuffled) == canonical_hash(content) == canonical_hash(json.loads(json.dumps(content)))


def test_canonical_hash_sees_values() -> None:
    assert len({canonical_hash(value) for value in (1, 1.5, "1", True, None, [1], {"1": 1})}) == 7


def test_find_files_takes_files_folders_and_patterns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/record.json", "y/deep/record.json", "flat/b.json", "flat/a.json"):
        atomic_write_bytes(tmp_path / name, b"{}")
    monkeypatch.chdir(tmp_path)
    assert find_files(["y", "x/record.json", "y"], "record.json") == [Path("y/deep/record.json"), Path("x/record.json")]
    assert find_files(["flat"], "record.json") == [Path("flat/a.json"), Path("flat/b.json")]
    assert find_files(["?"], "record.json") == [Path("x/record.json"), Path("y/deep/record.json")]
    assert find_files([str(tmp_path / "*" / "record.json")], "record.json") == [tmp_path / "x/record.json"]
    with pytest.raises(DataError, match="no record.json there"):
        find_files(["x", "nothing*"], "record.json")
