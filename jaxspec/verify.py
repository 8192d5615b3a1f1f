"""Speculative sampling by itself, from probabilities."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxspec.types import NO_TOKEN, Draft, Verdict
from jaxspec.verifiers.rejection import rejection

Array: TypeAlias = jax.Array


def verify(key: Array, draft_tokens: Array, draft_probs: Array, target_probs: Array) -> Verdict:
    """Accepts a prefix of drafted tokens and draws the token behind it.

    For loops of one's own. Pure and unbatched: `jax.vmap` it over rows. The emitted tokens have
    the target's distribution if each draft was drawn from its row of `draft_probs`, bit for bit,
    with randomness independent of `key`.

    Args:
      key: one PRNG key; it is consumed.
      draft_tokens: i32[K], K ≥ 1.
      draft_probs: float[K, V], the probabilities that each draft was drawn from.
      target_probs: float[K + 1, V], the target's at each draft and behind the last; or
        float[K, V]: then a draft accepted whole gets no bonus token.

    Returns:
      A `Verdict`: tokens i32[K + 1], the accepted drafts, then the correction or bonus, then -1;
      num_accepted i32[].

    Raises:
      ValueError: shapes do not fit.

    References:
      Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> q = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> p = jnp.array([[0.5, 0.5], [0.0, 1.0], [0.3, 0.7]])
      >>> verdict = verify(jax.random.key(0), jnp.array([1, 0]), q, p)
      >>> verdict.tokens.tolist(), int(verdict.num_accepted)
      ([1, 1, -1], 1)
    """
    shapes = (jnp.shape(draft_tokens), jnp.shape(draft_probs), jnp.shape(target_probs))
    num_draft = shapes[0][0] if shapes[0] else 0
    if (
        len(shapes[0]) != 1
        or num_draft < 1
        or len(shapes[1]) != 2
        or shapes[1][0] != num_draft
        or len(shapes[2]) != 2
        or shapes[2][0] not in (num_draft, num_draft + 1)
        or shapes[1][1] != shapes[2][1]
    ):
        raise ValueError(
            "verify needs draft_tokens [K], draft_probs [K, V] and target_probs [K + 1, V] or "
            f"[K, V], with K ≥ 1; got {shapes[0]}, {shapes[1]} and {shapes[2]}. "
            "jax.vmap it over a batch."
        )
    target = jnp.log(jnp.asarray(target_probs).astype(jnp.float32))
    has_bonus = target.shape[0] == num_draft + 1
    if not has_bonus:
        target = jnp.concatenate([target, target[-1:]])  # drawn from, then dropped
    draft = Draft(
        jnp.asarray(draft_tokens).astype(jnp.int32),
        jnp.log(jnp.asarray(draft_probs).astype(jnp.float32)),
        jnp.int32(num_draft),
    )
    verdict = rejection()(jax.random.split(key, num_draft + 1), draft, target)
    if not has_bonus:
        verdict = verdict._replace(tokens=verdict.tokens.at[num_draft].set(NO_TOKEN))
    return verdict
