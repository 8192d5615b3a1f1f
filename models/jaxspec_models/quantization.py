"""int8 weights and activations: one scale a row, integers inside the products.

A weight [out, in] keeps one float32 scale per output channel, and each row of activations gets
one as it comes (symmetric, no zero point); their product accumulates in int32, which is exact in
any order. So a row's result depends on that row alone, bit for bit, at any width and batch, and
whatever is exact with a float target is as exact with a quantised one.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array

KINDS = ("int8",)
_STEPS = 127


def quantize_rows(x: Array, largest: Array | None = None) -> tuple[Array, Array]:
    """Rounds each row to whole multiples of its own step.

    Args:
      x: float[..., I].
      largest: f32[...], the largest magnitude of each row, where it is known.

    Returns:
      int8[..., I] and f32[...], the step: x is about their product. A row with a value that is
      not finite has a step that is not.

    Example:
      >>> import jax.numpy as jnp
      >>> steps, step = quantize_rows(jnp.array([[1.0, -2.54, 0.0]]))
      >>> steps.tolist(), round(float(step[0]), 6)
      ([[50, -127, 0]], 0.02)
    """
    x = x.astype(jnp.float32)
    if largest is None:
        largest = jnp.max(jnp.abs(x), axis=-1)
    per_step = _STEPS / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x * per_step[..., None]).astype(jnp.int8), largest / _STEPS
