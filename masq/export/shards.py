"""Weight files written tensor by tensor: nothing is held but the tensor at hand and the headers to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masq.export.describe import DTYPE_NAMES, tensor_digest
from masq.files import atomic_write_json
from masq.models.checkpoint import INDEX, WEIGHTS
from masq.models.tensor_files import header_bytes, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import torch

# A header is written when all is known, so its place is kept free: what an entry takes besides its name, in the header
# itself and, quotes escaped, in the listing of all tensors.
_ENTRY_BYTES = 400
_NAMES_IN_ENTRY = 4


class ShardWriter:
    """safetensors files in a folder, filled one after the other, with an index where there are several.

    Args:
        folder: where to.
        names: of all tensors that will come.
        max_bytes: a file is at most so large, unless one tensor is larger.
    """

    def __init__(self, folder: Path, names: Iterable[str], max_bytes: int) -> None:
        self.listing: dict[str, list[Any]] = {}
        """[dtype, shape, SHA-256 of the bytes] of every tensor so far, by name."""
        self._folder, self._max_bytes = folder, max_bytes
        self._room = 1024 + sum(_ENTRY_BYTES + _NAMES_IN_ENTRY * len(name) for name in names)
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._filled = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors, those of wide numbers first, so that they lie at multiples of their width.

        Raises:
            OSError: no space.
        """
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
            self._add(name, tensor.detach().cpu().contiguous())

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if not self._shards or self._filled + tensor.nbytes > self._max_bytes:
            self._next()
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        file: Any = self._file
        file.write(raw(tensor))
        offsets = [self._filled, self._filled + tensor.nbytes]
        self._shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self.listing[name] = [dtype, shape, tensor_digest(tensor)]
        self._filled += tensor.nbytes

    def _next(self) -> None:
        self.close()
        self._file = self._path(len(self._shards)).open("wb")
        self._file.write(header_bytes({}, self._room))
        self._shards.append({})
        self._filled = 0

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

    def close(self) -> None:
        """Close the file at hand."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the headers and the index, and give the files their names.

        Args:
            metadata: of every file.

        Raises:
            OSError: no space.
        """
        self.close()
        count, weight_map = len(self._shards), {}
        for number, entries in enumerate(self._shards):
            header = header_bytes({"__metadata__": {"format": "pt", **metadata}, **entries}, self._room)
            assert len(header) == len(header_bytes({}, self._room))
            with self._path(number).open("r+b") as file:
                file.write(header)
            name = WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(entries, name)
        if count > 1:
            total = sum(
                entry["data_offsets"][1] - entry["data_offsets"][0] for s in self._shards for entry in s.values()
            )
            atomic_write_json(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_portions(
    portions: Iterable[Mapping[str, torch.Tensor]],
    folder: Path,
    names: Iterable[str],
    max_bytes: int,
    metadata: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> dict[str, list[Any]]:
    """Write a model piece by piece.

    Args:
        portions: its tensors by name, a few at a time.
        folder: where to.
        names: of all of them.
        max_bytes: see ``ShardWriter``.
        metadata: of the files, from the listing of their tensors.

    Returns:
        The listing.

    Raises:
        OSError: no space.
    """
    writer = ShardWriter(folder, names, max_bytes)
    try:
        for tensors in portions:
            writer.add(tensors)
            # The next piece comes into memory while this name is still bound.
            del tensors
    finally:
        writer.close()
    writer.finish(metadata(writer.listing))
    return writer.listing
