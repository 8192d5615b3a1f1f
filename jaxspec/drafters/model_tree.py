"""A language model drafts a tree, one forward a level."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.drafters import branching
from jaxspec.trees import Beam, Topology
from jaxspec.types import Branches, Cache, Context, Draft, Outcome, Signals

if TYPE_CHECKING:
    from jaxspec.drafters.model import ModelDrafter, ModelState

Array: TypeAlias = jax.Array


class ModelTreeState(NamedTuple):
    """The drafter's state.

    Attributes:
      text: the cache, and what it holds of the committed text.
      places: i32[B, K], where behind the text the cache holds each node of the round; -1: it was
        not fed.
    """

    text: ModelState
    places: Array


@pytree.dataclass
class ModelTreeDrafter:
    """See `model`. Of a tree, the cache holds the nodes that have children, as they were fed."""

    chain: ModelDrafter
    tree: Topology | Beam = pytree.static()
    children: str = pytree.static()

    hidden_layers: ClassVar[tuple[int, ...]] = ()

    @property
    def num_nodes(self) -> int:
        """K."""
        return self.tree.num_nodes

    @property
    def vocab_size(self) -> int:
        """V of the draft model."""
        return self.chain.vocab_size

    @property
    def max_length(self) -> int | None:
        """The draft model's limit, in tokens."""
        return self.chain.max_length

    def init(self, batch: int, capacity: int) -> ModelTreeState:
        """An empty cache."""
        places = jnp.full((batch, self.num_nodes), -1, jnp.int32)
        capacity = branching.capacity_for(self.tree, capacity)
        return ModelTreeState(self.chain.init(batch, capacity), places)

    def prefill(
        self,
        state: ModelTreeState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> ModelTreeState:
        """Feeds one chunk of the prompts."""
        return state._replace(text=self.chain.prefill(state.text, tokens, hidden, start, num_new))

    def propose(
        self,
        keys: Array,
        state: ModelTreeState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, ModelTreeState]:
        """Drafts level by level, all rows together."""
        del keep_drafting  # the tree's size is fixed
        lengths = context.lengths
        options, history = self.chain.options_for(context)
        logits, cache = self.chain.read_text(state.text, context, num_draft > 0)

        def feed(tokens: Array, level: branching.Level, cache: Cache) -> tuple[Array, Cache]:
            batch, width = tokens.shape
            output, cache = self.chain.lm.forward(
                tokens,
                cache,
                start=lengths + level.first,
                num_new=jnp.full((batch,), width, jnp.int32),
                branches=Branches(
                    prefix=lengths,
                    mask=level.sees,
                    positions=jnp.tile((lengths - 1 + level.depth)[:, None], (1, width)),
                ),
            )
            return output.logits, cache

        given = branching.Given(self.children, keys, options, history, num_draft)
        draft, places, cache = branching.grow(self.tree, given, logits, feed, cache)
        num_cached = jnp.where(num_draft > 0, lengths, state.text.num_cached)
        text = state.text._replace(cache=cache, num_cached=num_cached)
        return draft, ModelTreeState(text, places)

    def commit(self, state: ModelTreeState, outcome: Outcome) -> ModelTreeState:
        """Moves the accepted nodes that are cached together."""
        path = outcome.verdict.path
        assert path is not None  # of a tree
        # Before the round, the text in the cache ended with the pending token at the latest.
        cache, cached = state.text.cache, jnp.minimum(state.text.num_cached, outcome.start + 1)
        size = min(self.tree.depth - 1, self.num_nodes)  # the deepest nodes are not fed
        if size > 0:
            place = jnp.take_along_axis(state.places, path[:, :size], axis=1)
            depths = jnp.arange(size, dtype=jnp.int32)[None]
            is_kept = (place >= 0) & (depths < outcome.num_accepted[:, None])
            cache = self.chain.lm.compact(  # type: ignore[misc]  # `model` asked for it
                cache, outcome.start + 1, jnp.where(is_kept, place, depths)
            )
            cached = cached + jnp.sum(is_kept, axis=1, dtype=jnp.int32)
        cached = jnp.where(outcome.is_active, cached, state.text.num_cached)
        return state._replace(text=state.text._replace(cache=cache, num_cached=cached))
