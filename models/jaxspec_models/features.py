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
from jaxspec_models import answers, llama
from jaxspec_models.files import write_atomically

_VERSION = 1
_TOKENS_A_FORWARD = 2048
_ROWS_A_PRODUCT = 512
_WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024)


class Features(NamedTuple):
    """Of one answer.

    Attributes:
      hidden: bfloat16[N, L, D], at each token, of each layer that was asked for.
      log_normalizers: f32[N], log Σ exp(logits) behind each token from the prompt's last on, of
        the final state as it is stored; 0 before.
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
      layers: hidden states to keep, numbered as for `LanguageModel.apply`; among them -1, what
        the head reads.
      weights: how the target's weights are kept, such as "int8"; features of others do not mix.
      on_progress: called behind every shard with shards done and in all.

    Returns:
      The number of shards.

    Raises:
      ValueError: the directory holds other layers, or features of other answers; the model is no
        Llama of `jaxspec_models`.
      OSError: the directory cannot be written.

    Example:
      >>> write_features(None, "nowhere", "features", layers=(1, -1), weights="int8")
      Traceback (most recent call last):
      ValueError: nowhere holds no answers: no readable answers.json. ...
    """
    directory = Path(directory)
    begin(directory, answers.read_settings(answers_directory), layers=layers, weights=weights)
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
    at = [stored["layers"].index(layer) for layer in layers]
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
        hidden = file.get_slice("hidden")[tokens][:, at].view(ml_dtypes.bfloat16)
        return Features(hidden, file.get_slice("log_normalizers")[tokens])

    return found, read


def _of_shard(
    model: jaxspec.LanguageModel, found: Sequence[answers.Answer], layers: Sequence[int]
) -> dict[str, np.ndarray]:
    hidden: dict[int, np.ndarray] = {}
    for width, rows in _batches([len(answer.tokens) for answer in found]):
        tokens = np.zeros((max(1, _TOKENS_A_FORWARD // width), width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(found[row].tokens)] = found[row].tokens
        states = np.asarray(_forward(model, jnp.asarray(tokens), tuple(layers)))
        for i, row in enumerate(rows):
            hidden[row] = states[i, : len(found[row].tokens)]
    return columns(model, found, [hidden[row] for row in range(len(found))], layers)


def columns(
    model: jaxspec.LanguageModel,
    found: Sequence[answers.Answer],
    hidden: Sequence[np.ndarray],
    layers: Sequence[int],
) -> dict[str, np.ndarray]:
    """A shard of features.

    Args:
      model: the target.
      found: the shard's answers.
      hidden: of each answer the bits of bfloat16, uint16[N, L, D].
      layers: what the L are.
    """
    final = layers.index(-1)
    sums = [np.zeros((len(answer.tokens),), np.float32) for answer in found]
    places = [slice(max(answer.prompt_length - 1, 0), None) for answer in found]
    wanted = np.concatenate([h[at, final] for h, at in zip(hidden, places, strict=True)])
    counts = [len(h[at]) for h, at in zip(hidden, places, strict=True)]
    parts = np.split(_log_normalizers(model, wanted), np.cumsum(counts)[:-1])
    for of_answer, at, part in zip(sums, places, parts, strict=True):
        of_answer[at] = part
    return {"hidden": np.concatenate(hidden), "log_normalizers": np.concatenate(sums)}


def _log_normalizers(model: jaxspec.LanguageModel, final: np.ndarray) -> np.ndarray:
    """The log Σ exp(logits) of what the head reads: bits of bfloat16, uint16[N, D] -> f32[N]."""
    config = llama.config_of(model)
    head = llama.head_rows(config, model.params, jnp.arange(config.vocab_size))
    found = []
    for first in range(0, len(final), _ROWS_A_PRODUCT):
        rows = final[first : first + _ROWS_A_PRODUCT]
        padded_rows = np.pad(rows, ((0, _ROWS_A_PRODUCT - len(rows)), (0, 0)))
        found.append(np.asarray(_log_sums(head, jnp.asarray(padded_rows)))[: len(rows)])
    return np.concatenate(found)


@jax.jit
def _log_sums(head: jax.Array, bits: jax.Array) -> jax.Array:
    rows = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
    return jax.nn.logsumexp(jnp.einsum("nd,vd->nv", rows, head), axis=-1)


@functools.partial(jax.jit, static_argnums=2)
def _forward(model: jaxspec.LanguageModel, tokens: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    """The bits of bfloat16, uint16[B, T, L, D]."""
    batch, width = tokens.shape
    cache = model.init_cache(batch, width, width)
    output, _ = model.forward(
        tokens,
        cache,
        start=jnp.zeros((batch,), jnp.int32),
        num_new=jnp.full((batch,), width, jnp.int32),
        logits_at=jnp.zeros((batch, 0), jnp.int32),
        hidden_layers=layers,
    )
    return as_bits(output.hidden)


def as_bits(hidden: tuple[jax.Array, ...]) -> jax.Array:
    """Hidden states float[B, T, D] of L layers as bits of bfloat16: uint16[B, T, L, D]."""
    stacked = jnp.stack([state.astype(jnp.bfloat16) for state in hidden], axis=2)
    return jax.lax.bitcast_convert_type(stacked, jnp.uint16)


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


def begin(
    directory: Path, of_answers: dict[str, Any], *, layers: Sequence[int], weights: str
) -> None:
    """Notes what the directory will hold, or compares it with what it holds.

    Raises:
      ValueError: it holds something else, or the final state is not among the layers.
    """
    if -1 not in layers:
        raise ValueError(f"layers must contain -1, what the head reads; got {list(layers)}.")
    settings = {
        "version": _VERSION,
        "layers": list(layers),
        "weights": weights,
        "answers": of_answers,
    }
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
