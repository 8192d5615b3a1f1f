"""K-SEQ: the children of a node share one acceptance threshold, chosen for their number."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio, walking
from jaxspec.verifiers.recursive_rejection import recursive_rejection

Array: TypeAlias = jax.Array

_STEPS = 24  # of the bisection: as many as a float32 has bits


class _Level(NamedTuple):
    walk: walking.Walk
    is_done: Array  # bool[], no child of the node was accepted
    left: Array  # f32[V], what the rejections leave of the target's law


@pytree.dataclass
class KSeq:
    """See `k_seq`."""

    guarantee: ClassVar[str] = "distribution"
    needs_greedy_sampling: ClassVar[bool] = False
    takes_children: ClassVar[tuple[str, ...]] = ("independent",)

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        return self.judge(ratio.uniforms(keys), draft, target_log_probs)

    def judge(self, numbers: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """The rule as a function of its randomness; see `jaxspec.verifiers.ratio.uniforms`."""
        log_probs = draft.log_probs
        if log_probs is None or draft.tokens.shape[0] == 0:
            # Point masses that differ are not independent draws from one law.
            return recursive_rejection().judge(numbers, draft, target_log_probs)
        tree = walking.Tree.of(draft, target_log_probs)
        slots = jnp.arange(tree.num_slots)
        own = jnp.exp(log_probs[slots, jnp.maximum(tree.tokens, 0)])

        def go_down(level: _Level) -> _Level:
            walk = level.walk
            is_child = tree.parents == walk.node
            first = jnp.minimum(tree.child(walk.node, jnp.int32(-1)), tree.num_slots - 1)
            target, drafted = tree.target(walk.node), jnp.exp(log_probs[first])
            rho, left = share(target, drafted, jnp.sum(is_child))
            mine = target[tree.tokens] / rho
            passes = ((1.0 - numbers[:-1, 0]) * own <= mine) & (mine > 0) & (own > 0)
            passes = passes & is_child
            any_passes = jnp.any(passes)
            down = walk.to(jnp.argmax(passes).astype(jnp.int32))
            walk = jax.tree.map(lambda new, old: jnp.where(any_passes, new, old), down, walk)
            left = jnp.where(jnp.any(is_child), left, target)
            return _Level(walk, ~any_passes, left)

        walk = walking.Walk.begin(tree.num_slots)
        start = _Level(walk, jnp.zeros((), bool), tree.target(walk.node))
        walk, _, left = lax.while_loop(lambda level: ~level.is_done, go_down, start)
        return walking.conclude_with(numbers, tree, walk, left)


def share(target: Array, drafted: Array, count: Array) -> tuple[Array, Array]:
    """How `count` i32[] children drawn from one q share the target's law.

    Returns:
      ρ f32[], the least (to a float32's bits) with 1 - (1 - β)^k ≤ ρ β, where β(ρ) is the
      probability that a child is accepted; the residual f32[V]. Exact for every such ρ: the least
      one accepts most.
    """
    count = jnp.maximum(count, 1).astype(jnp.float32)

    def accepted(rho: Array) -> tuple[Array, Array]:
        """β, and the probability that any of the children is accepted."""
        beta = jnp.minimum(jnp.sum(jnp.minimum(target / rho, drafted)), 1.0)
        return beta, -jnp.expm1(count * jnp.log1p(-beta))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        beta, some = accepted(middle)
        is_enough = some <= middle * beta
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    one = jnp.ones((), jnp.float32)
    _, rho = lax.fori_loop(0, _STEPS, halve, (one, count))
    beta, some = accepted(rho)
    # min(p / ρ, q) some / β ≤ p, as some ≤ ρ β.
    taken = jnp.minimum(target / rho, drafted) * (some / jnp.where(beta > 0, beta, 1.0))
    return rho, jnp.maximum(target - taken, 0.0)


def k_seq() -> KSeq:
    """For k children drawn independently from one q: each is tried against p / ρ.

    With β(ρ) = Σ min(p / ρ, q), the least ρ in [1, k] with 1 - (1 - β)^k ≤ ρ β is found by
    bisection; a child x is accepted with min(1, p(x) / (ρ q(x))), and when all are rejected the
    token is y ∝ p - min(p / ρ, q) (1 - (1 - β)^k) / β. It accepts at least 1 - 1/e of what is
    possible for independent children. Children that are not drawn are judged by `descent`'s law.

    Returns:
      A verifier: keys key[K + 1], draft, target_log_probs f32[K + 1, V] -> `Verdict`.

    References:
      Sun et al., SpecTr, arXiv 2310.15141.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> p = jnp.log(jnp.array([[.5, .5], [.2, .8], [.3, .7]]))
      >>> draft = Draft(jnp.array([1, 1]), p[:1].repeat(2, 0), jnp.int32(2),
      ...               parents=jnp.array([-1, -1]))  # both ~ p: one of them stands
      >>> verdict = k_seq()(jax.random.split(jax.random.key(0), 3), draft, p)
      >>> int(verdict.num_accepted), int(verdict.tokens[0])
      (1, 1)
    """
    return KSeq()
