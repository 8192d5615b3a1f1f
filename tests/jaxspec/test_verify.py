"""`jaxspec.verify`: speculative sampling by itself, from probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec

Q = [[0.8, 0.2], [0.5, 0.5]]


def test_with_the_extra_row():
    same = jnp.array([*Q, [0.0, 1.0]])
    verdict = jaxspec.verify(jax.random.key(0), jnp.array([0, 1]), jnp.array(Q), same)
    assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == ([0, 1, 1], 2)


def test_without_the_extra_row_there_is_no_bonus():
    verdict = jaxspec.verify(jax.random.key(0), jnp.array([0, 1]), jnp.array(Q), jnp.array(Q))
    assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == ([0, 1, -1], 2)
    # A correction at the last draft is still drawn.
    never = jnp.array([Q[0], [1.0, 0.0]])
    q = jnp.array([Q[0], [0.0, 1.0]])
    verdict = jaxspec.verify(jax.random.key(0), jnp.array([0, 1]), q, never)
    assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == ([0, 0, -1], 1)
    # One draft, rejected or not.
    for target, expected in (([[1.0, 0.0]], [0, -1]), ([[0.0, 1.0]], [1, -1])):
        q = jnp.array([[0.0, 1.0]])
        verdict = jaxspec.verify(jax.random.key(0), jnp.array([1]), q, jnp.array(target))
        assert verdict.tokens.tolist() == expected


def test_the_law_of_the_first_token():
    """5 σ of a binomial share of 8 000, for six shares: chance fails it with 3.5e-6."""
    draws, q, p = 8_000, np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.0, 0.8])
    first, second = jax.random.split(jax.random.key(3))
    tokens = jax.random.categorical(first, jnp.log(jnp.asarray(q, jnp.float32)), shape=(draws, 1))
    verify = jax.jit(jax.vmap(jaxspec.verify, in_axes=(0, 0, None, None)))
    for target in ([p, [0.1, 0.1, 0.8]], [p]):
        out = verify(
            jax.random.split(jax.random.clone(second), draws),
            tokens,
            jnp.asarray([q], jnp.float32),
            jnp.asarray(target, jnp.float32),
        )
        shares = np.bincount(np.asarray(out.tokens[:, 0]), minlength=3) / draws
        assert np.all(np.abs(shares - p) <= 5 * np.sqrt(p * (1 - p) / draws))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype):
    verdict = jaxspec.verify(
        jax.random.key(0), np.array([0], np.int64), jnp.ones((1, 1), dtype), np.ones((2, 1))
    )
    assert (verdict.tokens.tolist(), int(verdict.num_accepted)) == ([0, 0], 1)
    assert verdict.tokens.dtype == jnp.int32


@pytest.mark.parametrize(
    ("tokens", "q", "p"),
    [
        ((), (1, 3), (2, 3)),
        ((0,), (0, 3), (1, 3)),
        ((2, 1), (2, 3), (3, 3)),
        ((2,), (1, 3), (3, 3)),
        ((2,), (3, 3), (3, 3)),
        ((2,), (2, 3), (4, 3)),
        ((2,), (2, 3), (1, 3)),
        ((2,), (2, 3), (3, 4)),
        ((2,), (2,), (3, 3)),
        ((2,), (2, 3), (3,)),
        ((2,), (1, 2, 3), (3, 3)),
    ],
)
def test_shapes_that_do_not_fit(tokens, q, p):
    with pytest.raises(ValueError, match=r"verify needs draft_tokens \[K\]"):
        jaxspec.verify(
            jax.random.key(0), jnp.zeros(tokens, jnp.int32), jnp.ones(q) / 3, jnp.ones(p) / 3
        )
