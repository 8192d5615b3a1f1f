"""What the target found likely behind each token, drafted when the token comes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import pytree, trees
from jaxspec.trees import Topology
from jaxspec.types import NO_NODE, NO_TOKEN, Context, Draft, Outcome, Signals

Array: TypeAlias = jax.Array

_TREE = trees.from_paths([(0, 0, 0, 0), (0, 0, 1), (0, 1), (1, 0, 0), (2, 0), (3,)])


class RecyclingState(NamedTuple):
    """The drafter's state.

    Attributes:
      table: i32[B, V, n], behind each token the target's likeliest tokens when it was last fed
        that token, the first ones first; `NO_TOKEN` where nothing is known.
      pending: i32[B], the token that was pending in the last round.
    """

    table: Array
    pending: Array


@pytree.dataclass
class TokenRecycling:
    """See `token_recycling`."""

    table: Array  # i32[V, n], what each row begins with
    tree: Topology = pytree.static()

    hidden_layers: ClassVar[tuple[int, ...]] = ()
    children: ClassVar[str] = "top_k"

    @property
    def num_nodes(self) -> int:
        """K."""
        return self.tree.num_nodes

    @property
    def num_top_tokens(self) -> int:
        """N."""
        return self.table.shape[1]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.table.shape[0]

    def in_tree(self, tree: Topology) -> TokenRecycling:
        """The same table, another tree."""
        return token_recycling(self.table.shape[0], tree=tree, table=self.table)

    def init(self, batch: int, capacity: int) -> RecyclingState:
        """A table for each row: rows do not know of each other."""
        del capacity
        table = jnp.tile(self.table[None], (batch, 1, 1))
        return RecyclingState(table, jnp.zeros((batch,), jnp.int32))

    def prefill(
        self,
        state: RecyclingState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> RecyclingState:
        """Learns which token followed which in the prompts, as a first guess."""
        del hidden, start
        # The last pair of a token in the chunk is the one that stays.
        follows = jnp.arange(tokens.shape[1] - 1)[None] < num_new[:, None] - 1
        first = jnp.full((*tokens[:, 1:].shape, self.num_top_tokens), NO_TOKEN, jnp.int32)
        known = jax.vmap(lambda table, tokens: table[tokens])(state.table, tokens[:, :-1])
        is_new = known[:, :, 0] == NO_TOKEN  # what the target said is worth more
        first = first.at[:, :, 0].set(tokens[:, 1:])
        table = _set_last(state.table, tokens[:, :-1], first, follows & is_new)
        return state._replace(table=table)

    def propose(
        self,
        keys: Array,
        state: RecyclingState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, RecyclingState]:
        """Fills the tree from the table: child b of a token is the b-th likeliest behind it."""
        del keys, keep_drafting
        parents = np.array(self.tree.parents)
        ranks = np.array(self.tree.ranks)
        batch = num_draft.shape[0]
        rows = jnp.arange(batch)[:, None]
        pending = jnp.take_along_axis(context.tokens, context.lengths[:, None] - 1, axis=1)
        tokens = jnp.full((batch, self.num_nodes), NO_TOKEN, jnp.int32)
        for first, end in self.tree.levels:
            above = pending if first == 0 else tokens[:, parents[first:end]]
            found = state.table[rows, jnp.maximum(above, 0), ranks[None, first:end]]
            found = jnp.where(above == NO_TOKEN, NO_TOKEN, found)
            tokens = tokens.at[:, first:end].set(found)
        exists = tokens != NO_TOKEN
        draft = Draft(
            jnp.where(exists, tokens, 0),
            None,
            num_draft,
            parents=jnp.where(exists, jnp.asarray(parents, jnp.int32)[None], NO_NODE),
        )
        return draft, state._replace(pending=pending[:, 0])

    def commit(self, state: RecyclingState, outcome: Outcome) -> RecyclingState:
        """Keeps what the target found likely behind every token that it was fed."""
        draft, top = outcome.draft, outcome.top_tokens
        assert top is not None  # it is asked for
        assert draft.parents is not None
        slots = jnp.arange(self.num_nodes)[None]
        is_fed = (draft.parents != NO_NODE) & (slots < draft.length[:, None])
        is_fed = jnp.concatenate([jnp.ones_like(is_fed[:, :1]), is_fed], axis=1)
        is_fed = is_fed & outcome.is_active[:, None] & (top[:, :, 0] != NO_TOKEN)
        fed = jnp.concatenate([state.pending[:, None], draft.tokens], axis=1)
        return state._replace(table=_set_last(state.table, fed, top, is_fed))


def _set_last(table: Array, tokens: Array, new: Array, where: Array) -> Array:
    """Writes rows of the tables, of a token that comes several times the last.

    Args:
      table: i32[B, V, n].
      tokens: i32[B, T].
      new: i32[B, T, n].
      where: bool[B, T].
    """

    def of_row(table: Array, tokens: Array, new: Array, where: Array) -> Array:
        order = jnp.arange(tokens.shape[0])
        later = (tokens[None] == tokens[:, None]) & where[None] & (order[None] > order[:, None])
        at = jnp.where(where & ~jnp.any(later, axis=1), tokens, table.shape[0])
        return table.at[at].set(new, mode="drop")

    return jax.vmap(of_row)(table, tokens, new, where)


def token_recycling(
    vocab_size: int, *, tree: Topology | None = None, num_successors: int = 8, table: Any = None
) -> TokenRecycling:
    """Drafts what the target itself found likely behind each token: for any model, untrained.

    A table remembers, of every token that the target was fed, pending or drafted, the tokens that
    it found likeliest behind it. A tree is filled from the table: the children of a token are its
    remembered successors. They are not drawn: a round costs the drafter next to nothing, and any
    temperature is exact. A row's table begins with what followed what in its prompt.

    The table of a call goes on in the next one with `generate(state=...)`; for other texts, pass
    it on: `token_recycling(V, table=out.state.state.drafter.table[0])`.

    Args:
      vocab_size: V, the target's.
      tree: of `jaxspec.trees`; None: a small one, twelve nodes, four levels.
      num_successors: n, tokens remembered behind each; the table is i32[V, n], 1.6 MB for V =
        49,152 and n = 8.
      table: i32[V, n], what to begin with; -1 where nothing is known. None: nothing is.

    Returns:
      A drafter.

    Raises:
      ValueError: a size is below 1, the tree is none or has nodes with more than `num_successors`
        children, or the table has another shape.

    References:
      Luo et al., Turning Trash into Treasure: Token Recycling, arXiv 2408.08696.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxspec
      >>> from jaxspec.testing import table_model
      >>> lm = table_model(10.0 * jnp.eye(4)[jnp.array([1, 2, 3, 0])], order=1)
      >>> out = jaxspec.generate(lm, [[0]], drafter=token_recycling(4), max_new_tokens=16,
      ...                        sampling=jaxspec.Sampling(temperature=0))
      >>> out.tokens[0, :5].tolist(), int(out.stats.num_spec_steps[0]) < 9
      ([1, 2, 3, 0, 1], True)
    """
    if vocab_size < 1 or num_successors < 1:
        raise ValueError(
            f"vocab_size and num_successors must be at least 1, got {vocab_size} and "
            f"{num_successors}."
        )
    tree = _TREE if tree is None else tree
    if not isinstance(tree, Topology):
        raise ValueError(f"tree must be a jaxspec.trees.Topology, got {type(tree).__name__}.")
    if table is None:
        table = jnp.full((vocab_size, num_successors), NO_TOKEN, jnp.int32)
    table = jnp.asarray(table)
    if table.ndim != 2 or table.shape[0] != vocab_size or table.dtype != jnp.int32:
        raise ValueError(
            f"table must be i32[{vocab_size}, n], got {table.dtype}{list(table.shape)}."
        )
    if max(tree.ranks) >= table.shape[1]:
        raise ValueError(
            f"a node of the tree has {max(tree.ranks) + 1} children, and the table remembers "
            f"{table.shape[1]} successors; raise num_successors."
        )
    return TokenRecycling(table, tree)
