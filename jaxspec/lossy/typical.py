"""Typical acceptance: what is not too unlikely for how sure the target is."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio

Array: TypeAlias = jax.Array


@pytree.dataclass
class Typical:
    """See `typical`."""

    epsilon: Any
    delta: Any

    guarantee: ClassVar[str] = "none"

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        return self.judge(ratio.uniforms(keys), draft, target_log_probs)

    def judge(self, numbers: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """The rule as a function of its randomness; see `jaxspec.verifiers.ratio.uniforms`."""
        laws = target_log_probs[:-1]
        probs = jnp.exp(laws)
        entropies = -jnp.sum(jnp.where(probs > 0, probs * laws, 0.0), axis=1)
        thresholds = jnp.minimum(
            jnp.asarray(self.epsilon, jnp.float32),
            jnp.asarray(self.delta, jnp.float32) * jnp.exp(-entropies),
        )
        slots = jnp.arange(draft.tokens.shape[0])
        is_token = ratio.log_ratios(draft, target_log_probs) > -jnp.inf
        passes = is_token & (probs[slots, draft.tokens] > thresholds)
        passes = passes & (jnp.arange(passes.shape[0]) < draft.length)
        num_accepted = jnp.sum(jnp.cumprod(passes.astype(jnp.int32)), dtype=jnp.int32)
        # Behind what is accepted, the target draws, as behind a whole draft.
        accepted = draft._replace(length=num_accepted)
        return ratio.conclude(numbers, accepted, target_log_probs, num_accepted)


def typical(epsilon: float = 0.3, delta: float = 0.09) -> Typical:
    """Accepts draft x where p(x) > min(ε, δ · exp(-H(p))), without a look at q.

    The token behind the accepted drafts is drawn from the target.

    Args:
      epsilon: f32 in [0, 1), ε, the threshold where the target is sure.
      delta: f32 ≥ 0, δ, lowers it as the target's entropy H grows.

    Returns:
      A verifier with `guarantee` "none".

    Raises:
      ValueError: a Python number out of range.

    References:
      Cai et al., Medusa, arXiv 2401.10774.

    Example:
      >>> from jaxspec import testing
      >>> testing.check_verifier(typical()).passed
      False
    """
    for name, value, low, high in (
        ("epsilon", epsilon, 0.0, 1.0),
        ("delta", delta, 0.0, float("inf")),
    ):
        if isinstance(value, (int, float)) and not low <= value < high:
            raise ValueError(f"{name} must lie in [{low}, {high}), got {value}.")
    return Typical(epsilon, delta)
