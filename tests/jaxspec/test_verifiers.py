"""Greedy and rejection verification: hand-computed cases and a float64 reference."""

import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from support.mutants import mutant

from jaxspec import Draft, verifiers
from jaxspec.verifiers import ratio

shipped = importlib.import_module("jaxspec.verifiers.rejection")
JUDGE = jax.jit(shipped.rejection().judge)
RATIO = "jaxspec.verifiers.ratio"


def log(probs):
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(np.asarray(probs, np.float64)), jnp.float32)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def draft_of(tokens, probs=None, length=None):
    length = len(tokens) if length is None else length
    return Draft(
        jnp.asarray(tokens, jnp.int32), None if probs is None else log(probs), jnp.int32(length)
    )


def judged(numbers, draft, target):
    verdict = JUDGE(jnp.asarray(numbers, jnp.float32), draft, log(target))
    assert verdict.tokens.dtype == verdict.num_accepted.dtype == jnp.int32
    assert verdict.path is None
    return verdict.tokens.tolist(), int(verdict.num_accepted)


# ---------------------------------------------------------------------------------------------
# By hand, V = 2: numbers[i] = (test, block, draw); the test passes if 1 - u <= p / q.

Q = [[0.8, 0.2], [0.5, 0.5]]
P = [[0.4, 0.6], [0.5, 0.5], [0.3, 0.7]]  # ratio of token 0 at offset 0: 1/2


@pytest.mark.parametrize(
    ("tests", "draws", "tokens", "length", "expected"),
    [
        ([0.51, 0.0], [0, 0, 0.29], [0, 1], 2, ([0, 1, 0], 2)),  # whole: the bonus is 0 below .3
        ([0.51, 0.0], [0, 0, 0.31], [0, 1], 2, ([0, 1, 1], 2)),
        ([0.49, 0.9], [0.9, 0, 0], [0, 1], 2, ([1, -1, -1], 0)),  # residual: token 1 alone
        ([0.51, 0.0], [0, 0.49, 0], [0, 1], 1, ([0, 0, -1], 1)),  # short: its bonus is of row 1
        ([0.51, 0.9], [0, 0.51, 0], [0, 1], 1, ([0, 1, -1], 1)),
        ([0.99, 0.99], [0.39, 0, 0], [0, 1], 0, ([0, -1, -1], 0)),  # length 0: plain decoding
        ([0.99, 0.99], [0.41, 0, 0], [0, 1], 0, ([1, -1, -1], 0)),
        ([0.0, 0.0], [0, 0, 0.5], [1, 1], 2, ([1, 1, 1], 2)),  # p >= q: even the hardest test
    ],
)
def test_rejection_by_hand(tests, draws, tokens, length, expected):
    numbers = [[t, 0.5, d] for t, d in zip([*tests, 0.0], draws, strict=True)]
    assert judged(numbers, draft_of(tokens, Q, length), P) == expected


@pytest.mark.parametrize(
    ("number", "draw", "expected"),
    [
        (0.61, 0.1, ([0, 0, -1], 1)),  # accepted with p(0) = .4; bonus
        (0.59, 0.0, ([1, -1, -1], 0)),  # rejected: p without token 0
        (0.59, 0.99, ([1, -1, -1], 0)),
    ],
)
def test_one_hot_drafts(number, draw, expected):
    numbers = [[number, 0, draw], [0, 0, 0.1], [0, 0, 0]]
    assert judged(numbers, draft_of([0, 1], None, 1), P) == expected


def test_no_drafts_at_all():
    """K = 0, with and without log-probabilities."""
    for probs in (None, np.zeros((0, 3))):
        draft = draft_of([], probs)
        assert judged([[0.9, 0.0, 0.55]], draft, [[0.5, 0.25, 0.25]]) == ([1], 0)
        verdict = verifiers.rejection()(keys(1), draft, log([[0.0, 0.0, 1.0]]))
        assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == ([2], 0)
        verdict = verifiers.greedy()(keys(1), draft, log([[0.5, 0.25, 0.25]]))
        assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == ([0], 0)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-23])
