"""The loop: one compiled program that drafts, verifies and commits until every row has stopped.

Strategies arrive as values; no concrete drafter, verifier or policy is known here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import drawing, sampling, stats, status, trees
from jaxspec.sampling import processing
from jaxspec.states import Engine, LogProbs, Outputs, Request, State, with_strong_types
from jaxspec.types import (
    NO_NODE,
    NO_TOKEN,
    Branches,
    Cache,
    Context,
    Draft,
    Outcome,
    Verdict,
    Verifier,
)

Array: TypeAlias = jax.Array

# Purposes that a round's key is folded with: no two draws share a key.
_PROPOSE, _VERIFY, _NOISE = 0, 1, 2


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

    return with_strong_types(lax.while_loop(goes_on, step, (jnp.int32(0), state))[1])


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
    num_finite: Array  # i32[B], accepted positions with a finite law before the first without
    log_probs: LogProbs  # [B, K + 1], of the verdict's tokens
    zeros: stats.ZeroProbabilities
    target_log_probs: Array  # f32[B, K + 1, V]
    hidden: tuple[Array, ...]  # [B, K + 1, D] each
    top_tokens: Array  # i32[B, K + 1, n]


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
        top_tokens=judged.top_tokens,
    )
    if engine.drafter is not None:
        drafter_state = engine.drafter.commit(drafter_state, outcome)
    tokens, log_probs = _write(request, state, verdict, num_emitted, judged.log_probs)
    return State(
        lengths=state.lengths + num_emitted,
        status=jnp.where(is_active, new_status, state.status),
        num_rounds=state.num_rounds + is_active.astype(jnp.int32),
        memory=sampling.remember(request.options, state.memory, verdict.tokens, num_emitted),
        policy=engine.policy.update(state.policy, outcome),
        log_probs=log_probs,
        prompt_log_probs=state.prompt_log_probs,
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
    if draft.parents is not None:  # a tree is drafted whole, or not at all
        widths = (widths[0], widths[-1])

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
        parents=None if draft.parents is None else draft.parents[:, :num_slots],
    )
    start = state.lengths - 1
    pending = jnp.take_along_axis(state.tokens, start[:, None], axis=1)
    fed = jnp.concatenate([pending, draft.tokens], axis=1)
    num_new = jnp.where(is_active, 1 + draft.length, 0)
    forward = functools.partial(
        engine.target.forward,
        fed,
        cache,
        start=start,
        num_new=num_new,
        hidden_layers=engine.hidden_layers,
    )
    # The sampling options at every position, each with the drafts before it as its prefix.
    history = _history(request, state)
    if draft.parents is None:
        output, cache = forward()
        logits = output.logits
        scores = processing.process_positions(logits, request.options, history, draft.tokens)
    else:
        paths, depths = jax.vmap(trees.paths)(draft.parents, draft.tokens)
        mask = jax.vmap(trees.ancestors)(draft.parents)
        output, cache = forward(branches=Branches(start, mask, start[:, None] + depths))
        logits = output.logits
        scores = processing.process_nodes(logits, request.options, history, paths, depths)

    # A position without a finite law ends the draft there: what stands before it is verified as
    # ever, and the row stops when it gets there.
    draft, is_finite = _cut_at_nonfinite(draft, logits, scores.log_probs)

    if _is_keyed_by_position(engine.verifier):
        keys = _noise_keys(request.keys, state.lengths, width)
    else:
        keys = _keys(request.keys, state.num_rounds, _VERIFY, width)
    verdict = jax.vmap(engine.verifier)(keys, draft, scores.log_probs)
    tokens = verdict.tokens.astype(jnp.int32)
    offsets = jnp.arange(width, dtype=jnp.int32)
    emitted = jnp.where(offsets[None] <= verdict.num_accepted[:, None], tokens, 0)
    nodes = path = None
    if draft.parents is not None:
        assert verdict.path is not None  # `arguments` lets only rules for trees judge trees
        assert engine.target.compact is not None
        cache = engine.target.compact(cache, start + 1, verdict.path)
        # Along the accepted path, as if the drafts had been a chain.
        nodes = _path_nodes(verdict.path, width)
        path = _path_nodes(verdict.path, engine.num_draft_tokens + 1)[:, 1:] - 1
        is_finite = jnp.take_along_axis(is_finite, nodes, axis=1)
    log_probs = _reported(engine.outputs, request.options, logits, scores.report, emitted, nodes)
    num_finite = jnp.sum(jnp.cumprod(is_finite.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)

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
        draft=whole._replace(
            length=draft.length,
            parents=None if draft.parents is None else widen(draft.parents, NO_NODE),
        ),
        verdict=verdict._replace(
            tokens=widen(tokens, NO_TOKEN),
            num_accepted=verdict.num_accepted.astype(jnp.int32),
            path=path,
            is_fallback=is_fallback,
        ),
        num_finite=num_finite,
        log_probs=jax.tree.map(widen, log_probs),
        zeros=jax.tree.map(widen, zeros),
        target_log_probs=widen(scores.log_probs),
        hidden=jax.tree.map(widen, output.hidden),
        top_tokens=widen(_top_tokens(scores.report, engine.num_top_tokens), NO_TOKEN),
    )


def _top_tokens(report: Array, count: int) -> Array:
    """The likeliest tokens of laws f32[B, T, V], i32[B, T, count]."""
    batch, width, size = report.shape
    if count == 0:
        return jnp.zeros((batch, width, 0), jnp.int32)
    top = functools.partial(drawing.top_k, count=min(count, size))
    values, tokens = jax.vmap(jax.vmap(top))(report)
    tokens = jnp.where(values > -jnp.inf, tokens, NO_TOKEN)
    missing = [(0, 0), (0, 0), (0, count - tokens.shape[2])]
    return jnp.pad(tokens, missing, constant_values=NO_TOKEN)


def _path_nodes(path: Array, width: int) -> Array:
    """The nodes along i32[B, P] slots, the pending token first: i32[B, width]."""
    nodes = jnp.tile(jnp.arange(width, dtype=jnp.int32), (path.shape[0], 1))
    return nodes.at[:, 1 : path.shape[1] + 1].set(path + 1)


def _reported(
    outputs: Outputs,
    options: sampling.Options,
    logits: Array,
    report: Array,
    tokens: Array,
    nodes: Array | None,
) -> LogProbs:
    """What is reported of `tokens` i32[B, K + 1], of laws and logits f32[B, K + 1, V].

    The laws behind the tokens are those at `nodes` i32[B, K + 1]; None: at 0 … K.
    """

    def along(laws: Array) -> Array:
        return laws if nodes is None else jnp.take_along_axis(laws, nodes[:, :, None], axis=1)

    at = jnp.arange(tokens.shape[1])[None] if nodes is None else nodes
    # Not of `along(report)`, which would copy the laws for the sake of a number each.
    chosen = raw = report[jnp.arange(tokens.shape[0])[:, None], at, tokens]
    if options.are_on:
        raw = jax.vmap(jax.vmap(sampling.log_prob))(along(logits).astype(jnp.float32), tokens)
    most = outputs.num_top_log_probs
    if most == 0:
        return LogProbs(chosen, raw, report[:, :, :0], jnp.zeros_like(tokens)[:, :, None][:, :, :0])
    top, top_ids = lax.top_k(along(report), most)
    return LogProbs(chosen, raw, top, top_ids.astype(jnp.int32))


def _propose(engine: Engine, request: Request, state: State, is_active: Array) -> tuple[Draft, Any]:
    """The round's drafts; none without a drafter."""
    batch, num_slots = is_active.shape[0], engine.num_draft_tokens
    if engine.drafter is None:
        return Draft(jnp.zeros((batch, 0), jnp.int32), None, jnp.zeros((batch,), jnp.int32)), None
    # The round emits one token beside the drafts: more than the remainder is never drafted.
    most = request.max_lengths - state.lengths - 1
    if hasattr(engine.drafter, "num_nodes"):  # of a tree, nodes are no tokens
        most = jnp.where(most > 0, num_slots, 0)
    most = jnp.minimum(most, num_slots)
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
      The draft, and bool[B, K + 1] where a law is finite.
    """
    # A maximum is NaN or +inf if any element is.
    is_finite = jnp.isfinite(jnp.max(logits, axis=-1)) & jnp.isfinite(jnp.max(log_probs, axis=-1))
    if draft.parents is None:
        num_finite = jnp.sum(
            jnp.cumprod(is_finite.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32
        )
        return draft._replace(length=jnp.minimum(draft.length, num_finite)), is_finite
    above = jnp.take_along_axis(is_finite, jnp.maximum(draft.parents + 1, 0), axis=1)
    return draft._replace(parents=jnp.where(above, draft.parents, NO_NODE)), is_finite


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
    request: Request, state: State, verdict: Verdict, num_emitted: Array, new: LogProbs
) -> tuple[Array, LogProbs]:
    """Writes the committed tokens and their log-probabilities at each row's own length."""
    rows = jnp.arange(num_emitted.shape[0])[:, None]
    offsets = jnp.arange(verdict.tokens.shape[1])[None]
    is_new = offsets < num_emitted[:, None]
    emitted = jnp.where(is_new, verdict.tokens, 0)
    at = state.lengths[:, None] + offsets
    tokens = state.tokens.at[rows, jnp.where(is_new, at, state.tokens.shape[1])].set(
        emitted, mode="drop"
    )
    size = state.log_probs.chosen.shape[1]
    column = jnp.where(is_new, at - request.start_lengths[:, None], size)
    return tokens, jax.tree.map(
        lambda all_, new: all_.at[rows, column].set(new, mode="drop"), state.log_probs, new
    )


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
