"""Traversal verification: a tree is judged from its leaves, and a rejected leaf falls off."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio, walking

Array: TypeAlias = jax.Array


class _Tour(NamedTuple):
    """Depth first, in the order of the slots: a node is judged behind all its children.

    `lefts` and `weights` are those of the nodes on the way to `node`; what they hold of others
    is garbage.
    """

    node: Array  # i32[]
    is_done: Array  # bool[], whether `node` was accepted
    tried: Array  # i32[K + 1], the last child of each node that was entered; -1: none
    weights: Array  # f32[K + 1], of the text down to each node, given the rejections so far
    lefts: Array  # f32[K + 1, V], the law behind each node, given the rejections so far


@pytree.dataclass
class Traversal:
    """See `traversal`."""

    with_replacement: bool = pytree.static()

    guarantee: ClassVar[str] = "distribution"
    needs_greedy_sampling: ClassVar[bool] = False

    @property
    def takes_children(self) -> tuple[str, ...]:
        """How the siblings of a tree may have been found; see `jaxspec.types.Verifier`."""
        return ("top_k", "independent" if self.with_replacement else "without_replacement")

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        return self.judge(ratio.uniforms(keys), draft, target_log_probs)

    def judge(self, numbers: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """The rule as a function of its randomness; see `jaxspec.verifiers.ratio.uniforms`."""
        tree = walking.Tree.of(draft, target_log_probs)
        if tree.num_slots == 0:
            walk = walking.Walk.begin(0)
            return walking.conclude_with(numbers, tree, walk, tree.target(walk.node))

        def step(_: Array, tour: _Tour) -> _Tour:
            child = tree.child(tour.node, tour.tried[tour.node])
            is_down = (child < tree.num_slots) & ~tour.is_done
            # On the way down `slot` is the child that is entered, on the way up the node's own.
            slot = jnp.where(is_down, child, jnp.maximum(tour.node - 1, 0))
            parent = jnp.where(is_down, tour.node, jnp.maximum(tree.parents[slot], 0))
            left, weight = tour.lefts[parent], tour.weights[parent]
            drafted = tree.law(slot, with_replacement=self.with_replacement)

            token = tree.tokens[slot]
            mine, its = weight * left[token], drafted[token]
            entered = jnp.where((mine > 0) & (its > 0), jnp.minimum(mine / its, 1.0), 0.0)

            passes = (tour.node == 0) | (1.0 - numbers[slot, 0] <= tour.weights[tour.node])
            is_done = tour.is_done | (~is_down & passes)
            is_up = ~is_down & ~is_done
            rest = jnp.maximum(weight * left - drafted, 0.0)
            mass = jnp.sum(rest)
            tiny = jnp.finfo(jnp.float32).tiny
            # S / (S + 1 - w); of the pending token, which stands whatever happens, 1.
            less = jnp.where(parent == 0, 1.0, mass / jnp.maximum(mass + (1.0 - weight), tiny))

            at = jnp.where(is_down, slot + 1, parent)  # whose weight changes
            new_weight = jnp.where(is_down, entered, jnp.where(is_up, less, tour.weights[at]))
            new_left = jnp.where(is_up, rest / jnp.maximum(mass, tiny), left)
            return _Tour(
                node=jnp.where(is_down, slot + 1, jnp.where(is_up, parent, tour.node)),
                is_done=is_done,
                tried=tour.tried.at[parent].set(
                    jnp.where(is_down, child, tour.tried[parent]).astype(jnp.int32)
                ),
                weights=tour.weights.at[at].set(new_weight),
                lefts=tour.lefts.at[parent].set(new_left),
            )

        size = tree.num_slots + 1
        start = _Tour(
            node=jnp.zeros((), jnp.int32),
            is_done=jnp.zeros((), bool),
            tried=jnp.full((size,), -1, jnp.int32),
            weights=jnp.ones((size,), jnp.float32),
            lefts=jnp.exp(target_log_probs),
        )
        # Every node is entered and left once at most.
        tour = lax.fori_loop(0, 2 * tree.num_slots, step, start)
        return walking.conclude_with(
            numbers, tree, walking.ascend(tree, tour.node), tour.lefts[tour.node]
        )


def traversal(*, with_replacement: bool = False) -> Traversal:
    """Block verification for trees: judged from the leaves up, and more of the tree stands.

    A text down to node x behind node v has weight w_x = min(1, w_v p(x) / q(x)). The leaves are
    judged first: a leaf stands, with all above it, with probability w. If not it falls off, and
    its parent's p becomes ∝ max(w_v p - q, 0), of sum S, its weight S / (S + 1 - w_v), and q
    loses x as in `recursive_rejection`, before the next child is entered. A node that has lost
    all its children is a leaf. A token behind the node that stands is drawn from what is left of
    its p. In expectation it accepts at least what `recursive_rejection` accepts; on a chain it is
    `block`.

    Args:
      with_replacement: as for `recursive_rejection`.

    Returns:
      A verifier: keys key[K + 1], draft, target_log_probs f32[K + 1, V] -> `Verdict`.

    References:
      Weng et al., Traversal Verification for Speculative Tree Decoding, arXiv 2505.12398.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> p = jnp.log(jnp.array([[.5, .5], [.2, .8], [.3, .7]]))
      >>> draft = Draft(jnp.array([1, 0]), p[jnp.array([0, 2])], jnp.int32(2),
      ...               parents=jnp.array([-1, 0]))
      >>> p = p[jnp.array([0, 2, 1])]  # q = p along the chain: all is accepted
      >>> verdict = traversal()(jax.random.split(jax.random.key(0), 3), draft, p)
      >>> verdict.tokens[:2].tolist(), int(verdict.num_accepted)
      ([1, 0], 2)
    """
    return Traversal(with_replacement)
