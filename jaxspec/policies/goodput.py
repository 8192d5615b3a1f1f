"""As much as pays: the draft length with the most predicted tokens per second."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.profile import Profile
from jaxspec.types import Outcome, Signals

Array: TypeAlias = jax.Array


class GoodputState(NamedTuple):
    """What is remembered of each row, all f32[B]; counts fade.

    Attributes:
      accepted: drafts that were accepted.
      rejected: drafts that were rejected (at most one a round).
      weight: 1 for a row that runs, 0 for one that has stopped.
    """

    accepted: Array
    rejected: Array
    weight: Array


@pytree.dataclass
class Goodput:
    """See `goodput`."""

    profile: Profile
    prior: Any
    prior_drafts: Any
    memory: Any

    def init(self, batch: int) -> GoodputState:
        """Nothing seen."""
        zeros = jnp.zeros((batch,), jnp.float32)
        return GoodputState(zeros, zeros, jnp.ones((batch,), jnp.float32))

    def acceptance(self, state: GoodputState) -> Array:
        """The estimated acceptance rate of each row's next draft, f32[B]."""
        accepted = state.accepted + self.prior * self.prior_drafts
        return accepted / (state.accepted + state.rejected + self.prior_drafts)

    def num_draft(self, state: GoodputState) -> Array:
        """The same length for all rows, i32[B]: the batch pays for its widest row."""
        costs = self.profile.round_costs()
        rate = self.acceptance(state)

        # E[N] of each length: 1 + α + … + α^γ.
        def extend(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
            power, expected = carry
            tokens = jnp.sum(expected * state.weight)
            return (power * rate, expected + power * rate), tokens

        ones = jnp.ones_like(rate)
        _, tokens = jax.lax.scan(extend, (ones, ones), None, length=costs.shape[0])
        best = jnp.argmax(tokens / costs).astype(jnp.int32)
        return jnp.broadcast_to(best, rate.shape)

    def keep_drafting(self, state: GoodputState, signals: Signals) -> Array:
        """Always true, bool[B]."""
        del signals
        return jnp.ones_like(state.weight, dtype=bool)

    def update(self, state: GoodputState, outcome: Outcome) -> GoodputState:
        """Counts the round's drafts. What was seen fades in every round, also in an empty one.

        So a length of 0 is not for ever: the estimate comes back to the prior, and if that is
        worth a draft, one is made.
        """
        num_accepted = jnp.minimum(outcome.verdict.num_accepted, outcome.draft.length)
        is_rejected = num_accepted < outcome.draft.length
        kept = 1.0 - 1.0 / jnp.asarray(self.memory, jnp.float32)
        accepted = state.accepted * kept + num_accepted.astype(jnp.float32)
        rejected = state.rejected * kept + is_rejected.astype(jnp.float32)
        took_part = outcome.is_active
        return GoodputState(
            accepted=jnp.where(took_part, accepted, state.accepted),
            rejected=jnp.where(took_part, rejected, state.rejected),
            weight=took_part.astype(jnp.float32),
        )


def goodput(
    profile: Profile, *, prior: float = 0.5, prior_drafts: float = 2.0, memory: float = 16.0
) -> Goodput:
    """Chooses the draft length γ, 0 included, that maximises predicted tokens per second.

    With α_b the running estimate of row b's acceptance rate, a round of length γ is worth
    Σ_b (1 - α_b^{γ+1}) / (1 - α_b) tokens and costs γ · draft + verify[γ] + overhead: all rows pay
    for the widest, so all rows get the same length. It follows from earlier rounds alone, so every
    lossless verifier stays exact; but a row's length depends on its neighbours: the law of its
    tokens does not, the path of a given key does.

    Args:
      profile: the measured costs, from `jaxspec.measure_costs`, for the batch size in use.
      prior: f32 in (0, 1), the acceptance rate assumed before anything was seen.
      prior_drafts: f32 > 0, how many drafts' worth of evidence the prior counts as.
      memory: f32 > 1, rounds after which evidence has faded to 1 / e.

    Returns:
      A policy.

    Raises:
      ValueError: `profile` is no `Profile`, or a Python number is out of range.

    References:
      Liu et al., Optimizing Speculative Decoding for Serving LLMs Using Goodput, arXiv 2406.14066.

    Example:
      >>> import jax.numpy as jnp
      >>> profile = Profile(jnp.array([10.0, 11.0, 12.0]), jnp.float32(0.0), jnp.float32(0.5))
      >>> policy = goodput(profile)
      >>> policy.num_draft(policy.init(batch=2)).tolist()
      [2, 2]
    """
    if not isinstance(profile, Profile):
        raise ValueError(
            f"goodput needs a jaxspec.Profile, got {type(profile).__name__}; "
            "jaxspec.measure_costs(target, drafter) returns one."
        )
    for name, value, low, high in (
        ("prior", prior, 0, 1),
        ("prior_drafts", prior_drafts, 0, float("inf")),
        ("memory", memory, 1, float("inf")),
    ):
        if isinstance(value, (int, float)) and not low < value < high:
            raise ValueError(f"{name} must lie between {low} and {high}, got {value}.")
    return Goodput(profile, prior, prior_drafts, memory)
