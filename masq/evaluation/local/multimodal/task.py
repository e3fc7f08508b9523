"""What the YAML files beside this one name."""

from masq.evaluation.local.multimodal_task import LocalTask as LocalTask
