"""Drafts copied from the row's own text: no model, no host code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.trees import Topology
from jaxspec.types import NO_NODE, Context, Draft, Outcome, Signals

Array: TypeAlias = jax.Array


@pytree.dataclass
class PromptLookup:
    """See `prompt_lookup`. It keeps no state: all it needs is in the context."""

    max_ngram: int = pytree.static()
    min_ngram: int = pytree.static()

    hidden_layers: ClassVar[tuple[int, ...]] = ()

    def in_tree(self, tree: Topology) -> PromptLookupTree:
        """Several matches at once."""
        return PromptLookupTree(self.max_ngram, self.min_ngram, tree)

    def init(self, batch: int, capacity: int) -> tuple[()]:
        """Nothing."""
        del batch, capacity
        return ()

    def prefill(
        self, state: Any, tokens: Array, hidden: tuple[Array, ...], start: Array, num_new: Array
    ) -> Any:
        """Nothing to take in: the context holds the prompt."""
        del tokens, hidden, start, num_new
        return state

    def propose(
        self,
        keys: Array,
        state: Any,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, Any]:
        """Copies what followed the last match, a point mass for each slot."""
        del keep_drafting  # copying a token costs nothing that stopping early would save
        num_slots = keys.shape[1]
        tokens, found = jax.vmap(
            lambda row, length: lookup(
                row,
                length,
                num_tokens=num_slots,
                max_ngram=self.max_ngram,
                min_ngram=self.min_ngram,
            )
        )(context.tokens, context.lengths)
        return Draft(tokens, None, jnp.where(found, num_draft, 0)), state

    def commit(self, state: Any, outcome: Outcome) -> Any:
        """Nothing to remember."""
        del outcome
        return state


def lookup(
    tokens: Array, length: Array, *, num_tokens: int, max_ngram: int, min_ngram: int
) -> tuple[Array, Array]:
    """Continues a text as it went on where its end occurred before (unbatched).

    The longest n-gram decides, up to `max_ngram`; of several matches the last. A match so near
    the end that its continuation runs into the end goes on periodically: the drafts themselves
    count as text.

    Args:
      tokens: i32[N]; slots at or beyond `length` hold garbage.
      length: i32[].
      num_tokens: how many tokens to copy.
      max_ngram: the longest n-gram compared.
      min_ngram: the shortest n-gram that counts as a match.

    Returns:
      i32[num_tokens], and bool[] whether there was a match (the tokens are garbage otherwise).

    Example:
      >>> import jax.numpy as jnp
      >>> text = jnp.array([5, 6, 7, 8, 5, 6, 0, 0])
      >>> tokens, found = lookup(text, jnp.int32(6), num_tokens=3, max_ngram=2, min_ngram=1)
      >>> tokens.tolist(), bool(found)
      ([7, 8, 5], True)
    """
    size, last = tokens.shape[0], length - 1
    rank = _rank(tokens, length, max_ngram=max_ngram, min_ngram=min_ngram)
    best = jnp.argmax(rank)
    period = jnp.maximum(last - best, 1)
    source = best + 1 + jnp.arange(num_tokens) % period
    return tokens[jnp.minimum(source, size - 1)], rank[best] >= 0


def lookup_tree(
    tokens: Array, length: Array, tree: Topology, *, max_ngram: int, min_ngram: int
) -> tuple[Array, Array]:
    """Continues a text in several ways, as it went on where its end occurred before (unbatched).

    The children of a node are what followed its path in the matches that went on like it, each
    token once, that of the best match first.

    Args:
      tokens: i32[N]; slots at or beyond `length` hold garbage.
      length: i32[].
      tree: the shape.
      max_ngram: as in `lookup`.
      min_ngram: as in `lookup`.

    Returns:
      i32[K], and bool[K] whether there is such a continuation.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxspec import trees
      >>> text = jnp.array([5, 6, 7, 5, 8, 9, 5, 0])
      >>> tokens, found = lookup_tree(text, jnp.int32(7), trees.kary((3, 1)), max_ngram=2,
      ...                             min_ngram=1)
      >>> tokens[found].tolist()  # behind 5: first 8, as last time, or else 6
      [8, 6, 9, 7]
    """
    size, last = tokens.shape[0], length - 1
    rank = _rank(tokens, length, max_ngram=max_ngram, min_ngram=min_ngram)
    ends = jnp.arange(size)
    period = jnp.maximum(last - ends, 1)
    followed: list[Array] = []  # of each node, the matches that went on along its path
    chosen: list[Array] = []
    exists: list[Array] = []
    for node, (parent, depth) in enumerate(zip(tree.parents, tree.depths, strict=True)):
        source = ends + 1 + (depth - 1) % period
        next_tokens = tokens[jnp.minimum(source, size - 1)]
        can_be = rank >= 0 if parent < 0 else followed[parent]
        open_ = can_be
        for elder in range(node):
            if tree.parents[elder] == parent:
                open_ = open_ & (next_tokens != chosen[elder])
        best = jnp.argmax(jnp.where(open_, rank, -1))
        chosen.append(next_tokens[best])
        exists.append(jnp.any(open_))
        followed.append(can_be & (next_tokens == next_tokens[best]) & exists[-1])
    return jnp.stack(chosen), jnp.stack(exists)


def _rank(tokens: Array, length: Array, *, max_ngram: int, min_ngram: int) -> Array:
    """How good a match ends at each place, i32[N]: the longest first, then the last; -1: none."""
    size = tokens.shape[0]
    ends = jnp.arange(size)  # where an earlier n-gram may end
    last = length - 1
    run = jnp.ones((size,), bool)
    num_matching = jnp.zeros((size,), jnp.int32)
    for n in range(max_ngram):
        # Token `end - n` against token `last - n`; neither may lie before the text.
        earlier = jnp.roll(tokens, n)
        run = run & (ends >= n) & (last >= n) & (earlier == tokens[jnp.maximum(last - n, 0)])
        num_matching = num_matching + run.astype(jnp.int32)
    is_match = (ends < last) & (num_matching >= min_ngram)
    return jnp.where(is_match, num_matching * size + ends, -1)


@pytree.dataclass
class PromptLookupTree:
    """See `prompt_lookup`: several matches at once."""

    max_ngram: int = pytree.static()
    min_ngram: int = pytree.static()
    tree: Topology = pytree.static()

    hidden_layers: ClassVar[tuple[int, ...]] = ()
    children: ClassVar[str] = "top_k"

    @property
    def num_nodes(self) -> int:
        """K."""
        return self.tree.num_nodes

    def init(self, batch: int, capacity: int) -> tuple[()]:
        """Nothing."""
        del batch, capacity
        return ()

    def prefill(
        self, state: Any, tokens: Array, hidden: tuple[Array, ...], start: Array, num_new: Array
    ) -> Any:
        """Nothing to take in: the context holds the prompt."""
        del tokens, hidden, start, num_new
        return state

    def propose(
        self,
        keys: Array,
        state: Any,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, Any]:
        """Copies what followed the matches, a point mass for each node."""
        del keys, keep_drafting
        tokens, exists = jax.vmap(
            lambda row, length: lookup_tree(
                row, length, self.tree, max_ngram=self.max_ngram, min_ngram=self.min_ngram
            )
        )(context.tokens, context.lengths)
        parents = jnp.array(self.tree.parents, jnp.int32)[None]
        length = jnp.where(jnp.any(exists, axis=1), num_draft, 0)
        return Draft(tokens, None, length, jnp.where(exists, parents, NO_NODE)), state

    def commit(self, state: Any, outcome: Outcome) -> Any:
        """Nothing to remember."""
        del outcome
        return state


def prompt_lookup(
    max_ngram: int = 3, min_ngram: int = 1, *, tree: Topology | None = None
) -> PromptLookup | PromptLookupTree:
    """Drafts what followed the last occurrence of the text's end, in prompt and output.

    Deterministic: each draft is a point mass. It pays where the output repeats the prompt or
    itself, and costs almost nothing.

    Args:
      max_ngram: the longest n-gram to look for, in tokens.
      min_ngram: the shortest that counts as a match, in tokens.
      tree: drafts what followed in several matches, a tree of this shape (`jaxspec.trees`), in the
        place of a chain from the best one; K is its number of nodes then.

    Returns:
      A drafter.

    Raises:
      ValueError: not whole numbers 1 ≤ min_ngram ≤ max_ngram; the tree is no `Topology`.

    References:
      Saxena, Prompt Lookup Decoding (2023); Yang et al., LLMA, arXiv 2304.04487.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec.types import Context
      >>> drafter = prompt_lookup()
      >>> context = Context(jnp.array([[3, 1, 4, 3, 0, 0]]), jnp.array([4]), None, None)
      >>> keys = jax.random.split(jax.random.key(0), (1, 2))
      >>> draft, _ = drafter.propose(keys, (), context, jnp.array([2]), lambda signals: True)
      >>> draft.tokens.tolist(), draft.length.tolist()
      ([[1, 4]], [2])
    """
    is_whole = isinstance(min_ngram, int) and isinstance(max_ngram, int)
    if not is_whole or not 1 <= min_ngram <= max_ngram:
        raise ValueError(
            "prompt_lookup needs whole numbers 1 ≤ min_ngram ≤ max_ngram, got "
            f"min_ngram={min_ngram!r} and max_ngram={max_ngram!r}."
        )
    if tree is None:
        return PromptLookup(max_ngram, min_ngram)
    if not isinstance(tree, Topology):
        raise ValueError(f"tree must be a jaxspec.trees.Topology, got {type(tree).__name__}.")
    return PromptLookupTree(max_ngram, min_ngram, tree)
