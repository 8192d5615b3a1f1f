"""Safetensors files, read straight into the caller's buffers and written tensor by tensor.

The `safetensors` package maps a file (its pages then count as resident memory) and returns fresh
arrays; here bytes go from the file to the place where they are used, so that loading a checkpoint
needs hardly more memory than its result. The format: a little-endian u64 header length, a JSON
header, then the data (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

CHUNK_BYTES = 4 << 20
"""The most bytes that a conversion of dtypes holds beside its result."""

_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


class Tensor(NamedTuple):
    """A tensor in a file that has not been read yet.

    Attributes:
      shape: as in the checkpoint.
      read_into: `read_into(out)` fills a C-contiguous float32 or bfloat16 array of that shape,
        or an int8 one from int8.
      file: where it is, for messages.
    """

    shape: tuple[int, ...]
    read_into: Callable[[np.ndarray], None]
    file: Path


def read_exactly(file: FileIO, out: np.ndarray) -> None:
    """Fills a C-contiguous array with the next bytes of a file.

    Raises:
      ValueError: the file ends too early.
    """
    view = out.reshape(-1).view(np.uint8).data
    while view.nbytes:
        if not (count := file.readinto(view)):
            raise ValueError(f"{file.name} is truncated; copy or download it again.")
        view = view[count:]


class _Entry(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> _Entry:
    begin, end = data_offsets
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets {data_offsets}")
    return _Entry(dtype, tuple(map(int, shape)), begin, end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"doubled: {', '.join(doubled)}")
    return found


class SafetensorsFile:
    """The header of a safetensors file; the tensors are read one by one.

    Args:
      path: the file.

    Attributes:
      tensors: name -> `Tensor`.
      metadata: the strings that the writer added.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or is no safetensors file.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
      >>> write_safetensors(path, {"w": np.ones((2, 3), np.float32)})
      >>> file = SafetensorsFile(path)
      >>> out = np.empty((2, 3), np.float32)
      >>> file.tensors["w"].read_into(out)
      >>> float(out.sum())
      6.0
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(
                    f"{path} is truncated or is no safetensors file; copy or download it again."
                )
            try:
                header = json.loads(file.read(length), object_pairs_hook=_unique)
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                entries = {name: _entry(**entry) for name, entry in header.items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} has a broken header ({error}); get it again.") from error
        self._start = 8 + length
        if size < self._start + max((entry.end for entry in entries.values()), default=0):
            raise ValueError(f"{path} is truncated; copy or download it again.")
        self.tensors = {name: self._tensor(name, entry) for name, entry in entries.items()}

    def _tensor(self, name: str, entry: _Entry) -> Tensor:
        def read_into(out: np.ndarray) -> None:
            dtype = _DTYPES.get(entry.kind)
            # Integers mean nothing without their scales: they are never converted.
            if dtype is None or (dtype == np.int8) != (out.dtype == np.int8):
                floats = ", ".join(kind for kind, dtype in _DTYPES.items() if dtype != np.int8)
                raise ValueError(
                    f"{name} in {self.path} has dtype {entry.kind}; the supported ones are "
                    f"{floats}."
                )
            if entry.end - entry.begin != math.prod(entry.shape) * dtype.itemsize:
                raise ValueError(f"{name} in {self.path} has a broken header; get the file again.")
            # Unbuffered: the bytes go straight to where they are used.
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + entry.begin)
                if out.dtype == dtype:
                    read_exactly(file, out)
                    return
                flat = out.reshape(-1)
                step = CHUNK_BYTES // dtype.itemsize
                for first in range(0, flat.size, step):
                    chunk = np.empty(min(step, flat.size - first), dtype)
                    read_exactly(file, chunk)
                    flat[first : first + chunk.size] = chunk

        return Tensor(entry.shape, read_into, self.path)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes float32, float16, bfloat16 or int8 arrays; nothing is held beside them.

    The file is forced to the disk, so that a rename afterwards publishes all of it or nothing.

    Args:
      path: the file to write.
      tensors: name -> array.
      metadata: strings to store in the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
