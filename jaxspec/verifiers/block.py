"""Block verification: the drafts of a round are judged together, and more of them stand."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import pytree
from jaxspec.types import Draft, Verdict
from jaxspec.verifiers import ratio
from jaxspec.verifiers.rejection import rejection

Array: TypeAlias = jax.Array


@pytree.dataclass
class Block:
    """See `block`."""

    guarantee: ClassVar[str] = "distribution"
    needs_greedy_sampling: ClassVar[bool] = False

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        return self.judge(ratio.uniforms(keys), draft, target_log_probs)

    def judge(self, numbers: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """The rule as a function of its randomness; see `jaxspec.verifiers.ratio.uniforms`."""
        if draft.log_probs is None or draft.tokens.shape[0] < 2:
            # Nothing to gain: for one-hot drafts, and for one draft, the two rules are one.
            return rejection().judge(numbers, draft, target_log_probs)
        num_slots = draft.tokens.shape[0]
        log_weights = prefix_log_weights(draft, target_log_probs)
        excess, lack = margins(draft, target_log_probs, log_weights)
        # u ≤ h = excess / (excess + lack) without the division, u in (0, 1]: passes at 0 / 0,
        # where nothing is left to correct, and fails wherever h is 0 otherwise.
        passes = (1.0 - numbers[:-1, 0]) * (excess + lack) <= excess
        lengths = jnp.arange(1, num_slots + 1)
        passes = passes & (lengths <= draft.length)
        # The longest prefix that passes, whatever shorter ones did.
        num_accepted = jnp.max(jnp.where(passes, lengths, 0)).astype(jnp.int32)
        log_weight = jnp.concatenate([jnp.zeros((1,)), log_weights])[num_accepted]
        return ratio.conclude(numbers, draft, target_log_probs, num_accepted, log_weight)


def prefix_log_weights(draft: Draft, target_log_probs: Array) -> Array:
    """Log p_i of the prefixes of 1 … K drafts, f32[K]: p_i = min(1, p_{i-1} · p(x_i) / q(x_i)).

    A running minimum: the clip of each factor is carried on (min(1, the product of all ratios) is
    not lossless).
    """

    def extend(log_weight: Array, log_ratio: Array) -> tuple[Array, Array]:
        log_weight = jnp.minimum(log_weight + log_ratio, 0.0)
        return log_weight, log_weight

    return lax.scan(extend, jnp.float32(0.0), ratio.log_ratios(draft, target_log_probs))[1]


def margins(draft: Draft, target_log_probs: Array, log_weights: Array) -> tuple[Array, Array]:
    """(excess, lack) of each prefix of 1 … K drafts, f32[K] each; h_i = excess / (excess + lack).

    Inside a draft the excess is S_i = Σ max(p_i · p - q, 0), the mass that corrections behind the
    prefix can take, and the lack is 1 - p_i; for the whole draft they are p_γ and 1 - p_γ.
    """
    num_slots = draft.tokens.shape[0]
    behind = jnp.minimum(jnp.arange(1, num_slots + 1), num_slots - 1)  # the last is not used
    left = jax.vmap(ratio.residual, in_axes=(None, None, 0, 0))(
        draft, target_log_probs, behind, log_weights
    )
    is_whole = jnp.arange(1, num_slots + 1) == draft.length
    excess = jnp.where(is_whole, jnp.exp(log_weights), jnp.sum(left, axis=1))
    return excess, -jnp.expm1(log_weights)


def block() -> Block:
    """Block verification: never fewer tokens in expectation than `rejection`, and as exact.

    With p_0 = 1, p_i = min(1, p_{i-1} · p(x_i) / q(x_i)) and S_i = Σ max(p_i · p - q, 0) over the
    tokens behind prefix i, the prefix passes with probability h_i = S_i / (S_i + 1 - p_i), the
    whole draft with p_γ. The longest prefix that passes stands (τ of γ drafts); the token behind
    it is y ∝ max(p_τ · p - q, 0), or a bonus from p behind the whole draft.

    For deterministic drafts (a one-hot q) and for a single draft it is the rule of `rejection`.
    Rows at temperature 0 are point masses; they accept what `greedy` accepts.

    Returns:
      A verifier: keys key[K + 1], draft, target_log_probs f32[K + 1, V] -> `Verdict`.

    References:
      Sun et al., Block Verification Accelerates Speculative Decoding, arXiv 2403.10444.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> p = jnp.log(jnp.array([[.5, .5], [.2, .8], [.9, .1]]))
      >>> draft = Draft(jnp.array([0, 1]), p[:2], jnp.int32(2))  # q = p: all is accepted
      >>> verdict = block()(jax.random.split(jax.random.key(0), 3), draft, p)
      >>> verdict.tokens[:2].tolist(), int(verdict.num_accepted)
      ([0, 1], 2)
    """
    return Block()
