"""The exact law of one block: the shipped verifiers, enumerated; planted bugs are caught.

Tolerance: the verifier works in float32. Each of the at most (K + 1) · (V + 1) borders of a
piece is rounded by at most a few units of 2⁻²³, so that the total variation of the whole law
stays below 16 · 2⁻²³ · 25 < 5e-5. The planted bugs move it by more than a hundred times that.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.enumeration import BlockOracle, random_laws
from support.mutants import mutant

from jaxspec import Draft
from jaxspec.verifiers import greedy, rejection

_TOLERANCE = 5e-5
_CAUGHT = 5e-3

_REJECTION = "jaxspec.verifiers.rejection"


def _verify_of(module):
    return module.verify_with_uniforms


def _shipped():
    return importlib.import_module(_REJECTION)


def _laws(case, *, vocab_size=3, num_draft=2, seed=0):
    """(target, draft laws or None, deterministic tokens or None)."""
    zeros = {"zeros": 1}.get(case, 0)
    target = random_laws(seed, vocab_size=vocab_size, num_draft=num_draft, zeros=zeros)
    drafted = random_laws(seed + 100, vocab_size=vocab_size, num_draft=num_draft, zeros=zeros)
    if case == "equal":
        drafted = target
    if case == "near":  # ratios around one, where a clip or a swap hides
        drafted = {k: 0.7 * target[k] + 0.3 * drafted[k] for k in target}
    if case == "greedy rows":
        target = {k: np.eye(vocab_size)[np.argmax(v)] for k, v in target.items()}
    if case == "one-hot":
        # A token that is likely but not certain, so that both branches have mass.
        tokens = {k: int(np.argsort(v)[-1]) for k, v in target.items()}
        return target, None, tokens
    return target, drafted, None


def _distance(module, case, *, length=None, **sizes):
    target, drafted, tokens = _laws(case, **sizes)
    oracle = BlockOracle(_verify_of(module), target, drafted, tokens_of=tokens)
    return oracle.distance(length)


_CASES = ["disagreeing", "near", "equal", "zeros", "greedy rows", "one-hot"]


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize(("vocab_size", "num_draft"), [(2, 1), (4, 1), (3, 2), (2, 3), (4, 3)])
def test_rejection_keeps_the_target_law(case, vocab_size, num_draft):
    if case == "zeros" and vocab_size == 2:
        vocab_size = 3
    distance = _distance(_shipped(), case, vocab_size=vocab_size, num_draft=num_draft)
    assert distance < _TOLERANCE


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("case", ["disagreeing", "one-hot"])
def test_rejection_keeps_the_target_law_of_short_drafts(case, length):
    assert _distance(_shipped(), case, num_draft=3, length=length) < _TOLERANCE


def test_equal_draft_is_accepted_whole():
    target, _, _ = _laws("equal")
    oracle = BlockOracle(_verify_of(_shipped()), target, target)
    # Ratios of two equal float32 numbers are exactly one: no tolerance.
    assert oracle.expected_accepted() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_acceptance_is_one_minus_total_variation(seed):
    target, drafted, _ = _laws("disagreeing", num_draft=1, seed=seed)
    oracle = BlockOracle(_verify_of(_shipped()), target, drafted)
    expected = 1 - 0.5 * np.abs(target[()] - drafted[()]).sum()
    assert oracle.expected_accepted() == pytest.approx(expected, abs=_TOLERANCE)


def test_one_hot_acceptance_is_the_target_probability():
    target, _, tokens = _laws("one-hot", num_draft=1)
    oracle = BlockOracle(_verify_of(_shipped()), target, tokens_of=tokens)
    assert oracle.expected_accepted() == pytest.approx(target[()][tokens[()]], abs=_TOLERANCE)


def test_greedy_verifier_emits_the_argmax_chain():
    """At temperature 0 the law is one text; the greedy verifier and rejection agree on it."""
    target, drafted, _ = _laws("greedy rows", num_draft=3, vocab_size=4)

    def by_greedy(numbers, draft, target_log_probs):
        del numbers
        keys = jax.random.split(jax.random.key(0), draft.tokens.shape[0] + 1)
        return greedy()(keys, draft, target_log_probs)

    oracle = BlockOracle(by_greedy, target, drafted)
    assert oracle.distance() < 1e-12
    by_rejection = BlockOracle(_verify_of(_shipped()), target, drafted)
    assert by_rejection.emitted_law().keys() == oracle.emitted_law().keys()


def test_the_keyed_verifier_is_the_enumerated_one():
    """`rejection()` on keys equals `verify_with_uniforms` on the uniforms of those keys."""
    shipped = _shipped()
    keys = jax.random.split(jax.random.key(7), (200, 4))
    target = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (200, 4, 5)))
    drafted = jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (200, 3, 5)))
    tokens = jax.random.randint(jax.random.key(3), (200, 3), 0, 5)
    draft = Draft(tokens, drafted, jnp.full((200,), 3))
    ours = jax.jit(jax.vmap(rejection()))(keys, draft, target)
    numbers = np.asarray(jax.jit(jax.vmap(shipped.uniforms))(jax.random.clone(keys)))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    explicit = jax.jit(jax.vmap(shipped.verify_with_uniforms))(jnp.asarray(numbers), draft, target)
    np.testing.assert_array_equal(ours.tokens, explicit.tokens)
    # Tests and draws are independent: no two columns of the uniforms are alike.
    correlations = np.corrcoef(numbers.reshape(200, -1), rowvar=False) - np.eye(12)
    assert np.abs(correlations).max() < 6 / np.sqrt(200)  # six standard errors


_MUTANTS = {
    "correction drawn from the target, not from the residual": (
        "residual = jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)",
        "residual = target",
        "disagreeing",
    ),
    "residual |p - q|": (
        "residual = jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)",
        "residual = jnp.abs(target - jnp.exp(draft.log_probs[slot]))",
        "disagreeing",
    ),
    "residual with p and q swapped": (
        "jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)",
        "jnp.maximum(jnp.exp(draft.log_probs[slot]) - target, 0.0)",
        "disagreeing",
    ),
    "residual against the draft one position early": (
        "slot = jnp.minimum(num_accepted, num_slots - 1)",
        "slot = jnp.maximum(num_accepted - 1, 0)",
        "disagreeing",
    ),
    "bonus drawn from a residual": (
        "has_residual = (num_accepted < draft.length) & (jnp.sum(residual) > 0)",
        "has_residual = jnp.sum(residual) > 0",
        "disagreeing",
    ),
    "target read one position late in the test": (
        "target = target_log_probs[slots, draft.tokens]",
        "target = target_log_probs[slots + 1, draft.tokens]",
        "disagreeing",
    ),
    "correction from the position before": (
        "target = jnp.exp(target_log_probs[num_accepted])",
        "target = jnp.exp(target_log_probs[jnp.maximum(num_accepted - 1, 0)])",
        "disagreeing",
    ),
    "ratio upside down": (
        "thresholds <= target - drafted",
        "thresholds <= drafted - target",
        "near",
    ),
    "draft probabilities rounded to bfloat16 in the test": (
        "drafted = draft.log_probs[slots, draft.tokens]",
        "drafted = draft.log_probs[slots, draft.tokens].astype(jnp.bfloat16).astype(jnp.float32)",
        "disagreeing",
    ),
    "drafts behind a rejection still accepted": (
        "num_accepted = jnp.sum(jnp.cumprod(accept.astype(jnp.int32)), dtype=jnp.int32)",
        "num_accepted = jnp.sum(accept.astype(jnp.int32), dtype=jnp.int32)",
        "disagreeing",
    ),
    "one-hot draft: the rejected token is drawn again": (
        "residual = jnp.where(is_drafted, 0.0, target)",
        "residual = target",
        "one-hot",
    ),
    "one-hot draft: accepted whenever possible": (
        "passes = thresholds <= target",
        "passes = target > -jnp.inf",
        "one-hot",
    ),
    "threshold log(u) + 0.1": (
        "thresholds = jnp.log1p(-numbers)",
        "thresholds = jnp.log1p(-numbers) + 0.1",
        "near",
    ),
}


@pytest.mark.parametrize("name", _MUTANTS)
def test_planted_bug_in_rejection_is_caught(name):
    old, new, case = _MUTANTS[name]
    broken = mutant(_REJECTION, (old, new))
    threshold = 1e-4 if "bfloat16" in name else _CAUGHT
    assert _distance(broken, case) > threshold > _TOLERANCE


def test_planted_bug_drafts_beyond_the_length_is_caught():
    broken = mutant(_REJECTION, ("return passes & (slots < draft.length)", "return passes"))
    assert _distance(broken, "disagreeing", num_draft=3, length=1) > _CAUGHT


def test_planted_bug_in_greedy_is_caught():
    broken = mutant("jaxspec.verifiers.greedy", ("best[:-1]) &", "best[1:]) &"))
    target, drafted, _ = _laws("greedy rows", num_draft=3, vocab_size=4)

    def verify(numbers, draft, target_log_probs):
        del numbers
        return broken.greedy()(None, draft, target_log_probs)

    assert BlockOracle(verify, target, drafted).distance() > _CAUGHT
