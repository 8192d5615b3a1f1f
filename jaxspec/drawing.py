"""How scores and randomness become a token: unbatched functions of explicit numbers.

Two ways to draw, which never share a number: the inverse CDF, for every draw of a round, and the
Gumbel race, whose winner is the same for whoever runs it with the same noise and the same law.
And the largest score, where nothing is drawn.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Array: TypeAlias = jax.Array

_BLOCK = 256


def draw(uniforms: Array, weights: Array) -> Array:
    """Draws an index with probability proportional to its weight.

    Inverse CDF at two levels, first a block of indices and then an index inside it, each with a
    uniform of its own: an error of 2⁻²³ in one uniform is not spread over the whole vocabulary,
    and no noise of the vocabulary's size is made.

    Args:
      uniforms: f32[2] in [0, 1), independent.
      weights: f32[V] ≥ 0, not all zero; need not be normalised.

    Returns:
      i32[], never an index of weight zero (subnormal weights count as zero).

    Example:
      >>> import jax.numpy as jnp
      >>> int(draw(jnp.array([0.3, 0.9]), jnp.array([0.0, 1.0, 0.0, 3.0])))
      3
    """
    size = weights.shape[0]
    num_blocks = -(-size // _BLOCK)
    blocks = jnp.pad(weights, (0, num_blocks * _BLOCK - size)).reshape(num_blocks, _BLOCK)
    block = _invert(uniforms[0], jnp.sum(blocks, axis=1))
    index = block * _BLOCK + _invert(uniforms[1], blocks[block])
    return jnp.minimum(index, size - 1).astype(jnp.int32)  # weights of NaN: still an id


def _invert(uniform: Array, weights: Array) -> Array:
    cumulative = jnp.cumsum(weights)
    can_be_drawn = weights > 0
    # A parallel sum need not be monotone to the last bit: an index of weight zero is excluded by
    # its weight, and where no index is beyond the mark, the last that can be drawn is taken.
    is_beyond = (cumulative > uniform * cumulative[-1]) & can_be_drawn
    last = weights.shape[0] - 1 - jnp.argmax(can_be_drawn[::-1])
    return jnp.where(jnp.any(is_beyond), jnp.argmax(is_beyond), last)


def gumbel_noise(key: Array, size: int) -> Array:
    """Standard Gumbel noise for `race`, f32[size].

    `jax.random.gumbel` starts from 23 bits, so that its largest value is about 16: over a
    vocabulary of 50,000, tokens below a probability of 1e-7 would never win. All 32 bits are used
    here, and the small end of -log(1 - u), which decides, keeps its relative precision.

    Args:
      key: one PRNG key; it is consumed.
      size: V.
    """
    bits = jax.random.bits(key, (size,), jnp.uint32)
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    uniform = jnp.minimum(uniform, jnp.float32(1 - 2.0**-24))  # rounding may reach 1
    return -jnp.log(-jnp.log1p(-uniform))


def race(noise: Array, log_probs: Array) -> Array:
    """Draws from `log_probs` with given noise: argmax(log_probs + noise), i32[].

    Two laws raced with the same noise agree with probability at least (1 - TV) / (1 + TV)
    (arXiv 2408.07978).

    Args:
      noise: f32[V], from `gumbel_noise`.
      log_probs: f32[V]; -inf never wins. Need not be normalised.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> int(race(gumbel_noise(jax.random.key(0), 3), jnp.log(jnp.array([0.0, 1.0, 0.0]))))
      1
    """
    return argmax(log_probs + noise)


def argmax(scores: Array) -> Array:
    """The index of the largest score, the first of equal ones: `jnp.argmax`, made fast.

    XLA's argmax carries the index along and is not vectorised on the CPU: 230 µs for 49,152
    scores. Maxima of blocks are, and only one block is searched: 14 µs.

    Args:
      scores: float[V]; NaN counts as the largest.

    Returns:
      i32[].

    Example:
      >>> import jax.numpy as jnp
      >>> int(argmax(jnp.array([0.0, 2.0, 2.0])))
      1
    """
    size = scores.shape[0]
    num_blocks = -(-size // _BLOCK)
    padding = (0, num_blocks * _BLOCK - size)
    blocks = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(num_blocks, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=1))
    return (block * _BLOCK + jnp.argmax(blocks[block])).astype(jnp.int32)


def top_k(scores: Array, count: int) -> tuple[Array, Array]:
    """The largest scores and their indices, falling, of equal ones the lower index first.

    As `jax.lax.top_k`, made fast: only the blocks with the largest maxima are searched, and the
    others cannot hold any of them.

    Args:
      scores: float[V], no NaN.
      count: 1 … V.

    Returns:
      float[count], i32[count].

    Example:
      >>> import jax.numpy as jnp
      >>> [x.tolist() for x in top_k(jnp.array([0.0, 2.0, 1.0, 2.0]), 3)]
      [[2.0, 2.0, 1.0], [1, 3, 2]]
    """
    size = scores.shape[0]
    num_blocks = -(-size // _BLOCK)
    if num_blocks <= count:  # nothing to leave out
        values, ids = lax.top_k(scores, count)
        return values, ids.astype(jnp.int32)
    padding = (0, num_blocks * _BLOCK - size)
    blocks = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(num_blocks, _BLOCK)
    _, chosen = lax.top_k(jnp.max(blocks, axis=1), count)
    chosen = jnp.sort(chosen)  # so that equal scores keep their order
    values, at = lax.top_k(blocks[chosen].reshape(-1), count)
    return values, (chosen[at // _BLOCK] * _BLOCK + at % _BLOCK).astype(jnp.int32)
