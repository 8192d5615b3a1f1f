"""The loop: one compiled program that drafts, verifies and commits until every row has stopped.

Strategies arrive as values; no concrete drafter, verifier or policy is known here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import pytree, sampling, stats, status
from jaxspec.sampling import processing
from jaxspec.types import (
    NO_TOKEN,
    PREFILL_CHUNK,
    Cache,
    Context,
    Draft,
    Drafter,
    LanguageModel,
    Outcome,
    Policy,
    Verdict,
    Verifier,
)

Array: TypeAlias = jax.Array

# Purposes that a round's key is folded with: no two draws share a key.
_PROPOSE, _VERIFY, _NOISE = 0, 1, 2


@pytree.dataclass
class Engine:
    """What stays the same from call to call; weights are leaves, the rest is static.

    Attributes:
      target: the model whose distribution is kept.
      drafter: None decodes plainly, through the same loop.
      verifier: the acceptance rule.
      policy: how much to draft.
      num_draft_tokens: K, the static maximum of drafts in a round; 0 without a drafter.
      kinds: the strategies' classes, so that programs of two never mix, however their authors
        registered them (see `jaxspec.pytree.dataclass`).
    """

    target: LanguageModel
    drafter: Drafter | None
    verifier: Verifier
    policy: Policy
    num_draft_tokens: int = pytree.static()
    kinds: tuple[type, ...] = pytree.static()

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The target layers that the drafter reads."""
        return () if self.drafter is None else self.drafter.hidden_layers

    def replace(self, **changes: Any) -> Engine:
        """Returns a copy with the given fields changed."""
        strategies = [changes.get(n, getattr(self, n)) for n in ("drafter", "verifier", "policy")]
        return dataclasses.replace(self, **changes, kinds=tuple(map(type, strategies)))


class Request(NamedTuple):
    """What a call asks for; read by every round, never changed.

    Attributes:
      keys: key[B], one a row; it follows the request, not the slot in the batch.
      prompt_lengths: i32[B].
      max_lengths: i32[B], prompt + new tokens at which a row stops.
      eos_ids: i32[E], tokens that end a row; E may be 0.
      stop_sequences: i32[B, W, L], tokens in a row that end it, filled with -1 on the left; W may
        be 0.
      options: the resolved sampling options.
    """

    keys: Array
    prompt_lengths: Array
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
    log_probs: Array  # f32[B, T], of new tokens
    stats: stats.Stats
    # Written in place.
    tokens: Array  # i32[B, N], prompt and output
    cache: Cache  # the target's
    drafter: Any


def token_buffer_length(max_prompt: int, max_new_tokens: int, num_draft_tokens: int) -> int:
    """N: room for the drafts of a row that is one token short of its limit."""
    return max_prompt + max_new_tokens + num_draft_tokens + 1