def test_edges_of_the_test(number):
    """Whatever the uniform: p = q passes; p(x) = 0 or q(x) = 0 does not."""
    numbers = [[number, 0.5, 0.5]] * 2
    same = [[0.3, 0.7]]
    for token in (0, 1):
        assert judged(numbers, draft_of([token], same), [*same, [0, 1]]) == ([token, 1], 1)
    never = [[0.0, 1.0], [1.0, 0.0]]
    assert judged(numbers, draft_of([0], [[0.5, 0.5]]), never) == ([1, -1], 0)
    assert judged(numbers, draft_of([0], None), never) == ([1, -1], 0)
    # q(x) = 0 cannot be sampled; it is rejected though p / q is infinite.
    assert judged(numbers, draft_of([0], [[0.0, 1.0]]), [[1.0, 0.0]] * 2) == ([0, -1], 0)
    # 0 / 0
    assert judged(numbers, draft_of([0], [[0.0, 1.0]]), [[0.0, 1.0]] * 2) == ([1, -1], 0)


def test_tiny_probabilities_keep_their_ratio():
    """p and q far below float32's smallest normal number, in log space."""
    draft = Draft(jnp.array([0]), jnp.array([[-200.0, 0.0]]), jnp.int32(1))
    target = jnp.array([[-200.0 + np.log(0.5), 0.0]] * 2)
    for number, accepted in ((0.49, 0), (0.51, 1)):
        numbers = jnp.array([[number, 0.5, 0.5]] * 2)
        verdict = JUDGE(numbers, draft, target)
        assert int(verdict.num_accepted) == accepted


def test_residual_without_mass_is_the_target():
    """q a rounding above p everywhere: rejected at the hardest test, then drawn from p."""
    target = log([[0.25, 0.75]] * 2)
    draft = Draft(jnp.array([0]), target[:1] + 3e-7, jnp.int32(1))
    for draw, token in ((0.2, 0), (0.3, 1)):
        verdict = JUDGE(jnp.array([[0.0, 0.5, draw]] * 2, jnp.float32), draft, target)
        assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == ([token, -1], 0)


@pytest.mark.parametrize("which", [slice(None), 1, 0])
def test_nan_in_q(which):
    """A q that is no number at the draft rejects; the correction is of p then, not NaN."""
    q = np.full((1, 3), np.log(1 / 3), np.float32)
    q[0, which] = np.nan
    draft = Draft(jnp.array([1]), jnp.asarray(q), jnp.int32(1))
    for draw, token in ((0.2, 0), (0.4, 1), (0.8, 2)):
        # The target leaves the draft one half of q's mass: rejected at u = 0 in every case.
        verdict = JUDGE(
            jnp.array([[0.0, 0.5, draw]] * 2, jnp.float32), draft, log([[0.3, 0.3, 0.4]] * 2)
        )
        assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == ([token, -1], 0)


# ---------------------------------------------------------------------------------------------
# The rule as a loop in float64.


def reference(numbers, tokens, length, q, p):
    """Tokens, accepted, and how far every comparison is from a tie."""
    margin = 1.0
    num_accepted = 0
    for i in range(length):
        ratio = p[i][tokens[i]]
        if q is not None:
            ratio = ratio / q[i][tokens[i]] if q[i][tokens[i]] > 0 else 0.0
        margin = min(margin, abs(1 - numbers[i][0] - ratio))
        if 1 - numbers[i][0] > ratio:
            break
        num_accepted += 1
    law = p[num_accepted]
    if num_accepted < length:
        one_hot = np.eye(len(law))[tokens[num_accepted]]
        residual = np.maximum(law - q[num_accepted], 0) if q is not None else law * (1 - one_hot)
        law = residual if residual.sum() > 1e-9 else law
    cdf = np.cumsum(law / law.sum())
    margin = min(margin, np.min(np.abs(cdf[:-1] - numbers[num_accepted][2])))
    token = int(np.searchsorted(cdf, numbers[num_accepted][2], side="right"))
    filled = [*tokens[:num_accepted], token]
    return filled + [-1] * (len(tokens) + 1 - len(filled)), num_accepted, margin


