"""Nano models and their adapters, fresh for each test: tests change weights and place hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from masq.models.base import ModelAdapter
from tests.nano_fixtures import NANO, nano_adapter


@pytest.fixture
def make_adapter() -> Callable[..., ModelAdapter]:
    """Adapter of a nano model by name; keyword arguments go to ``nano.build``."""
    return nano_adapter


@pytest.fixture(params=NANO)
def adapter(request: pytest.FixtureRequest) -> ModelAdapter:
    """The nano model of each family in turn."""
    return nano_adapter(request.param)
