"""The off-switch: no speculation where it does not pay."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.profile import Profile
from jaxspec.types import Outcome, Policy, Signals

Array: TypeAlias = jax.Array


class GuardedState(NamedTuple):
    """The guarded policy's state, and one account for the whole batch.

    Attributes:
      inner: of the guarded policy.
      num_emitted: i32[B], tokens of each row so far.
      balance: f32[], the time that speculation saved so far, in plain rounds; negative: lost.
      pause: i32[], rounds to go without drafts.
      next_pause: i32[], how long the next pause will be.
    """

    inner: Any
    num_emitted: Array
    balance: Array
    pause: Array
    next_pause: Array


@pytree.dataclass
class Guarded:
    """See `guarded`."""

    policy: Policy
    profile: Profile | None
    break_even: Any
    allowance: Any
    pause: Any
    longest_pause: Any

    def init(self, batch: int) -> GuardedState:
        """Speculation is on."""
        return GuardedState(
            self.policy.init(batch),
            jnp.zeros((batch,), jnp.int32),
            jnp.float32(0.0),
            jnp.int32(0),
            jnp.asarray(self.pause, jnp.int32),
        )

    def num_draft(self, state: GuardedState) -> Array:
        """The guarded policy's lengths, or 0 in a pause: i32[B]."""
        lengths = self.policy.num_draft(state.inner)
        return jnp.where(state.pause > 0, 0, lengths)

    def keep_drafting(self, state: GuardedState, signals: Signals) -> Array:
        """What the guarded policy says, bool[B]."""
        return self.policy.keep_drafting(state.inner, signals)

    def update(self, state: GuardedState, outcome: Outcome) -> GuardedState:
        """Enters what the round saved or lost, and starts or shortens a pause."""
        is_active = outcome.is_active
        longest = jnp.max(jnp.where(is_active, outcome.draft.length, 0))
        num_emitted = state.num_emitted + jnp.where(is_active, outcome.num_emitted, 0)
        # Plain decoding brings every row one token further: so much did the last one gain.
        gained = _least(num_emitted, is_active) - _least(state.num_emitted, is_active)
        saved = jnp.where(longest > 0, gained - self._cost(longest), 0.0)
        # Old gains do not excuse losses for ever.
        balance = jnp.minimum(state.balance + saved, self.allowance)

        is_paused = state.pause > 0
        stops = ~is_paused & (balance <= -jnp.asarray(self.allowance, jnp.float32))
        resumes = state.pause == 1
        pause = jnp.where(stops, state.next_pause, jnp.maximum(state.pause - 1, 0))
        # A trial may lose half of what the beginning may; a trial that gains forgets the past.
        balance = jnp.where(resumes, -0.5 * jnp.asarray(self.allowance, jnp.float32), balance)
        longer = jnp.minimum(2 * state.next_pause, jnp.asarray(self.longest_pause, jnp.int32))
        next_pause = jnp.where(stops, longer, state.next_pause)
        next_pause = jnp.where(balance > 0, jnp.asarray(self.pause, jnp.int32), next_pause)
        return GuardedState(
            self.policy.update(state.inner, outcome),
            num_emitted,
            balance.astype(jnp.float32),
            pause.astype(jnp.int32),
            next_pause.astype(jnp.int32),
        )

    def _cost(self, length: Array) -> Array:
        """The time of a round with drafts of `length` at most, in plain rounds, f32[]."""
        if self.profile is None:
            return jnp.asarray(self.break_even, jnp.float32)
        costs = self.profile.round_costs()
        return costs[jnp.minimum(length, costs.shape[0] - 1)] / costs[0]


def _least(counts: Array, is_active: Array) -> Array:
    """The least count of the rows that run, f32[]; 0 where none does."""
    least = jnp.min(jnp.where(is_active, counts, jnp.iinfo(jnp.int32).max))
    return jnp.where(jnp.any(is_active), least, 0).astype(jnp.float32)


def guarded(
    policy: Policy,
    profile: Profile | None = None,
    *,
    break_even: float = 1.3,
    allowance: float = 1.5,
    pause: int = 32,
    longest_pause: int = 256,
) -> Guarded:
    """Stops drafting where it costs more than it brings, and tries again later.

    It keeps an account of what speculation saved, in plain rounds: each round that drafts adds the
    tokens by which the slowest row came further and takes off what the round cost. Once `allowance`
    is lost, nothing is drafted for `pause` rounds (each pause in a row twice as long as the one
    before), then it is tried again with half the allowance. So the worst case loses a few percent:
    with the defaults 1.5 plain rounds at the beginning, then 0.75 in 32, in 64, … One account for
    the batch, which pays as a whole and is done when its last row is: no row is kept waiting longer
    than this for what its neighbours gain. It follows from earlier rounds alone, so every lossless
    verifier stays exact.

    Args:
      policy: the policy to guard.
      profile: the measured costs; None: the guarded policy's own, where it has one (`goodput`).
      break_even: f32, without a profile: what a round with drafts costs, in plain rounds.
      allowance: f32 > 0, plain rounds that may be lost before the first pause.
      pause: i32 ≥ 1, rounds of the first pause.
      longest_pause: i32 ≥ `pause`.

    Returns:
      A policy.

    Raises:
      ValueError: `policy` is no policy, `profile` no `Profile`, or a Python number is out of range.

    References:
      Liu et al., Optimizing Speculative Decoding for Serving LLMs Using Goodput, arXiv 2406.14066,
      which switches speculation off where its predicted goodput is below plain decoding's.

    Example:
      >>> from jaxspec import policies
      >>> policy = guarded(policies.fixed(4))
      >>> policy.num_draft(policy.init(batch=2)).tolist()
      [4, 4]
    """
    if not isinstance(policy, Policy):
        raise ValueError(f"guarded needs a policy, got {type(policy).__name__}.")
    if profile is None:
        profile = getattr(policy, "profile", None)
    if profile is not None and not isinstance(profile, Profile):
        raise ValueError(
            f"profile must be a jaxspec.Profile, got {type(profile).__name__}; "
            "jaxspec.measure_costs(target, drafter) returns one."
        )
    numbers = (break_even, allowance, pause, longest_pause)
    if all(isinstance(x, (int, float)) for x in numbers) and not (
        break_even > 0
        and allowance > 0
        and 1 <= pause <= longest_pause < 2**30
        and pause == int(pause)
        and longest_pause == int(longest_pause)
    ):
        raise ValueError(
            "guarded needs break_even > 0, allowance > 0 and whole 1 ≤ pause ≤ longest_pause, got "
            f"break_even={break_even}, allowance={allowance}, pause={pause} and "
            f"longest_pause={longest_pause}."
        )
    return Guarded(policy, profile, break_even, allowance, pause, longest_pause)
