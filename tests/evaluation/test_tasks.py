from __future__ import annotations

import pytest

from masq.errors import ConfigError, DataError
from masq.evaluation.tasks import TASKS, check_tasks
from masq.models.base import Sample


def test_every_task_is_generated_read_or_chosen() -> None:
    assert {TASKS.get(name).mode for name in TASKS.names()} == {"generate", "likelihood", "choose"}


def test_unknown_tasks_and_answers_without_prompt_are_refused() -> None:
    check_tasks([Sample("1", "read", "q", "a"), Sample("2", "prose", "", "a passage")])
    with pytest.raises(ConfigError, match="unknown task"):
        check_tasks([Sample("1", "raed", "q", "a")])
    with pytest.raises(DataError, match="sample 7 of task read"):
        check_tasks([Sample("7", "read", "", "secret")])


def test_choices_and_tasks_that_choose_belong_together() -> None:
    choices = ("a", "b")
    check_tasks([Sample("1", "choice", "c", "a", choices=choices)])
    with pytest.raises(DataError, match="sample 7 of task choice has none.*column choices"):
        check_tasks([Sample("7", "choice", "c", "a")])
    for task in ("read", "manual"):
        with pytest.raises(DataError, match=f"sample 8 of task {task} has 2"):
            check_tasks([Sample("8", task, "c", "a", choices=choices)])
