"""Speculative sampling: accept with min(1, p/q), else draw from the residual."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree, sampling
from jaxspec.types import NO_TOKEN, Draft, Verdict

Array: TypeAlias = jax.Array


@pytree.dataclass
class Rejection:
    """See `rejection`."""

    guarantee: ClassVar[str] = "distribution"
    needs_greedy_sampling: ClassVar[bool] = False

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        return verify_with_uniforms(uniforms(keys), draft, target_log_probs)


def uniforms(keys: Array) -> Array:
    """The numbers one offset consumes, f32[K + 1, 3] in [0, 1): the test, then two to draw."""
    return jax.vmap(lambda key: jax.random.uniform(key, (3,), jnp.float32))(keys)


def verify_with_uniforms(numbers: Array, draft: Draft, target_log_probs: Array) -> Verdict:
    """The rule as a function of its randomness.

    Args:
      numbers: f32[K + 1, 3] in [0, 1): [i, 0] tests draft i, [i, 1:] draw the token at offset i.
      draft: the row's draft.
      target_log_probs: f32[K + 1, V].

    Returns:
      The `Verdict`.
    """
    accept = acceptance(numbers[:-1, 0], draft, target_log_probs)
    num_accepted = jnp.sum(jnp.cumprod(accept.astype(jnp.int32)), dtype=jnp.int32)
    weights = correction_weights(num_accepted, draft, target_log_probs)
    token = sampling.draw(numbers[num_accepted, 1:], weights)
    slots = jnp.arange(target_log_probs.shape[0])
    drafted = jnp.concatenate([draft.tokens, jnp.full((1,), NO_TOKEN, jnp.int32)])
    tokens = jnp.where(slots < num_accepted, drafted, NO_TOKEN)
    return Verdict(jnp.where(slots == num_accepted, token, tokens), num_accepted)


def acceptance(numbers: Array, draft: Draft, target_log_probs: Array) -> Array:
    """Whether each draft passes its own test, bool[K], regardless of those before it.

    Args:
      numbers: f32[K] in [0, 1).
      draft: the row's draft.
      target_log_probs: f32[K + 1, V].
    """
    slots = jnp.arange(draft.tokens.shape[0])
    target = target_log_probs[slots, draft.tokens]
    # 1 - number lies in (0, 1], so that a ratio of 1 always passes and one of 0 never does.
    thresholds = jnp.log1p(-numbers)
    if draft.log_probs is None:
        passes = thresholds <= target
    else:
        drafted = draft.log_probs[slots, draft.tokens]
        # A token that q cannot draw is rejected; a NaN compares false.
        passes = (thresholds <= target - drafted) & (drafted > -jnp.inf)
    return passes & (slots < draft.length)


def correction_weights(num_accepted: Array, draft: Draft, target_log_probs: Array) -> Array:
    """Unnormalised law of the token behind `num_accepted` drafts, f32[V].

    The target itself behind a whole draft (the bonus), else the residual max(p - q, 0); where
    that has no mass up to rounding, or q is not a number, the target.
    """
    num_slots = draft.tokens.shape[0]
    target = jnp.exp(target_log_probs[num_accepted])
    if num_slots == 0:
        return target
    slot = jnp.minimum(num_accepted, num_slots - 1)
    if draft.log_probs is None:
        is_drafted = jnp.arange(target.shape[0]) == draft.tokens[slot]
        residual = jnp.where(is_drafted, 0.0, target)
    else:
        residual = jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)
    has_residual = (num_accepted < draft.length) & (jnp.sum(residual) > 0)
    return jnp.where(has_residual, residual, target)


def rejection() -> Rejection:
    """The rule of speculative sampling, exact for any draft distribution.

    Draft x_i ~ q_i is accepted with probability min(1, p_i(x_i) / q_i(x_i)). At the first
    rejection the correction y ∝ max(p_i - q_i, 0) is drawn; behind a whole draft, a bonus from p.
    A deterministic draft (`log_probs` None) has a one-hot q: accepted with p_i(x_i), else y ∝ p_i
    without x_i. Rows at temperature 0 are point masses and follow the same rule.

    Returns:
      A verifier: keys key[K + 1], draft, target_log_probs f32[K + 1, V] -> `Verdict`.

    References:
      Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> p = jnp.log(jnp.array([[.5, .5, 0.], [.2, .2, .6]]))
      >>> draft = Draft(jnp.array([2]), None, jnp.int32(1))  # p gives token 2 no chance
      >>> verdict = rejection()(jax.random.split(jax.random.key(0), 2), draft, p)
      >>> int(verdict.num_accepted), bool(verdict.tokens[0] < 2), int(verdict.tokens[1])
      (0, True, -1)
    """
    return Rejection()
