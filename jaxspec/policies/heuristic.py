"""Longer after success, shorter after failure."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Outcome, Signals

Array: TypeAlias = jax.Array


@pytree.dataclass
class Heuristic:
    """See `heuristic`. State: i32[B], the next draft's length."""

    initial: Any
    increase: Any
    decrease: Any
    minimum: Any

    def init(self, batch: int) -> Array:
        """i32[B]."""
        return jnp.broadcast_to(jnp.asarray(self.initial, jnp.int32), (batch,))

    def num_draft(self, state: Array) -> Array:
        """i32[B]."""
        return state

    def keep_drafting(self, state: Array, signals: Signals) -> Array:
        """Always true, bool[B]."""
        del signals
        return jnp.ones_like(state, dtype=bool)

    def update(self, state: Array, outcome: Outcome) -> Array:
        """Lengthens after a draft accepted whole, else shortens; an empty draft teaches nothing."""
        is_whole = outcome.verdict.num_accepted >= outcome.draft.length
        step = jnp.where(is_whole, self.increase, -jnp.asarray(self.decrease))
        most = outcome.draft.tokens.shape[-1]  # K: a length above it would be cut unseen
        length = jnp.minimum(state, most) + step.astype(jnp.int32)
        learns = outcome.is_active & (outcome.draft.length > 0)
        return jnp.where(learns, jnp.clip(length, self.minimum, most), state)


def heuristic(
    initial: int = 4,
    *,
    increase: int = 2,
    decrease: int = 1,
    minimum: int = 1,
) -> Heuristic:
    """HF transformers' schedule: γ + 2 after a draft accepted whole, else γ - 1, row by row.

    The length depends on earlier rounds only, so that every lossless verifier stays exact.

    Args:
      initial: i32, tokens drafted in the first round.
      increase: i32, tokens added after a whole acceptance.
      decrease: i32, tokens taken away otherwise.
      minimum: i32 ≥ 1, the shortest draft (a row that drafts nothing would learn nothing and
        never draft again); the longest is `num_draft_tokens`.

    Returns:
      A policy.

    Raises:
      ValueError: Python numbers that are not whole, below their least value or out of order.

    References:
      HF transformers, `num_assistant_tokens_schedule="heuristic"`.

    Example:
      >>> policy = heuristic(initial=3)
      >>> policy.num_draft(policy.init(batch=2)).tolist()
      [3, 3]
    """
    numbers = (initial, increase, decrease, minimum)
    if all(isinstance(x, (int, float)) for x in numbers) and not (
        1 <= minimum <= initial
        and increase >= 0
        and decrease >= 0
        and all(x == int(x) for x in numbers)
    ):
        raise ValueError(
            "heuristic needs whole numbers, 1 ≤ minimum ≤ initial and steps of at least 0, got "
            f"initial={initial}, increase={increase}, decrease={decrease}, minimum={minimum}."
        )
    return Heuristic(*numbers)
