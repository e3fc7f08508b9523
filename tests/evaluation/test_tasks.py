from __future__ import annotations

import pytest

from masq.errors import ConfigError, DataError
from masq.evaluation.tasks import TASKS, check_tasks
from masq.models.base import Sample


def test_every_task_is_generated_or_read() -> None:
    assert {TASKS.get(name).mode for name in TASKS.names()} == {"generate", "likelihood"}


def test_unknown_tasks_and_answers_without_prompt_are_refused() -> None:
    check_tasks([Sample("1", "read", "q", "a"), Sample("2", "prose", "", "a passage")])
    with pytest.raises(ConfigError, match="unknown task"):
        check_tasks([Sample("1", "raed", "q", "a")])
    with pytest.raises(DataError, match="sample 7 of task read"):
        check_tasks([Sample("7", "read", "", "secret")])
