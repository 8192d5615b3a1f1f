"""What trained drafters share: vocabularies that are smaller than the target's."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.sampling import processing
from jaxspec.types import Context

Array: TypeAlias = jax.Array


def draft_vocabulary(
    texts: list[np.ndarray], size: int, *, vocab_size: int, always: tuple[int, ...] = ()
) -> np.ndarray:
    """The tokens that a drafter of a reduced vocabulary can propose.

    Args:
      texts: i32[N] each, what the target wrote.
      size: how many.
      vocab_size: V of the target.
      always: ids that are taken however seldom they are, such as those that end a text.

    Returns:
      i32[size], the most frequent ids of the texts in rising order; of equally frequent ones, the
      lower.

    Raises:
      ValueError: more are asked for than there are.

    Example:
      >>> draft_vocabulary([np.array([5, 3, 5]), np.array([3, 1])], 3, vocab_size=8, always=(7,))
      array([3, 5, 7], dtype=int32)
    """
    if not 0 < size <= vocab_size:
        raise ValueError(f"a draft vocabulary has 1 to {vocab_size} tokens, got {size}.")
    counts = np.zeros((vocab_size,), np.int64)
    for text in texts:
        np.add.at(counts, text, 1)
    counts[list(always)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def positions_in(draft_ids: Array, vocab_size: int) -> Array:
    """Where each target token stands in the draft vocabulary, i32[V]; its size: nowhere."""
    size = draft_ids.shape[0]
    return (
        jnp.full((vocab_size,), size, jnp.int32)
        .at[draft_ids]
        .set(jnp.arange(size, dtype=jnp.int32))
    )


def spread(draft_logits: Array, draft_ids: Array, vocab_size: int) -> Array:
    """f32[B, W] of the draft vocabulary -> f32[B, V]; -inf for the other tokens."""
    whole = jnp.full((draft_logits.shape[0], vocab_size), -jnp.inf, jnp.float32)
    return whole.at[:, draft_ids].set(draft_logits, unique_indices=True, indices_are_sorted=True)


def process(
    draft_logits: Array,
    draft_ids: Array,
    vocab_size: int,
    context: Context,
    drafts: Array,
    slot: Any,
) -> Array:
    """Log q of the next token under the target's own sampling options, f32[B, V].

    Args:
      draft_logits: f32[B, W].
      draft_ids: i32[W].
      vocab_size: V.
      context: the round's.
      drafts: i32[B, K], the tokens drafted so far, as the options' prefix.
      slot: how many of them there are.
    """
    logits = spread(draft_logits, draft_ids, vocab_size)
    return processing.process_rows(
        logits, context.sampling, context.history, drafts, slot
    ).log_probs
