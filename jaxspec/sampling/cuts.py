"""What keeps the likeliest tokens only, by threshold (unbatched).

Nothing here sorts the vocabulary. Every cut has a threshold on the bits of the floats, which is
found by search: the number of tokens above it, or their probability in whole units of 2⁻³¹, so
that sums are exact and do not depend on their order. A search looks at the vocabulary a few times
only, with several thresholds at a time, and ends once no two tokens are left between its bounds.
The exponentials are computed once, however many cuts there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array: TypeAlias = jax.Array

_UNIT = 2.0**31
"""A probability of 1 in whole numbers; the rounded parts of 2³¹ tokens still fit uint32."""


class Weighed(NamedTuple):
    """Logits with what they weigh; -inf and 0 for what is cut off.

    Attributes:
      logits: f32[V].
      weights: f32[V], exp(logits - top).
      top: f32[], the largest logit before any cut; 0 where that is not finite.
    """

    logits: Array
    weights: Array
    top: Array

    def where(self, keep: Array) -> Weighed:
        """Cuts off what `keep` bool[V] does not hold."""
        logits = jnp.where(keep, self.logits, -jnp.inf)
        return Weighed(logits, jnp.where(keep, self.weights, 0.0), self.top)

    def log_probs(self) -> Array:
        """The law, f32[V]."""
        return (self.logits - self.top) - jnp.log(jnp.sum(self.weights))


def weigh(logits: Array) -> Weighed:
    """`Weighed` of f32[V]."""
    top = finite_max(logits)
    return Weighed(logits, jnp.exp(logits - top), top)


def log_softmax(logits: Array) -> Array:
    """f32[V] -> f32[V]; -inf logits stay -inf."""
    return weigh(logits).log_probs()


def log_prob(logits: Array, token: Array) -> Array:
    """One element of `log_softmax`, f32[], without forming the others."""
    weighed = weigh(logits)
    return weighed._replace(logits=logits[token]).log_probs()


def finite_max(logits: Array) -> Array:
    """The largest of f32[V]; 0 where that is not finite."""
    top = jnp.max(logits)
    return jnp.where(jnp.isfinite(top), top, 0.0)


def _ordered_bits(x: Array) -> Array:
    """A monotone map from float32 to uint32: x < y iff bits(x) < bits(y); -0 equals +0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _from_ordered_bits(bits: Array) -> Array:
    """The inverse of `_ordered_bits`."""
    sign = jnp.uint32(1 << 31)
    return lax.bitcast_convert_type(jnp.where(bits >= sign, bits ^ sign, ~bits), jnp.float32)


def _in_units(probs: Array) -> Array:
    """Probabilities as whole numbers, uint32."""
    return jnp.round(probs * _UNIT).astype(jnp.uint32)


class _Interval(NamedTuple):
    """Where a threshold lies: keys at or above `low` weigh enough, those at or above `high` less.

    Attributes:
      low: uint32[].
      high: uint32[].
      from_low: uint32[], the weight of all keys at or above `low`; the largest number: unknown.
      from_high: uint32[], at or above `high`.
    """

    low: Array
    high: Array
    from_low: Array
    from_high: Array

    @property
    def inside(self) -> Array:
        """What the keys between the bounds weigh."""
        return self.from_low - self.from_high


_LOWEST, _HIGHEST = np.uint32(0), np.uint32(0xFFFFFFFF)
_PARTS = 4  # of an interval; one pass over the vocabulary weighs what is above all borders
_FIRST_BORDERS = (2.0, 6.0, 14.0)  # below the highest value, where laws mostly have their cuts
_MAX_NEAR = 64.0
_NUM_NEAR = 16


