from __future__ import annotations

from pathlib import Path

from masq.report.provenance import provenance
from masq.report.sessions import add_session, differences, sessions


def test_sessions_are_kept_in_order_and_equal_programs_differ_in_nothing(tmp_path: Path) -> None:
    here = provenance(0, {}, threads=2)
    assert sessions(tmp_path) == []
    add_session(tmp_path, here)
    add_session(tmp_path, {**here, "started": "later"})
    noted = sessions(tmp_path)
    assert [session["started"] for session in noted] == [here["started"], "later"]
    assert differences(noted, here, "blocks") == []


def test_what_changed_in_between_is_named_once(tmp_path: Path) -> None:
    here = provenance(0, {}, threads=2)
    old = {**here, "threads": 1, "libraries": {**here["libraries"], "torch": "2.0.0"}}
    add_session(tmp_path, old)
    add_session(tmp_path, old)
    found = differences(sessions(tmp_path), here, "factors")
    assert found == [
        f"factors were made in part with libraries torch 2.0.0, the rest with torch {here['libraries']['torch']}",
        "factors were made in part with threads 1, the rest with 2",
    ]
