"""Plain safetensors files read tensor by tensor into fresh memory, and lists of tensors that overflow to disk.

Reading is ``readinto``, not a memory map: pages of a mapped file count as memory of the process, and mapped tensors lie
at any byte, where kernels of the CPU round differently.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from masq.errors import DataError, OutputError
from masq.models import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MEMORY_BYTES = 512 << 20
"""What all lists of one ``Overflow`` hold in memory together before they go to disk."""
_ALIGNMENT = 8


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, row by row, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def header_bytes(entries: Mapping[str, Any], at_least: int = 0) -> bytes:
    """Length and JSON of a safetensors header, filled up with spaces so that data begin at a multiple of eight."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = max(len(text), at_least)
    text = text.ljust(length + -length % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a working file for this process: one copy of one tensor in memory at most, not synced to the disk.

    Raises:
        OutputError: no space, or no permission.
    """
    entries, end = {}, 0
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(header_bytes(entries))
            for tensor in tensors.values():
                file.write(raw(tensor.detach().cpu().contiguous()))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"weights and activations that do not stay in memory need {end} bytes in {path.parent}",
            value=error.strerror or error,
            remedy="free space, or set output.root to a larger disk, and run again: finished blocks are kept",
        ) from error


class TensorFile:
    """One safetensors file, its header checked.

    Raises:
        ModelError: it is missing, truncated or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self._start = checkpoint.header(path)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in memory of its own.

        Raises:
            DataError: the file has become shorter, or cannot be read.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + begin)
                view, found = raw(tensor), 0
                while found < end - begin and (count := file.readinto(view[found:])):
                    found += count
        except OSError as error:
            raise self._error(name, error.strerror or error) from error
        if found != end - begin:
            raise self._error(name, f"{found} of {end - begin} bytes")
        return tensor

    def _error(self, name: str, value: object) -> DataError:
        return DataError(
            f"{name} must be in {self.path.name}, whole, for as long as the run lasts",
            value=value,
            remedy="put the file back (download it again); the same command goes on behind the finished blocks",
        )


class Overflow:
    """Lists of tensors that share a bound on memory; what is beyond it lies in files of one folder.

    Args:
        folder: of the files; each is gone when its list is.
        memory_bytes: the bound, over all lists; ``MEMORY_BYTES`` by default.
    """

    def __init__(self, folder: Path, memory_bytes: int | None = None) -> None:
        self.folder = folder
        self.memory_bytes = MEMORY_BYTES if memory_bytes is None else memory_bytes
        self.used = self.written = 0

    def new(self, tensors: Iterable[torch.Tensor] = ()) -> OverflowList:
        """A list that begins with ``tensors``."""
        found = OverflowList(self)
        for tensor in tensors:
            found.append(tensor)
        return found


class OverflowList(Sequence[torch.Tensor]):
    """Tensors in memory as long as there is room, then on disk, and read anew each time they are asked for."""

    def __init__(self, shared: Overflow) -> None:
        self._shared = shared
        self._items: list[torch.Tensor | TensorFile] = []
        self._held: list[int | Path] = []
        weakref.finalize(self, _release, shared, self._held)

    def append(self, tensor: torch.Tensor) -> None:
        """Add one at the end.

        Raises:
            OutputError: it does not fit on the disk.
        """
        shared = self._shared
        if shared.used + tensor.nbytes <= shared.memory_bytes:
            shared.used += tensor.nbytes
            self._held.append(tensor.nbytes)
            self._items.append(tensor)
            return
        path = shared.folder / f"activations-{shared.written:06d}.safetensors"
        shared.written += 1
        write_tensors(path, {str(tensor.device): tensor})
        self._held.append(path)
        self._items.append(TensorFile(path))

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        """Read one, or some into a list."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        item = self._items[index]
        if isinstance(item, torch.Tensor):
            return item
        (device,) = item.entries
        return item.read(device).to(device)

    def __len__(self) -> int:
        return len(self._items)


Collected = list[torch.Tensor] | OverflowList
"""Activations of all calibration batches, which are only added at the end."""


def _release(shared: Overflow, held: list[int | Path]) -> None:
    for one in held:
        if isinstance(one, int):
            shared.used -= one
        else:
            one.unlink(missing_ok=True)
