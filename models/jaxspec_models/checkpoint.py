"""Checkpoints in, parameters out: safetensors and GGUF, through the family's one table.

`llama.checkpoint_table` says where each tensor goes. Whatever the format, every tensor is read
straight into its place in the (fused) parameter it belongs to, which then becomes a JAX array
without another copy: loading needs little more memory than the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec_models import gguf_config, llama
from jaxspec_models.gguf_file import GGUFFile
from jaxspec_models.tensorfile import SafetensorsFile, Tensor, write_safetensors

FORMAT_VERSION = 1
"""Of converted files; raise it when what `save_converted` writes changes."""

_ALIGNMENT = 64  # bytes; what JAX asks of a buffer that it takes over without a copy
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Checkpoint keys that hold nothing to load: old transformers saved this derived buffer."""


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that JAX's CPU backend can take over."""
    dtype = np.dtype(dtype)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + num_bytes].view(dtype).reshape(shape)


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
    params: dict[Any, Any] = {}
    for path, parts in by_path.items():
        leaf = llama.abstract_params(config)
        place = params
        for key in path[:-1]:
            leaf, place = leaf[key], place.setdefault(key, {})
        shape, dtype = leaf[path[-1]].shape, leaf[path[-1]].dtype
        buffer = _empty(shape, dtype)
        for name, target in parts:
            rows = buffer[target.row : target.row + target.shape[0]]
            _read(tensors[name], rows, target.gguf_heads if is_gguf else 0)
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
    """Writes parameters in their final dtypes as one safetensors file with HF's keys.

    Args:
      path: the file.
      config: stored in the file's metadata.
      params: as `llama.abstract_params(config)`.
    """
    tensors = {}
    for name, target in llama.checkpoint_table(config).items():
        leaf = params
        for key in target.path:
            leaf = leaf[key]
        # On the CPU this is a view, so nothing is copied.
        tensors[name] = np.asarray(leaf)[target.row : target.row + target.shape[0]]
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
    return config, assemble(config, file.tensors)
