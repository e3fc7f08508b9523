"""The vision and audio towers, rounded to nearest: before calibration, which then sees what they give.

Shapes: O output channels, I input channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from masq import parallel
from masq.errors import DataError, errors_of, memory_errors_of
from masq.models.base import Modality
from masq.modules.modality import Unlabelled
from masq.modules.quant_linear import QuantLinear
from masq.rounding.nearest import round_nearest
from masq.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from masq.models.base import ModelAdapter
    from masq.numerics.scheme import RoundedTowers

FILE = "towers.safetensors"
"""Name of the file beside the finished blocks."""


@torch.no_grad()
def quantize_towers(adapter: ModelAdapter, config: RoundedTowers, folder: Path) -> None:
    """Round the linears of all towers in place, after a rotation of the model, which the last of them carries.

    Args:
        adapter: the float model.
        config: formats.
        folder: where the result is kept; a finished one is restored.

    Raises:
        NumericalError: a weight is not finite; the message names the linear.
        DataError: the stored towers are damaged.
    """
    missing = torch.tensor(float(load_tensors(folder / FILE) is None))
    # All processes look before the first of them writes, and come to the same answer.
    if parallel.greatest(missing):
        kept: dict[str, torch.Tensor] = {}
        for name, tower in adapter.towers().items():
            with memory_errors_of(f"the tower {name}"), adapter.residence.present(tower):
                for path, linear in linears_of(tower):
                    with errors_of(f"{name}.{path}"):
                        state = _rounded(linear, config).state_dict()
                    kept |= {f"{name}.{path}.{key}": value.cpu() for key, value in state.items()}
        if parallel.rank() == 0:
            save_tensors(folder / FILE, kept, {})
        # Nobody reads the file before it is there.
        parallel.summed(torch.zeros(1))
    restore_towers(adapter, config, folder)


def restore_towers(adapter: ModelAdapter, config: RoundedTowers, folder: Path) -> None:
    """Put stored towers into a float model, as ``quantize_towers`` left them, bit for bit.

    Raises:
        DataError: they are missing or damaged.
    """
    for name, tower in adapter.towers().items():
        fill = _filler(adapter, name, tower, config, folder / FILE)
        with adapter.residence.present(tower):
            fill()
        adapter.residence.kept(tower, fill)


def linears_of(tower: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of the linears of a tower, quantized or not; those within torch's own attention stay hidden.

    ``nn.MultiheadAttention`` reads the weights of its projections itself, so they cannot be replaced.
    """
    for path, module in list(tower.named_modules())[1:]:
        if type(module) is nn.Linear or isinstance(module, QuantLinear):
            yield path, module


def _rounded(linear: nn.Module, config: RoundedTowers) -> QuantLinear:
    assert isinstance(linear, nn.Linear)
    weight = round_nearest(linear.weight.detach(), config.weight)
    return QuantLinear(
        weights={Modality.TEXT: weight},
        bias=linear.bias,
        activation=config.activation,
        context=Unlabelled(),
        dtype=linear.weight.dtype,
    )


def _filler(
    adapter: ModelAdapter, name: str, tower: nn.Module, config: RoundedTowers, path: Path
) -> Callable[[], None]:
    """What puts the stored linears of one tower into the model."""
    dtype = adapter.embeddings().weight.dtype

    def fill() -> None:
        stored = load_tensors(path)
        if stored is None:
            raise DataError(
                "the towers of a quantized model must be stored beside its blocks",
                value=f"{path.name} is missing",
                remedy="let the run finish: masq run with the same configuration goes on where it stopped",
            )
        for inner, _ in linears_of(tower):
            whole = f"{name}.{inner}."
            state: dict[str, Any] = {
                key.removeprefix(whole): value.to(adapter.device)
                for key, value in stored[0].items()
                if key.startswith(whole)
            }
            layer = QuantLinear.from_state(
                state, weight=config.weight, activation=config.activation, context=Unlabelled(), dtype=dtype
            )
            adapter.model.set_submodule(whole[:-1], layer)

    return fill
