"""Before the loop: prompts are fed to target and drafter, and texts are taken up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import pytree, sampling, stats, status
from jaxspec.states import Engine, LogProbs, Request, State, with_strong_types
from jaxspec.types import PREFILL_CHUNK, Cache

Array: TypeAlias = jax.Array


@pytree.dataclass
class Continuation:
    """Where a generation stopped, for `generate(state=…)` to go on from. A registered pytree.

    It holds the caches, and so keeps their memory; it can be taken up more than once.

    Attributes:
      state: the loop's, all rows stopped.
      keys: key[B], the rows'.
      prompt_lengths: i32[B].
      capacity: slots of the caches (static).
    """

    state: State
    keys: Array
    prompt_lengths: Array
    capacity: int = pytree.static()


def token_buffer_length(max_prompt: int, max_new_tokens: int, num_draft_tokens: int) -> int:
    """N: room for the drafts of a row that is one token short of its limit."""
    return max_prompt + max_new_tokens + num_draft_tokens + 1


def cache_capacity(
    max_prompt: int, max_new_tokens: int, num_draft_tokens: int, *, num_before: int = 0
) -> int:
    """Slots that calls may write behind the first `num_before`: no write is ever clamped.

    Prefill writes whole chunks; a round writes K + 1 slots from the pending token on, and a
    drafter up to one slot more.
    """
    width = prefill_width(max_prompt)
    whole_chunks = -(-max_prompt // width) * width if width else 0
    tokens = token_buffer_length(max_prompt, max_new_tokens, num_draft_tokens)
    return num_before + max(whole_chunks, tokens + 1)


def prefill_width(max_prompt: int) -> int:
    """Tokens in one prefill call."""
    return min(max_prompt, PREFILL_CHUNK)


def prefill(engine: Engine, request: Request, prompts: Array, *, max_new_tokens: int) -> State:
    """Feeds the prompts to target and drafter, chunk by chunk.

    The last prompt token stays pending, so that no logits are formed at all (unless the prompts'
    log-probabilities are asked for); the first round forms them for that token only. Chunks that
    no row needs are skipped: the number of chunks is data.

    Args:
      engine: the strategies.
      request: what is asked for, of B rows.
      prompts: i32[P, L], right-padded with valid token ids. P divides B; each prompt is fed once
        and begins B / P rows next to each other.
      max_new_tokens: T.

    Returns:
      The `State` before the first round.
    """
    batch, (num_prompts, max_prompt) = request.prompt_lengths.shape[0], prompts.shape
    capacity = cache_capacity(max_prompt, max_new_tokens, engine.num_draft_tokens)
    size = token_buffer_length(max_prompt, max_new_tokens, engine.num_draft_tokens)
    tokens = jnp.pad(prompts, ((0, 0), (0, size - max_prompt)))
    lengths = request.prompt_lengths[:: batch // num_prompts]

    def init(batch: int) -> tuple[Cache, Any]:
        return _init(engine, batch, capacity, max_prompt)

    cache, drafter_state, prompt_log_probs = _feed(
        engine, tokens, jnp.zeros_like(lengths), lengths, *init(num_prompts), size=max_prompt
    )
    if batch != num_prompts:
        cache, drafter_state = _repeated((cache, drafter_state), init, num_prompts, batch)
        tokens = jnp.repeat(tokens, batch // num_prompts, axis=0)
    return _state(
        engine,
        request,
        tokens,
        (cache, drafter_state, prompt_log_probs),
        status=jnp.full((batch,), status.RUNNING, jnp.int32),
        num_rounds=jnp.zeros((batch,), jnp.int32),
        policy=engine.policy.init(batch),
        max_new_tokens=max_new_tokens,
    )


def resume(
    engine: Engine,
    request: Request,
    prompts: Array,
    continuation: Continuation,
    *,
    num_slots: int,
    capacity: int,
    max_new_tokens: int,
) -> State:
    """Takes texts up again: with new tokens behind them, or just with room for more.

    Nothing is fed twice: the new tokens and the one that was pending, behind the caches as they
    are. Rounds are numbered on, so that no randomness comes twice.

    Args:
      engine: the strategies, of the same kinds as before.
      request: what is asked for; its lengths count what stands there already.
      prompts: i32[B, L], the new tokens, right-padded with valid ids; L = 0: none, and rows that
        had stopped for another reason than their limit stay as they are.
      continuation: where the texts stand.
      num_slots: N, size of the token buffer from now on.
      capacity: slots of the caches from now on.
      max_new_tokens: T.

    Returns:
      The `State` before the next round.
    """
    before = continuation.state
    batch, size = prompts.shape
    tokens = jnp.pad(before.tokens, ((0, 0), (0, num_slots - before.tokens.shape[1])))
    offsets = jnp.arange(size, dtype=jnp.int32)[None]
    num_new = request.start_lengths - before.lengths
    at = jnp.where(offsets < num_new[:, None], before.lengths[:, None] + offsets, num_slots)
    tokens = tokens.at[jnp.arange(batch)[:, None], at].set(prompts, mode="drop")
    caches = _grown(
        (before.cache, before.drafter),
        jax.eval_shape(lambda: _init(engine, batch, capacity, max(size, 1))),
    )
    cache, drafter_state, prompt_log_probs = _feed(
        engine, tokens, before.lengths - 1, num_new + 1, *caches, size=size, is_behind_text=True
    )
    had_room = (before.status == status.LENGTH) if size == 0 else True
    return _state(
        engine,
        request,
        tokens,
        (cache, drafter_state, prompt_log_probs),
        status=jnp.where(had_room, status.RUNNING, before.status).astype(jnp.int32),
        num_rounds=before.num_rounds,
        policy=before.policy,
        max_new_tokens=max_new_tokens,
    )


def _state(
    engine: Engine,
    request: Request,
    tokens: Array,
    fed: tuple[Cache, Any, Array | None],
    *,
    status: Array,
    num_rounds: Array,
    policy: Any,
    max_new_tokens: int,
) -> State:
    """The state before a call's first round; nothing is reported yet."""
    batch = tokens.shape[0]
    cache, drafter_state, prompt_log_probs = fed
    history = sampling.recall(
        request.options,
        tokens,
        request.start_lengths,
        vocab_size=engine.target.vocab_size,
        prompt_lengths=request.prompt_lengths,
    )
    state = State(
        lengths=request.start_lengths,
        status=status,
        num_rounds=num_rounds,
        memory=history.memory,
        policy=policy,
        log_probs=LogProbs.zeros(batch, max_new_tokens, engine.outputs.num_top_log_probs),
        prompt_log_probs=prompt_log_probs,
        stats=stats.init(batch, engine.num_draft_tokens),
        tokens=tokens,
        cache=cache,
        drafter=drafter_state,
    )
    return with_strong_types(state)


