"""Losses and their gradients, against formulas in float64 and finite differences of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxspec.training import losses

V = 9


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def accepted(q, p):
    return np.minimum(q, p).sum()


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


FORMULAS = {
    "cross_entropy": lambda q, p: -sum(a * np.log(b) for a, b in zip(p, q, strict=True) if a > 0),
    "forward_kl": lambda q, p: kl(p, q),
    "reverse_kl": lambda q, p: kl(q, p),
    "acceptance": accepted,
    "total_variation": lambda q, p: 1 - accepted(q, p),
    "lk_alpha": lambda q, p: -np.log(accepted(q, p)),
    "lk_lambda": None,  # its weight is a constant to the gradient
}


def lk_lambda(weight):
    return lambda q, p: weight * kl(p, q) + (1 - weight) * (1 - accepted(q, p))


def pair(seed, missing=0):
    """Logits of q, and p; of p so many tokens are left out, as by a reduced vocabulary."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=V) * 1.5
    p = softmax(rng.normal(size=V + missing) * 1.5)[:V]
    return logits, p


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("missing", [0, 4])
@pytest.mark.parametrize("seed", range(5))
def test_values_and_gradients(name, missing, seed):
    logits, p = pair(seed, missing)
    log_p = jnp.asarray(np.log(p), jnp.float32)
    formula = FORMULAS[name] or lk_lambda(np.exp(-3.0 * accepted(softmax(logits), p)))

    def loss(x):
        return getattr(losses, name)(jax.nn.log_softmax(x), log_p)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(value, formula(softmax(logits), p), rtol=2e-5, atol=2e-6)
    step = 1e-6
    expected = [
        (formula(softmax(logits + d), p) - formula(softmax(logits - d), p)) / (2 * step)
        for d in step * np.eye(V)
    ]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("name", FORMULAS)
def test_no_gradient_flows_into_the_target(name):
    logits, p = pair(0)
    log_q = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    log_p = jnp.asarray(np.log(p), jnp.float32)
    gradient = jax.grad(getattr(losses, name), argnums=1)(log_q, log_p)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", [n for n in FORMULAS if n != "acceptance"])
def test_equal_laws_lose_nothing_and_are_left_alone(name):
    logits, _ = pair(1)
    x = jnp.asarray(logits, jnp.float32)
    log_p = jax.nn.log_softmax(x)
    value, gradient = jax.value_and_grad(
        lambda x: getattr(losses, name)(jax.nn.log_softmax(x), log_p)
    )(x)
    entropy = -float(jnp.sum(jnp.exp(log_p) * log_p))
    np.testing.assert_allclose(value, entropy if name == "cross_entropy" else 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_tokens_that_the_target_excludes(name):
    """A greedy target is a point mass: values and gradients stay finite where they exist."""
    logits, _ = pair(2)
    log_p = jnp.where(jnp.arange(V) == 3, 0.0, -jnp.inf)
    value, gradient = jax.value_and_grad(
        lambda x: getattr(losses, name)(jax.nn.log_softmax(x), log_p)
    )(jnp.asarray(logits, jnp.float32))
    q = softmax(logits)[3]
    expected = {
        "cross_entropy": -np.log(q),
        "forward_kl": -np.log(q),
        "reverse_kl": np.inf,
        "acceptance": q,
        "total_variation": 1 - q,
        "lk_alpha": -np.log(q),
        "lk_lambda": np.exp(-3 * q) * -np.log(q) + (1 - np.exp(-3 * q)) * (1 - q),
    }[name]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    if name != "reverse_kl":
        assert np.all(np.isfinite(gradient))
        assert name == "acceptance" or gradient[3] < 0


@pytest.mark.parametrize("name", ["cross_entropy", "forward_kl", "total_variation", "lk_lambda"])
def test_tokens_that_the_drafter_excludes(name):
    """q = 0 where p = 0: nothing is lost, and nothing is not a number."""
    logits, _ = pair(3)
    banned = jnp.arange(V) < 2
    x = jnp.asarray(logits, jnp.float32)
    log_p = jax.nn.log_softmax(jnp.where(banned, -jnp.inf, x))
    value, gradient = jax.value_and_grad(
        lambda x: getattr(losses, name)(jax.nn.log_softmax(jnp.where(banned, -jnp.inf, x)), log_p)
    )(x)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_what_nobody_accepts():
    """Laws without a common token: the losses stay finite, and their gradients."""
    log_q = jnp.array([0.0, -200.0])
    log_p = jnp.array([-jnp.inf, 0.0])
    assert float(losses.acceptance(log_q, log_p)) == 0
    assert float(losses.total_variation(log_q, log_p)) == 1
    np.testing.assert_allclose(losses.lk_alpha(log_q, log_p), 69.08, atol=0.01)
    np.testing.assert_allclose(losses.lk_lambda(log_q, log_p), 200.0)
    for name in ("total_variation", "lk_alpha", "lk_lambda"):
        gradient = jax.grad(lambda x, n=name: getattr(losses, n)(jax.nn.log_softmax(x), log_p))(
            log_q
        )
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("accept", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("logit", [-40.0, -0.5, 0.0, 2.0, 40.0])
def test_confidence(accept, logit):
    def loss(logit, accept):
        return losses.confidence(logit, accept)

    at = jnp.float32(logit), jnp.float32(accept)
    sigmoid = 1 / (1 + np.exp(-logit))
    softplus = np.logaddexp(0, -logit)  # -log of it
    expected = accept * softplus + (1 - accept) * (softplus + logit)
    np.testing.assert_allclose(loss(*at), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(*at), sigmoid - accept, rtol=1e-4, atol=1e-6)
    assert float(jax.grad(loss, argnums=1)(*at)) == 0


def test_second_order_of_smooth_losses():
    """JAX's own check, forwards and backwards."""
    logits, p = pair(4)
    log_p = jnp.asarray(np.log(p), jnp.float32)
    for name in ("cross_entropy", "forward_kl", "reverse_kl"):
        check_grads(
            lambda x, n=name: getattr(losses, n)(jax.nn.log_softmax(x), log_p),
            (jnp.asarray(logits, jnp.float32),),
            order=2,
            atol=2e-2,
            rtol=2e-2,
        )
