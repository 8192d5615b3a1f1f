"""From answers to a drafter on the disk: features, vocabulary, training, quantisation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxspec
from jaxspec_models import answers, drafter_training, features, llama, recording
from jaxspec_models.drafters import block, directory, parts
from jaxspec_models.files import write_atomically


def make_drafter(
    target: jaxspec.LanguageModel,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target_name: str,
    weights: str,
    settings: drafter_training.Settings,
    features_directory: str | os.PathLike[str] | None = None,
    num_draft_tokens: int = 6,
    draft_vocab_size: int = 8192,
    num_hidden_layers: int = 1,
    intermediate_size: int = 1024,
    markov_rank: int = 128,
    on_stage: Callable[..., None] = lambda name, done, total, told="": None,
) -> dict[str, float]:
    """Trains a block drafter on a target's answers; interrupted, the same call goes on.

    Args:
      target: the target, as it will be used.
      data: of `jaxspec train data`.
      out: where the drafter goes: `drafter/` in int8, `drafter-float32/`, checkpoints, `log.csv`.
      target_name: what the target is called.
      weights: how its weights are kept, such as "int8".
      settings: how to train.
      features_directory: for the target's features, to be shared by several trainings; None: in
        `out`.
      num_draft_tokens: K, the most drafts of a round.
      draft_vocab_size: tokens it can draft, at most V.
      num_hidden_layers: of the drafter.
      intermediate_size: of its MLPs.
      markov_rank: of the bias between drafts.
      on_stage: called with a stage's name, how much of it is done, and of how much.

    Returns:
      The last evaluation on held-out prompts.

    Raises:
      ValueError: the data, or `out`, belong to something else.
      FloatingPointError: the loss is not finite.
    """
    config, out = llama.config_of(target), Path(out)
    stored = Path(features_directory) if features_directory is not None else out / "features"
    taps = tapped_layers(config.num_hidden_layers)
    layers = (*taps, -1)
    features.write_features(
        target, data, stored, layers=layers, weights=weights,
        on_progress=lambda done, total: on_stage("features", done, total),
    )  # fmt: skip
    found, read = features.read_features(data, stored, layers=layers)
    shape = block.BlockConfig(
        target=config,
        tapped_layers=taps,
        num_draft_tokens=num_draft_tokens,
        draft_vocab_size=min(draft_vocab_size, config.vocab_size),
        num_hidden_layers=num_hidden_layers,
        intermediate_size=intermediate_size,
        markov_rank=markov_rank,
    )
    out.mkdir(parents=True, exist_ok=True)
    draft_ids = _vocabulary(out / "vocabulary.json", found, shape)
    texts = drafter_training.Texts(found, read, settings, num_draft_tokens)

    def on_step(done: int, metrics: dict[str, Any]) -> None:
        told = f"loss {metrics['loss']:.3f}, acceptance {metrics['acceptance'][0]:.3f}"
        on_stage("training", done, settings.num_steps, told)

    frozen = block.frozen_part(target, shape, jnp.asarray(draft_ids))
    params = drafter_training.train(shape, frozen, texts, settings, out, on_step=on_step)
    metrics = drafter_training.last_line(out / "log.csv")
    for name, (kind, kept) in {
        "drafter-float32": (shape, params),
        "drafter": block.quantize(shape, params),
    }.items():
        directory.save_drafter(
            out / name, target, kind, kept, draft_ids, target_name=target_name, metrics=metrics
        )
    return metrics


def recorder(
    target: jaxspec.LanguageModel, directory: str | os.PathLike[str], *, weights: str
) -> recording.Recorder:
    """For `answers.write_answers`: keeps the features that drafters are trained on.

    Args:
      target: the target.
      directory: where to, for `make_drafter(features_directory=…)`.
      weights: how its weights are kept, such as "int8".

    Raises:
      ValueError: the target is no Llama of `jaxspec_models`.
    """
    taps = tapped_layers(llama.config_of(target).num_hidden_layers)
    return recording.Recorder(target, directory, layers=(*taps, -1), weights=weights)


def tapped_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """Early, middle and late, as EAGLE-3 taps them (arXiv 2503.01840).

    Example:
      >>> tapped_layers(30), tapped_layers(3)
      ((2, 15, 27), (1, 2))
    """
    if num_hidden_layers < 7:
        return tuple(sorted({1, num_hidden_layers - 1} - {0}))
    return (2, num_hidden_layers // 2, num_hidden_layers - 3)


def _vocabulary(path: Path, found: list[answers.Answer], shape: block.BlockConfig) -> np.ndarray:
    """The draft vocabulary; kept, since more answers might change it under a training."""
    if path.exists():
        ids = np.asarray(json.loads(path.read_text()), np.int32)
        if len(ids) != shape.draft_vocab_size:
            raise ValueError(
                f"{path} holds {len(ids)} tokens and not {shape.draft_vocab_size}: the training "
                "in this directory was begun with other settings; choose another directory."
            )
        return ids
    ids = parts.draft_vocabulary(
        [answer.tokens[answer.prompt_length :] for answer in found],
        shape.draft_vocab_size,
        vocab_size=shape.target.vocab_size,
        always=shape.target.eos_ids,
    )
    write_atomically(path, json.dumps(ids.tolist()).encode())
    return ids
