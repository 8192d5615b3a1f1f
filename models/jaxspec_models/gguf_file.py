"""GGUF files: metadata and tensors, read one by one into the caller's buffers.

`gguf.GGUFReader` takes two seconds for the vocabulary of a small model and maps the whole file;
this reader takes a tenth of that and holds one chunk of rows. Weights are dequantised by
`gguf.quants`. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxspec_models.tensorfile import CHUNK_BYTES, Tensor, read_exactly

_SCALARS = {  # the format's number of a type -> its little-endian form
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMS = 4


class _Info(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from the start of the data


class _Cursor:
    """Reads values one after the other, and knows where the file ends."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.left = path.stat().st_size

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{self.path} is truncated; copy or download it again.")
        self.left -= count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind in _SCALARS:
                dtype = np.dtype(_SCALARS[kind])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            if count > self.left:
                raise ValueError(f"{self.path} is truncated; copy or download it again.")
            return [self.value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path} has a metadata value of unknown type {kind}.")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()


class GGUFFile:
    """The header of a GGUF file; the tensors are read one by one.

    Args:
      path: the file.

    Attributes:
      path: the file.
      metadata: its keys and values.
      tensors: name -> `Tensor`, shapes in the order of HF ([out, in]).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, is no GGUF file, or has a tensor twice.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "broken.gguf"
      >>> _ = path.write_bytes(b"no model")
      >>> GGUFFile(path)
      Traceback (most recent call last):
      ValueError: ...broken.gguf is no GGUF file; copy or download it again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        with path.open("rb") as file:
            if file.peek(4)[:4] != b"GGUF":
                raise ValueError(f"{path} is no GGUF file; copy or download it again.")
            try:
                infos, start = self._read_header(_Cursor(file, path))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} has a broken header; get it again.") from error
        for info in infos:
            if info.name in self.tensors:
                raise ValueError(f"{path} has the tensor {info.name} doubled; get a sound file.")
            self.tensors[info.name] = self._tensor(info, start + info.offset)

    def _read_header(self, cursor: _Cursor) -> tuple[list[_Info], int]:
        """Reads the metadata; returns what is said of each tensor, and where the data starts."""
        cursor.take(4)
        if (version := cursor.number("<I")) not in _VERSIONS:
            raise ValueError(
                f"{self.path} has GGUF version {version} (or big-endian numbers); "
                f"the supported ones are {', '.join(map(str, _VERSIONS))}, little-endian."
            )
        num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(num_values):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("<I"))
        infos = []
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.number("<I")
            if not 1 <= num_dims <= _MAX_DIMS:
                raise ValueError(f"{self.path} has a broken header; get it again.")
            shape = tuple(reversed([cursor.number("<Q") for _ in range(num_dims)]))
            infos.append(_Info(name, shape, cursor.number("<I"), cursor.number("<Q")))
        alignment = max(1, int(self.metadata.get("general.alignment", 32)))
        return infos, -(-cursor.file.tell() // alignment) * alignment

    def _tensor(self, info: _Info, offset: int) -> Tensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        where = f"{info.name} in {self.path}"
        try:
            quantization = GGMLQuantizationType(info.kind)
            block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{where} has the unknown type {info.kind}; get it again.") from error
        columns = info.shape[-1]
        row_bytes = columns // block_size * block_bytes
        rows = math.prod(info.shape[:-1])
        if offset + rows * row_bytes > self.path.stat().st_size:
            raise ValueError(f"{self.path} is truncated at {info.name}; copy or download it again.")

        def read_into(out: np.ndarray) -> None:
            matrix = out.reshape(rows, columns)
            step = max(1, CHUNK_BYTES // (4 * columns))
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                for first in range(0, rows, step):
                    chunk = np.empty((min(step, rows - first), row_bytes), np.uint8)
                    read_exactly(file, chunk)
                    try:
                        matrix[first : first + len(chunk)] = quants.dequantize(chunk, quantization)
                    except NotImplementedError as error:
                        raise ValueError(
                            f"{where} is quantised as {quantization.name}, which is not "
                            "supported; use a file with F16, Q8_0 or Q4_1 weights."
                        ) from error

        return Tensor(info.shape, read_into, self.path)