def _init(engine: Engine, batch: int, capacity: int, max_prompt: int) -> tuple[Cache, Any]:
    """Empty caches of target and drafter."""
    most = max(prefill_width(max_prompt), engine.num_draft_tokens + 1)
    drafter = engine.drafter
    return (
        engine.target.init_cache(batch, capacity, most),
        None if drafter is None else drafter.init(batch, capacity),
    )


def _feed(
    engine: Engine,
    tokens: Array,
    first: Array,
    num_known: Array,
    cache: Cache,
    drafter_state: Any,
    *,
    size: int,
    is_behind_text: bool = False,
) -> tuple[Cache, Any, Array | None]:
    """Feeds all but the last of the `num_known` i32[B] tokens from the slots `first` i32[B] on.

    Args:
      engine: the strategies.
      tokens: i32[B, N].
      first: the slot of the first token to feed.
      num_known: at most `size`, or `size` + 1 where the token at `first` was pending.
      cache: the target's, valid below `first`.
      drafter_state: the drafter's.
      size: L, the number of columns of the prompts.
      is_behind_text: whether the token at `first` was pending, and is none of the prompts'.

    Returns:
      Cache, drafter state, and the prompts' log-probabilities f32[B, L] where asked for.
    """
    target, drafter = engine.target, engine.drafter
    batch, num_slots = tokens.shape
    width = prefill_width(size)
    num_to_feed = num_known - 1
    wants_log_probs = engine.outputs.prompt_log_probs
    log_probs = jnp.zeros((batch, size), jnp.float32) if wants_log_probs else None
    if width == 0:
        return cache, drafter_state, log_probs
    rows = jnp.arange(batch)[:, None]

    def feed_chunk(index: Array, carry: Any) -> Any:
        cache, drafter_state, log_probs = carry
        at = index * width
        offsets = at + jnp.arange(width)
        # Gather, not slice, which would clamp and shift the last chunk.
        columns = jnp.minimum(first[:, None] + offsets[None], num_slots - 1)
        fed = tokens[rows, columns]
        start = first + at
        num_new = jnp.clip(num_to_feed - at, 0, width)
        output, cache = target.forward(
            fed,
            cache,
            start=start,
            num_new=num_new,
            logits_at=None if wants_log_probs else jnp.zeros((batch, 0), jnp.int32),
            hidden_layers=engine.hidden_layers,
        )
        if drafter is not None:
            drafter_state = drafter.prefill(drafter_state, fed, output.hidden, start, num_new)
        if log_probs is not None:
            next_tokens = tokens[rows, jnp.minimum(columns + 1, num_slots - 1)]
            laws = jax.vmap(jax.vmap(sampling.log_softmax))(output.logits)
            new = jnp.take_along_axis(laws, next_tokens[:, :, None], axis=2)[:, :, 0]
            # A prompt's own first token has no law.
            column = offsets[None] + (0 if is_behind_text else 1)
            column = jnp.where(offsets[None] < num_to_feed[:, None], column, size)
            log_probs = log_probs.at[rows, column].set(new, mode="drop")
        return cache, drafter_state, log_probs

    num_chunks = (jnp.max(num_to_feed) + width - 1) // width
    return lax.fori_loop(0, num_chunks, feed_chunk, (cache, drafter_state, log_probs))


