"""Text as it is written: the same program as `generate`, one round at a time."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from jaxspec import arguments, status
from jaxspec.generate import Generation, begin, finish, run
from jaxspec.types import LanguageModel


def stream(
    target: LanguageModel, prompts: Any = None, **kwargs: Any
) -> Generator[tuple[int, np.ndarray], None, Generation]:
    """Yields new tokens as rounds end.

    Arguments are checked at the call, before the first token is asked for. The tokens are those
    of `generate` with the same arguments, and no program is compiled that `generate` does not
    use. Not traceable: every round returns to the host.

    Args:
      target: as in `jaxspec.generate`.
      prompts: as in `jaxspec.generate`.
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
    return _stream(arguments.prepare(target, prompts, **kwargs))


def _stream(prepared: arguments.Prepared):
    engine, request = prepared.engine, prepared.request
    state = begin(prepared)
    lengths = np.asarray(state.lengths)
    while np.any(np.asarray(state.status) == status.RUNNING):
        state = run(engine, request, state, 1)
        tokens, new_lengths = np.asarray(state.tokens), np.asarray(state.lengths)
        for row in np.flatnonzero(new_lengths > lengths):
            yield int(row), tokens[row, lengths[row] : new_lengths[row]].copy()
        lengths = new_lengths
    return finish(prepared, state)
