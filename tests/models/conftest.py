"""Nano models and their adapters, fresh for each test: tests change weights and place hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from masq.models.base import ModelAdapter
from masq.models.qwen2_5_omni import Qwen25OmniAdapter
from masq.models.qwen2_5_vl import Qwen25VLAdapter
from masq.models.zoo import nano

FAMILIES = {"nano_vl": Qwen25VLAdapter, "nano_omni": Qwen25OmniAdapter}


@pytest.fixture
def make_adapter() -> Callable[..., ModelAdapter]:
    """Adapter of a nano model by name; keyword arguments go to ``nano.build``."""
    return lambda name, **changes: FAMILIES[name](*nano.build(name, **changes))


@pytest.fixture(params=nano.NAMES)
def adapter(request: pytest.FixtureRequest) -> ModelAdapter:
    """Each nano model in turn."""
    return FAMILIES[request.param](*nano.build(request.param))
