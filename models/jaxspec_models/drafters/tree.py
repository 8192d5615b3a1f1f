"""Trained drafters that draft trees: cell by cell, each behind its parent's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.drafters import branching
from jaxspec.trees import Beam, Topology
from jaxspec.types import Branches, Context, Draft, Outcome, Signals
from jaxspec_models import layers
from jaxspec_models.drafters import parts, reading

Array: TypeAlias = jax.Array


@pytree.dataclass
class ReaderTreeDrafter:
    """A `reading.ReaderDrafter` that drafts trees, cell by cell; see `in_trees`."""

    chain: reading.ReaderDrafter
    tree: Topology | Beam = pytree.static()
    children: str = pytree.static()

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The layers it taps."""
        return self.chain.hidden_layers

    @property
    def num_nodes(self) -> int:
        """K."""
        return self.tree.num_nodes

    @property
    def vocab_size(self) -> int:
        """V of the target."""
        return self.chain.vocab_size

    def init(self, batch: int, capacity: int) -> reading.ReaderState:
        """An empty cache of its own layers."""
        return self.chain.init(batch, branching.capacity_for(self.tree, capacity))

    def prefill(
        self,
        state: reading.ReaderState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> reading.ReaderState:
        """Takes in the features of one chunk of the prompts."""
        return self.chain.prefill(state, tokens, hidden, start, num_new)

    def propose(
        self,
        keys: Array,
        state: reading.ReaderState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, reading.ReaderState]:
        """Drafts level by level: each cell goes on from what its parent's has made."""
        del keep_drafting  # the tree's size is fixed
        own, model = self.chain, self.chain.model()
        start = context.lengths - 1
        pending = context.tokens[jnp.arange(num_draft.shape[0]), start]

        def read(x: Array) -> Array:
            logits = parts.logits(own.head, model.norm(x))
            return parts.spread(logits, own.draft_ids, own.vocab_size)

        def feed(
            tokens: Array, level: branching.Level, carry: tuple[layers.KVCache, Array]
        ) -> tuple[Array, tuple[layers.KVCache, Array]]:
            cache, above = carry  # what the cells of the level above have made
            batch, count = tokens.shape
            at = jnp.broadcast_to(level.above, (batch, count))
            last = jnp.take_along_axis(above, at[:, :, None], axis=1)
            # The pending token's cell stands before them, and is seen by all.
            ahead = [(0, 0)] * (level.sees.ndim - 1)
            mask = jnp.pad(level.sees, (*ahead, (1, 0)), constant_values=True)
            x, cache = reading.forward(
                model,
                cache,
                model.guess(own.embed(tokens), last),
                start + 1 + level.first,
                Branches(start, mask, jnp.tile((start + level.depth)[:, None], (1, count))),
            )
            return read(x), (cache, x)

        x, cache = reading.forward(
            model, state.cache, model.guess(own.embed(pending), state.last)[:, None], start
        )
        given = branching.Given(self.children, keys, context.sampling, context.history, num_draft)
        draft, _, (cache, _) = branching.grow(self.tree, given, read(x), feed, (cache, x))
        return draft, state._replace(cache=cache)

    def commit(self, state: reading.ReaderState, outcome: Outcome) -> reading.ReaderState:
        """Takes in the features of the accepted path."""
        path = outcome.verdict.path
        assert path is not None  # of a tree
        nodes = jnp.pad(path[:, : self.tree.depth] + 1, ((0, 0), (1, 0)))
        hidden = tuple(
            jnp.take_along_axis(state, nodes[:, :, None], axis=1) for state in outcome.hidden
        )
        return reading.take_in(
            self.chain.model(), state, hidden, outcome.start, outcome.num_emitted
        )


def in_trees(
    drafter: reading.ReaderDrafter, tree: Topology | Beam, *, children: str | None = None
) -> ReaderTreeDrafter:
    """Makes a trained EAGLE-3 drafter draft trees.

    Args:
      drafter: from `jaxspec_models.load_drafter`.
      tree: of `jaxspec.trees`.
      children: as for `jaxspec.drafters.model`.

    Returns:
      A drafter for `jaxspec.generate`.

    Raises:
      ValueError: the drafter is of another method, or was trained for less depth; `children` do
        not go with the tree.

    Example:
      >>> import jaxspec_models
      >>> model, tokenizer = jaxspec_models.load("smollm2-135m")  # doctest: +SKIP
      >>> drafter = jaxspec_models.load_drafter("drafter/drafter", model)  # doctest: +SKIP
      >>> drafter = jaxspec_models.in_trees(drafter, trees.comb((3, 2, 1)))  # doctest: +SKIP
    """
    if not isinstance(drafter, reading.ReaderDrafter) or drafter.config.method != "eagle3":
        raise ValueError(
            "trees are drafted cell by cell: in_trees takes a drafter of method 'eagle3', as "
            "jaxspec_models.load_drafter returns it."
        )
    children = branching.check(tree, children)
    if tree.depth > drafter.max_draft_tokens:
        raise ValueError(
            f"the tree is {tree.depth} deep, and this drafter was trained for at most "
            f"{drafter.max_draft_tokens} drafts behind each other."
        )
    return ReaderTreeDrafter(drafter, tree, children)
