"""Counters carried by the loop, per row, counted to EOS and not past it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import trees
from jaxspec.types import Draft, Outcome

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
      num_zero_probability_rejections: i32[B], steps that ended at a draft to which the target
        gives no probability (cut off by an option, say).
      num_impossible_draft_tokens: i32[B], drafts to which their own q gives no probability, or
        none that is a number, and ids outside the vocabulary. Rules that weigh p against q reject
        them. Not 0: the drafter reports a q that it did not sample from, see
        `jaxspec.testing.check_drafter`.
      num_fallbacks: i32[B], steps whose correction came from the target itself, since rounding
        left nothing of the residual. Now and then where p and q agree to the last bits.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = init(1, 4)._replace(
      ...     num_spec_steps=jnp.array([4]), num_emitted_tokens=jnp.array([10]),
      ...     num_accepted_draft_tokens=jnp.array([7]))
      >>> stats.mean_acceptance_length.tolist(), stats.tokens_per_step.tolist()
      ([2.75], [2.5])
    """

    num_spec_steps: Array
    num_emitted_tokens: Array
    num_draft_tokens: Array
    num_accepted_draft_tokens: Array
    acceptance_histogram: Array
    num_zero_probability_rejections: Array
    num_impossible_draft_tokens: Array
    num_fallbacks: Array

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
        num_zero_probability_rejections=jnp.zeros((batch,), jnp.int32),
        num_impossible_draft_tokens=jnp.zeros((batch,), jnp.int32),
        num_fallbacks=jnp.zeros((batch,), jnp.int32),
        acceptance_histogram=jnp.zeros((batch, num_draft_tokens + 1), jnp.int32),
    )


class ZeroProbabilities(NamedTuple):
    """Drafts that cannot be, or cannot be accepted.

    Attributes:
      is_impossible: bool[B, K], no token of the vocabulary, or one that its own q cannot draw.
      is_hopeless: bool[B, K], a token to which the target gives no probability.
    """

    is_impossible: Array
    is_hopeless: Array


def update(stats: Stats, outcome: Outcome, zeros: ZeroProbabilities) -> Stats:
    """Adds one round.

    Args:
      stats: the counters.
      outcome: of the round.
      zeros: of the round's drafts, from `zero_probabilities`.
    """
    took_part = outcome.is_active.astype(jnp.int32)
    was_cut = outcome.num_emitted < outcome.verdict.num_accepted + 1
    bins = jnp.arange(stats.acceptance_histogram.shape[1])
    hit = (bins[None] == outcome.num_accepted[:, None]).astype(jnp.int32)
    is_impossible, is_hopeless = zeros
    nodes, depths, last = _places(outcome)
    is_draft = jnp.arange(outcome.draft.tokens.shape[1])[None] < outcome.draft.length[:, None]
    is_draft = is_draft & (nodes >= 0)
    is_counted = is_draft & (~was_cut[:, None] | (depths <= outcome.num_emitted[:, None]))
    counted = jnp.sum(is_counted, axis=1, dtype=jnp.int32)
    num_impossible = jnp.sum(is_impossible & is_counted, axis=1, dtype=jnp.int32)
    # Without a cut, the step ended at the drafts behind the accepted ones, if there are any.
    is_end = (nodes == last[:, None]) & is_draft
    ends_here = outcome.is_active & ~was_cut
    is_zero = jnp.any(is_end, axis=1) & jnp.all(is_hopeless | ~is_end, axis=1) & ends_here
    is_fallback = outcome.verdict.is_fallback
    fell_back = jnp.zeros_like(is_zero) if is_fallback is None else is_fallback & ends_here
    return Stats(
        num_spec_steps=stats.num_spec_steps + took_part,
        num_emitted_tokens=stats.num_emitted_tokens + outcome.num_emitted,
        num_draft_tokens=stats.num_draft_tokens + counted * took_part,
        num_accepted_draft_tokens=stats.num_accepted_draft_tokens
        + outcome.num_accepted * took_part,
        acceptance_histogram=stats.acceptance_histogram + hit * took_part[:, None],
        num_zero_probability_rejections=stats.num_zero_probability_rejections
        + is_zero.astype(jnp.int32),
        num_impossible_draft_tokens=stats.num_impossible_draft_tokens + num_impossible * took_part,
        num_fallbacks=stats.num_fallbacks + fell_back.astype(jnp.int32),
    )


def _places(outcome: Outcome) -> tuple[Array, Array, Array]:
    """The node that each draft is a child of, its depth, i32[B, K]; the last accepted, i32[B]."""
    draft, verdict = outcome.draft, outcome.verdict
    batch, size = draft.tokens.shape
    if draft.parents is None:
        slots = jnp.tile(jnp.arange(size, dtype=jnp.int32), (batch, 1))
        return slots, slots + 1, outcome.num_accepted
    depths = jnp.sum(jax.vmap(trees.ancestors)(draft.parents), axis=2, dtype=jnp.int32) - 1
    assert verdict.path is not None  # of a tree
    at = jnp.maximum(outcome.num_accepted - 1, 0)[:, None]
    last = jnp.take_along_axis(verdict.path, at, axis=1)[:, 0] + 1
    last = jnp.where(outcome.num_accepted > 0, last, 0)
    return draft.parents + 1, depths[:, 1:], last


def zero_probabilities(draft: Draft, target_log_probs: Array) -> ZeroProbabilities:
    """Looks up what q and p give to each draft.

    Args:
      draft: of every row (leading axis B).
      target_log_probs: f32[B, K + 1, V].
    """
    is_outside = (draft.tokens < 0) | (draft.tokens >= target_log_probs.shape[2])
    tokens = jnp.where(is_outside, 0, draft.tokens)[:, :, None]
    if draft.parents is None:
        target = jnp.take_along_axis(target_log_probs[:, :-1], tokens, axis=2)[:, :, 0]
    else:
        rows = jnp.arange(tokens.shape[0])[:, None]
        target = target_log_probs[rows, jnp.maximum(draft.parents + 1, 0), tokens[:, :, 0]]
    is_impossible = is_outside
    if draft.log_probs is not None:
        drafted = jnp.take_along_axis(draft.log_probs, tokens, axis=2)[:, :, 0]
        is_impossible = is_outside | ~(drafted > -jnp.inf)
    return ZeroProbabilities(is_impossible, target == -jnp.inf)
