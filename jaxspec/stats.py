"""Counters carried by the loop, per row, counted to EOS and not past it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec.types import Outcome

Array: TypeAlias = jax.Array


class Stats(NamedTuple):
    """What speculation did for each row, under vLLM's metric names.

    Where a row stops inside an accepted draft (at EOS or at its limit), the drafts behind that
    token are counted neither as drafted nor as accepted.

    Attributes:
      num_spec_steps: i32[B], target forwards that the row took part in (prefill apart).
      num_emitted_tokens: i32[B], new tokens.
      num_draft_tokens: i32[B], tokens proposed.
      num_accepted_draft_tokens: i32[B], of them accepted and emitted.
      acceptance_histogram: i32[B, K + 1], steps by number of accepted drafts.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = Stats(jnp.array([4]), jnp.array([10]), jnp.array([16]), jnp.array([7]),
      ...               jnp.array([[1, 1, 0, 2, 0]]))
      >>> stats.mean_acceptance_length.tolist(), stats.tokens_per_step.tolist()
      ([2.75], [2.5])
    """

    num_spec_steps: Array
    num_emitted_tokens: Array
    num_draft_tokens: Array
    num_accepted_draft_tokens: Array
    acceptance_histogram: Array

    @property
    def draft_acceptance_rate(self) -> Array:
        """f32[B]: accepted / drafted; 0 where nothing was drafted."""
        return self.num_accepted_draft_tokens / jnp.maximum(self.num_draft_tokens, 1)

    @property
    def mean_acceptance_length(self) -> Array:
        """f32[B]: 1 + accepted / steps, the bonus or correction included."""
        return 1.0 + self.num_accepted_draft_tokens / jnp.maximum(self.num_spec_steps, 1)

    @property
    def tokens_per_step(self) -> Array:
        """f32[B]: emitted / steps, what EOS and the limit leave of `mean_acceptance_length`."""
        return self.num_emitted_tokens / jnp.maximum(self.num_spec_steps, 1)


def init(batch: int, num_draft_tokens: int) -> Stats:
    """Zeroed counters.

    Args:
      batch: B.
      num_draft_tokens: K, the static maximum of drafts in a round.
    """
    return Stats(
        num_spec_steps=jnp.zeros((batch,), jnp.int32),
        num_emitted_tokens=jnp.zeros((batch,), jnp.int32),
        num_draft_tokens=jnp.zeros((batch,), jnp.int32),
        num_accepted_draft_tokens=jnp.zeros((batch,), jnp.int32),
        acceptance_histogram=jnp.zeros((batch, num_draft_tokens + 1), jnp.int32),
    )


def update(stats: Stats, outcome: Outcome) -> Stats:
    """Adds one round."""
    took_part = outcome.is_active.astype(jnp.int32)
    was_cut = outcome.num_emitted < outcome.verdict.num_accepted + 1
    counted = jnp.where(
        was_cut, jnp.minimum(outcome.draft.length, outcome.num_emitted), outcome.draft.length
    )
    bins = jnp.arange(stats.acceptance_histogram.shape[1])
    hit = (bins[None] == outcome.num_accepted[:, None]).astype(jnp.int32)
    return Stats(
        num_spec_steps=stats.num_spec_steps + took_part,
        num_emitted_tokens=stats.num_emitted_tokens + outcome.num_emitted,
        num_draft_tokens=stats.num_draft_tokens + counted * took_part,
        num_accepted_draft_tokens=stats.num_accepted_draft_tokens
        + outcome.num_accepted * took_part,
        acceptance_histogram=stats.acceptance_histogram + hit * took_part[:, None],
    )
