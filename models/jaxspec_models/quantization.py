"""int8 weights and activations: one scale a row, integers inside the products.

A weight [out, in] keeps one float32 scale per output channel, and each row of activations gets
one as it comes (symmetric, no zero point); their product accumulates in int32, which is exact in
any order. So a row's result depends on that row alone, bit for bit, at any width and batch, and
whatever is exact with a float target is as exact with a quantised one.
"""

from __future__ import annotations

import sys
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec_models import fusion, native

Array: TypeAlias = jax.Array

KINDS = ("int8",)
MAX_SUMMED_ROWS = 5
"""Rows up to which a CPU with neither our kernel nor a matrix unit sums products itself; beyond,
the backend's matrix kernel is faster."""
_MAX_WIDENED_BYTES = 24 * 1024
"""Rows that fill half of a core's first-level cache in int32 are widened as they are read instead:
1,536 columns of 5 rows take 46 µs for 576 outputs so, and 59 widened before."""
_MAX_ROWS_BESIDE_UNIT, _MAX_ROWS_OF_AVX2 = 8, 64  # benchmarks/README.md
_VNNI_LANE = 64
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


def product(steps: Array, weight: Array) -> Array:
    """`steps @ weight.T` in whole numbers: exact, whichever way it is computed.

    Args:
      steps: int8[N, I].
      weight: int8[O, I].

    Returns:
      i32[N, O].

    Example:
      >>> import jax.numpy as jnp
      >>> product(jnp.array([[1, -2]], jnp.int8), jnp.array([[3, 4], [5, 6]], jnp.int8)).tolist()
      [[-5, -7]]
    """
    if not 1 < steps.shape[0] <= MAX_SUMMED_ROWS or has_matrix_unit():
        return _matrix_product(steps, weight)
    return lax.platform_dependent(steps, weight, cpu=_sum_products, default=_matrix_product)


def has_matrix_unit() -> bool:
    """Whether this machine's CPU has a unit for int8 matrices (AMX), which XLA's kernel uses.

    With it 16 rows cost little more than 2, and less than two rows summed (71 MB of weights: 3.4 ms
    for 2 rows, 3.7 for 5 and 4.2 for 16, summed 5.6, 17 and 29).
    """
    return "amx_int8" in native.cpu_flags()


def max_native_rows() -> int:
    """Rows up to which `native.linear` is the fastest on this CPU; 0 where there is none.

    None where programs run elsewhere, on several devices or under a mesh: XLA does not know how to
    share a foreign function out.
    """
    is_shared = jax.device_count() > 1 or not jax.sharding.get_abstract_mesh().empty
    if jax.default_backend() != "cpu" or is_shared or native.why_not() is not None:
        return 0
    if has_matrix_unit():
        return _MAX_ROWS_BESIDE_UNIT
    return sys.maxsize if native.lane() == _VNNI_LANE else _MAX_ROWS_OF_AVX2


def _matrix_product(steps: Array, weight: Array) -> Array:
    return lax.dot_general(
        steps, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )


def _sum_products(steps: Array, weight: Array) -> Array:
    """The product of a few rows as one pass over the weight, at the speed of the memory.

    The backend's matrix kernel reads int8 weights at less than half the memory's bandwidth,
    however few the rows are. A reduction with one operand for each row becomes one loop over the
    weight instead, which is vectorised; a reduction with a single operand would be split up and
    its products written out first. See `benchmarks/README.md`.
    """
    num_rows = steps.shape[0]
    if 4 * steps.size <= _MAX_WIDENED_BYTES:
        steps = steps.astype(jnp.int32)
    # Otherwise the rounding of the rows would be done again for every output.
    steps = fusion.computed_once(steps)
    # Tied to the rows, the cast of the weight cannot be hoisted out of a decoding loop.
    weight, steps = lax.optimization_barrier((weight, steps))
    weight = weight.astype(jnp.int32)
    products = [weight * steps[row].astype(jnp.int32)[None] for row in range(num_rows)]
    sums = lax.reduce(
        products,
        [jnp.zeros((), jnp.int32)] * num_rows,
        lambda totals, terms: [a + b for a, b in zip(totals, terms, strict=True)],
        (1,),
    )
    return jnp.stack(sums)
