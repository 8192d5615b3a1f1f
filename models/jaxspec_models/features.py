"""What a target computes on the way through its own answers: stored once, read by every training.

For each token of each answer the hidden states of some layers, and the logarithm of the sum that
turns the head's products into probabilities: with it a drafter of few tokens needs the head's rows
of these tokens only. On a CPU the target's forwards cost more than the drafter's steps, and several
epochs and methods share them. One shard of features belongs to one shard of answers; a shard
appears at once and whole, and whoever is interrupted runs the same call again.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

import jaxspec
from jaxspec_models import answers
from jaxspec_models.files import write_atomically

_VERSION = 1
_TOKENS_A_FORWARD = 2048
_WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024)


class Features(NamedTuple):
    """Of one answer.

    Attributes:
      hidden: bfloat16[N, L, D], at each token, of each layer that was asked for.
      log_normalizers: f32[N], log Σ exp(logits) behind each token.
    """

    hidden: np.ndarray
    log_normalizers: np.ndarray


def write_features(
    model: jaxspec.LanguageModel,
    answers_directory: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    layers: Sequence[int],
    weights: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Feeds answers to their target, and stores what it computes.

    Args:
      model: the target, as it will be used: quantised if drafts will be for the quantised one.
      answers_directory: of `answers.write_answers`.
      directory: where to; made if need be. Two bytes for each token, layer and channel.
      layers: hidden states to keep, numbered as for `LanguageModel.apply`; -1: what the head reads.
      weights: how the target's weights are kept, such as "int8"; features of others do not mix.
      on_progress: called behind every shard with shards done and in all.

    Returns:
      The number of shards.

    Raises:
      ValueError: the directory holds other layers, or features of other answers.
      OSError: the directory cannot be written.

    Example:
      >>> write_features(None, "nowhere", "features", layers=(1, -1), weights="int8")
      Traceback (most recent call last):
      ValueError: nowhere holds no answers: no readable answers.json. ...
    """
    settings = {
        "version": _VERSION,
        "layers": list(layers),
        "weights": weights,
        "answers": answers.read_settings(answers_directory),
    }
    directory = Path(directory)
    _begin(directory, settings)
    paths = answers.shard_paths(answers_directory)
    for number, path in enumerate(paths):
        target_path = directory / path.name
        if not target_path.exists():
            found = answers.read_shard(path)
            write_atomically(target_path, safetensors.numpy.save(_of_shard(model, found, layers)))
        on_progress(number + 1, len(paths))
    return len(paths)


def read_features(
    answers_directory: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    layers: Sequence[int],
) -> tuple[list[answers.Answer], Callable[[int], Features]]:
    """Answers, and a function that reads the features of the i-th from the disk.

    Args:
      answers_directory: of `answers.write_answers`.
      directory: of `write_features`.
      layers: the ones wanted, among those stored; in this order.

    Returns:
      The answers whose features are stored, and the function.

    Raises:
      ValueError: a layer was not stored, or there is nothing.

    Example:
      >>> read_features("nowhere", "features", layers=(1, -1))
      Traceback (most recent call last):
      ValueError: nowhere holds no answers: no readable answers.json. ...
    """
    settings = {"version": _VERSION, "answers": answers.read_settings(answers_directory)}
    directory = Path(directory)
    stored = _read_settings(directory)
    if any(stored.get(name) != settings[name] for name in settings):
        raise ValueError(f"{directory} holds features of other answers; choose another directory.")
    if missing := set(layers) - set(stored["layers"]):
        raise ValueError(
            f"{directory} holds layers {stored['layers']}, and not {sorted(missing)}: write "
            "features with these, into another directory."
        )
    columns = [stored["layers"].index(layer) for layer in layers]
    found: list[answers.Answer] = []
    places: list[tuple[int, slice]] = []
    files: list[Path] = []
    for path in answers.shard_paths(answers_directory):
        if not (directory / path.name).exists():
            continue
        first = 0
        for answer in answers.read_shard(path):
            places.append((len(files), slice(first, first + len(answer.tokens))))
            first += len(answer.tokens)
            found.append(answer)
        files.append(directory / path.name)
    if not found:
        raise ValueError(f"{directory} holds no features yet.")

    @functools.cache
    def open_file(number: int) -> Any:
        return safetensors.safe_open(files[number], framework="numpy").__enter__()

    def read(index: int) -> Features:
        number, tokens = places[index]
        file = open_file(number)
        hidden = file.get_slice("hidden")[tokens][:, columns].view(ml_dtypes.bfloat16)
        return Features(hidden, file.get_slice("log_normalizers")[tokens])

    return found, read


def _of_shard(
    model: jaxspec.LanguageModel, found: Sequence[answers.Answer], layers: Sequence[int]
) -> dict[str, np.ndarray]:
    hidden: dict[int, np.ndarray] = {}
    log_normalizers: dict[int, np.ndarray] = {}
    for width, rows in _batches([len(answer.tokens) for answer in found]):
        tokens = np.zeros((max(1, _TOKENS_A_FORWARD // width), width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(found[row].tokens)] = found[row].tokens
        states, sums = _forward(model, jnp.asarray(tokens), tuple(layers))
        states, sums = np.asarray(states), np.asarray(sums)
        for i, row in enumerate(rows):
            count = len(found[row].tokens)
            hidden[row], log_normalizers[row] = states[i, :count], sums[i, :count]
    order = range(len(found))
    return {
        "hidden": np.concatenate([hidden[row] for row in order]),
        "log_normalizers": np.concatenate([log_normalizers[row] for row in order]),
    }


@functools.partial(jax.jit, static_argnums=2)
def _forward(
    model: jaxspec.LanguageModel, tokens: jax.Array, layers: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The bits of bfloat16, uint16[B, T, L, D], and f32[B, T]."""
    batch, width = tokens.shape
    cache = model.init_cache(batch, width, width)
    start = jnp.zeros((batch,), jnp.int32)
    num_new = jnp.full((batch,), width, jnp.int32)
    output, _ = model.forward(tokens, cache, start=start, num_new=num_new, hidden_layers=layers)
    hidden = jnp.stack([state.astype(jnp.bfloat16) for state in output.hidden], axis=2)
    bits = jax.lax.bitcast_convert_type(hidden, jnp.uint16)
    return bits, jax.nn.logsumexp(output.logits.astype(jnp.float32), axis=-1)


def _batches(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(width, row numbers): rows of like length together, few shapes."""
    by_width: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        by_width.setdefault(padded(lengths[row]), []).append(row)
    for width, rows in by_width.items():
        size = max(1, _TOKENS_A_FORWARD // width)
        for first in range(0, len(rows), size):
            yield width, rows[first : first + size]


def padded(length: int) -> int:
    """The width, of a few, that a text of this length is padded to.

    Example:
      >>> padded(65), padded(1025)
      (128, 1280)
    """
    return next((width for width in _WIDTHS if width >= length), -(-length // 256) * 256)


def _begin(directory: Path, settings: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "features.json"
    if not path.exists():
        write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())
    elif _read_settings(directory) != settings:
        raise ValueError(
            f"{directory} holds features of other answers, layers or weights; choose another "
            "directory."
        )


def _read_settings(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "features.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} holds no features: no readable features.json.") from error
