"""What the YAML files beside this one name."""

from masq.evaluation.local.language_task import LocalTextTask as LocalTextTask
