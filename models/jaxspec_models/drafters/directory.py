"""A drafter as a directory: `config.json` and `drafter.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten
from jax.tree_util import tree_structure as structure_of

import jaxspec
from jaxspec_models import llama
from jaxspec_models.drafters import methods, parts
from jaxspec_models.files import write_atomically

_VERSION = 1
_NUM_SAMPLES = 64  # numbers of the target's embeddings that tell it from others
_LEAST_CORRELATION = 0.99  # between them; int8 leaves 0.9999


def save_drafter(
    directory: str | os.PathLike[str],
    target: jaxspec.LanguageModel,
    config: parts.DrafterConfig,
    params: Any,
    draft_ids: Any,
    *,
    target_name: str,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a trained drafter.

    Args:
      directory: where to; made if need be.
      target: the model it was trained for.
      config: the drafter's shape.
      params: its weights.
      draft_ids: i32[W], its vocabulary.
      target_name: what the target is called.
      metrics: to be told to whoever opens `config.json`.

    Raises:
      OSError: it cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {"draft_ids": np.asarray(draft_ids, np.int32)} | {
        _name(path): np.asarray(leaf) for path, leaf in tree_flatten_with_path(params)[0]
    }
    shape = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name != "target"
    }
    described = {
        "version": _VERSION,
        "method": config.method,
        "config": shape,
        "target": {
            "name": target_name,
            "shape": _shape_of(config.target),
            "samples": [float(x) for x in _samples(target, config.target)],
        },
        "metrics": dict(metrics or {}),
    }
    # The configuration last: a directory with one is whole.
    write_atomically(directory / "drafter.safetensors", safetensors.numpy.save(tensors))
    text = json.dumps(described, indent=2) + "\n"
    write_atomically(directory / "config.json", text.encode())


def load_drafter(path: str | os.PathLike[str], target: jaxspec.LanguageModel) -> Any:
    """Loads a trained drafter for its target.

    Args:
      path: a directory of `save_drafter`, or of `jaxspec train drafter`.
      target: the model that it was trained for; how that one is quantised does not matter.

    Returns:
      A drafter for `jaxspec.generate(drafter=…)`.

    Raises:
      ValueError: there is no drafter there, it is broken, or it was trained for another model.

    Example:
      >>> load_drafter("nowhere", None)
      Traceback (most recent call last):
      ValueError: nowhere holds no drafter: no readable config.json.
    """
    directory = Path(path)
    try:
        described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} holds no drafter: no readable config.json.") from error
    name = described.get("method")
    if described.get("version") != _VERSION or name not in methods.METHODS:
        raise ValueError(
            f"{directory} holds a drafter of version {described.get('version')} and method "
            f"{name!r}; this is version {_VERSION}, which knows {', '.join(methods.METHODS)}."
        )
    method = methods.of(name)
    shape = llama.config_of(target)
    _check_target(directory, described["target"], target, shape)
    given: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value
        for field, value in described["config"].items()
    }
    config = method.config(target=shape, **given)
    try:
        tensors = safetensors.numpy.load((directory / "drafter.safetensors").read_bytes())
        draft_ids = tensors.pop("draft_ids")
        params = _unflatten(tensors, method.module.abstract(config)[1])
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"the weights in {directory} are missing or broken: {error}.") from error
    return method.module.drafter(target, config, params, draft_ids)


def _name(path: Any) -> str:
    return keystr(path, simple=True, separator=".")


def _unflatten(tensors: Mapping[str, np.ndarray], wanted: Any) -> Any:
    leaves = []
    for path, leaf in tree_flatten_with_path(wanted)[0]:
        found = tensors[_name(path)]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise KeyError(f"{_name(path)} is {found.dtype}{list(found.shape)}")
        leaves.append(jnp.asarray(found))
    return tree_unflatten(structure_of(wanted), leaves)


def _shape_of(config: llama.LlamaConfig) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers")
    return {name: getattr(config, name) for name in names}


def _samples(target: jaxspec.LanguageModel, config: llama.LlamaConfig) -> np.ndarray:
    """Numbers of the embeddings, the same places in any model of the shape: f32[64]."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.vocab_size, size=_NUM_SAMPLES)
    channels = rng.integers(config.hidden_size, size=_NUM_SAMPLES)
    rows = parts.embed(config, target.params["embed"], jnp.asarray(tokens, jnp.int32))
    return np.asarray(rows)[np.arange(_NUM_SAMPLES), channels]


def _check_target(
    directory: Path, trained_for: Mapping[str, Any], target: Any, config: llama.LlamaConfig
) -> None:
    for name, value in _shape_of(config).items():
        if trained_for["shape"].get(name) != value:
            raise ValueError(
                f"the drafter in {directory} was trained for {trained_for['name']}, with "
                f"{name} {trained_for['shape'].get(name)}; this target has {value}."
            )
    ours, theirs = _samples(target, config), np.asarray(trained_for["samples"])
    correlation = np.corrcoef(ours, theirs)[0, 1]
    if not correlation > _LEAST_CORRELATION:
        raise ValueError(
            f"the drafter in {directory} was trained for {trained_for['name']}, and this target "
            f"is another model of its shape (their embeddings correlate by {correlation:.2f}). "
            "Train a drafter for it: jaxspec train --help."
        )
