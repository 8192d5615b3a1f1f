"""What options that look back need to know of the tokens before a position.

The loop carries a `Memory`, updated with each round's tokens; `History` is that and the text
itself. A position inside a draft sees both with the drafts before it added (`Text.of`,
`with_drafts`): penalties count drafted tokens as if they had been emitted.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec.sampling.options import Options

Array: TypeAlias = jax.Array


class Memory(NamedTuple):
    """What the loop carries from round to round; each is None while no option asks for it.

    Attributes:
      seen: bool[B, V], tokens that stand in the prompt or the output.
      counts: i32[B, V], how often each token stands in the output.
    """

    seen: Array | None
    counts: Array | None


class History(NamedTuple):
    """The committed text and what is remembered of it; in unbatched functions one row's.

    Attributes:
      memory: `Memory`.
      tokens: i32[B, N], prompt and output; slots at or beyond `length` hold garbage. N leaves room
        for the drafts behind any row's length.
      length: i32[B], committed tokens, prompt included.
      prompt_length: i32[B].
      eos_ids: i32[B, E], tokens that end a text.
    """

    memory: Memory
    tokens: Array
    length: Array
    prompt_length: Array
    eos_ids: Array


class Text(NamedTuple):
    """The text before one position of one row, as a user's `Sampling.processor` sees it.

    Attributes:
      tokens: i32[N], prompt, output and the drafts before the position; slots at or beyond
        `length` hold garbage.
      length: i32[], tokens before the position.
      prompt_length: i32[].
    """

    tokens: Array
    length: Array
    prompt_length: Array

    @classmethod
    def of(cls, history: History, prefix: Array, prefix_length: Array) -> Text:
        """One row's committed text with the first `prefix_length` i32[] of `prefix` i32[K]."""
        offsets = jnp.arange(prefix.shape[0], dtype=jnp.int32)
        at = jnp.where(offsets < prefix_length, history.length + offsets, history.tokens.shape[0])
        tokens = history.tokens.at[at].set(prefix, mode="drop")
        return cls(tokens, history.length + prefix_length, history.prompt_length)


def recall(
    options: Options,
    tokens: Array,
    lengths: Array,
    *,
    vocab_size: int | None = None,
    prompt_lengths: Array | None = None,
    eos_ids: Array | None = None,
) -> History:
    """The history of texts.

    Args:
      options: decides what must be remembered.
      tokens: i32[B, N].
      lengths: i32[B].
      vocab_size: V; needed where something must be remembered of each token.
      prompt_lengths: i32[B]; None: all of the text is prompt.
      eos_ids: i32[E] or i32[B, E]; None: none.
    """
    batch = tokens.shape[0]
    prompt_lengths = lengths if prompt_lengths is None else prompt_lengths
    eos_ids = jnp.zeros((0,), jnp.int32) if eos_ids is None else eos_ids
    slots = jnp.arange(tokens.shape[1])[None]
    is_text = slots < lengths[:, None]
    seen = counts = None
    if options.repetition_penalty is not None:
        seen = _mark(jnp.zeros((batch, vocab_size), bool), tokens, is_text)
    if options.presence_penalty is not None or options.frequency_penalty is not None:
        is_output = is_text & (slots >= prompt_lengths[:, None])
        counts = _count(jnp.zeros((batch, vocab_size), jnp.int32), tokens, is_output)
    eos_ids = jnp.broadcast_to(eos_ids, (batch, eos_ids.shape[-1]))
    return History(Memory(seen, counts), tokens, lengths, prompt_lengths, eos_ids)


def remember(memory: Memory, tokens: Array, num_tokens: Array) -> Memory:
    """Adds the first `num_tokens` i32[B] of `tokens` i32[B, K + 1] to each row's memory."""
    is_new = jnp.arange(tokens.shape[1])[None] < num_tokens[:, None]
    return Memory(
        None if memory.seen is None else _mark(memory.seen, tokens, is_new),
        None if memory.counts is None else _count(memory.counts, tokens, is_new),
    )


def with_drafts(memory: Memory, prefix: Array, prefix_length: Array) -> Memory:
    """One row's memory with the first `prefix_length` i32[] of `prefix` i32[K] added."""
    rows = Memory(*(None if x is None else x[None] for x in memory))
    return Memory(
        *(None if x is None else x[0] for x in remember(rows, prefix[None], prefix_length[None]))
    )


def _mark(seen: Array, tokens: Array, where: Array) -> Array:
    rows = jnp.arange(seen.shape[0])[:, None]
    return seen.at[rows, _ids(tokens, where, seen)].set(True, mode="drop")


def _count(counts: Array, tokens: Array, where: Array) -> Array:
    rows = jnp.arange(counts.shape[0])[:, None]
    return counts.at[rows, _ids(tokens, where, counts)].add(1, mode="drop")


def _ids(tokens: Array, where: Array, table: Array) -> Array:
    return jnp.where(where, tokens, table.shape[1])  # out of range: dropped
