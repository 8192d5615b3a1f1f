"""Recursive rejection: a node's children are tried in turn, each against what is left of p."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio, walking

Array: TypeAlias = jax.Array


class _Trial(NamedTuple):
    walk: walking.Walk
    slot: Array  # i32[], the child tried next; K: none
    left: Array  # f32[V], the law of the token behind the node, given the rejections


@pytree.dataclass
class RecursiveRejection:
    """See `recursive_rejection`."""

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
        walk = walking.Walk.begin(tree.num_slots)
        if tree.num_slots == 0:
            return walking.conclude_with(numbers, tree, walk, tree.target(walk.node))

        def try_child(trial: _Trial) -> _Trial:
            walk, slot, left = trial
            drafted = tree.law(slot, with_replacement=self.with_replacement)
            passes = does_pass(numbers[slot, 0], left, drafted, tree.tokens[slot])
            rest = remainder(left, drafted)
            down = walk.to(slot)
            walk = jax.tree.map(lambda new, old: jnp.where(passes, new, old), down, walk)
            left = jnp.where(passes, tree.target(walk.node), rest)
            return _Trial(walk, tree.child(walk.node, slot), left)

        start = _Trial(walk, tree.child(walk.node, jnp.int32(-1)), tree.target(walk.node))
        walk, _, left = lax.while_loop(lambda trial: trial.slot < tree.num_slots, try_child, start)
        return walking.conclude_with(numbers, tree, walk, left)


def does_pass(
    number: Array, target: Array, drafted: Array, token: Array, weight: Array | float = 1.0
) -> Array:
    """Whether a draft is accepted: with min(1, w · p(x) / q(x)), never where either is 0."""
    # 1 - number lies in (0, 1]: a ratio of 1 always passes. A NaN compares false.
    mine, its = weight * target[token], drafted[token]
    return ((1.0 - number) * its <= mine) & (mine > 0) & (its > 0)


def remainder(target: Array, drafted: Array) -> Array:
    """max(p - q, 0), normalised; all zero where nothing is left: f32[V]."""
    left = jnp.maximum(target - drafted, 0.0)
    return left / jnp.maximum(jnp.sum(left), jnp.finfo(jnp.float32).tiny)


def recursive_rejection(*, with_replacement: bool = False) -> RecursiveRejection:
    """Speculative sampling for trees: the children of a node get their chances one by one.

    Child x ~ q is accepted with probability min(1, p(x) / q(x)). If it is rejected, p becomes
    norm(max(p - q, 0)), and q loses x and is normalised again, as the next child was drawn
    without x; children drawn independently (SpecInfer) leave q as it is. When all are rejected,
    the token is drawn from what is left of p. Without replacement no child is wasted on a token
    that has been rejected: more is accepted.

    On a chain it is the rule of `rejection`; for children that are not drawn, of `descent`.

    Args:
      with_replacement: how the drafter drew the siblings: independently of each other, or each
        without those before it (Gumbel top-k). The wrong answer changes the output's law;
        `generate` refuses it.

    Returns:
      A verifier: keys key[K + 1], draft, target_log_probs f32[K + 1, V] -> `Verdict`.

    References:
      Jeon et al., Recursive Speculative Decoding, arXiv 2402.14160; Chen et al., Sequoia,
      arXiv 2402.12374; with replacement: Miao et al., SpecInfer, arXiv 2305.09781.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> p = jnp.log(jnp.array([[0., .5, .5], [.2, .2, .6], [.2, .2, .6]]))
      >>> q = jnp.log(jnp.full((2, 3), 1 / 3))
      >>> draft = Draft(jnp.array([0, 1]), q, jnp.int32(2), parents=jnp.array([-1, -1]))
      >>> verdict = recursive_rejection()(jax.random.split(jax.random.key(0), 3), draft, p)
      >>> int(verdict.num_accepted), int(verdict.tokens[0])  # p leaves 1 and 2, and so does q
      (1, 1)
    """
    return RecursiveRejection(with_replacement)