def cache_capacity(max_prompt: int, max_new_tokens: int, num_draft_tokens: int) -> int:
    """Slots that calls may write: no write is ever clamped.

    Prefill writes whole chunks; a round writes K + 1 slots from the pending token on, and a
    drafter up to one slot more.
    """
    whole_chunks = -(-max_prompt // prefill_width(max_prompt)) * prefill_width(max_prompt)
    return max(whole_chunks, token_buffer_length(max_prompt, max_new_tokens, num_draft_tokens) + 1)


def prefill_width(max_prompt: int) -> int:
    """Tokens in one prefill call."""
    return min(max_prompt, PREFILL_CHUNK)


def prefill(engine: Engine, request: Request, prompts: Array, *, max_new_tokens: int) -> State:
    """Feeds the prompts to target and drafter, chunk by chunk.

    The last prompt token stays pending, so that no logits are formed at all; the first round
    forms them for that token only. Chunks that no row needs are skipped: the number of chunks is
    data.

    Args:
      engine: the strategies.
      request: what is asked for.
      prompts: i32[B, L], right-padded with valid token ids.
      max_new_tokens: T.

    Returns:
      The `State` before the first round.
    """
    batch, max_prompt = prompts.shape
    target, drafter = engine.target, engine.drafter
    capacity = cache_capacity(max_prompt, max_new_tokens, engine.num_draft_tokens)
    width = prefill_width(max_prompt)
    hidden_layers = engine.hidden_layers
    num_to_feed = request.prompt_lengths - 1

    def feed_chunk(index: Array, carry: tuple[Cache, Any]) -> tuple[Cache, Any]:
        cache, drafter_state = carry
        at = index * width
        # The last chunk of a prompt array that is no multiple of the width: gather, not slice,
        # which would clamp and shift.
        columns = jnp.minimum(at + jnp.arange(width), max_prompt - 1)
        tokens = prompts[:, columns]
        start = jnp.full((batch,), at, jnp.int32)
        num_new = jnp.clip(num_to_feed - at, 0, width)
        none = jnp.zeros((batch, 0), jnp.int32)
        output, cache = target.forward(
            tokens,
            cache,
            start=start,
            num_new=num_new,
            logits_at=none,
            hidden_layers=hidden_layers,
        )
        if drafter is not None:
            drafter_state = drafter.prefill(drafter_state, tokens, output.hidden, start, num_new)
        return cache, drafter_state

    carry = (
        target.init_cache(batch, capacity, max(width, engine.num_draft_tokens + 1)),
        None if drafter is None else drafter.init(batch, capacity),
    )
    num_chunks = (jnp.max(num_to_feed) + width - 1) // width
    cache, drafter_state = lax.fori_loop(0, num_chunks, feed_chunk, carry)

    size = token_buffer_length(max_prompt, max_new_tokens, engine.num_draft_tokens)
    tokens = jnp.pad(prompts, ((0, 0), (0, size - max_prompt)))
    state = State(
        lengths=request.prompt_lengths,
        status=jnp.full((batch,), status.RUNNING, jnp.int32),
        num_rounds=jnp.zeros((batch,), jnp.int32),
        memory=sampling.recall(
            request.options, prompts, request.prompt_lengths, vocab_size=target.vocab_size
        ).memory,
        policy=engine.policy.init(batch),
        log_probs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        stats=stats.init(batch, engine.num_draft_tokens),
        tokens=tokens,
        cache=cache,
        drafter=drafter_state,
    )
    return _with_strong_types(state)


def _with_strong_types(state: State) -> State:
    """Whatever policies and drafters return, a state fits the program that it came from.

    A weakly typed array (`jnp.where(x, 1.0, 0.0)`) is another type to `jit`, which would compile
    the loop anew for the second round of a stream.
    """

    def harden(x: Any) -> Any:
        return lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x

    policy, drafter = jax.tree.map(harden, (state.policy, state.drafter))
    return state._replace(policy=policy, drafter=drafter)


def run(engine: Engine, request: Request, state: State, limit: Array | int) -> State:
    """Rounds until every row has stopped, or `limit` rounds have passed.

    Args:
      engine: the strategies.
      request: what is asked for.
      state: from `prefill` or an earlier `run`.
      limit: i32[], rounds at most; negative: no limit.

    Returns:
      The new state.
    """

    def goes_on(carry: tuple[Array, State]) -> Array:
        rounds, state = carry
        return (
            jnp.any(state.status == status.RUNNING)  # some row is not done
            & ((limit < 0) | (rounds < limit))  # the caller wants more
        )

    def step(carry: tuple[Array, State]) -> tuple[Array, State]:
        rounds, state = carry
        return rounds + 1, one_round(engine, request, state)

    return _with_strong_types(lax.while_loop(goes_on, step, (jnp.int32(0), state))[1])


def verification_widths(num_draft_tokens: int) -> tuple[int, ...]:
    """The numbers of tokens that a target forward is compiled for on the CPU, rising.

    A round runs at the narrowest one that holds the pending token and the longest draft: nobody
    pays for drafts that do not exist. Two drafts cost almost nothing there and bring most of what
    speculation brings where drafts are seldom right (see `benchmarks/README.md`). Each width
    costs compile time.

    Example:
      >>> [verification_widths(k) for k in (0, 2, 4, 10)]
      [(1,), (1, 3), (1, 5), (1, 3, 11)]
    """
    widths = (1, 3) if num_draft_tokens > 4 else (1,)
    return (*(w for w in widths if w <= num_draft_tokens), num_draft_tokens + 1)


def paid_widths(num_draft_tokens: int) -> list[int]:
    """The width that a round whose longest draft has 0 … K tokens runs at, on the CPU.

    Example:
      >>> paid_widths(5)
      [1, 3, 3, 6, 6, 6]
    """
    widths = verification_widths(num_draft_tokens)
    return [min(w for w in widths if w > length) for length in range(num_draft_tokens + 1)]


class _Judged(NamedTuple):
    """What a target forward and the verifier make of the drafts; K slots whatever the width."""

    cache: Cache
    draft: Draft  # cut where a law is not finite
    verdict: Verdict
    num_finite: Array  # i32[B], positions with a finite law before the first without
    emitted_log_probs: Array  # f32[B, K + 1], what is reported of the verdict's tokens
    zeros: stats.ZeroProbabilities
    target_log_probs: Array  # f32[B, K + 1, V]
    hidden: tuple[Array, ...]  # [B, K + 1, D] each


def one_round(engine: Engine, request: Request, state: State) -> State:
    """Propose, one target forward, verify, commit."""
    is_active = state.status == status.RUNNING
    draft, drafter_state = _propose(engine, request, state, is_active)
    judged = _judge(engine, request, state, draft, is_active)
    draft, verdict = judged.draft, judged.verdict

    num_emitted, new_status = _truncate(request, state, verdict, judged.num_finite)
    num_emitted = jnp.where(is_active, num_emitted, 0)
    outcome = Outcome(
        draft=draft,
        verdict=verdict,
        start=state.lengths - 1,
        num_emitted=num_emitted,
        num_accepted=jnp.minimum(verdict.num_accepted, num_emitted),
        is_active=is_active,
        target_log_probs=judged.target_log_probs,
        hidden=judged.hidden,
    )
    if engine.drafter is not None:
        drafter_state = engine.drafter.commit(drafter_state, outcome)
    tokens, log_probs = _write(request, state, verdict, num_emitted, judged.emitted_log_probs)
    return State(
        lengths=state.lengths + num_emitted,
        status=jnp.where(is_active, new_status, state.status),
        num_rounds=state.num_rounds + is_active.astype(jnp.int32),
        memory=sampling.remember(state.memory, verdict.tokens, num_emitted),
        policy=engine.policy.update(state.policy, outcome),
        log_probs=log_probs,
        stats=stats.update(state.stats, outcome, judged.zeros),
        tokens=tokens,
        cache=judged.cache,
        drafter=drafter_state,
    )


def _judge(
    engine: Engine, request: Request, state: State, draft: Draft, is_active: Array
) -> _Judged:
    """One target forward over the pending tokens and the drafts, and the verdicts."""
    at_width = functools.partial(_judge_at_width, engine, request, state._replace(cache=None))
    widths = verification_widths(engine.num_draft_tokens)

    def at_full_width(cache: Cache, draft: Draft, is_active: Array) -> _Judged:
        return at_width(cache, draft, is_active, width=widths[-1])

    def at_narrowest_width(cache: Cache, draft: Draft, is_active: Array) -> _Judged:
        # Loops of one trip or none, not `switch`, which would copy the cache on the CPU.
        shapes = jax.eval_shape(at_full_width, cache, draft, is_active)
        judged = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(cache=None))
        judged = judged._replace(cache=cache)
        needed = 1 + jnp.max(jnp.where(is_active, draft.length, 0))
        chosen = jnp.sum(needed > jnp.asarray(widths))
        for i, width in enumerate(widths):

            def judge(_: Any, judged: _Judged, width: int = width) -> _Judged:
                # Tied to the loop: XLA would hoist what needs no cache, and do it for every width.
                tied, _ = lax.optimization_barrier((draft.tokens, judged.num_finite))
                fed = draft._replace(tokens=tied)
                return at_width(judged.cache, fed, is_active, width=width)

            judged = lax.fori_loop(0, (chosen == i).astype(jnp.int32), judge, judged)
        return judged

    if len(widths) == 1:
        return at_full_width(state.cache, draft, is_active)
    # Elsewhere a loop of dynamic length costs more than the tokens it would save.
    return lax.platform_dependent(
        state.cache, draft, is_active, cpu=at_narrowest_width, default=at_full_width
    )


