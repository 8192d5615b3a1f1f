"""The same draft length in every round."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Outcome, Signals

Array: TypeAlias = jax.Array


@pytree.dataclass
class Fixed:
    """See `fixed`. State: i32[B] zeros, so that rows are counted."""

    length: Any

    def init(self, batch: int) -> Array:
        """i32[B]."""
        return jnp.zeros((batch,), jnp.int32)

    def num_draft(self, state: Array) -> Array:
        """i32[B]."""
        return jnp.broadcast_to(jnp.asarray(self.length, jnp.int32), state.shape)

    def keep_drafting(self, state: Array, signals: Signals) -> Array:
        """Always true, bool[B]."""
        del signals
        return jnp.ones_like(state, dtype=bool)

    def update(self, state: Array, outcome: Outcome) -> Array:
        """Nothing is learnt."""
        del outcome
        return state


def fixed(length: int | Array) -> Fixed:
    """Drafts `length` tokens in every round.

    Args:
      length: i32, a number or [B] for one a row, ≥ 0 (0: plain decoding). The loop clips it to
        `num_draft_tokens`, and to what a row still may emit.

    Returns:
      A policy.

    Raises:
      ValueError: a Python number that is negative or not whole.

    References:
      Leviathan et al., arXiv 2211.17192 (γ).

    Example:
      >>> policy = fixed(4)
      >>> policy.num_draft(policy.init(batch=2)).tolist()
      [4, 4]
    """
    if isinstance(length, (int, float)) and not (0 <= length < 2**31 and length == int(length)):
        raise ValueError(f"length must be a whole number of at least 0, got {length}.")
    return Fixed(length)