def random_law(rng, size):
    weights = rng.random(size) ** 2
    weights[rng.random(size) < 0.25] = 0
    weights[rng.integers(size)] = 0.4
    return (weights / weights.sum()).astype(np.float32).astype(np.float64)


def check_rejection(module, *, vocab_size, num_draft, one_hot, rows=300, seed=0):
    rng = np.random.default_rng([seed, vocab_size, num_draft])
    cases = []
    while len(cases) < rows:
        p = [random_law(rng, vocab_size) for _ in range(num_draft + 1)]
        q = [random_law(rng, vocab_size) for _ in range(num_draft)]
        if rng.random() < 0.3:
            q = p[:num_draft]
        tokens = rng.integers(vocab_size, size=num_draft).tolist()
        length = int(rng.integers(0, num_draft + 1))
        numbers = rng.random((num_draft + 1, 3)) * [1, 1, 0.999] + [0, 0, 0.0005]
        out = reference(numbers, tokens, length, None if one_hot else q, p)
        if out[2] > 1e-5:
            cases.append((numbers, tokens, length, q, p, *out[:2]))
    numbers, tokens, length, q, p, want, accepted = (np.array(x) for x in zip(*cases, strict=True))
    draft = Draft(jnp.asarray(tokens), None if one_hot else log(q), jnp.asarray(length))
    verdict = jax.jit(jax.vmap(module.rejection().judge))(
        jnp.asarray(numbers, jnp.float32), draft, log(p)
    )
    np.testing.assert_array_equal(verdict.num_accepted, accepted)
    np.testing.assert_array_equal(verdict.tokens, want)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize(("vocab_size", "num_draft"), [(2, 1), (5, 4)])
def test_rejection_is_the_reference(vocab_size, num_draft, one_hot):
    check_rejection(shipped, vocab_size=vocab_size, num_draft=num_draft, one_hot=one_hot)


@pytest.mark.parametrize(
    ("within", "patch", "one_hot"),
    [
        # garbage slots accepted; drafts behind a rejection accepted
        (None, ("passes & (jnp.arange(passes.shape[0]) < draft.length)", "passes"), True),
        (None, ("jnp.cumprod(passes.astype(jnp.int32))", "passes.astype(jnp.int32)"), False),
        (RATIO, ("jnp.where(is_drafted, 0.0, target)", "target"), True),  # the same token again
        (RATIO, ("jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)", "target"), False),
        (RATIO, ("= num_accepted < draft.length", "= num_accepted < num_slots"), False),
        (RATIO, ("target_log_probs[slots, draft", "target_log_probs[slots + 1, draft"), False),
        (RATIO, ("(drafted > -jnp.inf) & ", ""), False),
        (RATIO, ("jnp.exp(target_log_probs[num_accepted])", "jnp.exp(target_log_probs[-1])"), True),
        (RATIO, ("slots < num_accepted, drafted", "slots < draft.length, drafted"), False),
        (RATIO, ("slots == num_accepted, token", "slots == draft.length, token"), False),
    ],
)
def test_planted_bugs_are_seen(within, patch, one_hot):
    with pytest.raises(AssertionError):
        check_rejection(
            mutant("jaxspec.verifiers.rejection", patch, within=within),
            vocab_size=5,
            num_draft=4,
            one_hot=one_hot,
        )


def acceptance_rate(module, p, q, draws):
    first, second = jax.random.split(jax.random.key(11))
    tokens = jax.random.categorical(first, log(q), shape=(draws, 1))
    draft = Draft(tokens, jnp.broadcast_to(log(q), (draws, 1, 4)), jnp.ones(draws, jnp.int32))
    all_keys = jax.random.split(second, (draws, 2))
    target = jnp.broadcast_to(log(p), (draws, 2, 4))
    judge = jax.jit(jax.vmap(module.rejection()))
    return float(jnp.mean(judge(all_keys, draft, target).num_accepted))


