"""Speculative sampling: accept with min(1, p/q), else draw from the residual."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio

Array: TypeAlias = jax.Array


@pytree.dataclass
class Rejection:
    """See `rejection`."""

    guarantee: ClassVar[str] = "distribution"
    needs_greedy_sampling: ClassVar[bool] = False

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        return self.judge(ratio.uniforms(keys), draft, target_log_probs)

    def judge(self, numbers: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """The rule as a function of its randomness; see `jaxspec.verifiers.ratio.uniforms`."""
        # 1 - number lies in (0, 1]: a ratio of 1 always passes and one of 0 never does.
        thresholds = jnp.log1p(-numbers[:-1, 0])
        passes = thresholds <= ratio.log_ratios(draft, target_log_probs)
        passes = passes & (jnp.arange(passes.shape[0]) < draft.length)
        num_accepted = jnp.sum(jnp.cumprod(passes.astype(jnp.int32)), dtype=jnp.int32)
        return ratio.conclude(numbers, draft, target_log_probs, num_accepted)


def rejection() -> Rejection:
    """The rule of speculative sampling, exact for any draft distribution.

    Draft x_i ~ q_i is accepted with probability min(1, p_i(x_i) / q_i(x_i)). At the first
    rejection the correction y ∝ max(p_i - q_i, 0) is drawn; behind a whole draft, a bonus from p.
    A deterministic draft (`log_probs` None) has a one-hot q: accepted with p_i(x_i), else y ∝ p_i
    without x_i. Rows at temperature 0 are point masses and follow the same rule.

    Returns:
      A verifier: keys key[K + 1], draft, target_log_probs f32[K + 1, V] -> `Verdict`.

    References:
      Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> p = jnp.log(jnp.array([[.5, .5, 0.], [.2, .2, .6]]))
      >>> draft = Draft(jnp.array([2]), None, jnp.int32(1))  # p gives token 2 no chance
      >>> verdict = rejection()(jax.random.split(jax.random.key(0), 2), draft, p)
      >>> int(verdict.num_accepted), bool(verdict.tokens[0] < 2), int(verdict.tokens[1])
      (0, True, -1)
    """
    return Rejection()
