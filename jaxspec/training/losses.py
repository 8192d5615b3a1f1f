"""How far a draft law q is from the target's law p: unbatched pure functions of log-probabilities.

A drafter with a reduced vocabulary has no q for the other tokens: q = 0 there. All functions take
log p over the drafter's tokens only, so that p may sum to less than one: what is missing is p of
the tokens that q cannot draw. -inf stands for a probability of 0, in p as in q. What is sampled is
q; p is a constant: no gradient flows into it.

The probability that a draft is accepted is Σ min(p, q) = 1 - TV(p, q) (arXiv 2211.17192); it is
what a drafter is for. Where q is far from p its gradient vanishes: a cross-entropy has to stand
beside it, at first at least.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Array: TypeAlias = jax.Array

_TINY = 1e-30


def cross_entropy(log_q: Array, log_p: Array) -> Array:
    """-Σ p log q, of soft labels p: f32[].

    Least at q ∝ p. For hard labels, the log-probabilities of a point mass.

    Args:
      log_q: f32[V], the draft law.
      log_p: f32[V], the target's law of the same tokens.

    Returns:
      Nats; infinite where p has a token that q excludes.

    Example:
      >>> import jax.numpy as jnp
      >>> half = jnp.log(jnp.array([0.5, 0.5]))
      >>> round(float(cross_entropy(half, half)), 4)
      0.6931
    """
    log_p = lax.stop_gradient(log_p)
    return -jnp.sum(_weighted(jnp.exp(log_p), log_q))


def forward_kl(log_q: Array, log_p: Array) -> Array:
    """KL(p ‖ q) = Σ p log(p / q), which covers all of p: f32[].

    The gradient is that of `cross_entropy`; at q = p it is 0. Where p sums to s < 1, its least
    value is s log s, at q ∝ p.

    Args:
      log_q: f32[V], the draft law.
      log_p: f32[V], the target's law of the same tokens.

    Returns:
      Nats.

    Example:
      >>> import jax.numpy as jnp
      >>> half = jnp.log(jnp.array([0.5, 0.5]))
      >>> float(forward_kl(half, half))
      0.0
    """
    log_p = lax.stop_gradient(log_p)
    return cross_entropy(log_q, log_p) + jnp.sum(_weighted(jnp.exp(log_p), log_p))


def reverse_kl(log_q: Array, log_p: Array) -> Array:
    """KL(q ‖ p) = Σ q log(q / p), which seeks p's modes: f32[].

    Args:
      log_q: f32[V], the draft law.
      log_p: f32[V], the target's law of the same tokens.

    Returns:
      Nats; infinite where q has a token that p excludes (a target under top-k: use another).

    Example:
      >>> import jax.numpy as jnp
      >>> half = jnp.log(jnp.array([0.5, 0.5]))
      >>> float(reverse_kl(half, half))
      0.0
    """
    q = jnp.exp(log_q)
    return jnp.sum(_weighted(q, log_q) - _weighted(q, lax.stop_gradient(log_p)))


def acceptance(log_q: Array, log_p: Array) -> Array:
    """Σ min(p, q), the probability that a draft is accepted: f32[] (arXiv 2211.17192).

    Args:
      log_q: f32[V], the draft law.
      log_p: f32[V], the target's law of the same tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> log_q, log_p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
      >>> round(float(acceptance(log_q, log_p)), 4)
      0.7
    """
    return jnp.sum(jnp.minimum(jnp.exp(log_q), jnp.exp(lax.stop_gradient(log_p))))


def total_variation(log_q: Array, log_p: Array) -> Array:
    """TV(p, q) = 1 - Σ min(p, q), half the L1 distance: f32[].

    Args:
      log_q: f32[V], the draft law.
      log_p: f32[V], the target's law of the same tokens.

    Returns:
      A number in [0, 1]. Alone, from scratch, it does not train: begin with `cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> log_q, log_p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
      >>> round(float(total_variation(log_q, log_p)), 4)
      0.3
    """
    return 1.0 - acceptance(log_q, log_p)


def lk_alpha(log_q: Array, log_p: Array) -> Array:
    """-log Σ min(p, q), the log-likelihood of being accepted: f32[].

    The gradient of `total_variation` over the acceptance: largest where it is low.

    Args:
      log_q: f32[V], the draft law.
      log_p: f32[V], the target's law of the same tokens.

    Returns:
      Nats; at most about 69, where nothing would be accepted.

    Example:
      >>> import jax.numpy as jnp
      >>> log_q, log_p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
      >>> round(float(lk_alpha(log_q, log_p)), 4)
      0.3567
    """
    return -jnp.log(acceptance(log_q, log_p) + _TINY)


def lk_lambda(log_q: Array, log_p: Array, *, eta: float = 3.0) -> Array:
    """Weighed: w KL(p ‖ q) + (1 - w) TV(p, q) with w = exp(-eta · acceptance), a constant: f32[].

    From the divergence, where little is accepted, over to the acceptance itself.

    Args:
      log_q: f32[V], the draft law.
      log_p: f32[V], the target's law of the same tokens.
      eta: how fast.

    Example:
      >>> import jax.numpy as jnp
      >>> half = jnp.log(jnp.array([0.5, 0.5]))
      >>> round(float(lk_lambda(half, half)), 6)
      0.0
    """
    accepted = acceptance(log_q, log_p)
    weight = jnp.exp(-eta * lax.stop_gradient(accepted))
    return weight * forward_kl(log_q, log_p) + (1 - weight) * (1 - accepted)


def confidence(logit: Array, accepted: Array) -> Array:
    """Cross-entropy of a predicted acceptance, sigmoid(logit), with the true one: f32[].

    The label is soft, Σ min(p, q) = 1 - TV itself and not a draw of it, and a constant: the draft
    law is not bent towards what can be predicted.

    Args:
      logit: f32[].
      accepted: f32[] in [0, 1], from `acceptance`.

    Returns:
      Nats; least where sigmoid(logit) = accepted.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(confidence(jnp.float32(0.0), jnp.float32(0.3))), 4)
      0.6931
    """
    accepted = lax.stop_gradient(accepted)
    return -accepted * jax.nn.log_sigmoid(logit) - (1 - accepted) * jax.nn.log_sigmoid(-logit)


def _weighted(weights: Array, values: Array) -> Array:
    """`weights * values`, with 0 · -inf = 0 also in the gradient."""
    has_weight = weights > 0
    return jnp.where(has_weight, weights * jnp.where(has_weight, values, 0.0), 0.0)
