"""As far as the drafter trusts itself."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Outcome, Signals

Array: TypeAlias = jax.Array


@pytree.dataclass
class Confidence:
    """See `confidence`. State: i32[B] zeros, so that rows are counted."""

    threshold: Any

    def init(self, batch: int) -> Array:
        """i32[B]."""
        return jnp.zeros((batch,), jnp.int32)

    def num_draft(self, state: Array) -> Array:
        """As many as there may be, i32[B]; the loop clips it to `num_draft_tokens`."""
        return jnp.full_like(state, jnp.iinfo(jnp.int32).max)

    def keep_drafting(self, state: Array, signals: Signals) -> Array:
        """Whether what is drafted so far will probably be accepted with this slot, bool[B]."""
        acceptance = signals.acceptance
        if acceptance is None:
            acceptance = jnp.exp(jnp.max(signals.log_probs, axis=-1))
        threshold = jnp.asarray(self.threshold, jnp.float32)
        return jnp.broadcast_to(acceptance >= threshold, state.shape)

    def update(self, state: Array, outcome: Outcome) -> Array:
        """Nothing is learnt."""
        del outcome
        return state


def confidence(threshold: float = 0.4) -> Confidence:
    """Drafts on while the whole draft will probably be accepted.

    A row's draft ends before the first slot at which the drafter puts the probability that all
    drafts up to this one are accepted (`Signals.acceptance`) below the threshold; a drafter that
    says nothing of it is taken at the slot's highest probability. It follows from tokens before
    the slot and from its q, never from the token drawn there: every lossless verifier stays exact.
    Drafts that are copied (`prompt_lookup`) do not end early.

    Args:
      threshold: f32, a number or [B] for one a row, between 0 (never stop early) and 1. A draft
        pays while its probability is above what verifying one more token costs, over what one
        token costs at present. With the drafter of `smollm2-135m`, 0.3 was best greedily, in
        rounds simulated from recorded ones.

    Returns:
      A policy.

    Raises:
      ValueError: a Python number that is not between 0 and 1.

    References:
      Gante, assisted generation in HF transformers (`assistant_confidence_threshold`, 0.4, there
      by the drawn token's own probability, which is exact for greedy drafts only); the cumulative
      product: Huang et al., SpecDec++, arXiv 2405.19715.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxspec.types import Signals
      >>> policy = confidence(0.4)
      >>> signals = Signals(jnp.array([1, 1]), jnp.zeros((2, 8)), acceptance=jnp.array([0.5, 0.3]))
      >>> policy.keep_drafting(policy.init(batch=2), signals).tolist()
      [True, False]
    """
    if isinstance(threshold, (int, float)) and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}.")
    return Confidence(threshold)
