"""From answers to a drafter on the disk: features, vocabulary, training, quantisation."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

import jaxspec
from jaxspec_models import answers, drafter_plots, drafter_training, features, llama, recording
from jaxspec_models.drafters import directory, learning, methods, parts
from jaxspec_models.files import write_atomically

Directory: TypeAlias = "str | os.PathLike[str]"


def shape(target: jaxspec.LanguageModel, method: str, **fields: Any) -> parts.DrafterConfig:
    """The shape of a drafter to be trained for a target.

    Args:
      target: a Llama of `jaxspec_models`.
      method: "block", "eagle3" or "student".
      **fields: of the method's shape (`parts.DrafterConfig`); what is left out is the default, of
        `intermediate_size` the target's own. A draft vocabulary is at most the target's.

    Raises:
      ValueError: there is no such method or field.

    Example:
      >>> import jaxspec_models.llama as llama
      >>> config = llama.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
      ...                            num_hidden_layers=3, num_attention_heads=2,
      ...                            num_key_value_heads=1, head_dim=8, dtype="float32")
      >>> target = llama.language_model(config, llama.init_params(config, seed=0))
      >>> found = shape(target, "block", markov_rank=8)
      >>> found.tapped_layers, found.draft_vocab_size, found.intermediate_size, found.markov_rank
      ((1, 2), 32, 32, 8)
    """
    kind, config = methods.of(method).config, llama.config_of(target)
    if unknown := set(fields) - {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"a drafter of method {method!r} has no {', '.join(sorted(unknown))}.")
    if method != "student":
        fields.setdefault("tapped_layers", tapped_layers(config.num_hidden_layers))
    fields.setdefault("intermediate_size", config.intermediate_size)
    found = kind(target=config, **fields)
    few = min(found.draft_vocab_size, config.vocab_size)
    return dataclasses.replace(found, draft_vocab_size=few)


def make_drafter(
    target: jaxspec.LanguageModel,
    config: parts.DrafterConfig,
    data: Directory | Sequence[Directory],
    out: str | os.PathLike[str],
    *,
    target_name: str,
    weights: str,
    settings: drafter_training.Settings,
    features_directory: Directory | Sequence[Directory] | None = None,
    command: str = "",
    on_stage: Callable[..., None] = lambda name, done, total, told="": None,
) -> dict[str, float]:
    """Trains a drafter on a target's answers; interrupted, the same call goes on.

    Args:
      target: the target, as it will be used.
      config: the drafter's shape, see `shape`.
      data: of `jaxspec train data`; one directory or several.
      out: where the drafter goes: `drafter/` in int8, `drafter-float32/`, checkpoints, `log.csv`
        and `log.png`.
      target_name: what the target is called.
      weights: how its weights are kept, such as "int8".
      settings: how to train.
      features_directory: for the target's features, to be shared by several trainings, one for
        each directory of data; None: in `out`.
      command: what made it, for the card.
      on_stage: called with a stage's name, how much of it is done, and of how much.

    Returns:
      The last evaluation on held-out prompts.

    Raises:
      ValueError: the data, or `out`, belong to something else; there is not one directory of
        features for each of data.
      FloatingPointError: the loss is not finite.
    """
    out, method = Path(out), methods.of(config.method).module
    sources = _listed(data)
    if features_directory is not None:
        stores = _listed(features_directory)
    else:
        names = ["features", *(f"features-{i}" for i in range(2, len(sources) + 1))]
        stores = [out / name for name in names]
    if len(stores) != len(sources):
        raise ValueError(
            f"there are {len(sources)} directories of data and {len(stores)} of features: each has "
            "its own."
        )
    taps = config.tapped_layers or tapped_layers(config.target.num_hidden_layers)
    several = []
    for source, stored in zip(sources, stores, strict=True):
        features.write_features(
            target, source, stored, layers=(*taps, -1), weights=weights,
            on_progress=lambda done, total: on_stage("features", done, total),
        )  # fmt: skip
        several.append(features.read_features(source, stored, layers=(*config.tapped_layers, -1)))
    found, read = _joined(several)
    out.mkdir(parents=True, exist_ok=True)
    draft_ids = _vocabulary(out / "vocabulary.json", found, config)
    texts = drafter_training.Texts(found, read, settings)

    def on_step(done: int, metrics: dict[str, Any]) -> None:
        told = f"loss {metrics['loss']:.3f}, acceptance {metrics['acceptance'][0]:.3f}"
        on_stage("training", done, settings.num_steps, told)

    params = drafter_training.train(
        config,
        method.init_params(config, target, texts.sample(), settings.seed),
        learning.frozen_part(target, config, jnp.asarray(draft_ids)),
        texts,
        settings,
        out,
        on_step=on_step,
    )
    metrics = drafter_training.last_line(out / "log.csv")
    drafter_plots.draw_log(out / "log.csv", out / "log.png")
    told = [answers.read_settings(source) for source in sources]
    card = _card(config, texts, told, settings, metrics, target_name, command)
    for name, (kind, kept) in {
        "drafter-float32": (config, params),
        "drafter": methods.quantize(config, params),
    }.items():
        directory.save_drafter(
            out / name, target, kind, kept, draft_ids, target_name=target_name, metrics=metrics
        )
        write_atomically(out / name / "README.md", card.encode())
    return metrics


def _listed(paths: Directory | Sequence[Directory]) -> list[Path]:
    return [Path(p) for p in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


def _joined(
    several: Sequence[tuple[list[answers.Answer], Callable[[int], features.Features]]],
) -> tuple[list[answers.Answer], Callable[[int], features.Features]]:
    """Answers of several directories, one behind the other, and the features of the i-th."""
    found = [answer for some, _ in several for answer in some]
    ends = np.cumsum([len(some) for some, _ in several])

    def read(index: int) -> features.Features:
        which = int(np.searchsorted(ends, index, side="right"))
        begin = int(ends[which - 1]) if which else 0
        return several[which][1](index - begin)

    return found, read


def _card(
    config: parts.DrafterConfig,
    texts: drafter_training.Texts,
    data: Sequence[dict[str, Any]],
    settings: drafter_training.Settings,
    metrics: dict[str, float],
    target_name: str,
    command: str,
) -> str:
    """A model card in Markdown: what it is for, what made it, how good it is."""
    shape = {k: v for k, v in dataclasses.asdict(config).items() if k != "target"}

    def listed(items: dict[str, Any]) -> str:
        return "\n".join(f"- {name}: {value}" for name, value in items.items())

    epochs = settings.num_steps / texts.steps_an_epoch
    temperatures = sorted({t for source in data for t in source["temperatures"]})
    longest = max(source["max_new_tokens"] for source in data)
    made_by = f"\nMade by\n\n    {command}\n" if command else ""
    return f"""\
# A drafter for {target_name}

Method `{config.method}` of jaxspec. It drafts for that model only, whose embeddings and head it
shares; with any lossless rule the output's distribution is the model's own.
{made_by}
## Data

{len(texts.learned)} answers of the model itself, {texts.num_tokens} tokens, at temperatures
{", ".join(f"{t:g}" for t in temperatures)}, at most {longest} tokens each;
{len(texts.held_out)} answers to other prompts are held out.

## Shape

{listed(shape)}

## Training

{epochs:.2f} epochs, {metrics["seconds"]:.0f} seconds of steps.

{listed(dataclasses.asdict(settings))}

## On held-out prompts

Acceptance at temperature 1 and agreement of the likeliest tokens, of each draft once those before
it are accepted; tokens a step of whole blocks.

{listed({k: f"{v:.4g}" for k, v in metrics.items() if k not in ("step", "seconds", "loss")})}
"""


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


def _vocabulary(path: Path, found: list[answers.Answer], shape: parts.DrafterConfig) -> np.ndarray:
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
