"""Several processes that calibrate one model, each on its share of every batch (torch.distributed).

Every process holds the model and walks over it; what they have seen is added up wherever a decision depends on it, so
that all of them come to the same one, and the first writes it down. One process needs none of this: each function gives
back what it was given. Importing this module does not import torch.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from masq.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

T = TypeVar("T")
# A process that waits so long for the others gives up: one of them has died, or is stuck.
_PATIENCE = timedelta(minutes=30)


def expected() -> int:
    """How many processes ``torchrun`` says that there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it has; leave them at the end.

    Raises:
        ConfigError: torchrun's variables are not complete.
    """
    if expected() == 1:
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            "several processes find each other by the variables that torchrun sets",
            value=f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}",
            remedy="start them as torchrun --nproc-per-node N -m masq run ..., or unset WORLD_SIZE",
        )
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def size() -> int:
    """How many processes have joined."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def rank() -> int:
    """Number of this process; 0 is the one that writes."""
    return sys.modules["torch.distributed"].get_rank() if size() > 1 else 0


def share(items: Sequence[T]) -> list[T]:
    """Those of ``items`` that this process takes: every ``size()``-th from its rank on."""
    return list(items[rank() :: size()])


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, the same bits in all of them."""
    return _reduced(tensor, "SUM")


def greatest(tensor: torch.Tensor) -> torch.Tensor:
    """The maximum over processes."""
    return _reduced(tensor, "MAX")


def least(tensor: torch.Tensor) -> torch.Tensor:
    """The minimum over processes."""
    return _reduced(tensor, "MIN")


def stacked(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes, which have one shape, by rank: [size(), ...]."""
    if size() == 1:
        return tensor.unsqueeze(0)
    import torch

    parts = [torch.empty_like(tensor) for _ in range(size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def concatenated(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, D] of all processes, n differing, in the order of their ranks."""
    if size() == 1:
        return rows
    import torch

    counts = stacked(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    return torch.cat([part[:count] for part, count in zip(stacked(padded), counts, strict=True)])


def _reduced(tensor: torch.Tensor, operation: str) -> torch.Tensor:
    if size() == 1:
        return tensor
    from torch import distributed

    result = tensor.clone()
    distributed.all_reduce(result, getattr(distributed.ReduceOp, operation))
    return result