def _repeated(tree: Any, make: Callable[[int], Any], num_prompts: int, batch: int) -> Any:
    """Every row's state as often as it takes for `batch` rows, next to each other.

    The axis of the rows is the one that differs between `make(num_prompts)` and `make(batch)`.
    """

    def repeat(x: Array, few: Any, many: Any) -> Array:
        axes = [i for i, (a, b) in enumerate(zip(few.shape, many.shape, strict=True)) if a != b]
        if not axes:
            return x  # shared by all rows
        if len(axes) > 1 or (few.shape[axes[0]], many.shape[axes[0]]) != (num_prompts, batch):
            raise ValueError(
                "num_return_sequences needs caches with one axis of rows in each array; got "
                f"shapes {few.shape} for {num_prompts} rows and {many.shape} for {batch}. Repeat "
                "the prompts instead."
            )
        return jnp.repeat(x, batch // num_prompts, axis=axes[0])

    shapes = (jax.eval_shape(lambda size=size: make(size)) for size in (num_prompts, batch))
    return jax.tree.map(repeat, tree, *shapes)


def _grown(tree: Any, wanted: Any) -> Any:
    """Arrays with zeros behind them until they are as large as `wanted`."""

    def grow(x: Array, shape: Any) -> Array:
        missing = [max(0, b - a) for a, b in zip(x.shape, shape.shape, strict=True)]
        return jnp.pad(x, [(0, m) for m in missing]) if any(missing) else x

    return jax.tree.map(grow, tree, wanted)