def _judge_at_width(
    engine: Engine,
    request: Request,
    state: State,
    cache: Cache,
    draft: Draft,
    is_active: Array,
    *,
    width: int,
) -> _Judged:
    """`_judge` where no draft is longer than `width - 1` (static)."""
    num_slots = width - 1
    whole = draft
    draft = draft._replace(
        tokens=draft.tokens[:, :num_slots],
        log_probs=None if draft.log_probs is None else draft.log_probs[:, :num_slots],
    )
    start = state.lengths - 1
    pending = jnp.take_along_axis(state.tokens, start[:, None], axis=1)
    fed = jnp.concatenate([pending, draft.tokens], axis=1)
    num_new = jnp.where(is_active, 1 + draft.length, 0)
    output, cache = engine.target.forward(
        fed, cache, start=start, num_new=num_new, hidden_layers=engine.hidden_layers
    )
    logits = output.logits

    # The sampling options at every position, each with the drafts before it as its prefix.
    scores = processing.process_positions(
        logits, request.options, _history(request, state), draft.tokens
    )

    # A position without a finite law ends the draft there: what stands before it is verified as
    # ever, and the row stops when it gets there.
    draft, num_finite = _cut_at_nonfinite(draft, logits, scores.log_probs)

    if _is_keyed_by_position(engine.verifier):
        keys = _noise_keys(request.keys, state.lengths, width)
    else:
        keys = _keys(request.keys, state.num_rounds, _VERIFY, width)
    verdict = jax.vmap(engine.verifier)(keys, draft, scores.log_probs)
    tokens = verdict.tokens.astype(jnp.int32)
    offsets = jnp.arange(width, dtype=jnp.int32)
    emitted = jnp.where(offsets[None] <= verdict.num_accepted[:, None], tokens, 0)
    emitted_log_probs = jnp.take_along_axis(scores.report, emitted[:, :, None], axis=2)[:, :, 0]

    zeros = stats.zero_probabilities(draft, scores.log_probs)
    is_fallback = verdict.is_fallback
    if is_fallback is None:  # which may differ from width to width
        is_fallback = jnp.zeros(is_active.shape, bool)

    def widen(x: Array, fill: Any = 0) -> Array:
        missing = [(0, 0)] * x.ndim
        missing[1] = (0, engine.num_draft_tokens + 1 - width)
        return jnp.pad(x, missing, constant_values=fill)

    return _Judged(
        cache=cache,
        draft=whole._replace(length=draft.length),
        verdict=verdict._replace(
            tokens=widen(tokens, NO_TOKEN),
            num_accepted=verdict.num_accepted.astype(jnp.int32),
            is_fallback=is_fallback,
        ),
        num_finite=num_finite,
        emitted_log_probs=widen(emitted_log_probs),
        zeros=jax.tree.map(widen, zeros),
        target_log_probs=widen(scores.log_probs),
        hidden=jax.tree.map(widen, output.hidden),
    )


