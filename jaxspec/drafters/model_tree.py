"""A language model drafts a tree of a fixed shape, one forward a level."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import pytree
from jaxspec.drafters.branching import choose_children
from jaxspec.sampling import processing
from jaxspec.trees import Topology
from jaxspec.types import NO_NODE, Branches, Cache, Context, Draft, Outcome, Signals

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
        tree, lm = self.tree, self.chain.lm
        batch = num_draft.shape[0]
        options, history = self.chain.options_for(context)
        children = "top_k" if options.is_greedy else self.children
        logits, cache = self.chain.read_text(state, context, num_draft > 0)

        tokens = jnp.zeros((batch, tree.num_nodes), jnp.int32)
        log_probs = None
        if children != "top_k":
            log_probs = jnp.zeros((batch, tree.num_nodes, lm.vocab_size), jnp.float32)
        exists = jnp.zeros((batch, tree.num_nodes), bool)
        paths = jnp.zeros((batch, 1, 0), jnp.int32)  # to the nodes whose children come next
        nodes, inner = [-1], _inner_nodes(tree)
        is_there = jnp.ones((batch, 1), bool)
        for depth, (first, end) in enumerate(tree.levels, 1):
            depths = jnp.full(paths.shape[:2], depth - 1, jnp.int32)
            scores, report = processing.process_nodes(logits, options, history, paths, depths)
            for i, node in enumerate(nodes):
                slots = [k for k in range(first, end) if tree.parents[k] == node]
                # At temperature 0 the law is a point mass, and the next tokens those of the logits.
                law = report[:, i] if options.is_greedy else scores[:, i]
                span = slice(slots[0], slots[-1] + 1)
                choose = functools.partial(choose_children, count=len(slots), children=children)
                chosen, found = jax.vmap(choose)(keys[:, span], law)
                tokens = tokens.at[:, span].set(chosen)
                exists = exists.at[:, span].set(found & is_there[:, i, None])
                if log_probs is not None:
                    log_probs = log_probs.at[:, span].set(law[:, None])
            nodes = [k for k in range(first, end) if k in inner]
            if not nodes:
                break
            at = jnp.array(nodes)
            logits, cache = self._feed(tokens[:, at], cache, context.lengths, nodes, depth)
            paths = tokens[:, jnp.array([_way(tree, node) for node in nodes])]
            is_there = exists[:, at]
        draft = Draft(
            tokens,
            log_probs,
            jnp.where(num_draft > 0, num_draft, 0),
            parents=jnp.where(exists, jnp.array(tree.parents, jnp.int32)[None], NO_NODE),
        )
        num_cached = jnp.where(num_draft > 0, context.lengths, state.num_cached)
        return draft, state._replace(cache=cache, num_cached=num_cached)

    def _feed(
        self, tokens: Array, cache: Cache, lengths: Array, nodes: list[int], depth: int
    ) -> tuple[Array, Cache]:
        """One level's nodes that have children, i32[B, M]: the logits f32[B, M, V] behind them."""
        inner = _inner_nodes(self.tree)
        mask = np.array(
            [[above in _way(self.tree, node) for above in inner] for node in nodes], bool
        )
        batch, width = tokens.shape
        output, cache = self.chain.lm.forward(
            tokens,
            cache,
            start=lengths + inner.index(nodes[0]),
            num_new=jnp.full((batch,), width, jnp.int32),
            branches=Branches(
                prefix=lengths,
                mask=jnp.asarray(mask),
                positions=jnp.tile((lengths - 1 + depth)[:, None], (1, width)),
            ),
        )
        return output.logits, cache

    def commit(self, state: ModelState, outcome: Outcome) -> ModelState:
        """Moves the accepted nodes that are cached together."""
        path, inner = outcome.verdict.path, _inner_nodes(self.tree)
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


def _inner_nodes(tree: Topology) -> list[int]:
    """The nodes that have children."""
    return sorted(set(tree.parents) - {-1})


def _way(tree: Topology, node: int) -> list[int]:
    """The nodes from the first level down to `node`, itself included."""
    return [] if node < 0 else [*_way(tree, tree.parents[node]), node]
