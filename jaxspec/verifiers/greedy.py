"""Greedy verification: the text that argmax decoding would write."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import drawing, pytree
from jaxspec.types import NO_TOKEN, Draft, Verdict
from jaxspec.verifiers import walking
from jaxspec.verifiers.descent import descend

Array: TypeAlias = jax.Array


@pytree.dataclass
class Greedy:
    """See `greedy`."""

    guarantee: ClassVar[str] = "distribution"
    needs_greedy_sampling: ClassVar[bool] = True
    takes_children: ClassVar[tuple[str, ...]] = ("top_k", "independent", "without_replacement")

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        del keys  # nothing is drawn
        best = jax.vmap(drawing.argmax)(target_log_probs)
        if draft.parents is not None:
            return descend(walking.Tree.of(draft, target_log_probs), lambda node: best[node])
        slots = jnp.arange(best.shape[0])
        matches = (draft.tokens == best[:-1]) & (slots[:-1] < draft.length)
        num_accepted = jnp.sum(jnp.cumprod(matches.astype(jnp.int32)), dtype=jnp.int32)
        # An accepted draft is the argmax, and so is the correction or the bonus.
        return Verdict(jnp.where(slots <= num_accepted, best, NO_TOKEN), num_accepted)


def greedy() -> Greedy:
    """Accepts a draft while it is the target's argmax; the next argmax follows.

    For temperature 0 only, where it is exact; ties go to the lowest id, as in plain decoding. In a
    tree it goes down to the child that is the argmax.

    Returns:
      A verifier: keys key[K + 1] (unused), draft, target_log_probs f32[K + 1, V] -> `Verdict`.

    References:
      Stern et al., Blockwise Parallel Decoding, arXiv 1811.03115.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> log_probs = jnp.log(jnp.array([[.1, .9], [.8, .2], [.3, .7]]))
      >>> draft = Draft(jnp.array([1, 1]), None, jnp.int32(2))
      >>> verdict = greedy()(jax.random.split(jax.random.key(0), 3), draft, log_probs)
      >>> verdict.tokens.tolist(), int(verdict.num_accepted)
      ([1, 0, -1], 1)
    """
    return Greedy()