def _propose(engine: Engine, request: Request, state: State, is_active: Array) -> tuple[Draft, Any]:
    """The round's drafts; none without a drafter."""
    batch, num_slots = is_active.shape[0], engine.num_draft_tokens
    if engine.drafter is None:
        return Draft(jnp.zeros((batch, 0), jnp.int32), None, jnp.zeros((batch,), jnp.int32)), None
    # The round emits one token beside the drafts: more than the remainder is never drafted.
    most = jnp.minimum(request.max_lengths - state.lengths - 1, num_slots)
    num_draft = jnp.clip(engine.policy.num_draft(state.policy), 0, most)
    num_draft = jnp.where(is_active, num_draft, 0)
    noise_keys = None
    if _is_keyed_by_position(engine.verifier) and getattr(engine.verifier, "shares_noise", False):
        noise_keys = _noise_keys(request.keys, state.lengths, num_slots)
    history = _history(request, state)
    context = Context(state.tokens, state.lengths, request.options, history, noise_keys)
    draft, drafter_state = engine.drafter.propose(
        _keys(request.keys, state.num_rounds, _PROPOSE, num_slots),
        state.drafter,
        context,
        num_draft,
        functools.partial(engine.policy.keep_drafting, state.policy),
    )
    # The target is fed valid ids in every slot, so that garbage stays finite.
    length = jnp.clip(draft.length, 0, num_draft)
    is_drafted = jnp.arange(num_slots)[None] < length[:, None]
    return draft._replace(tokens=jnp.where(is_drafted, draft.tokens, 0), length=length), (
        drafter_state
    )


