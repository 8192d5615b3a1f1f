"""Checkpoints in, parameters out: safetensors and GGUF, through the family's one table.

`llama.checkpoint_table` says where each tensor goes. Whatever the format, every tensor is read
straight into its place in the (fused) parameter it belongs to, which then becomes a JAX array
without another copy: loading needs little more memory than the result.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec_models import gguf_config, llama
from jaxspec_models.gguf_file import GGUFFile
from jaxspec_models.tensorfile import SafetensorsFile, Tensor, write_safetensors

FORMAT_VERSION = 2
"""Of converted files; raise it when what `save_converted` writes changes."""

_ALIGNMENT = 64  # bytes; what JAX asks of a buffer that it takes over without a copy
_HUGE_PAGE = 2 << 20  # bytes
# Anonymous memory that is shared, Python's default, gets no huge pages.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Checkpoint keys that hold nothing to load: old transformers saved this derived buffer."""


class Arena:
    """Memory for all parameters of a model, which JAX's CPU backend takes over without a copy.

    One allocation in huge pages where the system has them: decoding streams all of it for every
    token, and spends a tenth less time on it than in pages of 4 kB. It lives as long as any of
    its arrays.

    Args:
      params: nested dict of what will be kept, with shapes and dtypes.
    """

    def __init__(self, params: Any):
        sizes = [_padded_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
        size = sum(sizes) + _HUGE_PAGE
        raw = mmap.mmap(-1, size, **_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                raw.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(raw, np.uint8)
        self._rest = whole[-whole.ctypes.data % _HUGE_PAGE :]

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The next array, of zeros."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = self._rest[:num_bytes].view(dtype).reshape(shape)
        self._rest = self._rest[_padded_bytes(shape, dtype) :]
        return array


def _padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _list(names: Any, limit: int = 5) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _check(
    config: llama.LlamaConfig, tensors: Mapping[str, Tensor], expected: Mapping[str, llama.Target]
) -> None:
    """Raises unless the checkpoint has exactly the tensors that the config calls for."""
    where = next(iter(tensors.values())).file.parent if tensors else "the checkpoint"
    if missing := expected.keys() - tensors.keys():
        raise ValueError(
            f"{where} lacks {_list(missing)}; the checkpoint is incomplete or is not what its "
            "config says: get all of its files."
        )
    extra = {name for name in tensors.keys() - expected.keys() if not _HARMLESS.search(name)}
    if config.tie_word_embeddings:
        extra -= {"lm_head.weight"}  # a second copy of the embeddings, saved by some tools
    if extra:
        raise ValueError(
            f"{where} has {_list(extra)}, for which its config has no place; "
            "the architecture is not supported, or config and weights do not belong together."
        )
    for name, target in expected.items():
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"{name} in {tensors[name].file} has shape {tensors[name].shape}, but the config "
                f"calls for {target.shape}; config and weights do not belong together."
            )


def _read(tensor: Tensor, out: np.ndarray, heads: int) -> None:
    if not heads:
        tensor.read_into(out)
        return
    # llama.cpp interleaves the two halves of each head's rows (its rotary convention): undo it.
    permuted = np.empty(out.shape, out.dtype)
    tensor.read_into(permuted)
    halves = permuted.reshape(heads, out.shape[0] // heads // 2, 2, *out.shape[1:])
    out[...] = halves.swapaxes(1, 2).reshape(out.shape)


def assemble(
    config: llama.LlamaConfig, tensors: Mapping[str, Tensor], *, is_gguf: bool = False
) -> Any:
    """Reads the tensors of a checkpoint into the parameters of a model.

    Args:
      config: the shape; its dtype is the weights'.
      tensors: checkpoint key -> where to read it.
      is_gguf: the keys and the row order are llama.cpp's.

    Returns:
      The nested dict of `llama.abstract_params(config)`, as JAX arrays.

    Raises:
      ValueError: a key is missing or unmatched, or a shape is wrong; the message names it.
    """
    table = llama.checkpoint_table(config)
    if is_gguf:
        table = {target.gguf_key: target for target in table.values()}
    _check(config, tensors, table)
    by_path: dict[tuple[str | int, ...], list[tuple[str, llama.Target]]] = {}
    for name, target in table.items():
        by_path.setdefault(target.path, []).append((name, target))
    abstract = llama.abstract_params(config)
    arena = Arena(abstract)
    params: dict[Any, Any] = {}
    for path, parts in by_path.items():
        leaf = functools.reduce(lambda place, key: place[key], path, abstract)
        buffer = arena.take(leaf.shape, leaf.dtype)
        for name, target in parts:
            rows = buffer[target.row : target.row + target.shape[0]]
            _read(tensors[name], rows, target.gguf_heads if is_gguf else 0)
        place = functools.reduce(lambda place, key: place.setdefault(key, {}), path[:-1], params)
        place[path[-1]] = jax.device_put(buffer)
    return params


# ---------------------------------------------------------------------------------------------
# HF directories.


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one dictionary.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is broken; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; a model directory needs config.json, *.safetensors and "
            "tokenizer.json."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken (no dictionary); copy or download it again.")
    return content


def read_config(directory: Path, *, dtype: str) -> llama.LlamaConfig:
    """Reads `config.json` and, where there is one, the EOS ids of `generation_config.json`.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: a file is broken, or the architecture is not supported.
    """
    config = read_json(directory / "config.json")
    if config.get("quantization_config"):
        raise ValueError(
            f"{directory} holds quantised weights (quantization_config in config.json), which are "
            "not supported; use the original checkpoint."
        )
    generation = directory / "generation_config.json"
    if generation.exists() and (eos := read_json(generation).get("eos_token_id")) is not None:
        config["eos_token_id"] = eos  # what HF's own generate stops at
    try:
        return llama.LlamaConfig.from_hf(config, dtype=dtype)
    except KeyError as error:
        raise ValueError(f"{directory / 'config.json'} lacks {error}; get it again.") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{directory / 'config.json'} has a broken value ({error}); get it again."
        ) from error


def _safetensors_files(directory: Path) -> list[Path]:
    if (single := directory / "model.safetensors").exists():
        return [single]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{index} has no weight_map; copy or download it again.")
        files = [directory / name for name in sorted(set(names.values()))]
        if absent := [file.name for file in files if not file.exists()]:
            raise FileNotFoundError(
                f"{directory} lacks {_list(absent)}, which its index names; get all of its files."
            )
        return files
    if files := sorted(directory.glob("*.safetensors")):
        return files
    if list(directory.glob("*.bin")) or list(directory.glob("*.pth")):
        raise FileNotFoundError(
            f"{directory} has no *.safetensors, only PyTorch files; load it with transformers and "
            "save it again with save_pretrained(directory)."
        )
    raise FileNotFoundError(
        f"{directory} has no *.safetensors; get all files of the checkpoint, weights included."
    )


def read_directory(directory: Path, *, dtype: str) -> tuple[llama.LlamaConfig, Any]:
    """Reads a model in HF form: config.json and safetensors, sharded or not.

    Args:
      directory: where the files are.
      dtype: "float32" or "bfloat16", of the weights; float32, float16 and bfloat16 are cast.

    Returns:
      The config, and the parameters as `llama.abstract_params(config)`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is broken, the architecture is not supported, or a key is unmatched,
        doubled, missing or of a wrong shape; the message names it.
    """
    config = read_config(directory, dtype=dtype)
    tensors: dict[str, Tensor] = {}
    for file in map(SafetensorsFile, _safetensors_files(directory)):
        if doubled := tensors.keys() & file.tensors.keys():
            raise ValueError(
                f"{_list(doubled)} is doubled: in {file.path} and in another file of "
                f"{directory}; remove the file that does not belong there."
            )
        tensors |= file.tensors
    return config, assemble(config, tensors)


# ---------------------------------------------------------------------------------------------
# GGUF, and the fast form it is converted to.


def read_gguf(file: GGUFFile, *, dtype: str) -> tuple[llama.LlamaConfig, Any]:
    """Reads a model from a GGUF file, its weights dequantised.

    Args:
      file: the opened file.
      dtype: "float32" or "bfloat16", of the weights.

    Returns:
      The config, and the parameters as `llama.abstract_params(config)`.

    Raises:
      ValueError: as `read_directory`.
    """
    config = gguf_config.read_config(file, dtype=dtype)
    return config, assemble(config, file.tensors, is_gguf=True)


def save_converted(path: Path, config: llama.LlamaConfig, params: Any) -> None:
    """Writes parameters as they are, each under its own path, as one safetensors file.

    Args:
      path: the file.
      config: stored in the file's metadata.
      params: as `llama.abstract_params(config)`.
    """
    # On the CPU `np.asarray` is a view, so nothing is copied.
    tensors = {name: np.asarray(leaf) for name, leaf in _named_leaves(params)}
    metadata = {"format_version": str(FORMAT_VERSION), "config": gguf_config.to_json(config)}
    write_safetensors(path, tensors, metadata)


def read_converted(path: Path) -> tuple[llama.LlamaConfig, Any]:
    """Reads what `save_converted` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged or of another format version.
    """
    file = SafetensorsFile(path)
    if file.metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(f"{path} has another format version; remove it.")
    config = gguf_config.from_json(file.metadata["config"])
    abstract = llama.abstract_params(config)
    arena = Arena(abstract)
    leaves = []
    for name, leaf in _named_leaves(abstract):
        tensor = file.tensors.get(name)
        if tensor is None or tensor.shape != leaf.shape:
            raise ValueError(f"{path} lacks {name} {leaf.shape}; remove it.")
        buffer = arena.take(leaf.shape, leaf.dtype)
        tensor.read_into(buffer)
        leaves.append(jax.device_put(buffer))
    return config, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _named_leaves(params: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    ]
