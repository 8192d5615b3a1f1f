"""Does a drafter keep its contract? Its drafts, taken from the shipped loop, put to the test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.sampling import Sampling
from jaxspec.strategies import check_type
from jaxspec.testing.comparison import FALSE_ALARM, chi_square_p_value
from jaxspec.testing.recording import FormError, Recording, Round
from jaxspec.types import Draft, Drafter, LanguageModel

Array: TypeAlias = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class DrafterReport:
    """What `check_drafter` found.

    Attributes:
      problems: what breaks the contract; empty: nothing.
      is_deterministic: whether the drafts are point masses.
      mean_length: drafted tokens a round.
      p_values: {(round, slot): p-value of the drafted tokens under the reported q}.
      false_alarm: at or below which a p-value fails.
    """

    problems: tuple[str, ...]
    is_deterministic: bool
    mean_length: float
    p_values: dict[tuple[int, int], float]
    false_alarm: float = FALSE_ALARM

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def assert_passed(self) -> None:
        """Raises AssertionError with the whole report, unless `passed`."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """The problems, and the p-value of each round and slot."""
        kind = "deterministic" if self.is_deterministic else "sampled"
        lines = [
            f"check_drafter {'passed' if self.passed else 'FAILED'}: {kind} drafts of "
            f"{self.mean_length:.2f} tokens"
        ]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines += [
            f"round {number} slot {slot}: p = {p:.2g} (fails at {self.false_alarm:.0e})"
            for (number, slot), p in self.p_values.items()
        ]
        return "\n".join(lines)


def check_drafter(
    drafter: Drafter,
    target: LanguageModel,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    prompts: Sequence[Sequence[int]] = ((0,), (1, 0, 1)),
    num_draft_tokens: int = 3,
    num_samples: int = 20_000,
    false_alarm: float = FALSE_ALARM,
    key: Any = None,
) -> DrafterReport:
    """Puts a drafter through three rounds of the loop and tests what it proposes.

    - **Form**: shapes and dtypes of the `Draft`, a state that keeps its form, no more drafts than
      asked for, ids inside the vocabulary, a q that is normalised.
    - **The q it reports is the q it samples**, given everything before: the drafts of a slot have
      the reported law among all rows, among rows with one text, earlier drafts (rejected ones
      too) and drafts before them, and on average their likelihood under q is what q says. Tokens
      dropped for their own value show here, too: what is left of a slot then has another law.
    - **Batch independence**: a row drafts the same alone, with its own key, in a wider buffer.

    Between the rounds none and then all of the drafts are accepted, so that numbers kept from an
    earlier round are seen. It does not tell whether the drafts are any good: a stale cache samples
    truly from its stale q (draft with the target itself and expect an acceptance rate of 1).
    `check_lossless` shows the law of what is written with the drafts. The policy is `fixed`.

    Args:
      drafter: the drafter.
      target: a small model over the same vocabulary.
      sampling: the target's options: numbers, or arrays with one element for each prompt. (A
        drafter's own per-row arrays would need one for every row of the batch: use numbers.)
      prompts: token ids, one list a prompt.
      num_draft_tokens: K.
      num_samples: rows for each prompt, at least 100.
      false_alarm: the probability with which a correct drafter fails each test of a slot.
      key: a PRNG key; None: `jax.random.key(0)`.

    Returns:
      A `DrafterReport`.

    Raises:
      ValueError: the arguments are refused by `generate`, or q of all rows would not fit in 4 GB.

    Example:
      >>> import jaxspec
      >>> from jaxspec.testing import random_logits, table_model
      >>> lm = table_model(random_logits(0, vocab_size=3, order=1), order=1)
      >>> check_drafter(jaxspec.drafters.model(lm), lm).passed
      True
    """
    if drafter is None:
        raise ValueError("there is no drafter to check: pass one from jaxspec.drafters, or yours.")
    check_type("drafter", drafter, Drafter, "jaxspec.drafters")
    if num_samples < 100:
        raise ValueError(f"num_samples must be at least 100, got {num_samples}.")
    key = jax.random.key(0) if key is None else key
    num_rows = num_samples * len(prompts)
    if num_rows * num_draft_tokens * target.vocab_size > 10**9:
        raise ValueError(
            f"{num_rows} rows of {num_draft_tokens} laws over {target.vocab_size} tokens do not "
            "fit in 4 GB; use a smaller vocabulary or fewer num_samples."
        )
    call = Recording(drafter, target, sampling, prompts, num_draft_tokens)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows))
    try:
        rounds = call.rounds(keys, np.arange(num_rows))
    except FormError as error:
        return DrafterReport((str(error),), False, 0.0, {})
    problems: list[str] = []
    p_values: dict[tuple[int, int], float] = {}
    past = np.zeros((num_rows, 0), np.int32)  # the drafts of earlier rounds, rejected ones too
    for number, (texts, asked, draft) in enumerate(rounds):
        problems += _form_problems(number, draft, asked, target.vocab_size)
        if draft.log_probs is not None and draft.log_probs.shape[2] == target.vocab_size:
            for slot, p in enumerate(_law_p_values(texts, past, draft)):
                p_values[number, slot] = p
        slots = np.arange(num_draft_tokens)[None]
        is_drafted = slots < np.asarray(draft.length)[:, None]
        past = np.c_[past, np.where(is_drafted, draft.tokens, -1)]
    wrong = [at for at, p in p_values.items() if p <= false_alarm]
    if wrong and not any("does not sum to 1" in problem for problem in problems):
        problems.append(_law_problem(wrong))
    # Rows of each prompt that are asked for all K drafts, from the end of the batch.
    is_whole = np.asarray(rounds[0][1]) == num_draft_tokens
    for row in np.flatnonzero(is_whole)[::-1][: 2 * len(prompts) + 1].tolist():
        alone = call.rounds(keys[row : row + 1], np.array([row]), padding=7)
        together = [
            (texts[[row]], asked[[row]], _rows(draft, row)) for texts, asked, draft in rounds
        ]
        if problem := _difference(alone, together):
            problems.append(problem)
            break
    lengths = [np.asarray(draft.length).mean() for _, _, draft in rounds]
    return DrafterReport(
        tuple(dict.fromkeys(problems)),
        rounds[0][2].log_probs is None,
        float(np.mean(lengths)),
        p_values,
        false_alarm,
    )


def _law_problem(wrong: list[tuple[int, int]]) -> str:
    """Names the (round, slot) pairs whose drafts do not have their q, and what it may be."""
    where = "; ".join(
        f"round {number}: slot {', '.join(str(slot) for other, slot in wrong if other == number)}"
        for number in dict.fromkeys(number for number, _ in wrong)
    )
    cause = "sampled from another law, or dropped for their own value"
    if all(number > 0 for number, _ in wrong):
        cause = "drawn with numbers kept from an earlier round"
    elif all(slot > 0 for _, slot in wrong):
        cause = "one key for several slots, or another law behind the first"
    return f"the drafts do not have the q that is reported for them ({where}): perhaps {cause}"


def _rows(draft: Draft, row: int) -> Draft:
    return jax.tree.map(lambda x: x[row : row + 1], draft)


def _form_problems(number: int, draft: Draft, asked: Array, vocab_size: int) -> list[str]:
    problems = []
    lengths, tokens = np.asarray(draft.length), np.asarray(draft.tokens)
    if (lengths < 0).any() or (lengths > asked).any():
        problems.append(f"round {number}: more drafts than num_draft asked for, or fewer than none")
    is_drafted = np.arange(tokens.shape[1])[None] < lengths[:, None]
    if ((tokens < 0) | (tokens >= vocab_size))[is_drafted].any():
        problems.append(f"round {number}: drafted ids outside 0 … {vocab_size - 1}")
    if draft.log_probs is not None:
        if draft.log_probs.shape[2] != vocab_size:
            problems.append(f"Draft.log_probs is not {vocab_size} tokens wide, the target's V")
            return problems
        total = np.exp(np.asarray(draft.log_probs, np.float64)).sum(axis=2)
        if not (np.abs(total - 1)[is_drafted] < 1e-4).all():
            problems.append(
                f"round {number}: exp(log_probs) does not sum to 1 at every drafted slot"
            )
    return problems


def _law_p_values(texts: Array, past: Array, draft: Draft) -> list[float]:
    """For each slot, the p-value of the drafted tokens under their reported laws.

    Three tests, so that a deviation shows whether or not it differs from text to text, and however
    large the vocabulary is; the smallest p-value counts, three times.

    Args:
      texts: i32[B, N], the rows' texts before the round.
      past: i32[B, …], the drafts of earlier rounds.
      draft: the round's drafts.
    """
    tokens, lengths = np.asarray(draft.tokens), np.asarray(draft.length)
    probs = np.exp(np.asarray(draft.log_probs, np.float64))
    vocab_size = probs.shape[2]
    p_values = []
    for slot in range(tokens.shape[1]):
        rows = np.flatnonzero(lengths > slot)
        if len(rows) == 0:
            p_values.append(1.0)
            continue
        law = np.nan_to_num(probs[rows, slot])
        drawn = np.clip(tokens[rows, slot], 0, vocab_size - 1)
        history = np.concatenate([texts[rows], past[rows], tokens[rows, :slot]], axis=1)
        by_past = np.unique(history, axis=0, return_inverse=True)[1].ravel()
        found = [
            _p_value_by_group(group, drawn, law) for group in (by_past, np.zeros(len(rows), int))
        ]
        found.append(_p_value_of_likelihood(drawn, law))
        p_values.append(min(1.0, len(found) * min(found)))
    return p_values


def _p_value_by_group(group: Array, drawn: Array, law: Array) -> float:
    """Each group's counts against the sum of its rows' laws."""
    shape = (int(group.max()) + 1, law.shape[1])
    expected, observed = np.zeros(shape), np.zeros(shape)
    np.add.at(expected, group, law)
    np.add.at(observed, (group, drawn), 1.0)
    return chi_square_p_value(observed, expected)


def _p_value_of_likelihood(drawn: Array, law: Array) -> float:
    """Mean log q of the drawn tokens against minus the entropy of q, in standard errors."""
    of_drawn = law[np.arange(len(drawn)), drawn]
    if (of_drawn <= 0).any():
        return 0.0
    logs = np.log(np.where(law > 0, law, 1.0))
    mean = (law * logs).sum(axis=1)
    variance = ((law * logs**2).sum(axis=1) - mean**2).sum()
    surplus = abs((np.log(of_drawn) - mean).sum())
    if variance <= 1e-9:
        return 1.0
    return math.erfc(surplus / math.sqrt(2 * variance))


def _difference(alone: list[Round], together: list[Round]) -> str:
    """How a row alone drafts otherwise than in the batch, or nothing."""
    for number, (first, second) in enumerate(zip(alone, together, strict=True)):
        length = int(first[2].length[0])
        if length != int(second[2].length[0]):
            what = "another number of drafts"
        elif (first[2].tokens[0] != second[2].tokens[0])[:length].any():
            what = "other drafts"
        elif not _have_one_law(first[2], second[2], length):
            what = "another q"
        else:
            continue
        return f"round {number}: a row alone has {what} than in a batch, with the same key"
    return ""


def _have_one_law(first: Draft, second: Draft, length: int) -> bool:
    if first.log_probs is None or second.log_probs is None:
        return first.log_probs is second.log_probs
    return np.allclose(first.log_probs[0, :length], second.log_probs[0, :length], atol=1e-4)