def _history(request: Request, state: State) -> sampling.History:
    """The committed text as the sampling options see it."""
    batch = state.lengths.shape[0]
    eos_ids = jnp.broadcast_to(request.eos_ids, (batch, request.eos_ids.shape[0]))
    return sampling.History(
        state.memory, state.tokens, state.lengths, request.prompt_lengths, eos_ids
    )


def _cut_at_nonfinite(draft: Draft, logits: Array, log_probs: Array) -> tuple[Draft, Array]:
    """Shortens drafts so that only finite laws judge them.

    Args:
      draft: with leading axis B.
      logits: f32[B, K + 1, V].
      log_probs: f32[B, K + 1, V], after the options, whose traced values may be broken and whose
        bans may leave nothing.

    Returns:
      The draft, and i32[B] the offset of the first position with NaN or +inf (or nothing but
      -inf); K + 1 where there is none.
    """
    # A maximum is NaN or +inf if any element is.
    is_finite = jnp.isfinite(jnp.max(logits, axis=-1)) & jnp.isfinite(jnp.max(log_probs, axis=-1))
    num_finite = jnp.sum(jnp.cumprod(is_finite.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    return draft._replace(length=jnp.minimum(draft.length, num_finite)), num_finite


def _truncate(
    request: Request, state: State, verdict: Verdict, num_finite: Array
) -> tuple[Array, Array]:
    """How many of the verdict's tokens are committed, and the rows' status after them.

    Returns:
      i32[B], i32[B].
    """
    offsets = jnp.arange(verdict.tokens.shape[1])[None]
    num_emitted = verdict.num_accepted + 1
    # The token drawn at a position without finite logits does not exist.
    is_broken = num_emitted > num_finite
    num_emitted = jnp.minimum(num_emitted, num_finite)
    new_status = jnp.where(is_broken, status.NONFINITE, status.RUNNING)

    remaining = request.max_lengths - state.lengths
    reaches_limit = num_emitted >= remaining
    num_emitted = jnp.minimum(num_emitted, remaining)
    new_status = jnp.where(reaches_limit, status.LENGTH, new_status)

    is_eos = jnp.any(verdict.tokens[:, :, None] == request.eos_ids[None, None], axis=-1)
    is_eos = is_eos & (offsets < num_emitted[:, None])
    has_eos = jnp.any(is_eos, axis=1)
    num_emitted = jnp.where(has_eos, jnp.argmax(is_eos, axis=1) + 1, num_emitted)
    new_status = jnp.where(has_eos, status.EOS, new_status)
    if request.stop_sequences.shape[1]:
        is_stop = _ends_stop_sequence(request, state, verdict.tokens)
        is_stop = is_stop & (offsets < num_emitted[:, None])
        has_stop = jnp.any(is_stop, axis=1)
        # At the token of an EOS the row ends as one that has said what it had to say.
        is_earlier = has_stop & ((jnp.argmax(is_stop, axis=1) + 1 < num_emitted) | ~has_eos)
        num_emitted = jnp.where(is_earlier, jnp.argmax(is_stop, axis=1) + 1, num_emitted)
        new_status = jnp.where(is_earlier, status.STOP, new_status)
    return num_emitted.astype(jnp.int32), new_status.astype(jnp.int32)


def _ends_stop_sequence(request: Request, state: State, tokens: Array) -> Array:
    """Whether the output ends in a stop sequence behind each of `tokens` i32[B, K + 1], bool.

    A sequence counts where all of it is output: what the prompt ends in is no part of it.
    """
    size = request.stop_sequences.shape[2]

    def of_row(row, length, prompt_length, new, sequences):
        at = length - (size - 1) + jnp.arange(size - 1, dtype=jnp.int32)
        before = jnp.where(at >= prompt_length, row[jnp.maximum(at, 0)], NO_TOKEN)
        text = jnp.concatenate([before, new])
        ends = jax.vmap(lambda i: lax.dynamic_slice(text, (i,), (size,)))(jnp.arange(new.shape[0]))
        is_same = (ends[:, None] == sequences[None]) | (sequences == NO_TOKEN)[None]
        is_sequence = sequences[:, -1] != NO_TOKEN  # else it only fills the array
        return jnp.any(jnp.all(is_same, axis=2) & is_sequence[None], axis=1)

    return jax.vmap(of_row)(
        state.tokens, state.lengths, request.prompt_lengths, tokens, request.stop_sequences
    )


def _write(
    request: Request, state: State, verdict: Verdict, num_emitted: Array, new_log_probs: Array
) -> tuple[Array, Array]:
    """Writes the committed tokens and their log-probabilities at each row's own length."""
    rows = jnp.arange(num_emitted.shape[0])[:, None]
    offsets = jnp.arange(verdict.tokens.shape[1])[None]
    is_new = offsets < num_emitted[:, None]
    emitted = jnp.where(is_new, verdict.tokens, 0)
    at = state.lengths[:, None] + offsets
    tokens = state.tokens.at[rows, jnp.where(is_new, at, state.tokens.shape[1])].set(
        emitted, mode="drop"
    )
    column = jnp.where(is_new, at - request.prompt_lengths[:, None], state.log_probs.shape[1])
    return tokens, state.log_probs.at[rows, column].set(new_log_probs, mode="drop")


def _keys(keys: Array, rounds: Array, purpose: int, count: int) -> Array:
    """key[B, count], by (row, round, purpose, offset)."""

    def of_row(key: Array, number: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, number), purpose)
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))

    return jax.vmap(of_row)(keys, rounds)


def _is_keyed_by_position(verifier: Verifier) -> bool:
    return getattr(verifier, "is_keyed_by_position", False)


def _noise_keys(keys: Array, positions: Array, count: int) -> Array:
    """key[B, count], by (row, position in the text), for the positions from i32[B] on."""

    def of_row(key: Array, first: Array) -> Array:
        def at(offset: Array) -> Array:
            return jax.random.fold_in(jax.random.fold_in(key, first + offset), _NOISE)

        return jax.vmap(at)(jnp.arange(count, dtype=jnp.int32))

    return jax.vmap(of_row)(keys, positions)
