"""What the loop is given and what it carries from round to round."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import pytree, sampling, stats
from jaxspec.types import Cache, Drafter, LanguageModel, Policy, Verifier

Array: TypeAlias = jax.Array


class Outputs(NamedTuple):
    """What a call reports beside tokens and their log-probabilities; static.

    Attributes:
      num_top_log_probs: n, how many of each position's likeliest tokens.
      prompt_log_probs: whether the prompts' tokens get theirs.
    """

    num_top_log_probs: int = 0
    prompt_log_probs: bool = False


class LogProbs(NamedTuple):
    """Log-probabilities of tokens, [B, T] in the loop's state, [B, K + 1] of a round.

    Attributes:
      chosen: f32[B, T], of the token, under the target after the sampling options; of a greedy
        row under the target at temperature 1.
      raw: f32[B, T], under the target before any option.
      top: f32[B, T, n], the n largest under the law that `chosen` is of, falling.
      top_ids: i32[B, T, n], their tokens.
    """

    chosen: Array
    raw: Array
    top: Array
    top_ids: Array

    @classmethod
    def zeros(cls, batch: int, size: int, num_top: int) -> LogProbs:
        """Nothing reported yet of `size` tokens a row."""
        one, many = jnp.zeros((batch, size), jnp.float32), jnp.zeros((batch, size, num_top))
        return cls(one, one, many.astype(jnp.float32), many.astype(jnp.int32))


@pytree.dataclass
class Engine:
    """What stays the same from call to call; weights are leaves, the rest is static.

    Attributes:
      target: the model whose distribution is kept.
      drafter: None decodes plainly, through the same loop.
      verifier: the acceptance rule.
      policy: how much to draft.
      num_draft_tokens: K, the static maximum of drafts in a round; 0 without a drafter.
      outputs: what is reported beside the tokens.
      kinds: the strategies' classes, so that programs of two never mix, however their authors
        registered them (see `jaxspec.pytree.dataclass`).
    """

    target: LanguageModel
    drafter: Drafter | None
    verifier: Verifier
    policy: Policy
    num_draft_tokens: int = pytree.static()
    outputs: Outputs = pytree.static()
    kinds: tuple[type, ...] = pytree.static()

    @property
    def guarantee(self) -> str:
        """What `Generation.guarantee` says; see there."""
        is_anticipating = any(
            getattr(strategy, "is_anticipating", False) for strategy in (self.drafter, self.policy)
        )
        return "none" if is_anticipating else self.verifier.guarantee

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The target layers that the drafter reads."""
        return () if self.drafter is None else self.drafter.hidden_layers

    @property
    def num_top_tokens(self) -> int:
        """How many of the target's likeliest tokens the drafter wants to know."""
        return getattr(self.drafter, "num_top_tokens", 0)

    def replace(self, **changes: Any) -> Engine:
        """Returns a copy with the given fields changed."""
        strategies = [changes.get(n, getattr(self, n)) for n in ("drafter", "verifier", "policy")]
        return dataclasses.replace(self, **changes, kinds=tuple(map(type, strategies)))


class Request(NamedTuple):
    """What a call asks for; read by every round, never changed.

    Attributes:
      keys: key[B], one a row; it follows the request, not the slot in the batch.
      prompt_lengths: i32[B]; what stands behind them is output, and some options count it.
      start_lengths: i32[B], where this call begins to write: `prompt_lengths`, or more where a
        text is written on.
      max_lengths: i32[B], prompt + new tokens at which a row stops.
      eos_ids: i32[E], tokens that end a row; E may be 0.
      stop_sequences: i32[B, W, L], tokens in a row that end it, filled with -1 on the left; W may
        be 0.
      options: the resolved sampling options.
    """

    keys: Array
    prompt_lengths: Array
    start_lengths: Array
    max_lengths: Array
    eos_ids: Array
    stop_sequences: Array
    options: sampling.Options


class State(NamedTuple):
    """What the loop carries.

    Invariants:
      1. Caches are valid below `lengths - 1`; the last committed token is pending: the next
         forward feeds it.
      2. Slots beyond are garbage, finite, and overwritten before anything sees them. Rolling
         back is not advancing `lengths`.
      3. A row that has stopped emits nothing and disturbs no one.
      4. A row's tokens do not depend on the other rows, the batch size or the padding. Inside a
         row, randomness is keyed by (round, purpose, offset): a position that is tried again
         sees new numbers. Only the noise of rules that ask for it (`verifiers.match`) is keyed
         by position.
      5. The q that verification uses is bit for bit the q that was sampled from.
      6. No host round-trip.
      7. No cache is copied.
      8. Arithmetic does not depend on the width or the batch (the model's part; see
         `jaxspec_models.layers`).
    """

    # Evolves.
    lengths: Array  # i32[B], committed tokens, prompt included
    status: Array  # i32[B], see jaxspec.status
    num_rounds: Array  # i32[B], rounds the row took part in
    memory: sampling.Memory  # what penalties look back on
    policy: Any
    # Reported.
    log_probs: LogProbs  # [B, T], of new tokens
    prompt_log_probs: Array | None  # f32[B, L], where asked for
    stats: stats.Stats
    # Written in place.
    tokens: Array  # i32[B, N], prompt and output
    cache: Cache  # the target's
    drafter: Any


def with_strong_types(state: State) -> State:
    """Whatever policies and drafters return, a state fits the program that it came from.

    A weakly typed array (`jnp.where(x, 1.0, 0.0)`) is another type to `jit`, which would compile
    the loop anew for the second round of a stream.
    """

    def harden(x: Any) -> Any:
        return lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x

    policy, drafter = jax.tree.map(harden, (state.policy, state.drafter))
    return state._replace(policy=policy, drafter=drafter)
