"""Target-sample descent: draw from the target, and go down while the draw is a child."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import drawing, pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio, walking

Array: TypeAlias = jax.Array


@pytree.dataclass
class Descent:
    """See `descent`."""

    guarantee: ClassVar[str] = "distribution"
    needs_greedy_sampling: ClassVar[bool] = False
    takes_children: ClassVar[tuple[str, ...]] = ("top_k", "independent", "without_replacement")

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        numbers, tree = ratio.uniforms(keys), walking.Tree.of(draft, target_log_probs)

        def draw(node: Array) -> Array:
            return drawing.draw(numbers[node, 1:], tree.target(node))

        return descend(tree, draw)


def descend(tree: walking.Tree, choose: Callable[[Array], Array]) -> Verdict:
    """Follows the tokens that `choose` names behind each node, while they are drafted."""

    def look(walk: walking.Walk) -> tuple[Array, Array]:
        token = choose(walk.node)
        is_drafted = (tree.parents == walk.node) & (tree.tokens == token)
        slot = jnp.where(jnp.any(is_drafted), jnp.argmax(is_drafted), tree.num_slots)
        return token, slot.astype(jnp.int32)

    if tree.num_slots == 0:
        walk = walking.Walk.begin(0)
        return walking.conclude(tree, walk, choose(walk.node))

    def step(carry: tuple[walking.Walk, Array, Array]) -> tuple[walking.Walk, Array, Array]:
        walk, _, slot = carry
        walk = walk.to(slot)
        return walk, *look(walk)

    walk = walking.Walk.begin(tree.num_slots)
    start = (walk, *look(walk))
    walk, token, _ = lax.while_loop(lambda carry: carry[2] < tree.num_slots, step, start)
    return walking.conclude(tree, walk, token)


def descent() -> Descent:
    """Draws the next token from the target, and goes down the tree while that token is a child.

    Exact for any tree, however its tokens were found, and the best rule for children that are
    not drawn (a drafter's top-k, matches in the text): a node's children S hold the next token
    with probability p(S), and no rule does better for a fixed S. At temperature 0 it is `greedy`.

    Returns:
      A verifier: keys key[K + 1], draft, target_log_probs f32[K + 1, V] -> `Verdict`.

    References:
      Miao et al., SpecInfer, arXiv 2305.09781 (naive sampling); Li et al., arXiv 2406.16858.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> p = jnp.log(jnp.array([[.5, .5, 0.], [0., 0., 1.], [0., 1., 0.]]))
      >>> draft = Draft(jnp.array([0, 1]), None, jnp.int32(2), parents=jnp.array([-1, -1]))
      >>> verdict = descent()(jax.random.split(jax.random.key(0), 3), draft, p)
      >>> verdict.tokens.tolist() in ([0, 2, -1], [1, 1, -1])
      True
    """
    return Descent()
