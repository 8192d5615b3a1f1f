"""Does `generate` write with exactly the target's law? Drawn for real, compared with the oracle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxspec.generate import Generation
from jaxspec.generate import generate as shipped_generate
from jaxspec.sampling import Sampling
from jaxspec.testing.comparison import (
    FALSE_ALARM,
    Comparison,
    compare,
    num_samples_for,
    power_of,
)
from jaxspec.testing.oracle import Law, Oracle, Text
from jaxspec.testing.rows import pad_prompts, per_prompt
from jaxspec.types import Drafter, LanguageModel, Policy, Verifier

Array: TypeAlias = np.ndarray[Any, Any]

_PAD = 1  # a token like any other: none may be taken for padding inside a text
_MOST_SAMPLES = 200_000
_MOST_ROWS = 1 << 16  # of a batch: beyond, only the memory grows
_LOG_PROB_TOLERANCE = 1e-4  # float32 against float64, options included


@dataclasses.dataclass(frozen=True)
class LosslessReport:
    """What `check_lossless` found.

    Attributes:
      rows: one `Comparison` a prompt.
      problems: what is wrong beside the laws: counters that contradict each other, a reported
        log-probability that is not the law's, padding that is not, a text that depends on the
        drafter though the rule promises that it does not.
      tokens_per_step: emitted tokens per target forward, over all rows.
      acceptance_rate: accepted / drafted, over all rows.
      num_fallbacks: `Stats.num_fallbacks`, summed.
    """

    rows: tuple[Comparison, ...]
    problems: tuple[str, ...]
    tokens_per_step: float
    acceptance_rate: float
    num_fallbacks: int

    @property
    def passed(self) -> bool:
        """Whether every law fits and nothing else is wrong."""
        return not self.problems and all(row.passed for row in self.rows)

    @property
    def total_variation(self) -> float:
        """The largest of the rows'."""
        return max(row.total_variation for row in self.rows)

    def assert_passed(self) -> None:
        """Raises AssertionError with the whole report, unless `passed`."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """The problems, and a table for each prompt."""
        parts = [
            f"check_lossless {'passed' if self.passed else 'FAILED'}: {self.tokens_per_step:.2f} "
            f"tokens a step, {self.acceptance_rate:.0%} of the drafts accepted, "
            f"{self.num_fallbacks} numerical fallbacks"
        ]
        parts += [f"problem: {problem}" for problem in self.problems]
        parts += [f"prompt {i} {row}" for i, row in enumerate(self.rows)]
        return "\n".join(parts)


def check_lossless(
    target: LanguageModel,
    drafter: Drafter | str | None = None,
    verifier: Verifier | None = None,
    policy: Policy | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    prompts: Sequence[Sequence[int]] = ((0,),),
    max_new_tokens: int = 4,
    num_draft_tokens: int = 3,
    eos_ids: Sequence[int] | int | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    num_samples: int | None = None,
    false_alarm: float = FALSE_ALARM,
    key: Any = None,
    generate: Callable[..., Generation] = shipped_generate,
) -> LosslessReport:
    """Draws many texts through `generate` and compares them with the exact law.

    Each prompt becomes many rows; the rows of all prompts are mixed in every batch, so that prompts
    of other lengths, options and fates are each row's neighbours. Beside the law of
    every prompt, the reported log-probabilities, the counters and the padding are checked, and for
    rules that promise it (`guarantee = "tokens"`), that the texts are those of plain decoding.

    Args:
      target: a small model, such as `jaxspec.testing.table_model`: all V ** max_new_tokens texts
        are enumerated.
      drafter: see `jaxspec.generate`, like the next three.
      verifier: None: the default rule.
      policy: None: `num_draft_tokens` in every round.
      sampling: options: numbers, or arrays with one element for each prompt.
      prompts: token ids, one list a prompt.
      max_new_tokens: T.
      num_draft_tokens: K.
      eos_ids: None: the target's; (): texts never end early.
      stop_sequences: token-id lists, the same for all prompts.
      num_samples: rows for each prompt; None: for each as many as it takes to see a law that is
        off by a total variation of 0.03 with probability 0.99, but at most 200,000 (the report
        says what would be seen).
      false_alarm: the probability with which a correct program fails, for each prompt.
      key: a PRNG key; None: `jax.random.key(0)`.
      generate: what draws, for testing a wrapper around `jaxspec.generate`.

    Returns:
      A `LosslessReport`.

    Raises:
      ValueError: the arguments are refused by `generate`, or there are too many texts.

    Example:
      >>> import jaxspec
      >>> from jaxspec.testing import random_logits, table_model
      >>> target, draft = (
      ...     table_model(random_logits(seed, vocab_size=3, order=1), order=1) for seed in (0, 1))
      >>> report = check_lossless(target, jaxspec.drafters.model(draft), max_new_tokens=3)
      >>> report.passed, report.total_variation < 0.03
      (True, True)
    """
    padded, lengths = pad_prompts(prompts, _PAD)
    if isinstance(eos_ids, (int, np.integer)):
        eos_ids = (int(eos_ids),)
    if num_samples is not None and (int(num_samples) != num_samples or num_samples < 1):
        raise ValueError(f"num_samples must be a whole number of at least 1, got {num_samples}.")
    num_kinds = len(prompts)
    oracles = [
        Oracle(
            target,
            prompt,
            max_new_tokens,
            per_prompt(sampling, i, num_kinds),
            eos_ids=eos_ids,
            stop_sequences=stop_sequences,
        )
        for i, prompt in enumerate(prompts)
    ]
    kind = _mixed(
        [
            _num_samples(oracle.law, false_alarm) if num_samples is None else int(num_samples)
            for oracle in oracles
        ]
    )
    key = jax.random.key(0) if key is None else key

    def write(key: Any, **options: Any) -> Generation:
        """All rows, in batches of one size: the same texts as in one, in less memory."""
        size = -(-len(kind) // -(-len(kind) // _MOST_ROWS))
        batches = [
            np.minimum(np.arange(first, first + size), len(kind) - 1)
            for first in range(0, len(kind), size)
        ]
        if len(batches) > 1:  # each row's key as `generate` would make it of one
            key = jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(len(kind)))
        written = [
            generate(
                target,
                padded[kind[rows]],
                prompt_lengths=lengths[kind[rows]],
                sampling=per_prompt(sampling, kind[rows], num_kinds),
                max_new_tokens=max_new_tokens,
                eos_ids=eos_ids,
                stop_sequences=stop_sequences,
                pad_id=_PAD,
                verifier=verifier,
                key=key if len(batches) == 1 else key[rows],
                **options,
            )
            for rows in batches
        ]
        # The last batch is filled with its last row.
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(kind)], *written)

    generation = write(key, drafter=drafter, policy=policy, num_draft_tokens=num_draft_tokens)
    tokens, new_lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
    problems = _counter_problems(generation)
    is_new = np.arange(max_new_tokens)[None] < new_lengths[:, None]
    if (tokens[~is_new] != _PAD).any():
        problems.append("a row's tokens go on behind its length")
    rows = []
    for i, oracle in enumerate(oracles):
        texts = _texts(tokens[kind == i], new_lengths[kind == i])
        counts = {text: len(where) for text, where in texts.items()}
        rows.append(compare(counts, oracle.law, false_alarm=false_alarm))
        log_probs = np.asarray(generation.log_probs)[kind == i]
        if problem := _log_prob_problem(texts, log_probs, oracle):
            problems.append(f"prompt {i}: {problem}")
    if generation.guarantee == "tokens" and drafter is not None:
        plain = write(jax.random.clone(key))
        num_other = int((np.asarray(plain.tokens) != tokens).any(axis=1).sum())
        if num_other:
            problems.append(
                f"{num_other} of {len(kind)} texts differ from plain decoding with the same key"
            )
    totals = jax.tree.map(lambda counter: int(np.asarray(counter).sum()), generation.stats)
    return LosslessReport(
        rows=tuple(rows),
        problems=tuple(problems),
        tokens_per_step=totals.num_emitted_tokens / max(totals.num_spec_steps, 1),
        acceptance_rate=totals.num_accepted_draft_tokens / max(totals.num_draft_tokens, 1),
        num_fallbacks=totals.num_fallbacks,
    )


def _num_samples(law: Law, false_alarm: float) -> int:
    size = num_samples_for(len(law), false_alarm=false_alarm)
    while size < _MOST_SAMPLES and power_of(law, size, 0.03, false_alarm=false_alarm) < 0.99:
        size = min(int(1.2 * size), _MOST_SAMPLES)
    return size


def _mixed(sizes: Sequence[int]) -> Array:
    """The prompt of each row, i64[sum of `sizes`]: those of each spread evenly over the batch."""
    kinds = np.repeat(np.arange(len(sizes)), sizes)
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return kinds[np.argsort(places, kind="stable")]


def _texts(tokens: Array, lengths: Array) -> dict[Text, Array]:
    """{text: indices of the rows that wrote it}."""
    unique, inverse = np.unique(np.c_[lengths, tokens], axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(inverse.ravel()))[:-1])
    texts: dict[Text, Array] = {}
    for (length, *row), where in zip(unique.tolist(), groups, strict=True):
        texts[tuple(row[:length])] = where
    return texts


def _log_prob_problem(texts: dict[Text, Array], log_probs: Array, oracle: Oracle) -> str:
    """What is wrong with the reported log-probabilities, or nothing."""
    for text, where in texts.items():
        if text not in oracle.law:
            continue  # the law has failed already
        wanted = np.zeros(log_probs.shape[1])
        wanted[: len(text)] = oracle.log_probs(text)
        error = np.abs(log_probs[where] - wanted)
        if not (error < _LOG_PROB_TOLERANCE).all():
            row = where[np.argmax(error.max(axis=1))]
            return f"log_probs of {text} are {log_probs[row].tolist()}, not {wanted.tolist()}"
    return ""


def _counter_problems(generation: Generation) -> list[str]:
    """Counters that contradict each other or the tokens."""
    stats = jax.tree.map(np.asarray, generation.stats)
    drafted, accepted = stats.num_draft_tokens, stats.num_accepted_draft_tokens
    emitted, steps = stats.num_emitted_tokens, stats.num_spec_steps
    bins = np.arange(stats.acceptance_histogram.shape[1])
    # Every step emits one token beside the drafts it accepts; only a row's last step may be cut
    # before that token, at EOS or at the limit.
    beside = emitted - accepted
    checks = {
        "lengths are not the tokens emitted": emitted == np.asarray(generation.lengths),
        "more accepted than drafted": accepted <= drafted,
        "accepted drafts counted that were not emitted, or corrections as drafts": (
            (beside == steps) | (beside == steps - 1)
        ),
        "the acceptance histogram does not add up": (
            (stats.acceptance_histogram.sum(axis=1) == steps)
            & (stats.acceptance_histogram @ bins == accepted)
        ),
        "drafts to which their own q gives no probability": (
            stats.num_impossible_draft_tokens == 0
        ),
    }
    return [
        f"{name} (in {int((~holds).sum())} of {len(holds)} rows)"
        for name, holds in checks.items()
        if not holds.all()
    ]
