"""A language model drafts a tree of a fixed shape, one forward a level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import pytree
from jaxspec.drafters import branching
from jaxspec.trees import Topology
from jaxspec.types import Branches, Cache, Context, Draft, Outcome, Signals

if TYPE_CHECKING:
    from jaxspec.drafters.model import ModelDrafter, ModelState

Array: TypeAlias = jax.Array


@pytree.dataclass
class ModelTreeDrafter:
    """See `model`. Of a tree, the cache holds the nodes that have children, in their order."""

    chain: ModelDrafter
    tree: Topology = pytree.static()
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

    def init(self, batch: int, capacity: int) -> ModelState:
        """An empty cache."""
        return self.chain.init(batch, capacity)

    def prefill(
        self,
        state: ModelState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> ModelState:
        """Feeds one chunk of the prompts."""
        return self.chain.prefill(state, tokens, hidden, start, num_new)

    def propose(
        self,
        keys: Array,
        state: ModelState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, ModelState]:
        """Drafts level by level, all rows together."""
        del keep_drafting  # the tree's size is fixed
        lengths = context.lengths
        options, history = self.chain.options_for(context)
        logits, cache = self.chain.read_text(state, context, num_draft > 0)

        def feed(tokens: Array, nodes: Sequence[int], cache: Cache) -> tuple[Array, Cache]:
            batch, width = tokens.shape
            depth = self.tree.depths[nodes[0]]
            output, cache = self.chain.lm.forward(
                tokens,
                cache,
                start=lengths + branching.inner_nodes(self.tree).index(nodes[0]),
                num_new=jnp.full((batch,), width, jnp.int32),
                branches=Branches(
                    prefix=lengths,
                    mask=branching.sees_inner(self.tree, nodes),
                    positions=jnp.tile((lengths - 1 + depth)[:, None], (1, width)),
                ),
            )
            return output.logits, cache

        draft, cache = branching.grow(
            self.tree, self.children, keys, options, history, num_draft, logits, feed, cache
        )
        num_cached = jnp.where(num_draft > 0, lengths, state.num_cached)
        return draft, state._replace(cache=cache, num_cached=num_cached)

    def commit(self, state: ModelState, outcome: Outcome) -> ModelState:
        """Moves the accepted nodes that are cached together."""
        path, inner = outcome.verdict.path, branching.inner_nodes(self.tree)
        assert path is not None  # of a tree
        size = min(len(inner), self.tree.depth)
        if size == 0:
            cached = jnp.minimum(state.num_cached, outcome.start + 1)
            cached = jnp.where(outcome.is_active, cached, state.num_cached)
            return state._replace(num_cached=cached)
        places = np.full((self.tree.num_nodes,), -1, np.int32)  # a leaf has none
        places[inner] = np.arange(len(inner))
        place = jnp.asarray(places)[path[:, :size]]
        depths = jnp.arange(size, dtype=jnp.int32)[None]
        is_kept = (place >= 0) & (depths < outcome.num_accepted[:, None])
        cache = self.chain.lm.compact(  # type: ignore[misc]  # `model` asked for it
            state.cache, outcome.start + 1, jnp.where(is_kept, place, depths)
        )
        cached = jnp.minimum(state.num_cached, outcome.start + 1)
        cached = cached + jnp.sum(is_kept, axis=1, dtype=jnp.int32)
        cached = jnp.where(outcome.is_active, cached, state.num_cached)
        return state._replace(cache=cache, num_cached=cached)
