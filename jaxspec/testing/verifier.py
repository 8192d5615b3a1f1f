"""Is an acceptance rule lossless? Its law over every draft, against the target's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.strategies import check_type
from jaxspec.testing.bounds import MAX_TOKENS, optimal_acceptance
from jaxspec.testing.comparison import FALSE_ALARM, compare
from jaxspec.testing.enumeration import Block, Laws, TreeBlock, emitted_laws
from jaxspec.testing.oracle import Text
from jaxspec.types import NO_TOKEN, Draft, Verdict, Verifier
from jaxspec.verifiers import ratio

Array: TypeAlias = np.ndarray[Any, Any]

_EXACT_BOUND = 5e-5
"""Each of the at most (K + 1) (V + 1) borders of a piece is rounded by a few units of 2⁻²³."""


@dataclasses.dataclass(frozen=True)
class VerifierCase:
    """One pair of laws.

    Attributes:
      name: what the draft is to the target.
      is_exact: whether the law was enumerated; else it was sampled.
      total_variation: between the emitted law, carried on by the target, and the target's.
      bound: what it must stay below.
      expected_accepted: E[number of accepted drafts], exact or the samples' mean.
      acceptance_rate: P(some draft is accepted), likewise.
      optimal_acceptance_rate: what no lossless rule can exceed of that, `optimal_acceptance`; NaN
        for more than 16 tokens.
      problem: what is wrong, or nothing.
    """

    name: str
    is_exact: bool
    total_variation: float
    bound: float
    expected_accepted: float
    acceptance_rate: float
    optimal_acceptance_rate: float
    problem: str


@dataclasses.dataclass(frozen=True)
class VerifierReport:
    """What `check_verifier` found.

    Attributes:
      cases: one for each pair of laws.
    """

    cases: tuple[VerifierCase, ...]

    @property
    def passed(self) -> bool:
        """Whether every case did."""
        return not any(case.problem for case in self.cases)

    @property
    def total_variation(self) -> float:
        """The largest of the cases'."""
        return max(case.total_variation for case in self.cases)

    def assert_passed(self) -> None:
        """Raises AssertionError with the whole report, unless `passed`."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """One line a case."""
        lines = [f"check_verifier {'passed' if self.passed else 'FAILED'}"]
        width = max(len(case.name) for case in self.cases)
        lines.append(
            f"{'case':>{width}}  {'law':>10}  {'TV':>9}  {'bound':>9}  {'E[accepted]':>11}  "
            f"{'P(any)':>7}  {'optimal':>7}"
        )
        for case in self.cases:
            how = "enumerated" if case.is_exact else "sampled"
            lines.append(
                f"{case.name:>{width}}  {how:>10}  {case.total_variation:9.1e}  {case.bound:9.1e}  "
                f"{case.expected_accepted:11.4f}  {case.acceptance_rate:7.4f}  "
                f"{case.optimal_acceptance_rate:7.4f}  {case.problem}"
            )
        return "\n".join(lines)


def check_verifier(
    verifier: Verifier,
    *,
    vocab_size: int = 3,
    num_draft: int = 2,
    parents: Sequence[int] | None = None,
    seed: int = 0,
    num_samples: int = 100_000,
    false_alarm: float = FALSE_ALARM,
) -> VerifierReport:
    """Computes what a rule emits, over every draft of K tokens, and compares it with the target.

    The emitted tokens, carried on to K + 1 tokens by the target itself, must have the target's
    law, whatever the draft's: one that disagrees, one that is near, one that is equal, one with
    zeros where the target has none and the other way round, target and draft as point masses,
    and drafts shorter than K. Every verdict's form is checked as well.

    A rule with a `judge` (see `jaxspec.types.Verifier`) is enumerated, exactly, and calling it has
    to be that judge; the law of any other is sampled over `num_samples` drafts and keys a case.
    What a rule says of its keys (`is_keyed_by_position`, `shares_noise`) and a guarantee of
    "tokens" concern several rounds: `check_lossless` tests them.

    Args:
      verifier: the rule, from `jaxspec.verifiers` or your own.
      vocab_size: V ≥ 2, small.
      num_draft: K ≥ 1, small; of chains.
      parents: a tree to draft instead, of K nodes: of each its parent, -1 for the pending token or
        an earlier node. Its children are found in every way that the rule takes.
      seed: of the random laws.
      num_samples: for a rule that is sampled.
      false_alarm: the probability with which a correct rule that is sampled fails a case.

    Returns:
      A `VerifierReport`, with the expected number of accepted drafts of each case, and how often
      any is accepted beside the optimum.

    Raises:
      ValueError: no verifier; sizes that cannot be enumerated; a `judge` whose numbers do not
        decide as described.

    Example:
      >>> import jaxspec
      >>> report = check_verifier(jaxspec.verifiers.rejection())
      >>> report.passed, report.total_variation < 1e-5
      (True, True)
    """
    check_type("verifier", verifier, Verifier, "jaxspec.verifiers")
    if parents is not None:
        num_draft = len(parents)
        _check_parents(verifier, parents)
    if not (2 <= vocab_size <= 256 and num_draft >= 1 and vocab_size**num_draft <= 4096):
        raise ValueError(
            "check_verifier enumerates every draft: it takes 2 ≤ vocab_size ≤ 256, num_draft ≥ 1 "
            f"and at most 4,096 drafts, got {vocab_size} ** {num_draft}."
        )
    if parents is None:
        cases = blocks(vocab_size=vocab_size, num_draft=num_draft, seed=seed)
    else:
        kinds = getattr(verifier, "takes_children", ())
        cases = tree_blocks(parents, kinds, vocab_size=vocab_size, seed=seed)
    if getattr(verifier, "needs_greedy_sampling", False):
        cases = {name: block for name, block in cases.items() if "greedy" in name}
    if problem := _plain_problem(verifier, vocab_size):
        return VerifierReport((_broken("no drafts (K = 0)", False, problem),))
    if hasattr(verifier, "judge"):
        return VerifierReport(tuple(_enumerated(verifier, cases)))
    return VerifierReport(
        tuple(
            _sampled(
                verifier, name, block, np.random.default_rng([seed, i]), num_samples, false_alarm
            )
            for i, (name, block) in enumerate(cases.items())
        )
    )


def random_laws(seed: Any, *, vocab_size: int, num_draft: int, zeros: int = 0) -> Laws:
    """A law float64[V] for every prefix of up to K tokens, with `zeros` impossible tokens each."""
    rng = np.random.default_rng(seed)
    laws = {}
    for size in range(num_draft + 1):
        for prefix in itertools.product(range(vocab_size), repeat=size):
            weights = rng.gamma(0.7, size=vocab_size) + 0.01
            weights[rng.permutation(vocab_size)[:zeros]] = 0.0
            laws[prefix] = weights / weights.sum()
    return laws


def blocks(*, vocab_size: int, num_draft: int, seed: int) -> dict[str, Block]:
    """The cases of `check_verifier`: {name: laws}."""
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "num_draft": num_draft}
    target, drafted = random_laws([seed, 0], **sizes), random_laws([seed, 1], **sizes)
    near = {text: 0.7 * target[text] + 0.3 * drafted[text] for text in target}
    greedy = {text: np.eye(vocab_size)[np.argmax(law)] for text, law in target.items()}
    top = {text: int(np.argmax(law)) for text, law in target.items()}
    other = {text: int(np.argmin(law)) for text, law in target.items()}
    some_zeros = random_laws([seed, 2], **sizes, zeros=1)
    other_zeros = random_laws([seed, 3], **sizes, zeros=1)
    cases = {
        "disagreeing": Block(target, drafted),
        "near": Block(target, near),
        "equal": Block(target, target),
        "zeros in both": Block(some_zeros, other_zeros),
        "zeros in the target": Block(some_zeros, drafted),
        "zeros in the draft": Block(target, other_zeros),
        "one-hot drafts": Block(target, tokens_of=top),
        "unlikely one-hot drafts": Block(target, tokens_of=other),
        "drafts as point masses": Block(
            target, {text: np.eye(vocab_size)[token] for text, token in top.items()}
        ),
        "greedy, sampled drafts": Block(greedy, drafted),
        "greedy, right drafts": Block(greedy, tokens_of=top),
        "greedy, wrong drafts": Block(greedy, tokens_of=other),
    }
    for length in range(num_draft):
        cases[f"{length} of {num_draft} drafted"] = Block(target, near, length=length)
    return cases


def tree_blocks(
    parents: Sequence[int], kinds: Sequence[str], *, vocab_size: int, seed: int
) -> dict[str, Block]:
    """The cases of `check_verifier` for a tree: {name: laws}.

    Args:
      parents: of each node.
      kinds: how its children are found.
      vocab_size: V.
      seed: of the laws.
    """
    depths = [0]
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "num_draft": max(depths)}
    target, drafted = random_laws([seed, 0], **sizes), random_laws([seed, 1], **sizes)
    near = {text: 0.7 * target[text] + 0.3 * drafted[text] for text in target}
    some_zeros = random_laws([seed, 2], **sizes, zeros=1)
    other_zeros = random_laws([seed, 3], **sizes, zeros=1)
    greedy = {text: np.eye(vocab_size)[np.argmax(law)] for text, law in target.items()}
    laws = {
        "disagreeing": (target, drafted),
        "near": (target, near),
        "equal": (target, target),
        "zeros in both": (some_zeros, other_zeros),
        "zeros in the target": (some_zeros, drafted),
        "zeros in the draft": (target, other_zeros),
        "drafts as point masses": (target, greedy),  # q is used up by the first child
        "greedy": (greedy, drafted),
    }
    cases: dict[str, Block] = {}
    for kind in kinds:
        for name, (p, q) in laws.items():
            cases[f"{kind}, {name}"] = TreeBlock(p, q, parents=parents, children=kind)
        cases[f"{kind}, {len(parents) - 1} of {len(parents)} drafted"] = TreeBlock(
            target, near, parents=parents, children=kind, length=len(parents) - 1
        )
    return cases


def _check_parents(verifier: Any, parents: Sequence[int]) -> None:
    if not getattr(verifier, "takes_children", ()):
        raise ValueError(
            f"{type(verifier).__name__} judges chains; a rule for trees says in its takes_children "
            "what trees it is exact for (jaxspec.types.Verifier)."
        )
    if not parents or not all(-1 <= parent < slot for slot, parent in enumerate(parents)):
        raise ValueError(
            "parents must name an earlier node each, or -1 for the pending token, got "
            f"{list(parents)}."
        )


def _enumerated(verifier: Any, cases: dict[str, Block]) -> list[VerifierCase]:
    found = {}
    for is_sampled in (True, False):
        group = {name: block for name, block in cases.items() if block.is_drawn == is_sampled}
        if not group:
            continue
        problems = [_call_problem(verifier, block) for block in group.values()]
        if bad := {name: p for name, p in zip(group, problems, strict=True) if p}:
            return [_broken(name, True, problem) for name, problem in bad.items()]
        laws = emitted_laws(verifier, list(group.values()))
        for (name, block), law in zip(group.items(), laws, strict=True):
            ours, exact = block.completed(law), block.target_law()
            distance = 0.5 * sum(
                abs(ours.get(text, 0.0) - exact.get(text, 0.0)) for text in set(ours) | set(exact)
            )
            problem = "another law than the target's" if distance > _EXACT_BOUND else ""
            accepted = sum(mass * (len(text) - 1) for text, mass in law.items())
            some = sum(mass for text, mass in law.items() if len(text) > 1)
            found[name] = VerifierCase(
                name, True, distance, _EXACT_BOUND, accepted, some, _optimum(block), problem
            )
    return [found[name] for name in cases]


def _broken(name: str, is_exact: bool, problem: str) -> VerifierCase:
    """A case of a rule that has no law to be compared."""
    return VerifierCase(name, is_exact, 1.0, 0.0, 0.0, 0.0, float("nan"), problem)


def _optimum(block: Block) -> float:
    """The acceptance rate that no lossless rule exceeds."""
    if block.vocab_size > MAX_TOKENS:
        return float("nan")
    drafts = [(block.first_drafts(text), mass) for text, mass in block.texts()]
    return optimal_acceptance(block.target[()], drafts)


def _plain_problem(verifier: Any, vocab_size: int) -> str:
    """What is wrong where nothing is drafted at all: plain decoding is K = 0."""
    draft = Draft(jnp.zeros((4, 0), jnp.int32), None, jnp.zeros((4,), jnp.int32))
    keys = jax.random.split(jax.random.key(0), (4, 1))
    target = jnp.full((4, 1, vocab_size), -jnp.log(float(vocab_size)))
    try:
        verdict = _call(verifier, keys, draft, target)
    except (IndexError, TypeError, ValueError) as error:
        return f"fails where nothing is drafted, K = 0, as in plain decoding: {error}"
    return _form_problem(verdict, draft, vocab_size)


def _call_problem(verifier: Any, block: Block) -> str:
    """What is wrong with calling the rule on keys: its form, or that it is not its judge."""
    texts = [text for text, _ in block.texts()]
    draft, target = block.arrays(texts * max(1, 512 // len(texts)))
    keys = jax.random.split(jax.random.key(0), (draft.tokens.shape[0], block.num_draft + 1))
    called = _call(verifier, keys, draft, target)
    if problem := _form_problem(called, draft, block.vocab_size):
        return problem
    judged = _judge(verifier, jax.random.clone(keys), draft, target)
    is_same = (called.tokens == judged.tokens).all()
    if not (is_same and (called.num_accepted == judged.num_accepted).all()):
        return "calling it is not its judge on jaxspec.verifiers.ratio.uniforms(keys)"
    return ""


@jax.jit
def _judge(verifier: Any, keys: jax.Array, draft: Draft, target: jax.Array) -> Verdict:
    return jax.vmap(verifier.judge)(jax.vmap(ratio.uniforms)(keys), draft, target)


@jax.jit
def _call(verifier: Any, keys: jax.Array, draft: Draft, target: jax.Array) -> Verdict:
    return jax.vmap(verifier)(keys, draft, target)


def _sampled(
    verifier: Verifier,
    name: str,
    block: Block,
    rng: np.random.Generator,
    num_samples: int,
    false_alarm: float,
) -> VerifierCase:
    texts = [text for text, _ in block.texts()]
    share = np.array([mass for _, mass in block.texts()])
    chosen = rng.choice(len(texts), size=num_samples, p=share / share.sum())
    draft, target = jax.tree.map(lambda x: x[chosen], block.arrays(texts))
    keys = jax.random.split(
        jax.random.key(int(rng.integers(2**31))), (num_samples, block.num_draft + 1)
    )
    verdict = _call(verifier, keys, draft, target)
    if problem := _form_problem(verdict, draft, block.vocab_size):
        return _broken(name, False, problem)
    tokens, accepted = np.asarray(verdict.tokens), np.asarray(verdict.num_accepted)
    emitted, times = np.unique(np.c_[accepted, tokens], axis=0, return_counts=True)
    counts: dict[Text, int] = {}
    for (count, *row), repeats in zip(emitted.tolist(), times.tolist(), strict=True):
        # Each is carried on by draws from the target.
        endings = block.completed({tuple(row[: count + 1]): 1.0})
        masses = np.array(list(endings.values()))
        drawn = rng.multinomial(repeats, masses / masses.sum())
        for text, number in zip(endings, drawn.tolist(), strict=True):
            counts[text] = counts.get(text, 0) + number
    comparison = compare(counts, block.target_law(), false_alarm=false_alarm)
    return VerifierCase(
        name,
        False,
        comparison.total_variation,
        comparison.bound,
        float(accepted.mean()),
        float((accepted > 0).mean()),
        _optimum(block),
        "" if comparison.passed else "another law than the target's",
    )


def _form_problem(verdict: Any, draft: Draft, vocab_size: int) -> str:
    """What is wrong with the verdicts' form, or nothing."""
    if not isinstance(verdict, Verdict):
        return f"a rule returns a jaxspec.Verdict, got {type(verdict).__name__}"
    num_rows, num_slots = draft.tokens.shape
    form = verdict.tokens, verdict.num_accepted
    if verdict.tokens.shape != (num_rows, num_slots + 1) or verdict.num_accepted.shape != (
        num_rows,
    ):
        return (
            "a verdict is tokens [K + 1] and num_accepted [], got "
            f"{' and '.join(str(x.shape[1:]) for x in form)}"
        )
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in form):
        return f"a verdict holds integers, got {' and '.join(str(x.dtype) for x in form)}"
    tokens, accepted = map(np.asarray, form)
    if (accepted < 0).any() or (accepted > np.asarray(draft.length)).any():
        return "num_accepted must lie in 0 … draft.length: a correction is no accepted draft"
    slots = np.arange(num_slots + 1)
    is_draft = slots[:-1] < accepted[:, None]
    drafted = np.asarray(draft.tokens)
    if draft.parents is not None:
        if verdict.path is None or verdict.path.shape[1] > num_slots:
            return "a rule for trees says in path [P ≤ K] which slots it accepted"
        path = np.asarray(verdict.path)
        path = np.c_[path, np.tile(slots[path.shape[1] : -1], (num_rows, 1))]
        drafted = np.take_along_axis(drafted, path, axis=1)
        above = np.take_along_axis(np.asarray(draft.parents), path, axis=1)
        is_below = above == np.c_[np.full(num_rows, NO_TOKEN), path[:, :-1]]
        if (is_draft & ~is_below).any() or (~is_draft & (path != slots[:-1])).any():
            return "path must go down from the pending token, and behind it name each slot itself"
    if (tokens[:, :-1][is_draft] != drafted[is_draft]).any():
        return "the accepted drafts must stand first among the verdict's tokens"
    if (tokens[slots[None] == accepted[:, None]] < 0).any():
        return "a correction or bonus must stand behind the accepted drafts"
    if (tokens >= vocab_size).any():
        return f"a verdict's ids must lie below {vocab_size}, the vocabulary's size"
    if (tokens[slots[None] > accepted[:, None]] != NO_TOKEN).any():
        return f"slots behind the correction or bonus must hold {NO_TOKEN}"
    return ""
