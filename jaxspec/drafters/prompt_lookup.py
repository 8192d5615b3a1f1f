"""Drafts copied from the row's own text: no model, no host code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree
from jaxspec.types import Context, Draft, Outcome, Signals

Array: TypeAlias = jax.Array


@pytree.dataclass
class PromptLookup:
    """See `prompt_lookup`. It keeps no state: all it needs is in the context."""

    max_ngram: int = pytree.static()
    min_ngram: int = pytree.static()

    hidden_layers: ClassVar[tuple[int, ...]] = ()

    def init(self, batch: int, capacity: int) -> tuple[()]:
        """Nothing."""
        del batch, capacity
        return ()

    def prefill(
        self, state: Any, tokens: Array, hidden: tuple[Array, ...], start: Array, num_new: Array
    ) -> Any:
        """Nothing to take in: the context holds the prompt."""
        del tokens, hidden, start, num_new
        return state

    def propose(
        self,
        keys: Array,
        state: Any,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, Any]:
        """Copies what followed the last match, a point mass for each slot."""
        del keep_drafting  # copying a token costs nothing that stopping early would save
        num_slots = keys.shape[1]
        tokens, found = jax.vmap(
            lambda row, length: lookup(
                row,
                length,
                num_tokens=num_slots,
                max_ngram=self.max_ngram,
                min_ngram=self.min_ngram,
            )
        )(context.tokens, context.lengths)
        return Draft(tokens, None, jnp.where(found, num_draft, 0)), state

    def commit(self, state: Any, outcome: Outcome) -> Any:
        """Nothing to remember."""
        del outcome
        return state


def lookup(
    tokens: Array, length: Array, *, num_tokens: int, max_ngram: int, min_ngram: int
) -> tuple[Array, Array]:
    """Continues a text as it went on where its end occurred before (unbatched).

    The longest n-gram decides, up to `max_ngram`; of several matches the last. A match so near
    the end that its continuation runs into the end goes on periodically: the drafts themselves
    count as text.

    Args:
      tokens: i32[N]; slots at or beyond `length` hold garbage.
      length: i32[].
      num_tokens: how many tokens to copy.
      max_ngram: the longest n-gram compared.
      min_ngram: the shortest n-gram that counts as a match.

    Returns:
      i32[num_tokens], and bool[] whether there was a match (the tokens are garbage otherwise).

    Example:
      >>> import jax.numpy as jnp
      >>> text = jnp.array([5, 6, 7, 8, 5, 6, 0, 0])
      >>> tokens, found = lookup(text, jnp.int32(6), num_tokens=3, max_ngram=2, min_ngram=1)
      >>> tokens.tolist(), bool(found)
      ([7, 8, 5], True)
    """
    size = tokens.shape[0]
    ends = jnp.arange(size)  # where an earlier n-gram may end
    last = length - 1
    run = jnp.ones((size,), bool)
    num_matching = jnp.zeros((size,), jnp.int32)
    for n in range(max_ngram):
        # Token `end - n` against token `last - n`; neither may lie before the text.
        earlier = jnp.roll(tokens, n)
        run = run & (ends >= n) & (last >= n) & (earlier == tokens[jnp.maximum(last - n, 0)])
        num_matching = num_matching + run.astype(jnp.int32)
    is_match = (ends < last) & (num_matching >= min_ngram)
    # The longest match first, then the last one.
    rank = jnp.where(is_match, num_matching * size + ends, -1)
    best = jnp.argmax(rank)
    period = jnp.maximum(last - best, 1)
    source = best + 1 + jnp.arange(num_tokens) % period
    return tokens[jnp.minimum(source, size - 1)], rank[best] >= 0


def prompt_lookup(max_ngram: int = 3, min_ngram: int = 1) -> PromptLookup:
    """Drafts what followed the last occurrence of the text's end, in prompt and output.

    Deterministic: each draft is a point mass. It pays where the output repeats the prompt or
    itself, and costs almost nothing.

    Args:
      max_ngram: the longest n-gram to look for, in tokens.
      min_ngram: the shortest that counts as a match, in tokens.

    Returns:
      A drafter.

    Raises:
      ValueError: not whole numbers 1 ≤ min_ngram ≤ max_ngram.

    References:
      Saxena, Prompt Lookup Decoding (2023); Yang et al., LLMA, arXiv 2304.04487.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec.types import Context
      >>> drafter = prompt_lookup()
      >>> context = Context(jnp.array([[3, 1, 4, 3, 0, 0]]), jnp.array([4]), None, None)
      >>> keys = jax.random.split(jax.random.key(0), (1, 2))
      >>> draft, _ = drafter.propose(keys, (), context, jnp.array([2]), lambda signals: True)
      >>> draft.tokens.tolist(), draft.length.tolist()
      ([[1, 4]], [2])
    """
    is_whole = isinstance(min_ngram, int) and isinstance(max_ngram, int)
    if not is_whole or not 1 <= min_ngram <= max_ngram:
        raise ValueError(
            "prompt_lookup needs whole numbers 1 ≤ min_ngram ≤ max_ngram, got "
            f"min_ngram={min_ngram!r} and max_ngram={max_ngram!r}."
        )
    return PromptLookup(max_ngram, min_ngram)
