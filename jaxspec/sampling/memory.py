"""What options that look back need to know of the tokens before a position.

The loop carries a `Memory`, updated with each round's tokens; `History` is that and the text
itself. A position inside a draft sees both with the drafts before it added (`Text.of`,
`with_drafts`): penalties count drafted tokens as if they had been emitted.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec.sampling import grammar as grammars
from jaxspec.sampling.options import Options

Array: TypeAlias = jax.Array


class Memory(NamedTuple):
    """What the loop carries from round to round; each is None while no option asks for it.

    Attributes:
      seen: bool[B, V], tokens that stand in the prompt or the output.
      counts: i32[B, V], how often each token stands in the output.
      grammar: i32[B], the state of `Sampling.grammar` behind the output.
    """

    seen: Array | None
    counts: Array | None
    grammar: Array | None


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
    seen = counts = grammar = None
    if options.repetition_penalty is not None:
        seen = jax.vmap(_mark)(jnp.zeros((batch, vocab_size), bool), tokens, is_text)
    if options.presence_penalty is not None or options.frequency_penalty is not None:
        is_output = is_text & (slots >= prompt_lengths[:, None])
        counts = jax.vmap(_count)(jnp.zeros((batch, vocab_size), jnp.int32), tokens, is_output)
    if options.grammar is not None:
        read = jax.vmap(grammars.read, in_axes=(options.row_axes().grammar, 0, 0, 0))
        grammar = read(options.grammar, tokens, prompt_lengths, lengths)
    eos_ids = jnp.broadcast_to(eos_ids, (batch, eos_ids.shape[-1]))
    return History(Memory(seen, counts, grammar), tokens, lengths, prompt_lengths, eos_ids)


def remember(options: Options, memory: Memory, tokens: Array, num_tokens: Array) -> Memory:
    """Adds the first `num_tokens` i32[B] of `tokens` i32[B, K + 1] to each row's memory."""
    of_row = jax.vmap(with_drafts, in_axes=(options.row_axes(), 0, 0, 0))
    return of_row(options, memory, tokens, num_tokens)


def with_drafts(options: Options, memory: Memory, prefix: Array, prefix_length: Array) -> Memory:
    """One row's memory with the first `prefix_length` i32[] of `prefix` i32[K] added."""
    is_new = jnp.arange(prefix.shape[0]) < prefix_length
    seen, counts, state = memory
    if state is not None:
        assert options.grammar is not None  # `recall` remembers what these options ask for
        state = grammars.advance(options.grammar, state, prefix, prefix_length)
    return Memory(
        None if seen is None else _mark(seen, prefix, is_new),
        None if counts is None else _count(counts, prefix, is_new),
        state,
    )


def _mark(seen: Array, tokens: Array, where: Array) -> Array:
    return seen.at[_ids(tokens, where, seen)].set(True, mode="drop")


def _count(counts: Array, tokens: Array, where: Array) -> Array:
    return counts.at[_ids(tokens, where, counts)].add(1, mode="drop")


def _ids(tokens: Array, where: Array, table: Array) -> Array:
    return jnp.where(where, tokens, table.shape[0])  # out of range: dropped
