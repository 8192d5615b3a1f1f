"""The façade: prefill, then the loop, then the result."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import arguments, loop, prefilling, programs, pytree, states
from jaxspec.sampling import Sampling
from jaxspec.settings import Settings
from jaxspec.stats import Stats
from jaxspec.types import Drafter, LanguageModel, Policy, Verifier

Array: TypeAlias = jax.Array


@pytree.dataclass
class Generation:
    """What `generate` returns. A registered pytree.

    Attributes:
      tokens: i32[B, T], new tokens only (an EOS included), then `pad_id`.
      lengths: i32[B], the number of new tokens of each row.
      log_probs: f32[B, T], natural log-probability of each new token under the target after the
        sampling options; of a greedy row under the target at temperature 1; then 0.
      raw_log_probs: f32[B, T], the same before any option.
      status: i32[B], why each row stopped: `jaxspec.status.EOS`, `STOP`, `LENGTH` or
        `NONFINITE`.
      stats: `Stats`, per row.
      guarantee: "distribution": the tokens have exactly the target's distribution; "tokens"
        (`verifiers.match`): they are also the same with any drafter, or none; "none": a lossy
        rule was allowed by `exact=False` (static).
      top_log_probs: f32[B, T, n], with `num_top_log_probs=n` the n largest log-probabilities of
        each position's law, that which `log_probs` is of, falling; then 0. Else None.
      top_ids: i32[B, T, n], their tokens; then `pad_id`. Else None.
      prompt_log_probs: f32[P, L], on request of each prompt token given those before it, before
        any option; 0 for a text's first token and for padding. Else None.
      state: on request, what `generate(state=…)` goes on from. Else None.
    """

    tokens: Array
    lengths: Array
    log_probs: Array
    raw_log_probs: Array
    status: Array
    stats: Stats
    guarantee: str = pytree.static()
    top_log_probs: Array | None = None
    top_ids: Array | None = None
    prompt_log_probs: Array | None = None
    state: prefilling.Continuation | None = None


# One program serves `generate` (no limit) and `stream` (one round at a time).
prefill = programs.Program(prefilling.prefill, static_argnames="max_new_tokens")
resume = programs.Program(
    prefilling.resume, static_argnames=("num_slots", "capacity", "max_new_tokens")
)
run = programs.Program(loop.run, donate_argnames="state")


@functools.partial(jax.jit, static_argnames="pad_id")
def result(engine: states.Engine, request: states.Request, state: states.State, *, pad_id: int):
    """The `Generation` of a state, without its continuation."""
    reported = state.log_probs
    size = reported.chosen.shape[1]
    lengths = state.lengths - request.start_lengths
    tokens = jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (size,)))(
        state.tokens, request.start_lengths
    )
    is_new = jnp.arange(size)[None] < lengths[:, None]
    has_top = engine.outputs.num_top_log_probs > 0
    return Generation(
        tokens=jnp.where(is_new, tokens, pad_id),
        lengths=lengths,
        log_probs=reported.chosen,
        raw_log_probs=reported.raw,
        status=state.status,
        stats=state.stats,
        guarantee=engine.guarantee,
        top_log_probs=reported.top if has_top else None,
        top_ids=jnp.where(is_new[:, :, None], reported.top_ids, pad_id) if has_top else None,
        prompt_log_probs=state.prompt_log_probs,
    )


def begin(
    prepared: arguments.Prepared, *, prefill: Any = prefill, resume: Any = resume
) -> states.State:
    """The state before the first round, by these programs."""
    engine, request, size = prepared.engine, prepared.request, prepared.max_new_tokens
    if prepared.resumption is None:
        return prefill(engine, request, prepared.prompts, max_new_tokens=size)
    continuation, num_slots, capacity = prepared.resumption
    return resume(
        engine,
        request,
        prepared.prompts,
        continuation,
        num_slots=num_slots,
        capacity=capacity,
        max_new_tokens=size,
    )


def finish(prepared: arguments.Prepared, state: states.State) -> Generation:
    """The result of the last state."""
    request = prepared.request
    generation = result(prepared.engine, request, state, pad_id=prepared.pad_id)
    if not prepared.returns_state:
        return generation
    return dataclasses.replace(
        generation,
        state=prefilling.Continuation(
            state, request.keys, request.prompt_lengths, prepared.capacity
        ),
    )


def generate(
    target: LanguageModel,
    prompts: Any = None,
    *,
    drafter: Drafter | str | None = None,
    verifier: Verifier | None = None,
    policy: Policy | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: int | Sequence[int] | Array = 128,
    num_draft_tokens: int = 4,
    settings: Settings | str | os.PathLike[str] | None = None,
    eos_ids: Sequence[int] | int | None = None,
    stop_sequences: Any = None,
    pad_id: int = 0,
    key: Array | None = None,
    prompt_lengths: Array | None = None,
    num_return_sequences: int = 1,
    num_top_log_probs: int = 0,
    prompt_log_probs: bool = False,
    state: prefilling.Continuation | None = None,
    return_state: bool = False,
    exact: bool = True,
) -> Generation:
    """Writes text with the target's distribution, several tokens per target forward.

    Prefill and loop are one compiled program each, without host round-trips. The function is
    itself traceable: it works inside a user's `jax.jit`, with models as pytree arguments. It
    compiles anew only when a static shape or strategy changes; lists of prompts are padded to a
    power of two, so that a new length rarely does.

    Args:
      target: the model whose distribution is kept.
      prompts: a list of token-id lists, or i32[B, L] padded on the right. With `state` these are
        the tokens that follow what stands there; None: the texts are written on.
      drafter: from `jaxspec.drafters`; "auto": the target's own, or prompt lookup; None: plain
        decoding through the same loop.
      verifier: from `jaxspec.verifiers`; None: the strongest lossless rule, row by row: `block`
        for sampled drafts, which is the one-hot rule for deterministic ones and accepts as
        `greedy` does in rows at temperature 0.
      policy: from `jaxspec.policies`; None: `num_draft_tokens` in every round.
      sampling: the options, one value for all rows or one a row.
      max_new_tokens: tokens to write at most, ≥ 1: one number, or integers [B], one a row; T is
        the largest (static).
      num_draft_tokens: K ≥ 1, the most tokens drafted in a round (static).
      settings: what `jaxspec tune` found, or its file: how much is drafted and in what shape, in
        the place of `num_draft_tokens`; the drafter drafts a tree then, if that was fastest.
      eos_ids: tokens that end a row; None: the model's own; (): never stop.
      stop_sequences: token-id lists, or i32[W, L] or i32[B, W, L] filled with -1 on the left: a
        row ends once its output ends in one of them, which is kept, like an EOS. What the prompt
        ends in is no part of it.
      pad_id: fills the result behind each row's tokens (static).
      key: `jax.random.key(seed)` (threefry), folded with each row's number, or key[B], one a row,
        so that a row's tokens follow its key wherever it stands. May be left out at temperature 0.
      prompt_lengths: i32[B] for an array of prompts; None: every row is L tokens long.
      num_return_sequences: n ≥ 1, texts for each prompt, which is fed once. Rows i n … i n + n - 1
        of the result are prompt i's; what is given row by row is given for each prompt (static).
      num_top_log_probs: how many of each position's likeliest tokens to report (static).
      prompt_log_probs: whether to report the prompts' log-probabilities: logits [B, C, V] are
        formed for chunks of C ≤ 256 prompt tokens (static).
      state: `Generation.state` of an earlier call with the same models: nothing is fed again. With
        prompts, the call is what it would be behind the whole text; without, rows that stopped at
        their limit write on, as if the limit had been higher, and others stay as they are.
      return_state: whether to return a state, which keeps the caches' memory (static).
      exact: whether to refuse what does not keep the target's distribution: rules of
        `jaxspec.lossy`, and policies or drafters that call themselves anticipating.

    Returns:
      A `Generation`.

    Raises:
      ValueError: a static argument is wrong: an empty or left-padded prompt, ids outside the
        vocabulary, vocabularies that differ, more tokens than a model is made for, counts below
        1, an option out of range, no key, a rule that does not fit the temperature. Values under
        a trace are not checked; logits that are not finite become a row's `status`.

    References:
      Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxspec
      >>> def apply(params, tokens, cache, *, start):  # a bigram table
      ...     return jaxspec.ModelOutput(params[tokens]), cache
      >>> def init_cache(batch, capacity, max_step):
      ...     return ()
      >>> table = jax.random.normal(jax.random.key(0), (8, 8))
      >>> lm = jaxspec.LanguageModel(table, apply, init_cache, vocab_size=8)
      >>> out = jaxspec.generate(lm, [[1, 2], [3]], drafter=jaxspec.drafters.model(lm),
      ...                        max_new_tokens=6, key=jax.random.key(1))
      >>> out.tokens.shape, out.lengths.tolist(), out.guarantee
      ((2, 6), [6, 6], 'distribution')
    """
    prepared = arguments.prepare(
        target,
        prompts,
        drafter=drafter,
        verifier=verifier,
        policy=policy,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        settings=settings,
        eos_ids=eos_ids,
        stop_sequences=stop_sequences,
        pad_id=pad_id,
        key=key,
        prompt_lengths=prompt_lengths,
        num_return_sequences=num_return_sequences,
        num_top_log_probs=num_top_log_probs,
        prompt_log_probs=prompt_log_probs,
        state=state,
        return_state=return_state,
        exact=exact,
    )
    return finish(prepared, run(prepared.engine, prepared.request, begin(prepared), -1))
