"""What the float model makes of teacher-forced batches, computed once for every quantized model compared with it.

Shapes: B batch, T tokens, R answer tokens, d hidden size.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from masq.errors import DataError
from masq.evaluation.likelihood import head_inputs
from masq.files import canonical_hash
from masq.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from masq.models.base import EncodedBatch, ModelAdapter, Sample

_LOG = logging.getLogger(__name__)


class FloatBatch(NamedTuple):
    """One batch.

    Attributes:
        blocks: output [B, T, d] of each decoder block.
        rows: inputs [R, d] of the head at the positions that predict an answer token.
    """

    blocks: list[torch.Tensor]
    rows: torch.Tensor


class FloatOutputs:
    """Outputs of a float model, kept in a folder or computed each time.

    Args:
        model: the float model.
        folder: where batches are kept, by the ids of their samples; of this model and these samples alone. A batch
            takes as many bytes as B * T * d numbers of the model's dtype for each block. None keeps nothing.
    """

    def __init__(self, model: ModelAdapter, folder: Path | None = None) -> None:
        self.model, self.folder = model, folder

    def __call__(self, samples: Sequence[Sample], batch: EncodedBatch) -> FloatBatch:
        """The outputs for ``batch``, which is ``samples`` encoded with their answers."""
        if self.folder is None:
            return self._compute(batch)
        path = self.folder / f"{canonical_hash([sample.id for sample in samples])[:24]}.safetensors"
        try:
            found = load_tensors(path)
        except DataError as error:
            _LOG.warning("%s is computed again: %s", path.name, error)
            found = None
        if found is None:
            computed = self._compute(batch)
            save_tensors(path, {"rows": computed.rows, **_numbered(computed.blocks)}, {})
            return computed
        tensors = {name: tensor.to(self.model.device) for name, tensor in found[0].items()}
        rows = tensors.pop("rows")
        return FloatBatch([tensors[name] for name in sorted(tensors)], rows)

    def _compute(self, batch: EncodedBatch) -> FloatBatch:
        blocks: list[torch.Tensor] = []
        with block_outputs(self.model, lambda _index, output: blocks.append(output)):
            rows = head_inputs(self.model, batch)
        return FloatBatch(blocks, rows)


def _numbered(blocks: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"block-{index:04d}": output for index, output in enumerate(blocks)}


@contextmanager
def block_outputs(adapter: ModelAdapter, observe: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call ``observe`` with the number and the output [B, T, d] of each decoder block, while the context lasts."""

    def hook(index: int) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            observe(index, output[0] if isinstance(output, tuple) else output)

        return after

    handles = [block.module.register_forward_hook(hook(index)) for index, block in enumerate(adapter.blocks())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
