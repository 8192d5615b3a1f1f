"""What changes the logits of one position because of the tokens before it (unbatched).

Each takes and returns f32[V]; a ban is -inf.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec.sampling.memory import History, Text
from jaxspec.sampling.options import NO_ID

Array: TypeAlias = jax.Array


def penalize_repetition(logits: Array, penalty: Array, seen: Array) -> Array:
    """Makes tokens of the text, bool[V], less likely (arXiv 1909.05858): once, however often."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_frequency(logits: Array, penalty: Array, counts: Array) -> Array:
    """Takes `penalty` off for each time a token stands in the output, i32[V]."""
    return logits - penalty * counts.astype(jnp.float32)


def penalize_presence(logits: Array, penalty: Array, counts: Array) -> Array:
    """Takes `penalty` off for tokens that stand in the output, i32[V]."""
    return logits - jnp.where(counts > 0, penalty, 0.0)


def ban(logits: Array, ids: Array) -> Array:
    """Bans `ids` i32[S]; `NO_ID` bans nothing."""
    ids = jnp.where(ids == NO_ID, logits.shape[0], ids)  # out of range: dropped
    return logits.at[ids].set(-jnp.inf, mode="drop")


def ban_repeated_ngrams(logits: Array, size: Array, text: Text) -> Array:
    """Bans what would complete an n-gram of `size` i32[] that the text holds; 0: nothing."""
    slots = jnp.arange(text.tokens.shape[0], dtype=jnp.int32)

    # follows[j]: the size - 1 tokens before slot j are those at the end of the text.
    def compare(back: Array, follows: Array) -> Array:
        return follows & (jnp.roll(text.tokens, back) == text.tokens[text.length - back])

    follows = (slots >= size - 1) & (slots < text.length) & (size > 0)
    follows = lax.fori_loop(1, jnp.minimum(size, text.length), compare, follows)
    return ban(logits, jnp.where(follows, text.tokens, NO_ID))


def ban_bad_words(logits: Array, words: Array, text: Text) -> Array:
    """Bans the last token of each of `words` i32[W, L] whose beginning ends the text."""
    beginnings, last = words[:, :-1], words[:, -1]
    at = text.length - beginnings.shape[1] + jnp.arange(beginnings.shape[1], dtype=jnp.int32)
    end = jnp.where(at >= 0, text.tokens[jnp.maximum(at, 0)], NO_ID)  # before the text: no token
    is_complete = jnp.all((beginnings == end[None]) | (beginnings == NO_ID), axis=1)
    return ban(logits, jnp.where(is_complete, last, NO_ID))


def ban_early_end(logits: Array, min_new_tokens: Array, history: History, num_more: Array) -> Array:
    """Bans the end until `min_new_tokens` i32[] stand behind the prompt, drafts included."""
    num_new = history.length + num_more - history.prompt_length
    return ban(logits, jnp.where(num_new < min_new_tokens, history.eos_ids, NO_ID))
