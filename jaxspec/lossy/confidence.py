"""A fast path for drafts that the target is sure of."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio

Array: TypeAlias = jax.Array


@pytree.dataclass
class Confidence:
    """See `confidence`."""

    threshold: Any

    guarantee: ClassVar[str] = "none"

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        return self.judge(ratio.uniforms(keys), draft, target_log_probs)

    def judge(self, numbers: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """The rule as a function of its randomness; see `jaxspec.verifiers.ratio.uniforms`."""
        ratios = ratio.log_ratios(draft, target_log_probs)
        slots = jnp.arange(draft.tokens.shape[0])
        target = target_log_probs[slots, draft.tokens]
        is_sure = (target >= jnp.log(jnp.asarray(self.threshold, jnp.float32))) & (
            ratios > -jnp.inf  # else it is no token, or its own q cannot draw it
        )
        passes = is_sure | (jnp.log1p(-numbers[:-1, 0]) <= ratios)
        passes = passes & (jnp.arange(passes.shape[0]) < draft.length)
        num_accepted = jnp.sum(jnp.cumprod(passes.astype(jnp.int32)), dtype=jnp.int32)
        return ratio.conclude(numbers, draft, target_log_probs, num_accepted)


def confidence(threshold: float = 0.5) -> Confidence:
    """Accepts any draft that the target gives a probability of at least `threshold`.

    Other drafts are judged as by `verifiers.rejection`. Above a threshold of 1 the two are one.

    Args:
      threshold: f32 > 0.

    Returns:
      A verifier with `guarantee` "none".

    Raises:
      ValueError: a Python number that is not above 0.

    References:
      A threshold on the target's probability as in the fast path of several serving systems; the
      test behind it is that of Leviathan et al., arXiv 2211.17192.

    Example:
      >>> from jaxspec import testing
      >>> testing.check_verifier(confidence(0.5)).passed
      False
    """
    if isinstance(threshold, (int, float)) and not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}.")
    return Confidence(threshold)
