"""How the children of a node of a tree are found."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import drawing

Array: TypeAlias = jax.Array

CHILDREN = ("without_replacement", "independent", "top_k")
"""What `jaxspec.types.Verifier.takes_children` names."""


def choose_children(
    keys: Array, log_probs: Array, count: int, children: str
) -> tuple[Array, Array]:
    """Finds the children of one node (unbatched).

    Args:
      keys: key[count], one a child.
      log_probs: f32[V], the law q behind the node.
      count: how many.
      children: one of `CHILDREN`.

    Returns:
      i32[count], and bool[count] whether each exists: q may have fewer tokens to offer.
    """
    if children == "top_k":
        best, tokens = drawing.top_k(log_probs, min(count, log_probs.shape[0]))
        missing = count - tokens.shape[0]
        return jnp.pad(tokens, (0, missing)), jnp.pad(best > -jnp.inf, (0, missing))
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    weights = jnp.exp(log_probs)
    if children == "independent":
        tokens = jax.vmap(drawing.draw, in_axes=(0, None))(uniforms, weights)
        return tokens, jnp.broadcast_to(jnp.sum(weights) > 0, (count,))

    def draw(weights: Array, uniforms: Array) -> tuple[Array, tuple[Array, Array]]:
        exists = jnp.sum(weights) > 0
        token = drawing.draw(uniforms, weights)
        return weights.at[token].set(0.0), (token, exists)

    return lax.scan(draw, weights, uniforms)[1]