def test_acceptance_rate_is_one_minus_total_variation():
    """5 σ of a binomial share of 8 000: a correct program fails with probability 6e-7."""
    draws, p, q = 8_000, np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.4, 0.2, 0.3])
    rate = 1 - 0.5 * np.abs(p - q).sum()
    bound = 5 * np.sqrt(rate * (1 - rate) / draws)
    assert abs(acceptance_rate(shipped, p, q, draws) - rate) < bound
    lenient = mutant(
        "jaxspec.verifiers.rejection", ("log1p(-numbers[:-1, 0])", "log1p(-numbers[:-1, 0]) - 0.3")
    )
    assert abs(acceptance_rate(lenient, p, q, draws) - rate) > bound


# ---------------------------------------------------------------------------------------------
# Greedy.


@pytest.mark.parametrize(
    ("tokens", "length", "expected"),
    [
        ([1, 0, 1], 3, ([1, 0, 1, 0], 3)),
        ([1, 1, 1], 3, ([1, 0, -1, -1], 1)),
        ([0, 0, 1], 3, ([1, -1, -1, -1], 0)),
        ([1, 0, 1], 2, ([1, 0, 1, -1], 2)),  # the third is garbage that happens to be right
        ([1, 0, 1], 0, ([1, -1, -1, -1], 0)),
    ],
)
def test_greedy_by_hand(tokens, length, expected):
    target = log([[0.2, 0.8], [0.5, 0.5], [0.1, 0.9], [0.6, 0.4]])  # a tie goes to the lower id
    verdict = verifiers.greedy()(keys(4), draft_of(tokens, None, length), target)
    assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == expected
    # A sampled draft's q plays no part, and a point mass is the same to the ratio rule.
    verdict = verifiers.greedy()(keys(4), draft_of(tokens, [[0.5, 0.5]] * 3, length), target)
    assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == expected
    mass = log(np.eye(2)[[1, 0, 1, 0]])
    verdict = verifiers.rejection()(keys(4), draft_of(tokens, None, length), mass)
    assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == expected


# ---------------------------------------------------------------------------------------------
# Both, through the public call.


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(name=["greedy", "rejection"], one_hot=[False, True])
    def test_vmapped_is_looped(self, name, one_hot):
        rng = np.random.default_rng(4)
        rows, K, V = 5, 3, 5
        target = log([[random_law(rng, V) for _ in range(K + 1)] for _ in range(rows)])
        q = log([[random_law(rng, V) for _ in range(K)] for _ in range(rows)])
        tokens = jnp.argmax(target[:, :K] + 0.5 * jnp.asarray(rng.random((rows, K, V)), "f4"), -1)
        draft = Draft(tokens.astype(jnp.int32), None if one_hot else q, jnp.arange(rows) % (K + 1))
        verifier = getattr(verifiers, name)()

        def all_keys():
            return jax.random.split(jax.random.key(2), (rows, K + 1))

        batched = self.variant(jax.vmap(verifier))(all_keys(), draft, target)
        looped = [
            verifier(all_keys()[i], jax.tree.map(lambda x, i=i: x[i], draft), target[i])
            for i in range(rows)
        ]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *looped)
        chex.assert_trees_all_equal(batched, stacked)
        for row, accepted in zip(batched.tokens, batched.num_accepted, strict=True):
            assert np.all(np.asarray(row)[: int(accepted) + 1] >= 0)
            assert np.all(np.asarray(row)[int(accepted) + 1 :] == -1)
        assert np.all(batched.num_accepted <= draft.length)  # no correction counts as accepted


def test_each_offset_consumes_its_own_key():
    numbers = ratio.uniforms(keys(3))
    assert numbers.shape == (3, 3)
    assert len(np.unique(numbers)) == 9
    draft = draft_of([0, 1], Q)
    via_keys = verifiers.rejection()(keys(3), draft, log(P))
    chex.assert_trees_all_equal(via_keys, verifiers.rejection().judge(numbers, draft, log(P)))
