"""Grammars: finite-state machines over tokens, walked along the text and along every draft.

A machine's states say which tokens may follow. The state of the committed text is remembered; a
position inside a draft sees the state behind the drafts before it, so a token that is rejected
has moved nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxspec import pytree

Array: TypeAlias = jax.Array

NO_STATE = -1
"""Behind a token that the grammar does not allow: nothing may follow."""

_BITS = 32


@pytree.dataclass
class Grammar:
    """A finite-state machine over tokens, packed; `grammar_of` makes one of a table.

    A registered pytree. Tokens that no state tells apart share a class.

    Attributes:
      next_states: i32[S, C], the state behind a token of a class; -1: not allowed.
      classes: i32[V], the tokens' classes.
      allowed: uint32[S, ceil(V / 32)], a bit for each token: bit i % 32 of word i // 32.
      start: i32[] or i32[B], the state in which a row's output begins.
    """

    next_states: Array
    classes: Array
    allowed: Array
    start: Array

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.classes.shape[0]


def grammar_of(table: Any, start: Any = 0) -> Grammar:
    """Packs a machine.

    End-of-text tokens are tokens like others: allow them where the text may end. A state that
    allows nothing stops its row with status `NONFINITE`.

    Args:
      table: integers [S, V], the state behind each token in each state; -1: not allowed.
      start: the state in which the output begins, or one a row, [B].

    Returns:
      A `Grammar` for `Sampling(grammar=…)`.

    Raises:
      ValueError: no such table, or a state that there is none of.

    Example:
      >>> from jaxspec import Sampling, sampling
      >>> evens = sampling.grammar_of([[1, 0, -1], [0, 1, 1]])  # 2 only behind an odd number of 0s
      >>> Sampling(grammar=evens).grammar.next_states.shape
      (2, 3)
    """
    table, starts = np.asarray(table), np.asarray(start)
    if table.ndim != 2 or 0 in table.shape or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(
            "a grammar's table must be integers [S, V], the state behind each token in each state; "
            f"got {table.dtype}{list(table.shape)}."
        )
    num_states = table.shape[0]
    if table.min() < NO_STATE or table.max() >= num_states:
        raise ValueError(
            f"a grammar's table of {num_states} states must hold 0 … {num_states - 1}, or -1 for a "
            f"token that is not allowed; got {table.min()} … {table.max()}."
        )
    _check_start(starts, num_states)
    columns = np.ascontiguousarray(table.T, np.int32)
    numbers: dict[bytes, int] = {}
    classes = np.array([numbers.setdefault(c.tobytes(), len(numbers)) for c in columns], np.int32)
    _, first = np.unique(classes, return_index=True)
    bits = np.zeros((num_states, -(-columns.shape[0] // _BITS) * _BITS), bool)
    bits[:, : columns.shape[0]] = table != NO_STATE
    words = np.packbits(bits, axis=1, bitorder="little").view("<u4")
    return Grammar(
        jnp.asarray(columns[first].T),
        jnp.asarray(classes),
        jnp.asarray(words.astype(np.uint32)),
        jnp.asarray(starts, jnp.int32),
    )


def join_grammars(grammars: Sequence[Grammar | None]) -> Grammar:
    """One machine for a batch whose rows follow different grammars.

    Args:
      grammars: one a row, with one start each; None: the row writes what it likes.

    Returns:
      A `Grammar` with `start` i32[B].

    Raises:
      ValueError: no grammar at all, or grammars of different vocabularies.

    Example:
      >>> from jaxspec import sampling
      >>> only = [sampling.grammar_of([[0, -1]]), None, sampling.grammar_of([[-1, 0]])]
      >>> sampling.join_grammars(only).start.tolist()
      [0, 1, 2]
    """
    sizes = {grammar.vocab_size for grammar in grammars if grammar is not None}
    if len(sizes) != 1:
        raise ValueError(
            "join_grammars needs grammars of one vocabulary, and None for a free row; got "
            + (f"vocabularies of {sorted(sizes)} tokens." if sizes else "no grammar.")
        )
    (vocab_size,) = sizes
    tables: list[np.ndarray[Any, Any]] = []
    starts, known = [], dict[int, int]()  # the same grammar twice needs one table
    for grammar in grammars:
        if id(grammar) not in known:
            known[id(grammar)] = sum(map(len, tables))
            tables.append(_table(grammar, vocab_size, known[id(grammar)]))
        own = 0 if grammar is None else np.asarray(grammar.start)
        if np.ndim(own):
            raise ValueError("join_grammars needs grammars with one start each.")
        starts.append(known[id(grammar)] + int(own))
    return grammar_of(np.concatenate(tables), starts)


def _table(grammar: Grammar | None, vocab_size: int, offset: int) -> np.ndarray[Any, Any]:
    """The unpacked table, its states counted from `offset` on."""
    if grammar is None:
        return np.full((1, vocab_size), offset, np.int32)
    table = np.asarray(grammar.next_states)[:, np.asarray(grammar.classes)]
    return np.where(table == NO_STATE, NO_STATE, table + offset)


def check(grammar: Any, vocab_size: int) -> Grammar | None:
    """Returns the grammar, or None.

    Raises:
      ValueError: it is none, is of another vocabulary, or starts in a state that there is none of.
    """
    if grammar is None:
        return None
    if not isinstance(grammar, Grammar):
        raise ValueError(
            "grammar must be a jaxspec.sampling.Grammar, from jaxspec.sampling.grammar_of or "
            f"jaxspec_models.grammars; got {type(grammar).__name__}."
        )
    if grammar.vocab_size != vocab_size:
        raise ValueError(
            f"the grammar is over {grammar.vocab_size} tokens and the model has {vocab_size}; "
            "build it for this model's vocab_size (ids that no text has are not allowed)."
        )
    if not isinstance(grammar.start, jax.core.Tracer):
        _check_start(np.asarray(grammar.start), grammar.next_states.shape[0])
    return grammar


def _check_start(start: np.ndarray[Any, Any], num_states: int) -> None:
    is_state = start.ndim <= 1 and start.size and np.issubdtype(start.dtype, np.integer)
    if not is_state or start.min() < 0 or start.max() >= num_states:
        raise ValueError(
            f"a grammar's start must be one of its states, 0 … {num_states - 1}, or one a row; "
            f"got {start.tolist()}."
        )


def _step(grammar: Grammar, state: Array, token: Array) -> Array:
    """The state behind one token: i32[]."""
    behind = grammar.next_states[jnp.maximum(state, 0), grammar.classes[token]]
    return jnp.where(state == NO_STATE, NO_STATE, behind)


def advance(grammar: Grammar, state: Array, tokens: Array, num_tokens: Array) -> Array:
    """The state behind the first `num_tokens` i32[] of `tokens` i32[K], one row's: i32[].

    K is small: the steps are laid out one behind another.
    """
    for slot in range(tokens.shape[0]):
        behind = _step(grammar, state, tokens[slot])
        state = jnp.where(slot < num_tokens, behind, state)
    return state


def read(grammar: Grammar, tokens: Array, start: Array, end: Array) -> Array:
    """The state behind the slots `start` … `end - 1` of `tokens` i32[N], one row's: i32[]."""

    def step(slot: Array, state: Array) -> Array:
        return _step(grammar, state, tokens[slot])

    return lax.fori_loop(start, end, step, grammar.start)


def keep_allowed(logits: Array, grammar: Grammar, state: Array) -> Array:
    """-inf for the tokens of f32[V] that the state i32[] does not allow."""
    words = jnp.where(state == NO_STATE, 0, grammar.allowed[jnp.maximum(state, 0)])
    bits = (words[:, None] >> jnp.arange(_BITS, dtype=jnp.uint32)[None]) & jnp.uint32(1)
    return jnp.where(bits.reshape(-1)[: logits.shape[0]] != 0, logits, -jnp.inf)
