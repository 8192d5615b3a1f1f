"""What the rules for trees share: how a draft's tree is read, walked and concluded (unbatched).

Nodes are numbered as the target is fed them: node 0 is the pending token, draft i is node i + 1.
A chain is a tree like others: whatever judges trees judges chains.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import drawing
from jaxspec.types import NO_NODE, NO_TOKEN, Draft, Verdict

Array: TypeAlias = jax.Array


class Tree(NamedTuple):
    """One row's draft, and the target's laws, as a walk over nodes wants them.

    Attributes:
      tokens: i32[K].
      parents: i32[K], the node that each draft is a child of; `NO_NODE` where there is no draft.
      log_probs: f32[K, V], or None: point masses.
      target_log_probs: f32[K + 1, V], behind each node.
    """

    tokens: Array
    parents: Array
    log_probs: Array | None
    target_log_probs: Array

    @classmethod
    def of(cls, draft: Draft, target_log_probs: Array) -> Tree:
        """Leaves out what lies beyond the draft's length, and what is no token."""
        slots = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)
        parents = slots - 1 if draft.parents is None else draft.parents
        exists = (slots < draft.length) & (parents >= NO_TOKEN)
        exists &= (draft.tokens >= 0) & (draft.tokens < target_log_probs.shape[1])
        parents = jnp.where(exists, parents + 1, NO_NODE)
        return cls(draft.tokens, parents.astype(jnp.int32), draft.log_probs, target_log_probs)

    @property
    def num_slots(self) -> int:
        """K."""
        return self.tokens.shape[0]

    def target(self, node: Array) -> Array:
        """The target's law behind a node, f32[V]."""
        return jnp.exp(self.target_log_probs[node])

    def child(self, node: Array, tried: Array) -> Array:
        """The first draft behind slot `tried` that is a child of `node`, i32[]; K: none."""
        slots = jnp.arange(self.num_slots, dtype=jnp.int32)
        is_next = (self.parents == node) & (slots > tried)
        return jnp.min(jnp.where(is_next, slots, self.num_slots))

    def law(self, slot: Array, *, with_replacement: bool) -> Array:
        """The law that a draft was drawn from, given the siblings before it: f32[V].

        Without replacement it is q without their tokens, normalised again. All zero where the
        siblings have used up q: such a draft cannot have been drawn, and no rule accepts it.
        """
        token, size = self.tokens[slot], self.target_log_probs.shape[1]
        if self.log_probs is None:
            return (jnp.arange(size) == token).astype(jnp.float32)
        law = jnp.exp(self.log_probs[slot])
        if with_replacement:
            return law
        slots = jnp.arange(self.num_slots)
        is_elder = (self.parents == self.parents[slot]) & (slots < slot)
        gone = jnp.where(is_elder, self.tokens, size)  # out of range: dropped
        law = law.at[gone].set(0.0, mode="drop")
        return law / jnp.maximum(jnp.sum(law), jnp.finfo(jnp.float32).tiny)


class Walk(NamedTuple):
    """How far a descent has come.

    Attributes:
      node: i32[], the last accepted node.
      num_accepted: i32[], its depth.
      path: i32[K], the accepted drafts; behind them each slot names itself.
    """

    node: Array
    num_accepted: Array
    path: Array

    @classmethod
    def begin(cls, num_slots: int) -> Walk:
        """At the pending token."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, zero, jnp.arange(num_slots, dtype=jnp.int32))

    def to(self, slot: Array) -> Walk:
        """One step down, to a draft that is a child of `node`."""
        path = self.path.at[self.num_accepted].set(slot, mode="drop")
        return Walk(slot + 1, self.num_accepted + 1, path)


def ascend(tree: Tree, node: Array) -> Walk:
    """The walk that ends at a node: its ancestors, found from below."""

    def depth_of(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        node, depth = carry
        return tree.parents[node - 1], depth + 1

    start = (jnp.asarray(node, jnp.int32), jnp.zeros((), jnp.int32))
    _, depth = jax.lax.while_loop(lambda carry: carry[0] > 0, depth_of, start)

    def note(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        node, left, path = carry
        return tree.parents[node - 1], left - 1, path.at[left - 1].set(node - 1)

    path = jnp.arange(tree.num_slots, dtype=jnp.int32)
    _, _, path = jax.lax.while_loop(lambda carry: carry[0] > 0, note, (start[0], depth, path))
    return Walk(start[0], depth, path)


def conclude(tree: Tree, walk: Walk, token: Array, is_fallback: Array | None = None) -> Verdict:
    """The verdict: the drafts of the walk, and `token` i32[] behind them."""
    drafted = jnp.concatenate([tree.tokens[walk.path], jnp.full((1,), NO_TOKEN, jnp.int32)])
    slots = jnp.arange(tree.num_slots + 1)
    tokens = jnp.where(slots < walk.num_accepted, drafted, NO_TOKEN)
    tokens = jnp.where(slots == walk.num_accepted, token, tokens)
    return Verdict(tokens, walk.num_accepted, path=walk.path, is_fallback=is_fallback)


def conclude_with(numbers: Array, tree: Tree, walk: Walk, left: Array) -> Verdict:
    """`conclude` with a token drawn from `left` f32[V], or from the target if that has no mass.

    Args:
      numbers: f32[K + 1, 3], see `jaxspec.verifiers.ratio.uniforms`; [n, 1:] draw behind node n.
      tree: the row's.
      walk: where the token stands.
      left: what the rejected children leave of the target's law there, of any sum.
    """
    has_mass = jnp.sum(left) > 0  # a NaN compares false
    weights = jnp.where(has_mass, left, tree.target(walk.node))
    return conclude(tree, walk, drawing.draw(numbers[walk.node, 1:], weights), ~has_mass)
