"""A checkpoint folder as the source of a model without weights: each tensor is read when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from masq.errors import ModelError
from masq.models import checkpoint
from masq.models.tensor_files import TensorFile, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class CheckpointWeights:
    """Parameters of a model by the names that they have in memory, read from a folder of safetensors files.

    Names are brought together by transformers' own rules for the class.

    Args:
        model: on the meta device.
        folder: its checkpoint, its files checked.

    Raises:
        ModelError: a rule that does more than rename.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.files = {path.name: TensorFile(path) for path in checkpoint.weight_files(folder)}
        self.state: dict[str, torch.Tensor] = model.state_dict()
        self.keys: dict[str, tuple[str, str]] = {}
        self.unexpected: list[str] = []
        renamed = _renaming(model, self.state)
        for file_name, file in self.files.items():
            for key in file.entries:
                name = renamed(key)
                if name in self.state:
                    self.keys[name] = file_name, key
                else:
                    self.unexpected.append(key)

    def loading_info(self, model: Any) -> dict[str, Any]:
        """What transformers would say of a load: missing, mismatched and unexpected keys."""
        shapes = {name: tuple(self.files[file].entries[key]["shape"]) for name, (file, key) in self.keys.items()}
        missing = self.state.keys() - self.keys.keys() - _tied(model)
        mismatched = [name for name, shape in shapes.items() if shape != tuple(self.state[name].shape)]
        return {
            "missing_keys": sorted(missing),
            "mismatched_keys": sorted(mismatched),
            "unexpected_keys": self.unexpected,
            "error_msgs": [],
        }

    def read(self, name: str) -> torch.Tensor:
        """See ``WeightSource.read``."""
        file, key = self.keys[name]
        return self.files[file].read(key).to(self.state[name].dtype)


class WrittenWeights:
    """The weights of a model in memory, written once to a file from which they are read again.

    Args:
        model: whose stored tensors are written.
        path: of the file.
    """

    def __init__(self, model: Any, path: Path) -> None:
        write_tensors(path, model.state_dict())
        self._file = TensorFile(path)

    def read(self, name: str) -> torch.Tensor:
        """See ``WeightSource.read``."""
        return self._file.read(name)


def skeleton(model_class: Any, folder: Path, *, dtype: torch.dtype, attention: str, shared: dict[str, Any]) -> Any:
    """The model of a checkpoint, its parameters on the meta device and everything else ready.

    Args:
        model_class: of transformers.
        folder: the checkpoint.
        dtype: of the parameters.
        attention: implementation of transformers.
        shared: options of every ``from_pretrained`` call.
    """
    from transformers import GenerationConfig

    config = model_class.config_class.from_pretrained(folder, **shared)
    config._name_or_path = str(folder)
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    _compute_buffers(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _compute_buffers(model: Any) -> None:
    """Give buffers that no checkpoint holds (frequencies of rotary embeddings) their values, as transformers does."""
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._non_persistent_buffers_set:
            module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
            module._is_hf_initialized = False
    model.initialize_weights()


def _tied(model: Any) -> set[str]:
    """Names of tied parameters but the first of each."""
    first: dict[int, str] = {}
    pairs = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in pairs if first.setdefault(id(parameter), name) != name}


def _renaming(model: Any, state: dict[str, torch.Tensor]) -> Callable[[str], str]:
    """From the name of a tensor in a checkpoint to the name in memory."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]

    def renamed(key: str) -> str:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            return key
        if converted is not None:
            raise ModelError(
                "streamed weights must be stored as the model uses them, tensor by tensor",
                value=f"{key} is one of several that make {name}",
                remedy="set model.weights=resident",
            )
        return name

    return renamed
