"""How trees are grown, level by level, and how the children of a node are found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxspec import drawing, sampling
from jaxspec.sampling import processing
from jaxspec.trees import Topology
from jaxspec.types import NO_NODE, Draft

Array: TypeAlias = jax.Array

CHILDREN = ("without_replacement", "independent", "top_k")
"""What `jaxspec.types.Verifier.takes_children` names."""


def choose_children(
    keys: Array, log_probs: Array, count: int, children: str
) -> tuple[Array, Array]:
    """Finds the children of one node (unbatched).

    Args:
      keys: key[count], one a child.
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


# (tokens i32[B, M], the nodes they stand at, what is handed on) -> (logits f32[B, M, V] behind
# them, what is handed on).
Feed: TypeAlias = Callable[[Array, Sequence[int], Any], tuple[Array, Any]]


def grow(
    tree: Topology,
    children: str,
    keys: Array,
    options: sampling.Options,
    history: sampling.History,
    num_draft: Array,
    logits: Array,
    feed: Feed,
    state: Any,
) -> tuple[Draft, Any]:
    """Drafts a tree of a fixed shape, one forward a level.

    Every node's q is shaped by the sampling options on its own path. A node is chosen without
    looking at the levels behind it, and none is dropped: what rules for drawn children rest on.

    Args:
      tree: the shape.
      children: one of `CHILDREN`; at temperature 0 (the Python number) they are the likeliest.
      keys: key[B, K].
      options: that shape q.
      history: what they look back on.
      num_draft: i32[B], nodes; 0 for a row that is not drafted for.
      logits: f32[B, 1, V], behind the pending token.
      feed: feeds the drafter one level's nodes that have children.
      state: handed to `feed` and on.

    Returns:
      The `Draft` of every row, and the last state.
    """
    batch, vocab_size = num_draft.shape[0], logits.shape[2]
    children = "top_k" if options.is_greedy else children
    tokens = jnp.zeros((batch, tree.num_nodes), jnp.int32)
    exists = jnp.zeros((batch, tree.num_nodes), bool)
    log_probs = None
    if children != "top_k":
        log_probs = jnp.zeros((batch, tree.num_nodes, vocab_size), jnp.float32)
    inner = inner_nodes(tree)
    nodes, is_there = [-1], jnp.ones((batch, 1), bool)  # whose children come next
    paths = jnp.zeros((batch, 1, 0), jnp.int32)
    for depth, (first, end) in enumerate(tree.levels):
        depths = jnp.full(paths.shape[:2], depth, jnp.int32)
        scores, report = processing.process_nodes(logits, options, history, paths, depths)
        # At temperature 0 the law is a point mass: what comes next is found in the logits.
        laws = report if options.is_greedy else scores
        for i, node in enumerate(nodes):
            slots = [k for k in range(first, end) if tree.parents[k] == node]
            span = slice(slots[0], slots[-1] + 1)
            choose = functools.partial(choose_children, count=len(slots), children=children)
            chosen, found = jax.vmap(choose)(keys[:, span], laws[:, i])
            tokens = tokens.at[:, span].set(chosen)
            exists = exists.at[:, span].set(found & is_there[:, i, None])
            if log_probs is not None:
                log_probs = log_probs.at[:, span].set(laws[:, i, None])
        nodes = [k for k in range(first, end) if k in inner]
        if not nodes:
            break
        at = jnp.array(nodes)
        logits, state = feed(tokens[:, at], nodes, state)
        paths = tokens[:, jnp.array([way_to(tree, node) for node in nodes])]
        is_there = exists[:, at]
    parents = jnp.where(exists, jnp.array(tree.parents, jnp.int32)[None], NO_NODE)
    return Draft(tokens, log_probs, jnp.where(num_draft > 0, num_draft, 0), parents), state


def inner_nodes(tree: Topology) -> list[int]:
    """The nodes that have children: those that a drafter is fed."""
    return sorted(set(tree.parents) - {-1})


def way_to(tree: Topology, node: int) -> list[int]:
    """The nodes from the first level down to `node`, itself included."""
    return [] if node < 0 else [*way_to(tree, tree.parents[node]), node]


def sees_inner(tree: Topology, nodes: Sequence[int]) -> Array:
    """Which inner nodes each of `nodes` sees, itself included: bool[M, number of inner nodes]."""
    inner = inner_nodes(tree)
    return jnp.asarray(
        np.array([[above in way_to(tree, node) for above in inner] for node in nodes], bool)
    )
