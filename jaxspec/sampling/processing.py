"""From the logits of a position to the law of its token."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import drawing
from jaxspec.sampling import cuts, grammar, memory, penalties
from jaxspec.sampling.memory import History
from jaxspec.sampling.options import Options

Array: TypeAlias = jax.Array


class Scores(NamedTuple):
    """What `process` makes of logits.

    Attributes:
      log_probs: f32[V], the law a token is drawn from; -inf for tokens cut off. At temperature
        0 it is a point mass on the argmax. Where bans leave no token, its maximum is NaN.
      report: f32[V], what `Generation.log_probs` reports: `log_probs`, but for a greedy row the
        law at temperature 1, before any cut.
    """

    log_probs: Array
    report: Array


def process(
    logits: Array, options: Options, history: History, prefix: Array, prefix_length: Any
) -> Scores:
    """The law of one row's next token under the sampling options (unbatched).

    Args:
      logits: float[V].
      options: one row's options (arrays without B).
      history: one row's history.
      prefix: i32[K], drafted tokens behind the history.
      prefix_length: i32[], how many of them precede this position; they count as emitted.

    Returns:
      `Scores`, each f32[V], normalised.
    """
    logits = logits.astype(jnp.float32)
    logits = _penalized(logits, options, history, prefix, jnp.asarray(prefix_length, jnp.int32))
    if options.is_greedy:
        return Scores(_point_mass(logits), cuts.log_softmax(logits))
    warped = logits
    if options.temperature is not None:
        is_greedy_row = options.temperature == 0
        # From the top down: a tiny temperature overflows to -inf below the top, not to NaN.
        warped = (logits - cuts.finite_max(logits)) / jnp.where(
            is_greedy_row, 1.0, options.temperature
        )
    weighed = whole = cuts.weigh(warped)
    if options.top_k is not None:
        weighed = cuts.keep_top_k(weighed, options.top_k)
    if options.top_p is not None:
        weighed = cuts.keep_top_p(weighed, options.top_p)
    if options.min_p is not None:
        weighed = cuts.keep_min_p(weighed, options.min_p)
    if options.typical_p is not None:
        weighed = cuts.keep_typical(weighed, options.typical_p)
    log_probs = weighed.log_probs()
    if options.temperature is None:
        return Scores(log_probs, log_probs)
    # A point mass, not a tiny "sentinel" temperature: exact, also where two logits are close.
    return Scores(
        jnp.where(is_greedy_row, _point_mass(logits), log_probs),
        jnp.where(is_greedy_row, whole.log_probs(), log_probs),
    )


def process_rows(
    logits: Array,
    options: Options,
    history: History,
    prefix: Array | None = None,
    prefix_length: Array | int = 0,
) -> Scores:
    """`process` for every row of a batch.

    Args:
      logits: float[B, V].
      options: from `resolve`.
      history: from `recall`, or the loop's.
      prefix: i32[B, K], drafted tokens behind the histories; None: none.
      prefix_length: i32[B], how many of them precede each row's position; one number: of all.

    Returns:
      `Scores`, each f32[B, V].
    """
    batch = logits.shape[0]
    prefix = jnp.zeros((batch, 0), jnp.int32) if prefix is None else prefix
    prefix_length = jnp.broadcast_to(jnp.asarray(prefix_length, jnp.int32), (batch,))
    of_row = jax.vmap(process, in_axes=(0, options.row_axes(), 0, 0, 0))
    return of_row(logits, options, history, prefix, prefix_length)


def process_positions(logits: Array, options: Options, history: History, drafts: Array) -> Scores:
    """`process` at every position of every row's draft.

    Args:
      logits: float[B, K + 1, V], behind the pending token and each draft.
      options: from `resolve`.
      history: the loop's.
      drafts: i32[B, K]; the drafts before a position are its prefix.

    Returns:
      `Scores`, each f32[B, K + 1, V].
    """
    offsets = jnp.arange(logits.shape[1], dtype=jnp.int32)
    at_offsets = jax.vmap(process, in_axes=(0, None, None, None, 0))
    of_row = jax.vmap(at_offsets, in_axes=(0, options.row_axes(), 0, 0, None))
    return of_row(logits, options, history, drafts, offsets)


def process_nodes(
    logits: Array, options: Options, history: History, paths: Array, depths: Array
) -> Scores:
    """`process` at nodes of every row's tree, each behind its own path.

    Args:
      logits: float[B, M, V], behind each node.
      options: from `resolve`.
      history: the loop's.
      paths: i32[B, M, P], the tokens on the way to each node, itself included.
      depths: i32[B, M], how many of them there are.

    Returns:
      `Scores`, each f32[B, M, V].
    """
    of_nodes = jax.vmap(process, in_axes=(0, None, None, 0, 0))
    of_row = jax.vmap(of_nodes, in_axes=(0, options.row_axes(), 0, 0, 0))
    return of_row(logits, options, history, paths, depths)


def _penalized(
    logits: Array, options: Options, history: History, prefix: Array, prefix_length: Array
) -> Array:
    """The logits after bias, penalties and bans, f32[V]."""
    if options.logit_bias is not None:
        logits = logits + options.logit_bias
    seen, counts, state = memory.with_drafts(options, history.memory, prefix, prefix_length)
    if options.repetition_penalty is not None:
        assert seen is not None  # `memory.recall` remembers what these options ask for
        logits = penalties.penalize_repetition(logits, options.repetition_penalty, seen)
    if options.frequency_penalty is not None:
        assert counts is not None
        logits = penalties.penalize_frequency(logits, options.frequency_penalty, counts)
    if options.presence_penalty is not None:
        assert counts is not None
        logits = penalties.penalize_presence(logits, options.presence_penalty, counts)

    def text() -> memory.Text:
        return memory.Text.of(history, prefix, prefix_length)

    if options.no_repeat_ngram_size is not None:
        logits = penalties.ban_repeated_ngrams(logits, options.no_repeat_ngram_size, text())
    if options.bad_words is not None:
        logits = penalties.ban_bad_words(logits, options.bad_words, text())
    if options.min_new_tokens is not None:
        logits = penalties.ban_early_end(logits, options.min_new_tokens, history, prefix_length)
    if options.grammar is not None:
        assert state is not None
        logits = grammar.keep_allowed(logits, options.grammar, state)
    if options.suppress_tokens is not None:
        logits = penalties.ban(logits, options.suppress_tokens)
    if options.processor is not None:
        logits = options.processor(text(), logits)
    return logits


def _point_mass(logits: Array) -> Array:
    """Log 1 at the (first) largest logit, log 0 elsewhere: f32[V]; NaN there if none is finite."""
    best = drawing.argmax(logits)
    mass = jnp.where(jnp.isfinite(logits[best]), 0.0, jnp.nan)
    return jnp.where(jnp.arange(logits.shape[0]) == best, mass, -jnp.inf)
