"""Several drafters in one: each row is drafted for by the first that has something to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Context, Draft, Drafter, Outcome, Signals

Array: TypeAlias = jax.Array


@pytree.dataclass
class Fallback:
    """See `fallback`."""

    drafters: tuple[Any, ...]

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Those of all, one drafter's behind the other's."""
        return tuple(layer for drafter in self.drafters for layer in drafter.hidden_layers)

    @property
    def vocab_size(self) -> int | None:
        """V of those that have one."""
        sizes = (getattr(drafter, "vocab_size", None) for drafter in self.drafters)
        return next((size for size in sizes if size is not None), None)

    @property
    def max_length(self) -> int | None:
        """The least of all, in tokens; None: there is no limit."""
        return _least(self.drafters, "max_length")

    @property
    def max_draft_tokens(self) -> int | None:
        """The least that any of them was trained to draft in a round; None: there is no limit."""
        return _least(self.drafters, "max_draft_tokens")

    @property
    def is_anticipating(self) -> bool:
        """Whether any of them is."""
        return any(getattr(drafter, "is_anticipating", False) for drafter in self.drafters)

    def init(self, batch: int, capacity: int) -> tuple[Any, ...]:
        """The states of all."""
        return tuple(drafter.init(batch, capacity) for drafter in self.drafters)

    def prefill(
        self,
        state: tuple[Any, ...],
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> tuple[Any, ...]:
        """All of them see the prompts."""
        return tuple(
            drafter.prefill(own, tokens, seen, start, num_new)
            for drafter, own, seen in zip(self.drafters, state, self._dealt(hidden), strict=True)
        )

    def in_tree(self, tree: Any) -> Any:
        """The last of them, which always has a draft, drafting a tree; the others are not asked.

        Raises:
          ValueError: it drafts chains only.
        """
        last = self.drafters[-1]
        if not hasattr(last, "in_tree"):
            raise ValueError(f"{type(last).__name__}, the last of fallback's, drafts chains only.")
        return last.in_tree(tree)

    def propose(
        self,
        keys: Array,
        state: tuple[Any, ...],
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, tuple[Any, ...]]:
        """Asks one after the other for the rows that have no draft yet."""
        batch, num_slots = keys.shape
        found = Draft(
            jnp.zeros((batch, num_slots), jnp.int32), None, jnp.zeros((batch,), jnp.int32)
        )
        states = []
        for drafter, own in zip(self.drafters, state, strict=True):
            still = jnp.where(found.length > 0, 0, num_draft)
            draft, own = drafter.propose(keys, own, context, still, keep_drafting)
            found = _either(found, draft)
            states.append(own)
        return found, tuple(states)

    def commit(self, state: tuple[Any, ...], outcome: Outcome) -> tuple[Any, ...]:
        """All of them learn what has become of the round."""
        return tuple(
            drafter.commit(own, outcome._replace(hidden=seen))
            for drafter, own, seen in zip(
                self.drafters, state, self._dealt(outcome.hidden), strict=True
            )
        )

    def _dealt(self, hidden: tuple[Array, ...]) -> list[tuple[Array, ...]]:
        """To each drafter the hidden states of its own layers."""
        dealt, first = [], 0
        for drafter in self.drafters:
            end = first + len(drafter.hidden_layers)
            dealt.append(hidden[first:end])
            first = end
        return dealt


def _least(drafters: tuple[Any, ...], name: str) -> int | None:
    """The least of an attribute that some of them have."""
    found = [getattr(drafter, name, None) for drafter in drafters]
    return min((number for number in found if number is not None), default=None)


def _either(first: Draft, second: Draft) -> Draft:
    """Row by row, the first draft where it is not empty."""
    is_first = (first.length > 0)[:, None]
    log_probs = None
    if second.log_probs is not None:
        log_probs = jnp.where(
            is_first[..., None], _laws_of(first, second.log_probs.shape[2]), second.log_probs
        )
    elif first.log_probs is not None:
        log_probs = jnp.where(
            is_first[..., None], first.log_probs, _laws_of(second, first.log_probs.shape[2])
        )
    return Draft(
        jnp.where(is_first, first.tokens, second.tokens),
        log_probs,
        jnp.where(is_first[:, 0], first.length, second.length),
    )


def _laws_of(draft: Draft, vocab_size: int) -> Array:
    """Log q f32[B, K, V], of point masses where there is none."""
    if draft.log_probs is not None:
        return draft.log_probs
    is_token = jnp.arange(vocab_size)[None, None] == draft.tokens[..., None]
    return jnp.where(is_token, 0.0, -jnp.inf).astype(jnp.float32)


def fallback(*drafters: Drafter) -> Fallback:
    """Each row is drafted for by the first of several drafters that has a draft for it.

    Made for a cheap drafter that seldom knows and is right when it does, such as
    `prompt_lookup(min_ngram=3)`, before one that always drafts. Who drafts depends on the text so
    far and on nothing that was drawn, so every q stays exact.

    Args:
      *drafters: the one to ask first comes first.

    Returns:
      A drafter. Its `hidden_layers` are those of all; its limits the least of them.

    Raises:
      ValueError: fewer than two, something that is no drafter, or one that drafts trees.

    References:
      Oliaro et al., SuffixDecoding, arXiv 2411.04975, which leaves to EAGLE what it does not find.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxspec
      >>> def apply(params, tokens, cache, *, start):
      ...     return jaxspec.ModelOutput(params[tokens]), cache
      >>> def init_cache(batch, capacity, max_step):
      ...     return ()
      >>> lm = jaxspec.LanguageModel(10.0 * jnp.eye(4)[jnp.array([1, 2, 3, 0])],
      ...                            apply, init_cache, vocab_size=4)
      >>> both = fallback(jaxspec.drafters.prompt_lookup(), jaxspec.drafters.model(lm))
      >>> out = jaxspec.generate(lm, [[0]], drafter=both, max_new_tokens=10,
      ...                        sampling=jaxspec.Sampling(temperature=0))
      >>> out.tokens.tolist(), out.stats.num_spec_steps.tolist()
      ([[1, 2, 3, 0, 1, 2, 3, 0, 1, 2]], [2])
    """
    if len(drafters) < 2:
        raise ValueError(f"fallback takes two drafters or more, got {len(drafters)}.")
    for drafter in drafters:
        if not isinstance(drafter, Drafter):
            raise ValueError(f"fallback takes drafters, got {type(drafter).__name__}.")
        if hasattr(drafter, "num_nodes"):
            raise ValueError(
                f"fallback takes drafters of chains, and {type(drafter).__name__} drafts trees: "
                "whose turn it is decides which rule is exact. Pass that drafter by itself."
            )
    return Fallback(drafters)
