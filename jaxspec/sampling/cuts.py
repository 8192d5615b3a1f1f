"""What keeps the likeliest tokens only, by threshold (unbatched).

Nothing here sorts the vocabulary. Every cut has a threshold on the bits of the floats, which is
found by search: the number of tokens above it, or their probability in whole units of 2⁻³¹, so
that sums are exact and do not depend on their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array: TypeAlias = jax.Array

_UNIT = 2.0**31
"""A probability of 1 in whole numbers; the rounded parts of 2³¹ tokens still fit uint32."""


def log_softmax(logits: Array) -> Array:
    """f32[V] -> f32[V]; -inf logits stay -inf."""
    shifted = logits - finite_max(logits)
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted)))


def finite_max(logits: Array) -> Array:
    """The largest of f32[V]; 0 where that is not finite."""
    top = jnp.max(logits)
    return jnp.where(jnp.isfinite(top), top, 0.0)


def _ordered_bits(x: Array) -> Array:
    """A monotone map from float32 to uint32: x < y iff bits(x) < bits(y); -0 equals +0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _in_units(probs: Array) -> Array:
    """Probabilities as whole numbers, uint32."""
    return jnp.round(probs * _UNIT).astype(jnp.uint32)


def _largest(condition: Callable[[Array], Array], low: Any, high: Any) -> Array:
    """The largest x in [low, high) with `condition`, monotone from true to false, uint32[].

    `low` where there is none.
    """

    def is_open(interval):
        low, high = interval
        return high - low > 1

    def halve(interval):
        low, high = interval
        middle = low + (high - low) // 2
        holds = condition(middle)
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    return lax.while_loop(is_open, halve, (low, high))[0]


_LOWEST, _HIGHEST = np.uint32(0), np.uint32(0xFFFFFFFF)


def _threshold(keys: Array, weights: Array, wanted: Array) -> Array:
    """The highest key that must stay for the `weights` of what stays to reach `wanted`.

    0, which keeps everything, where all weights together do not.

    Args:
      keys: uint32[V].
      weights: uint32[V]; their sum fits uint32.
      wanted: uint32[].
    """
    return _largest(
        lambda t: jnp.sum(jnp.where(keys >= t, weights, 0), dtype=jnp.uint32) >= wanted,
        _LOWEST,
        _HIGHEST,
    )


def keep_top_k(logits: Array, k: Array) -> Array:
    """-inf for all but the k largest of f32[V] and the ties of the k-th; k = 0 keeps all."""
    keys = _ordered_bits(logits)
    k = jnp.clip(k, 0, logits.shape[0]).astype(jnp.uint32)
    threshold = _threshold(keys, jnp.ones_like(keys), k)
    return jnp.where((keys >= threshold) | (k == 0), logits, -jnp.inf)


def keep_top_p(logits: Array, p: Array) -> Array:
    """-inf for all but the nucleus of f32[V] (arXiv 1904.09751).

    A token stays if the probability ahead of it, of likelier tokens and of equal ones with a
    higher id, is below p: so the token that crosses p stays, and at least one does.
    """
    keys = _ordered_bits(logits)
    probs = _in_units(jnp.exp(log_softmax(logits)))
    wanted = jnp.maximum(_in_units(p), 1)  # never 0: the likeliest token stays
    threshold = _threshold(keys, probs, wanted)
    ahead = jnp.sum(jnp.where(keys > threshold, probs, 0), dtype=jnp.uint32)
    is_tie = keys == threshold
    ids = jnp.arange(logits.shape[0], dtype=jnp.uint32)

    # Of the ties, those from the lowest id on that still has less than p ahead of it.
    def leaves_out(i: Array) -> Array:
        ties = jnp.sum(jnp.where(is_tie & (ids > i), probs, 0), dtype=jnp.uint32)
        return ahead + ties >= wanted

    has_surplus = (jnp.sum(is_tie) > 1) & leaves_out(jnp.uint32(0))
    high = jnp.where(has_surplus, np.uint32(logits.shape[0]), np.uint32(1))
    last_left_out = _largest(leaves_out, np.uint32(0), high)
    stays = ~has_surplus | (ids > last_left_out)
    keep = (keys > threshold) | (is_tie & stays)
    return jnp.where(keep | (p >= 1), logits, -jnp.inf)


def keep_min_p(logits: Array, p: Array) -> Array:
    """-inf for the tokens of f32[V] less than p times as likely as the likeliest."""
    return jnp.where(logits >= jnp.max(logits) + jnp.log(p), logits, -jnp.inf)


def keep_typical(logits: Array, p: Array) -> Array:
    """-inf for all but the typical tokens of f32[V] (arXiv 2202.00666).

    Those whose surprise is closest to the law's entropy, until their probability reaches p, and
    all ties of the last one.
    """
    log_probs = log_softmax(logits)
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0))
    keys = _ordered_bits(-jnp.abs(-log_probs - entropy))
    threshold = _threshold(keys, _in_units(probs), jnp.maximum(_in_units(p), 1))
    return jnp.where((keys >= threshold) | (p >= 1), logits, -jnp.inf)
