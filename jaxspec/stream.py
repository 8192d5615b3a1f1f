"""Text as it is written: the same program as `generate`, one round at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import arguments, states, status
from jaxspec.generate import Generation, begin, finish, run
from jaxspec.types import LanguageModel

Stop: TypeAlias = Callable[[int, np.ndarray], int | None]


def stream(
    target: LanguageModel, prompts: Any = None, *, stop: Stop | None = None, **kwargs: Any
) -> Generator[tuple[int, np.ndarray], None, Generation]:
    """Yields new tokens as rounds end.

    Arguments are checked at the call, before the first token is asked for. The tokens are those
    of `generate` with the same arguments, and no program is compiled that `generate` does not
    use. Not traceable: every round returns to the host.

    Args:
      target: as in `jaxspec.generate`.
      prompts: as in `jaxspec.generate`.
      stop: called with (row, its new ids i32[n]) whenever a row has some; returns how many of them
        to keep, 1 … n, where the row is to end there with status `STOP`, or None where it goes on.
        What stands behind is neither yielded nor counted nor reported. For texts,
        `jaxspec_models.stop_strings` makes one.
      **kwargs: the keyword arguments of `jaxspec.generate`.

    Returns:
      A generator of (row, i32[n] with n ≥ 1 new token ids), rows in order within a round. Its
      return value (`result = yield from stream(...)`, or `StopIteration.value`) is the
      `jaxspec.Generation`.

    Raises:
      ValueError: as `jaxspec.generate`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxspec
      >>> def apply(params, tokens, cache, *, start):
      ...     return jaxspec.ModelOutput(params[tokens]), cache
      >>> def init_cache(batch, capacity, max_step):
      ...     return ()
      >>> lm = jaxspec.LanguageModel(10.0 * jnp.eye(4)[jnp.array([1, 2, 3, 0])],
      ...                            apply, init_cache, vocab_size=4)
      >>> greedy = jaxspec.Sampling(temperature=0)
      >>> for row, ids in stream(lm, [[0]], drafter=jaxspec.drafters.model(lm),
      ...                        sampling=greedy, max_new_tokens=7, num_draft_tokens=2):
      ...     print(row, ids.tolist())
      0 [1, 2, 3]
      0 [0, 1, 2]
      0 [3]
    """
    return _stream(arguments.prepare(target, prompts, **kwargs), stop)


def _stream(prepared: arguments.Prepared, stop: Stop | None):
    engine, request = prepared.engine, prepared.request
    state = begin(prepared)
    lengths = np.asarray(state.lengths)
    while np.any(np.asarray(state.status) == status.RUNNING):
        before = jax.tree.map(np.array, state.stats) if stop is not None else None
        state = run(engine, request, state, 1)
        tokens, new_lengths = np.asarray(state.tokens), np.asarray(state.lengths)
        rows = np.flatnonzero(new_lengths > lengths)
        new = {int(row): tokens[row, lengths[row] : new_lengths[row]].copy() for row in rows}
        if stop is not None:
            kept = {row: count for row, ids in new.items() if (count := _kept(stop, row, ids))}
            state = _cut(state, before, kept, lengths, np.asarray(request.start_lengths))
            new = {row: ids[: kept.get(row)] for row, ids in new.items()}
            new_lengths = np.asarray(state.lengths)
        yield from new.items()
        lengths = new_lengths
    return finish(prepared, state)


def _kept(stop: Stop, row: int, ids: np.ndarray) -> int | None:
    count = stop(row, ids)
    if count is not None and not 1 <= count <= len(ids):
        raise ValueError(f"stop must return None or 1 … {len(ids)}, tokens to keep; got {count!r}.")
    return count


def _cut(
    state: states.State, before: Any, kept: dict[int, int], lengths: np.ndarray, starts: np.ndarray
) -> states.State:
    """Ends rows inside the round that has just passed, as if it had ended there itself.

    Args:
      state: behind the round.
      before: the statistics before it, NumPy.
      kept: by row, how many of the round's tokens stay.
      lengths: i64[B], before the round.
      starts: i64[B], where the call's output begins.
    """
    if not kept:
        return state
    new_status, new_lengths = np.array(state.status), np.array(state.lengths)
    counters = jax.tree.map(np.array, state.stats)
    for row, count in kept.items():
        is_cut = lengths[row] + count < new_lengths[row]
        if is_cut or new_status[row] != status.EOS:
            new_status[row] = status.STOP
        if not is_cut:
            continue
        # What stays are accepted drafts, since one token alone comes behind them: the round
        # counts as one that accepted these, and in which nothing else came up.
        new_lengths[row] = lengths[row] + count
        for now, then in zip(counters, before, strict=True):
            now[row] = then[row]
        counters.num_spec_steps[row] += 1
        counters.num_emitted_tokens[row] += count
        counters.num_draft_tokens[row] += count
        counters.num_accepted_draft_tokens[row] += count
        counters.acceptance_histogram[row, count] += 1
    is_written = np.arange(state.log_probs.chosen.shape[1])[None] < (new_lengths - starts)[:, None]

    def behind_is_zero(x: jax.Array) -> jax.Array:
        mask = jnp.asarray(is_written.reshape(is_written.shape + (1,) * (x.ndim - 2)))
        return jnp.where(mask, x, jnp.zeros_like(x))

    return state._replace(
        status=jnp.asarray(new_status),
        lengths=jnp.asarray(new_lengths),
        stats=jax.tree.map(jnp.asarray, counters),
        log_probs=jax.tree.map(behind_is_zero, state.log_probs),
    )
