"""Lenience: accept with min(1, p / (l · q))."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio

Array: TypeAlias = jax.Array


@pytree.dataclass
class Lenient:
    """See `lenient`."""

    lenience: Any

    guarantee: ClassVar[str] = "none"

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        return self.judge(ratio.uniforms(keys), draft, target_log_probs)

    def judge(self, numbers: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """The rule as a function of its randomness; see `jaxspec.verifiers.ratio.uniforms`."""
        log_weight = -jnp.log(jnp.asarray(self.lenience, jnp.float32))
        thresholds = jnp.log1p(-numbers[:-1, 0])
        passes = thresholds <= ratio.log_ratios(draft, target_log_probs) + log_weight
        passes = passes & (jnp.arange(passes.shape[0]) < draft.length)
        num_accepted = jnp.sum(jnp.cumprod(passes.astype(jnp.int32)), dtype=jnp.int32)
        return ratio.conclude(numbers, draft, target_log_probs, num_accepted, log_weight)


def lenient(lenience: float = 0.5) -> Lenient:
    """Accepts as if the draft were less sure of itself than it is.

    Draft x ~ q is accepted with probability min(1, p(x) / (l · q(x))), else y ∝ max(p - l · q, 0).
    No token becomes more than 1 / l times as likely as under the target; at l = 1 it is
    `verifiers.rejection`.

    Args:
      lenience: f32 in (0, 1], l.

    Returns:
      A verifier with `guarantee` "none".

    Raises:
      ValueError: a Python number out of range.

    References:
      Leviathan et al., arXiv 2211.17192, appendix A.5.

    Example:
      >>> from jaxspec import testing
      >>> report = testing.check_verifier(lenient(0.5))
      >>> report.passed, report.total_variation > 0.01
      (False, True)
    """
    if isinstance(lenience, (int, float)) and not 0 < lenience <= 1:
        raise ValueError(f"lenience must lie in (0, 1], got {lenience}.")
    return Lenient(lenience)
