"""Rules without a guarantee: what they accept, how far they move the law, and who may use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant
from support.real import benchmark

import jaxspec
from jaxspec import Draft, Sampling, drafters, lossy, policies, pytree, verifiers
from jaxspec.testing import check_lossless, check_verifier, random_logits, table_model

pytestmark = pytest.mark.law

RULES = {
    "lenient": lambda: lossy.lenient(0.5),
    "confidence": lambda: lossy.confidence(0.01),
    "typical": lambda: lossy.typical(),
}
P = np.array([0.45, 0.3, 0.15, 0.07, 0.03])
Q = np.array([0.05, 0.25, 0.2, 0.3, 0.2])


def _emitted(rule, q=Q, token=None):
    """The law of the first token behind one draft, f64[5], from 200,000 keys, and its acceptance.

    Each estimate is within 0.006 with probability 1 - 1e-6 (five standard errors at 0.5).
    """
    draws = 200_000
    keys = jax.random.split(jax.random.key(0), (draws, 2))
    first, _ = jax.random.split(jax.random.key(1))
    if token is None:
        tokens = jax.random.choice(first, 5, (draws, 1), p=jnp.asarray(q))
        laws = jnp.broadcast_to(jnp.log(jnp.asarray(q, jnp.float32)), (draws, 1, 5))
    else:
        tokens, laws = jnp.full((draws, 1), token), None
    draft = Draft(tokens.astype(jnp.int32), laws, jnp.ones((draws,), jnp.int32))
    target = jnp.broadcast_to(jnp.log(jnp.asarray(P, jnp.float32)), (draws, 2, 5))
    verdict = jax.jit(jax.vmap(rule))(keys, draft, target)
    law = np.bincount(np.asarray(verdict.tokens[:, 0]), minlength=5) / draws
    return law, float(jnp.mean(verdict.num_accepted))


def _law_of(passes, left, q=Q):
    """Accepted with `passes` f64[5], else drawn from `left`: the emitted law and the acceptance."""
    accepted = q * passes
    missing = 1 - accepted.sum()
    return accepted + missing * left / max(left.sum(), 1e-30), accepted.sum()


def check_rule(module, name):
    rule = getattr(module, name)
    for parameter in (0.3, 0.7):
        if name == "lenient":
            passes = np.minimum(1, P / (parameter * Q))
            left = np.maximum(P - parameter * Q, 0)
            judged = rule(parameter)
        elif name == "confidence":
            passes = np.where(parameter <= P, 1, np.minimum(1, P / Q))
            left = np.maximum(P - Q, 0)
            judged = rule(parameter)
        else:
            entropy = -np.sum(P * np.log(P))
            threshold = min(0.2, parameter * np.exp(-entropy))
            passes, left = (threshold < P).astype(float), P
            judged = rule(0.2, parameter)
        law, rate = _law_of(passes, left)
        got, got_rate = _emitted(judged)
        np.testing.assert_allclose(got, law, atol=0.006)
        assert abs(got_rate - rate) < 0.006
        # A draft without a law is a point mass.
        for token in (0, 2):
            q = np.eye(5)[token]
            if name == "lenient":
                passes = np.minimum(1, P / parameter)
                left = np.maximum(P - parameter * q, 0)
            elif name == "confidence":
                passes, left = np.where(parameter <= P, 1, P), np.maximum(P - q, 0)
            law, rate = _law_of(passes, left, q)
            got, got_rate = _emitted(judged, token=token)
            np.testing.assert_allclose(got, law, atol=0.006)
            assert abs(got_rate - rate) < 0.006


@pytest.mark.parametrize("name", RULES)
def test_the_law_of_one_draft_is_the_formulas(name):
    check_rule(lossy, name)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("lenient", ("num_accepted, log_weight)", "num_accepted)")),
        ("lenient", ("log_weight = -jnp.log", "log_weight = jnp.log")),
        ("confidence", ("target >= jnp.log(", "target >= 2 * jnp.log(")),
        ("confidence", ("is_sure | (", "(")),
        ("typical", ("jnp.exp(-entropies)", "jnp.exp(entropies)")),
        ("typical", ("accepted, target_log_probs, num_accepted)",
                     "draft, target_log_probs, num_accepted)")),
    ],
)  # fmt: skip
def test_planted_bugs_are_noticed(name, patch):
    with pytest.raises(AssertionError):
        check_rule(mutant(f"jaxspec.lossy.{name}", patch), name)


@pytest.mark.parametrize("name", RULES)
def test_how_far_a_law_is_moved(name):
    """By enumeration: more is accepted than by speculative sampling, and greedy rows are exact."""
    ours, exact = check_verifier(RULES[name]()), check_verifier(verifiers.rejection())
    assert exact.passed
    assert not ours.passed
    assert ours.total_variation > 0.02
    for case, reference in zip(ours.cases, exact.cases, strict=True):
        assert case.is_exact
        if case.name.startswith("greedy"):
            assert not case.problem
        if name != "typical":  # which does not look at q
            assert case.expected_accepted >= reference.expected_accepted - 1e-6


@pytest.mark.parametrize("rule", [lossy.lenient(1.0), lossy.confidence(2.0)])
def test_at_the_end_of_their_range_they_are_exact(rule):
    check_verifier(rule).assert_passed()


def test_lenience_bounds_every_token():
    law, _ = _emitted(lossy.lenient(0.5))
    assert np.all(law <= P / 0.5 + 0.006)


TARGET = table_model(random_logits(4, vocab_size=3, order=1), order=1)
OTHER = table_model(random_logits(1, vocab_size=3, order=1), order=1)


def _generate(**kwargs):
    return jaxspec.generate(
        TARGET, [[0], [1]], key=jax.random.key(0), max_new_tokens=12,
        **{"drafter": drafters.model(OTHER)} | kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_lossy_rule_is_asked_for_by_name(name):
    with pytest.raises(ValueError, match=r"is a lossy rule: .*exact=False"):
        _generate(verifier=RULES[name]())
    out = _generate(verifier=RULES[name](), exact=False)
    assert out.guarantee == "none"
    assert _generate().guarantee == "distribution"
    assert _generate(exact=False).guarantee == "distribution"
    # Greedy text is the target's.
    greedy = {"sampling": Sampling(temperature=np.array([0.0, 0.0]))}
    want = _generate(**greedy, drafter=None).tokens
    got = _generate(verifier=RULES[name](), exact=False, **greedy)
    np.testing.assert_array_equal(got.tokens, want)
    assert got.guarantee == "none"


@pytest.mark.parametrize("name", RULES)
def test_the_check_of_whole_texts_sees_them(name):
    report = check_lossless(
        TARGET, drafters.model(OTHER), RULES[name](), max_new_tokens=3, num_draft_tokens=2,
        generate=functools.partial(jaxspec.generate, exact=False),
    )  # fmt: skip
    assert not report.passed
    assert report.total_variation > 0.03


def test_the_benchmarks_coin_accepts_at_the_rate_asked_for():
    benchmark("synthetic").check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lossy.lenient(0), r"lenience must lie in \(0, 1\], got 0"),
        (lambda: lossy.lenient(1.5), "got 1.5"),
        (lambda: lossy.confidence(0), "threshold must be above 0"),
        (lambda: lossy.typical(1.0), r"epsilon must lie in \[0.0, 1.0\), got 1.0"),
        (lambda: lossy.typical(0.3, -1.0), "delta must lie in"),
    ],
)
def test_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytree.dataclass
class Peeking(policies.fixed(1).__class__):
    """Says of itself that it drops drafts for their own value."""

    is_anticipating = True


def test_a_policy_that_looks_ahead_is_refused_with_the_reason():
    policy = Peeking(2)
    with pytest.raises(ValueError, match=r"policy Peeking drops .* 2211\.17192 .*exact=False"):
        _generate(policy=policy)
    assert _generate(policy=policy, exact=False).guarantee == "none"
