"""Properties of the pure functions for any p and q on the simplex, zeros included (Hypothesis).

Probabilities are quotients of whole numbers, so that ties, zeros, point masses and equal laws are
common; some are scaled down to the edge of float32. Laws are float64, functions float32: the
tolerances are a few units of 2⁻²³ for each term of a sum.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.mutants import mutant

from jaxspec import Draft, drawing, sampling, verifiers
from jaxspec.testing.oracle import next_token_law
from jaxspec.verifiers import ratio
from jaxspec.verifiers.block import margins, prefix_log_weights

V, K = 4, 3
_SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)
_RULES = {name: getattr(verifiers, name)() for name in ("rejection", "block")}


def _log(probs):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, np.float64))


@st.composite
def laws(draw, shape=()):
    """float64[*shape, V] on the simplex."""
    weights = draw(hnp.arrays(np.int64, (*shape, V), elements=st.integers(0, 6))).astype(float)
    tiny = draw(st.sampled_from([0, 0, 0, -20, -80]))
    weights[..., 0] *= np.exp(float(tiny))
    weights[..., -1] += weights.sum(axis=-1) == 0
    return weights / weights.sum(axis=-1, keepdims=True)


_bits = st.sampled_from([0, 1, 2**22, 2**23 - 1]) | st.integers(0, 2**23 - 1)
uniforms = hnp.arrays(np.int64, (K + 1, 3), elements=_bits).map(
    lambda bits: (bits / 2**23).astype(np.float32)
)
texts = hnp.arrays(np.int64, (K,), elements=st.integers(0, V - 1))


def _draft(tokens, q, length=K):
    log_probs = None if q is None else jnp.asarray(_log(q), jnp.float32)
    return Draft(jnp.asarray(tokens, jnp.int32), log_probs, jnp.int32(length))


@functools.cache
def _judge(verifier):
    return jax.jit(verifier.judge)


@_SETTINGS
@given(p=laws((2,)), q=laws())
def test_one_draft_is_accepted_or_corrected_to_p(p, q):
    """q(x) min(1, p(x) / q(x)) + P(rejected) · residual = p, for every x."""
    _check_one_draft(ratio, p, q)


@functools.cache
def _one_draft(module):
    def parts(log_p, log_q):
        drafts = Draft(jnp.arange(V)[:, None], jnp.broadcast_to(log_q, (V, 1, V)), jnp.ones(V, int))
        targets = jnp.broadcast_to(log_p, (V, 2, V))
        ratios = jax.vmap(module.log_ratios)(drafts, targets)[:, 0]
        first = jax.tree.map(lambda x: x[0], drafts)
        return ratios, module.residual(first, log_p, jnp.int32(0), jnp.float32(0))

    return jax.jit(parts)


def _check_one_draft(module, p, q):
    log_p, log_q = (jnp.asarray(_log(x), jnp.float32) for x in (p, q))
    ratios, residual = _one_draft(module)(log_p, log_q)
    accepted = q * np.minimum(1.0, np.exp(np.asarray(ratios, np.float64)))
    residual = np.asarray(residual, np.float64)
    rejected = 1 - accepted.sum()
    correction = residual / residual.sum() if residual.sum() > 0 else p[0]
    np.testing.assert_allclose(accepted + rejected * correction, p[0], atol=3e-6)


@pytest.mark.parametrize(
    "patch",
    [
        ("jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)", "target"),
        ("jnp.where(can_pass, ratios, -jnp.inf)", "jnp.where(can_pass, ratios, 0.0)"),
        ("ratios = target - drafted", "ratios = target - drafted - 0.1"),
    ],
)
def test_planted_bugs_in_one_draft(patch):
    broken = mutant("jaxspec.verifiers.ratio", patch)

    @_SETTINGS
    @given(p=laws((2,)), q=laws())
    def search(p, q):
        _check_one_draft(broken, p, q)

    with pytest.raises(AssertionError):
        search()


@_SETTINGS
@given(p=laws((3, V)), q=laws((2, V)))
def test_the_lemma_of_block_verification(p, q):
    """P(tau ≥ 1 | x_1) = p_1: what the later drafts take on is what h_1 leaves out.

    h_1 + (1 - h_1) Σ_x q(x | x_1) p_2(x) = p_1, for every first draft x_1.
    """
    p_of, q_of = p[:, 0], q[:, 0]  # laws at the three positions; q's second depends on x_1
    tokens = np.array([(a, b) for a in range(V) for b in range(V)])
    q_rows = np.stack([np.stack([q_of[0], q[1, a]]) for a, _ in tokens])
    p_rows = np.stack([np.stack([p_of[0], p[1, a], p_of[2]]) for a, _ in tokens])
    weights, excess, lack = _prefixes(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(_log(q_rows), jnp.float32),
        jnp.asarray(_log(p_rows), jnp.float32),
    )
    weights = np.exp(np.asarray(weights, np.float64)).reshape(V, V, 2)
    excess, lack = (np.asarray(x, np.float64).reshape(V, V, 2) for x in (excess, lack))
    total = excess + lack
    h = np.where(total > 0, excess / np.where(total > 0, total, 1), 1.0)
    np.testing.assert_allclose(h[:, :, 1], weights[:, :, 1], atol=1e-6)  # h_γ = p_γ
    for first in range(V):
        if q_of[0][first] == 0:
            continue
        later = (q[1, first] * weights[first, :, 1]).sum()
        here = h[first, 0, 0]
        assert here + (1 - here) * later == pytest.approx(weights[first, 0, 0], abs=1e-5)


@jax.jit
@jax.vmap
def _prefixes(tokens, log_q, log_p):
    draft = Draft(tokens, log_q, jnp.int32(tokens.shape[0]))
    weights = prefix_log_weights(draft, log_p)
    return (weights, *margins(draft, log_p, weights))


@_SETTINGS
@given(p=laws((K + 1,)), q=laws((K,)), tokens=texts)
def test_block_s_prefixes_weigh_no_less_than_rejection_s(p, q, tokens):
    """p_i ≥ Π min(1, p / q), whatever was drafted: hence no fewer tokens, in expectation."""
    draft, log_p = _draft(tokens, q), jnp.asarray(_log(p), jnp.float32)
    by_block, ratios = (np.asarray(x) for x in _weights(draft, log_p))
    by_rejection = np.cumsum(np.minimum(ratios, 0.0))
    assert (by_block >= by_rejection - 1e-5).all()
    assert (by_block <= 0).all()


@jax.jit
def _weights(draft, log_p):
    return prefix_log_weights(draft, log_p), ratio.log_ratios(draft, log_p)


@pytest.mark.parametrize("rule", _RULES)
@_SETTINGS
@given(
    p=laws((K + 1,)), q=laws((K,)), tokens=texts, numbers=uniforms,
    length=st.integers(0, K), is_one_hot=st.booleans(),
)  # fmt: skip
def test_a_verdict_is_well_formed_and_possible(rule, p, q, tokens, numbers, length, is_one_hot):
    """Accepted drafts, one more token, then -1; and never a token to which p gives nothing."""
    draft = _draft(tokens, None if is_one_hot else q, length)
    log_p = jnp.asarray(_log(p), jnp.float32)
    verdict = _judge(_RULES[rule])(jnp.asarray(numbers), draft, log_p)
    emitted, count = np.asarray(verdict.tokens), int(verdict.num_accepted)
    assert 0 <= count <= length
    np.testing.assert_array_equal(emitted[:count], tokens[:count])
    assert (emitted[count + 1 :] == -1).all()
    for i in range(count + 1):
        assert np.exp(log_p[i, emitted[i]]) > 0
    if not is_one_hot:
        assert all(q[i, tokens[i]] > 0 for i in range(count))


@pytest.mark.parametrize("rule", _RULES)
@_SETTINGS
@given(p=laws((K + 1,)), tokens=texts, numbers=uniforms)
def test_p_equal_to_q_accepts_everything_it_can_draw(rule, p, tokens, numbers):
    assume(all(np.float32(_log(p[i, token])) > -np.inf for i, token in enumerate(tokens)))
    log_p = jnp.asarray(_log(p), jnp.float32)
    draft = Draft(jnp.asarray(tokens, jnp.int32), log_p[:K], jnp.int32(K))
    verdict = _judge(_RULES[rule])(jnp.asarray(numbers), draft, log_p)
    assert int(verdict.num_accepted) == K
    assert not bool(verdict.is_fallback)


@pytest.mark.parametrize("rule", _RULES)
@_SETTINGS
@given(
    best=hnp.arrays(np.int64, (K + 1,), elements=st.integers(0, V - 1)), q=laws((K,)),
    tokens=texts, numbers=uniforms, length=st.integers(0, K), is_one_hot=st.booleans(),
)  # fmt: skip
def test_rows_at_temperature_zero_accept_as_greedy(
    rule, best, q, tokens, numbers, length, is_one_hot
):
    """A target of point masses: the same verdict as `greedy`, whatever the numbers."""
    possible = np.array([q[i, token] > 0 for i, token in enumerate(tokens)])
    assume(is_one_hot or possible.all())  # a draft has positive probability under its own q
    log_p = jnp.asarray(_log(np.eye(V)[best]), jnp.float32)
    draft = _draft(tokens, None if is_one_hot else q, length)
    ours = _judge(_RULES[rule])(jnp.asarray(numbers), draft, log_p)
    greedy = verifiers.greedy()(None, draft, log_p)
    assert ours.tokens.tolist() == greedy.tokens.tolist()
    assert int(ours.num_accepted) == int(greedy.num_accepted)


@_SETTINGS
@given(p=laws((K + 1,)), tokens=texts, seed=st.integers(0, 2**31 - 1), length=st.integers(0, K))
def test_match_says_what_the_target_draws(p, tokens, seed, length):
    log_p = jnp.asarray(_log(p), jnp.float32)
    verdict, drawn = _match(jax.random.key(seed), _draft(tokens, None, length), log_p)
    count = int(verdict.num_accepted)
    assert verdict.tokens[: count + 1].tolist() == drawn[: count + 1].tolist()
    assert all(np.exp(log_p[i, token]) > 0 for i, token in enumerate(drawn.tolist()))
    assert tokens[:count].tolist() == drawn[:count].tolist()
    assert count == length or int(tokens[count]) != int(drawn[count])


@jax.jit
def _match(key, draft, log_p):
    keys = jax.random.split(key, K + 1)
    noise = jax.vmap(lambda k: drawing.gumbel_noise(k, V))(jax.random.clone(keys))
    return verifiers.match()(keys, draft, log_p), jax.vmap(drawing.race)(noise, log_p)


# ---------------------------------------------------------------------------------------------
# The sampling options against the oracle, which sorts and works in float64.

_logits = hnp.arrays(np.int64, (V,), elements=st.integers(-6, 6)).map(
    lambda whole: whole.astype(np.float32) / 2
)


@jax.jit
def _process(logits, options, tokens, length):
    history = sampling.recall(options, tokens, length, vocab_size=V)
    return sampling.process_rows(logits, options, history).log_probs


@_SETTINGS
@given(
    logits=_logits, masked=st.sets(st.integers(0, V - 1), max_size=V - 1),
    context=st.lists(st.integers(0, V - 1), max_size=4),
    temperature=st.sampled_from([0.0, 0.25, 0.7, 1.0, 3.0]), top_k=st.integers(0, V + 1),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]), penalty=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
)  # fmt: skip
def test_options_are_the_oracle_s(
    logits, masked, context, temperature, top_k, top_p, min_p, penalty
):
    """Ties, masked logits and every combination; not where rounding decides."""
    logits = logits.copy()
    logits[list(masked)] = -np.inf
    values = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": penalty,
    }  # fmt: skip
    numbers = {name: np.asarray(value, np.float32).item() for name, value in values.items()}
    numbers["top_k"] = top_k
    # At min_p = 1 ties with the likeliest stay, and only those: they must be exact.
    assume(min_p < 1 or temperature in (0.0, 0.25, 1.0))
    try:
        exact = next_token_law(logits, context, **numbers)
    except ValueError:  # rounding decides
        assume(False)
    options = sampling.resolve(
        sampling.Sampling(**{name: np.array([value]) for name, value in values.items()}), 1, V
    )
    tokens = np.zeros((1, 4), np.int32)
    tokens[0, : len(context)] = context
    law = _process(jnp.asarray(logits)[None], options, tokens, np.array([len(context)], np.int32))
    ours = np.exp(np.asarray(law[0], np.float64))
    np.testing.assert_allclose(ours, exact, atol=2e-6)
    assert ((ours > 0) == (exact > 0)).all()


@_SETTINGS
@given(weights=laws(), numbers=hnp.arrays(np.int64, (2,), elements=st.integers(0, 2**23 - 1)))
def test_a_draw_is_possible(weights, numbers):
    weights = weights.astype(np.float32)
    token = int(drawing.draw(jnp.asarray(numbers / 2**23, jnp.float32), jnp.asarray(weights)))
    assert weights[token] > 0
