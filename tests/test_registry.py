from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from masq.errors import ConfigError
from masq.registry import Registry


@pytest.fixture
def registry() -> Registry[Callable[..., Any]]:
    registry: Registry[Callable[..., Any]] = Registry("parser")
    registry.register("json", "json:loads")
    registry.register("dump", json.dumps)
    return registry


def test_objects_and_references_are_found(registry: Registry[Callable[..., Any]]) -> None:
    assert registry.get("dump") is json.dumps
    assert registry.get("json") is json.loads
    assert registry.get("json") is json.loads


def test_names_are_sorted_and_contained(registry: Registry[Callable[..., Any]]) -> None:
    assert registry.names() == ["dump", "json"]
    assert "json" in registry
    assert "yaml" not in registry


def test_a_reference_is_imported_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("colour")
    registry.register("grey", "colorsys:rgb_to_hls")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert "grey" in registry.names()
    assert "colorsys" not in sys.modules
    assert callable(registry.get("grey"))
    assert "colorsys" in sys.modules


def test_unknown_name_lists_near_matches(registry: Registry[Callable[..., Any]]) -> None:
    with pytest.raises(ConfigError, match=r"unknown parser \(got: jsn\). Did you mean json\?"):
        registry.get("jsn")


def test_a_name_is_registered_once(registry: Registry[Callable[..., Any]]) -> None:
    with pytest.raises(KeyError, match="registered twice"):
        registry.register("json", json.dumps)
