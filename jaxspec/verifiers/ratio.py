"""What the rules that weigh p against q share: unbatched pure functions, no rule of its own."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import drawing
from jaxspec.types import NO_TOKEN, Draft, Verdict

Array: TypeAlias = jax.Array


def uniforms(keys: Array) -> Array:
    """The numbers that the offsets consume, f32[K + 1, 3] in [0, 1).

    Of each offset i, number [i, 0] decides about draft i, and [i, 1:] draw the token that follows
    i accepted drafts (`jaxspec.drawing.draw`).
    """
    return jax.vmap(lambda key: jax.random.uniform(key, (3,), jnp.float32))(keys)


def log_ratios(draft: Draft, target_log_probs: Array) -> Array:
    """Log p(x) / q(x) of each draft, f32[K].

    -inf, which never passes a test, for a draft that p gives no chance, that its own q cannot
    draw (also 0 / 0), whose p or q is not a number, or that is no token of the vocabulary. Slots
    beyond the draft's length hold garbage.
    """
    slots = jnp.arange(draft.tokens.shape[0])
    target = target_log_probs[slots, draft.tokens]
    drafted = jnp.zeros_like(target)
    if draft.log_probs is not None:
        drafted = draft.log_probs[slots, draft.tokens]
    ratios = target - drafted
    can_pass = (drafted > -jnp.inf) & (target > -jnp.inf) & ~jnp.isnan(ratios)
    # Indexing beyond the vocabulary clamps, or wraps around.
    can_pass &= (draft.tokens >= 0) & (draft.tokens < target_log_probs.shape[1])
    return jnp.where(can_pass, ratios, -jnp.inf)


def residual(draft: Draft, target_log_probs: Array, slot: Array, log_weight: Array) -> Array:
    """max(w · p - q, 0) at a drafted slot, f32[V]; without its own draft where q is one-hot.

    Args:
      draft: the row's draft.
      target_log_probs: f32[K + 1, V].
      slot: i32[], below K.
      log_weight: f32[], log w; of lossless rules ≤ 0.
    """
    target = jnp.exp(log_weight + target_log_probs[slot])
    if draft.log_probs is None:
        is_drafted = jnp.arange(target.shape[0]) == draft.tokens[slot]
        return jnp.where(is_drafted, 0.0, target)
    return jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)


def conclude(
    numbers: Array,
    draft: Draft,
    target_log_probs: Array,
    num_accepted: Array,
    log_weight: Array | float = 0.0,
) -> Verdict:
    """The accepted drafts and the token behind them.

    Behind a whole draft that token is a bonus, drawn from the target; else a correction, drawn
    from the residual. Where the residual has no mass up to rounding, or q is not a number, it is
    drawn from the target, and `Verdict.is_fallback` says so.

    Args:
      numbers: f32[K + 1, 3], see `uniforms`.
      draft: the row's draft.
      target_log_probs: f32[K + 1, V].
      num_accepted: i32[], drafts accepted.
      log_weight: f32[], the residual is max(w · p - q, 0); of lossless rules ≤ 0.
    """
    weights = jnp.exp(target_log_probs[num_accepted])
    is_fallback = jnp.zeros((), bool)
    num_slots = draft.tokens.shape[0]
    if num_slots > 0:
        is_rejected = num_accepted < draft.length
        slot = jnp.minimum(num_accepted, num_slots - 1)
        left = residual(draft, target_log_probs, slot, jnp.asarray(log_weight, jnp.float32))
        has_mass = jnp.sum(left) > 0  # a NaN compares false
        weights = jnp.where(is_rejected & has_mass, left, weights)
        is_fallback = is_rejected & ~has_mass
    token = drawing.draw(numbers[num_accepted, 1:], weights)
    slots = jnp.arange(target_log_probs.shape[0])
    drafted = jnp.concatenate([draft.tokens, jnp.full((1,), NO_TOKEN, jnp.int32)])
    tokens = jnp.where(slots < num_accepted, drafted, NO_TOKEN)
    tokens = jnp.where(slots == num_accepted, token, tokens)
    return Verdict(tokens, num_accepted, is_fallback=is_fallback)
