"""Sample-match: the target draws every token, and drafts stand while they are what it drew."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import drawing, pytree
from jaxspec.types import NO_TOKEN, Draft, Verdict

Array: TypeAlias = jax.Array


@pytree.dataclass
class Match:
    """See `match`."""

    shares_noise: bool = pytree.static()

    guarantee: ClassVar[str] = "tokens"
    needs_greedy_sampling: ClassVar[bool] = False
    is_keyed_by_position: ClassVar[bool] = True

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft; see `jaxspec.types.Verifier`."""
        size = target_log_probs.shape[1]
        noise = jax.vmap(lambda key: drawing.gumbel_noise(key, size))(keys)
        drawn = jax.vmap(drawing.race)(noise, target_log_probs)
        slots = jnp.arange(drawn.shape[0])
        matches = (draft.tokens == drawn[:-1]) & (slots[:-1] < draft.length)
        num_accepted = jnp.sum(jnp.cumprod(matches.astype(jnp.int32)), dtype=jnp.int32)
        # An accepted draft is the token drawn there, and so is the correction or the bonus.
        return Verdict(jnp.where(slots <= num_accepted, drawn, NO_TOKEN), num_accepted)


def match(*, share_noise: bool = True) -> Match:
    """Emits the same tokens whatever is drafted: the text is a function of key and prompt alone.

    At each position the target draws y = argmax(log p + noise), with Gumbel noise keyed by the
    row's key and the position in the text; drafts are accepted while they equal y. So the same
    key gives the same tokens with any drafter, any draft length, any policy, or none
    (`drafter=None, verifier=match()`), as long as the logits do not depend on how many tokens
    are fed at once.

    Deterministic drafts are accepted with probability p(x), as by the other rules; sampled drafts
    with at least (1 - TV) / (1 + TV) where the noise is shared, against 1 - TV for `rejection`, and
    only with Σ p q where it is not. `drafters.model` shares it; a drafter of one's own does by
    `drawing.race` on `Context.noise_keys`.

    Args:
      share_noise: lets drafters race with the noise of the positions they draft for, which makes
        them agree with the target more often. Exact for this rule only: no other rule may know
        what drove the draft.

    Returns:
      A verifier: keys key[K + 1], keyed by position, draft, target_log_probs f32[K + 1, V] ->
      `Verdict`.

    Raises:
      ValueError: `share_noise` is no bool.

    References:
      Daliri, Musco, Suresh, Coupling without Communication, arXiv 2408.07978.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import Draft
      >>> p = jnp.log(jnp.array([[0., 1.], [1., 0.], [.5, .5]]))
      >>> draft = Draft(jnp.array([1, 1]), None, jnp.int32(2))
      >>> verdict = match()(jax.random.split(jax.random.key(0), 3), draft, p)
      >>> verdict.tokens.tolist(), int(verdict.num_accepted)
      ([1, 0, -1], 1)
    """
    if not isinstance(share_noise, bool):
        raise ValueError(f"share_noise must be True or False, got {share_noise!r}.")
    return Match(share_noise)