def _search(
    values: Array,
    weights: Array,
    wanted: Array,
    is_on: Any,
    least: Callable[[Array], Array],
) -> tuple[Array, _Interval]:
    """Finds the highest threshold such that `weights` of what is at or above reach `wanted`.

    Args:
      values: f32[V].
      weights: uint32[V]; their sum fits uint32.
      wanted: uint32[], at least 1.
      is_on: bool[]; false: nothing is looked for, and everything stays.
      least: from a value f32[] to a lower bound, uint32[], on what any two tokens at or above it
        weigh: the search ends when less than that lies between its bounds.

    Returns:
      The keys of the values, uint32[V], and an `_Interval` which holds one value, that of the
      last token that stays, or several equal ones. Where all weights together do not reach
      `wanted`, it begins at 0.
    """
    keys = _ordered_bits(values)
    top = jnp.max(values)

    def narrowed(interval: _Interval, borders: list[Array]) -> _Interval:
        masked = tuple(jnp.where(keys >= border, weights, np.uint32(0)) for border in borders)
        zeros = (np.uint32(0),) * len(borders)
        sums = lax.reduce(
            masked, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (0,)
        )
        low, high, from_low, from_high = interval
        for border, total in zip(borders, sums, strict=True):
            is_inside = (border > low) & (border < high)
            raises, lowers = is_inside & (total >= wanted), is_inside & (total < wanted)
            low, from_low = jnp.where(raises, border, low), jnp.where(raises, total, from_low)
            high, from_high = jnp.where(lowers, border, high), jnp.where(lowers, total, from_high)
        return _Interval(low, high, from_low, from_high)

    def is_open(carry: tuple[Array, _Interval]) -> Array:
        _, interval = carry
        low, high = interval.low, interval.high
        bound = least(jnp.where(low == _LOWEST, -jnp.inf, _from_ordered_bits(low)))
        return (high - low > 1) & (interval.inside >= bound)

    def step(carry: tuple[Array, _Interval]) -> tuple[Array, _Interval]:
        count, interval = carry
        low, high = interval.low, interval.high
        # Equal parts of the values close in fast, of the keys in any case.
        bottom = _from_ordered_bits(low)
        width = _from_ordered_bits(high) - bottom
        is_near = (low > _LOWEST) & (width <= _MAX_NEAR) & (count < _NUM_NEAR)
        borders = []
        for part in range(1, _PARTS):
            near = _ordered_bits(bottom + width * (part / _PARTS))
            far = low + (high - low) // _PARTS * part
            border = jnp.where(is_near, near, far.astype(jnp.uint32))
            borders.append(jnp.clip(border, low + 1, high - 1))
        return count + 1, narrowed(interval, borders)

    whole = _Interval(
        jnp.uint32(_LOWEST),
        jnp.where(is_on, _ordered_bits(top), _LOWEST) + np.uint32(1),
        jnp.uint32(_HIGHEST),
        jnp.uint32(0),
    )
    first = narrowed(whole, [_ordered_bits(top - below) for below in _FIRST_BORDERS])
    return keys, lax.while_loop(is_open, step, (jnp.int32(0), first))[1]


def keep_top_k(weighed: Weighed, k: Array) -> Weighed:
    """Keeps the k largest and the ties of the k-th; k = 0 keeps all."""
    size = weighed.logits.shape[0]
    counts = jnp.ones((size,), jnp.uint32)
    wanted = jnp.clip(k, 1, size).astype(jnp.uint32)
    keys, interval = _search(weighed.logits, counts, wanted, k > 0, lambda _: jnp.uint32(2))
    return weighed.where(keys >= interval.low)


def keep_top_p(weighed: Weighed, p: Array) -> Weighed:
    """Keeps the nucleus (arXiv 1904.09751).

    A token stays if the probability ahead of it, of likelier tokens and of equal ones with a
    higher id, is below p: so the token that crosses p stays, and at least one does.
    """
    logits, weights, top = weighed
    total = jnp.sum(weights)
    probs = _in_units(weights / total)
    wanted = jnp.maximum(_in_units(p), 1)  # never 0: the likeliest token stays
    keys, interval = _search(
        logits, probs, wanted, p < 1, lambda value: _of_two(jnp.exp(value - top) / total)
    )
    low, from_high = interval.low, interval.from_high
    is_tie, ids = keys == low, jnp.arange(logits.shape[0], dtype=jnp.uint32)

    # Of several equal tokens, as few as reach p stay: those from an id on.
    def is_open(bounds: tuple[Array, Array]) -> Array:
        return bounds[1] - bounds[0] > 1

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        first, end = bounds
        middle = first + (end - first) // 2
        ties = jnp.sum(jnp.where(is_tie & (ids >= middle), probs, 0), dtype=jnp.uint32)
        reaches = from_high + ties >= wanted
        return jnp.where(reaches, middle, first), jnp.where(reaches, end, middle)

    may_be_several = (p < 1) & (interval.high - low == 1)
    end = jnp.where(may_be_several, np.uint32(logits.shape[0]), np.uint32(1))
    first_to_stay = lax.while_loop(is_open, halve, (jnp.uint32(0), end))[0]
    return weighed.where((keys >= low) & (~is_tie | (ids >= first_to_stay)))


def _of_two(prob: Array) -> Array:
    """What two tokens, each at least as probable, weigh at least: uint32[], roundings allowed."""
    return jnp.maximum(prob * (_UNIT * (2 - 1e-4)) - 4.0, 0.0).astype(jnp.uint32)


def keep_min_p(weighed: Weighed, p: Array) -> Weighed:
    """Keeps the tokens at least p times as likely as the likeliest."""
    logits = weighed.logits
    return weighed.where(logits >= jnp.max(logits) + jnp.log(p))


def keep_typical(weighed: Weighed, p: Array) -> Weighed:
    """Keeps the typical tokens (arXiv 2202.00666).

    Those whose surprise is closest to the law's entropy, until their probability reaches p, and
    all ties of the last one.
    """
    log_probs = weighed.log_probs()
    probs = weighed.weights / jnp.sum(weighed.weights)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0))
    keys, interval = _search(
        -jnp.abs(-log_probs - entropy),
        _in_units(probs),
        jnp.maximum(_in_units(p), 1),
        p < 1,
        # No token is more surprising than the entropy and its distance from it.
        lambda closeness: _of_two(jnp.exp(closeness - entropy)),
    )
    return weighed.where(keys >= interval.low)
