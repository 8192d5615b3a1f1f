"""How the tokens of sampled drafts are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import drawing
from jaxspec.types import Context

Array: TypeAlias = jax.Array


def chooser(keys: Array, context: Context) -> Callable[[Array, Array], Array]:
    """Draws by the drafter's own keys, or with the noise that the verifier shares.

    Args:
      keys: key[B, K], of the slots.
      context: the round's; `Context.noise_keys` where noise is shared (`verifiers.match`).

    Returns:
      A function: slots i32[B], log-probabilities f32[B, V] -> tokens i32[B].
    """
    rows = jnp.arange(keys.shape[0])
    if context.noise_keys is not None:
        noise_keys = context.noise_keys

        def run_race(slot: Array, log_probs: Array) -> Array:
            size = log_probs.shape[1]
            keys = jax.random.clone(noise_keys[rows, slot])  # the verifier will use them again
            noise = jax.vmap(lambda key: drawing.gumbel_noise(key, size))(keys)
            return jax.vmap(drawing.race)(noise, log_probs)

        return run_race
    uniforms = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32)))(keys)
    return lambda slot, log_probs: jax.vmap(drawing.draw)(uniforms[rows, slot], jnp.exp(log_probs))
