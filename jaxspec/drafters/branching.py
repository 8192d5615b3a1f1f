"""How trees are grown, level by level, and how the children of a node are found."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxspec import drawing, sampling
from jaxspec.sampling import processing
from jaxspec.trees import Beam, Topology
from jaxspec.types import NO_NODE, Draft

Array: TypeAlias = jax.Array

CHILDREN = ("without_replacement", "independent", "top_k")
"""What `jaxspec.types.Verifier.takes_children` names."""


def choose_children(
    keys: Array | None, log_probs: Array, count: int, children: str
) -> tuple[Array, Array]:
    """Finds the children of one node (unbatched).

    Args:
      keys: key[count], one a child; None: nothing is drawn.
      log_probs: f32[V], the law q behind the node.
      count: how many.
      children: one of `CHILDREN`.

    Returns:
      i32[count], and bool[count] whether each exists: q may have fewer tokens to offer.
    """
    if children == "top_k":
        best, tokens = drawing.top_k(log_probs, min(count, log_probs.shape[0]))
        missing = count - tokens.shape[0]
        return jnp.pad(tokens, (0, missing)), jnp.pad(best > -jnp.inf, (0, missing))
    assert keys is not None  # children are drawn
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    weights = jnp.exp(log_probs)
    if children == "independent":
        tokens = jax.vmap(drawing.draw, in_axes=(0, None))(uniforms, weights)
        return tokens, jnp.broadcast_to(jnp.sum(weights) > 0, (count,))

    def draw(weights: Array, uniforms: Array) -> tuple[Array, tuple[Array, Array]]:
        exists = jnp.sum(weights) > 0
        token = drawing.draw(uniforms, weights)
        return weights.at[token].set(0.0), (token, exists)

    return lax.scan(draw, weights, uniforms)[1]


class Level(NamedTuple):
    """Nodes of one level that have children: what a drafter is fed next.

    The nodes that are fed stand behind each other in the drafter's cache, level by level.

    Attributes:
      depth: of these nodes; children of the pending token have 1.
      first: how many nodes of the round were fed before these.
      above: i32[M] or i32[B, M], each node's parent among those fed last; 0 on the first level.
      sees: bool[M, W] or bool[B, M, W], which of the round's fed nodes each sees, itself included.
    """

    depth: int
    first: int
    above: Array
    sees: Array


# (tokens i32[B, M], where they stand, what is handed on) -> (logits f32[B, M, V] behind them, what
# is handed on).
Feed: TypeAlias = Callable[[Array, Level, Any], tuple[Array, Any]]


class Grown(NamedTuple):
    """A drafted tree.

    Attributes:
      draft: the `Draft` of every row.
      places: i32[B, K], each node's place among those that were fed; -1: it was not.
      state: what `feed` handed on last.
    """

    draft: Draft
    places: Array
    state: Any


class Given(NamedTuple):
    """What trees are grown from.

    Attributes:
      children: one of `CHILDREN`; at temperature 0 (the Python number) they are the likeliest.
      keys: key[B, K].
      options: that shape q.
      history: what they look back on.
      num_draft: i32[B], nodes; 0 for a row that is not drafted for.
    """

    children: str
    keys: Array
    options: sampling.Options
    history: sampling.History
    num_draft: Array

    @property
    def draws(self) -> bool:
        """Whether children are drawn."""
        return self.children != "top_k" and not self.options.is_greedy

    def laws(self, logits: Array, paths: Array) -> Array:
        """The laws of the children of nodes, f32[B, M, V], shaped by each node's own path.

        Args:
          logits: f32[B, M, V].
          paths: i32[B, M, depth].
        """
        depths = jnp.full(paths.shape[:2], paths.shape[2], jnp.int32)
        scores, report = processing.process_nodes(logits, self.options, self.history, paths, depths)
        # At temperature 0 the law is a point mass: what comes next is found in the logits.
        return report if self.options.is_greedy else scores

    def choose(self, slots: slice, laws: Array, count: int) -> tuple[Array, Array]:
        """Finds the children of nodes in every row, as `choose_children`.

        Args:
          slots: where the children's keys stand, those of the first node first; unused where
            children are not drawn.
          laws: f32[B, M, V].
          count: children of each node.

        Returns:
          i32[B, M, count], bool[B, M, count].
        """
        batch, width = laws.shape[:2]
        if not self.draws:
            best = functools.partial(choose_children, None, count=count, children="top_k")
            return jax.vmap(jax.vmap(best))(laws)
        choose = functools.partial(choose_children, count=count, children=self.children)
        keys = self.keys[:, slots].reshape(batch, width, count)
        return jax.vmap(jax.vmap(choose))(keys, laws)

    def draft(self, tokens: Array, log_probs: Array | None, parents: Array) -> Draft:
        """The `Draft` of every row."""
        return Draft(tokens, log_probs, jnp.maximum(self.num_draft, 0), parents)


def grow(tree: Topology | Beam, given: Given, logits: Array, feed: Feed, state: Any) -> Grown:
    """Drafts a tree, one forward a level.

    Every node's q is shaped by the sampling options on its own path. Which nodes have children is
    decided without looking at the levels behind them, and no node that was drawn is dropped: what
    rules for drawn children rest on.

    Args:
      tree: the shape.
      given: what it is grown from.
      logits: f32[B, 1, V], behind the pending token.
      feed: feeds the drafter one level's nodes that have children.
      state: handed to `feed` and on.

    Returns:
      `Grown`.
    """
    if isinstance(tree, Beam):
        return _grow_beam(tree, given, logits, feed, state)
    batch, vocab_size = given.num_draft.shape[0], logits.shape[2]
    tokens = jnp.zeros((batch, tree.num_nodes), jnp.int32)
    exists = jnp.zeros((batch, tree.num_nodes), bool)
    log_probs = None
    if given.draws:
        log_probs = jnp.zeros((batch, tree.num_nodes, vocab_size), jnp.float32)
    inner = _inner_nodes(tree)
    nodes, is_there = [-1], jnp.ones((batch, 1), bool)  # whose children come next
    paths = jnp.zeros((batch, 1, 0), jnp.int32)
    for first, end in tree.levels:
        laws = given.laws(logits, paths)
        for i, node in enumerate(nodes):
            slots = [k for k in range(first, end) if tree.parents[k] == node]
            span = slice(slots[0], slots[-1] + 1)
            chosen, found = given.choose(span, laws[:, i : i + 1], len(slots))
            tokens = tokens.at[:, span].set(chosen[:, 0])
            exists = exists.at[:, span].set(found[:, 0] & is_there[:, i, None])
            if log_probs is not None:
                log_probs = log_probs.at[:, span].set(laws[:, i, None])
        above, nodes = nodes, [k for k in range(first, end) if k in inner]
        if not nodes:
            break
        level = Level(
            depth=tree.depths[first],
            first=inner.index(nodes[0]),
            above=jnp.array([above.index(tree.parents[node]) for node in nodes]),
            sees=_sees_inner(tree, nodes),
        )
        at = jnp.array(nodes)
        logits, state = feed(tokens[:, at], level, state)
        paths = tokens[:, jnp.array([_way_to(tree, node) for node in nodes])]
        is_there = exists[:, at]
    parents = jnp.where(exists, jnp.array(tree.parents, jnp.int32)[None], NO_NODE)
    place = np.full((tree.num_nodes,), -1, np.int32)
    place[inner] = np.arange(len(inner))
    places = jnp.tile(jnp.asarray(place)[None], (batch, 1))
    return Grown(given.draft(tokens, log_probs, parents), places, state)


def _inner_nodes(tree: Topology) -> list[int]:
    """The nodes that have children: those that a drafter is fed."""
    return sorted(set(tree.parents) - {-1})


def _way_to(tree: Topology, node: int) -> list[int]:
    """The nodes from the first level down to `node`, itself included."""
    return [] if node < 0 else [*_way_to(tree, tree.parents[node]), node]


def _sees_inner(tree: Topology, nodes: list[int]) -> Array:
    """Which inner nodes each of `nodes` sees, itself included: bool[M, number of inner nodes]."""
    inner = _inner_nodes(tree)
    return jnp.asarray(
        np.array([[above in _way_to(tree, node) for above in inner] for node in nodes], bool)
    )


class _Candidates(NamedTuple):
    """The nodes that one level of a beam adds."""

    tokens: Array  # i32[B, M]
    parents: Array  # i32[B, M], among all candidates, or -1
    worth: Array  # f32[B, M], the sum of log q on the way; -inf: the node does not exist
    places: Array  # i32[B, M], among those that were fed, or -1


def _grow_beam(beam: Beam, given: Given, logits: Array, feed: Feed, state: Any) -> Grown:
    """`grow`, of a shape that each row finds by itself."""
    batch, count = given.num_draft.shape[0], beam.num_children
    rows = jnp.arange(batch)[:, None]
    levels: list[_Candidates] = []
    all_laws: list[Array] = []  # f32[B, M, V], if children are drawn
    # The nodes whose children come next: number among the candidates, worth, tokens on the way,
    # the fed nodes that they see.
    nodes, worth = jnp.full((batch, 1), -1), jnp.zeros((batch, 1), jnp.float32)
    paths, sees = jnp.zeros((batch, 1, 0), jnp.int32), jnp.zeros((batch, 1, 0), bool)
    first = num_fed = 0
    for depth, width in enumerate(beam.widths, start=1):
        size = width * count
        laws = given.laws(logits, paths)
        if given.draws:
            all_laws.append(jnp.repeat(laws, count, axis=1))
        tokens, found = given.choose(slice(first, first + size), laws, count)
        # log q, rounded, may lie above 0; and no child is worth more than its parent.
        log_q = jnp.minimum(jnp.take_along_axis(laws, tokens, axis=2), 0.0)
        found = found & jnp.isfinite(worth)[:, :, None]
        level = _Candidates(
            tokens=tokens.reshape(batch, size),
            parents=jnp.repeat(nodes, count, axis=1),
            worth=jnp.where(found, worth[:, :, None] + log_q, -jnp.inf).reshape(batch, size),
            places=jnp.full((batch, size), -1),
        )
        if depth < beam.depth:
            width = beam.widths[depth]
            worth, best = lax.top_k(level.worth, width)
            above = best // count
            fed = num_fed + jnp.arange(width)
            level = level._replace(places=level.places.at[rows, best].set(fed[None]))
            nodes, new = first + best, level.tokens[rows, best]
            paths = jnp.concatenate([paths[rows, above], new[:, :, None]], axis=2)
            own = jnp.broadcast_to(jnp.eye(width, dtype=bool)[None], (batch, width, width))
            sees = jnp.concatenate([sees[rows, above], own], axis=2)
            logits, state = feed(new, Level(depth, num_fed, above, sees), state)
            num_fed += width
        levels.append(level)
        first += size
    tokens, parents, worth, places = (jnp.concatenate(x, axis=1) for x in zip(*levels, strict=True))
    if beam.best is not None:
        # In their order, in which parents stand before their children. Of equal ones the first
        # are taken: a node's parent is among them.
        best = jnp.sort(lax.top_k(worth, beam.best)[1], axis=1)
        number = jnp.full((batch, first), -1).at[rows, best].set(jnp.arange(beam.best)[None])
        parents = jnp.where(parents < 0, -1, number[rows, jnp.maximum(parents, 0)])[rows, best]
        tokens, worth, places = tokens[rows, best], worth[rows, best], places[rows, best]
    parents = jnp.where(jnp.isfinite(worth), parents, NO_NODE)
    log_probs = jnp.concatenate(all_laws, axis=1) if all_laws else None
    return Grown(given.draft(tokens, log_probs, parents), places, state)


def capacity_for(tree: Topology | Beam, capacity: int) -> int:
    """Slots that a drafter's cache needs where the target's has `capacity`.

    Of a beam that keeps its best nodes, more may be fed than the K that the target's has room for.
    """
    most_fed = sum(tree.widths[1:]) if isinstance(tree, Beam) else len(_inner_nodes(tree))
    return capacity + max(0, most_fed - tree.num_nodes)


def check(tree: Any, children: str | None) -> str:
    """Checks what a drafter shall grow.

    Args:
      tree: should be a `Topology` or a `Beam`.
      children: should be one of `CHILDREN`; None: drawn without replacement, where nothing is
        dropped.

    Returns:
      The children.

    Raises:
      ValueError: they are none, or do not go together.
    """
    if not isinstance(tree, (Topology, Beam)):
        raise ValueError(
            f"tree must be a jaxspec.trees.Topology or Beam, got {type(tree).__name__}; "
            "jaxspec.trees.kary, comb and sequoia make topologies."
        )
    drops = isinstance(tree, Beam) and tree.best is not None
    if children is None:
        return "top_k" if drops else "without_replacement"
    if children not in CHILDREN:
        raise ValueError(f"children must be one of {', '.join(CHILDREN)}; got {children!r}.")
    if drops and children != "top_k":
        raise ValueError(
            f"a beam with `best` drops drafted nodes for what they are, which changes the output's "
            f"law where children are drawn ({children!r}); pass children='top_k', or best=None."
        )
    return children
