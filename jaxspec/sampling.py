"""Sampling options: from logits to log-probabilities, at every draft position.

One function, `process`, serves the target's verification and a drafter's own sampling, so that
both mean the same by every option. It is unbatched and pure; the loop vmaps it. Whatever looks
back counts the drafted prefix as if it had been emitted.

Nothing here sorts the vocabulary: thresholds are found by bisection on the bits of the floats,
which ends at the exact threshold after at most 32 passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxspec import drawing, pytree

Array: TypeAlias = jax.Array
PerRow: TypeAlias = Any  # a Python number, an array [] or [B], or None


@pytree.dataclass
class Sampling:
    """How tokens are drawn from the target's logits. A registered pytree.

    Each option is one number for all rows or an array [B]. A neutral Python value, or None,
    switches an option off before tracing, at no cost; every other value is traced data: new
    values never retrace. The order is HF's: repetition penalty on the logits, then temperature,
    top-k, top-p, min-p.

    Attributes:
      temperature: f32 ≥ 0, divides the logits; 0 is greedy. The Python number 0 makes the whole
        program greedy, without keys; in an array, rows at 0 are greedy beside sampled ones.
      top_k: i32 ≥ 0, keeps the k likeliest tokens and all ties of the last one; 0: off.
      top_p: f32 in (0, 1], keeps the smallest set of likeliest tokens whose probability reaches
        top_p; of equal tokens the lower id is removed first; 1: off.
      min_p: f32 in [0, 1], keeps tokens at least min_p times as likely as the likeliest; 0: off.
      repetition_penalty: f32 > 0 (arXiv 1909.05858): divides positive and multiplies negative
        logits of tokens that stand in the prompt or the output; 1: off.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
      >>> options = resolve(Sampling(top_k=2), batch=1)
      >>> row = jax.tree.map(lambda x: x[0], options)
      >>> scores = process(logits, row, History(None), jnp.zeros(0, jnp.int32), 0)
      >>> (jnp.exp(scores.log_probs) > 0).tolist()
      [True, True, False]
    """

    temperature: PerRow = 1.0
    top_k: PerRow = 0
    top_p: PerRow = 1.0
    min_p: PerRow = 0.0
    repetition_penalty: PerRow = 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether temperature is the Python number 0: no row draws anything."""
        return _is_python_number(self.temperature) and self.temperature == 0


@pytree.dataclass
class Options:
    """`Sampling` resolved: arrays [B], None where statically off. See `resolve`.

    Attributes:
      temperature: f32[B] or None (1, or irrelevant because `is_greedy`).
      top_k: i32[B] or None.
      top_p: f32[B] or None.
      min_p: f32[B] or None.
      repetition_penalty: f32[B] or None.
      is_greedy: static; every row takes the argmax.
    """

    temperature: Array | None
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None
    repetition_penalty: Array | None
    is_greedy: bool = pytree.static()


class History(NamedTuple):
    """What options that look back need to know of the committed tokens.

    Attributes:
      seen: bool[B, V] (in unbatched functions bool[V]), tokens that stand in the prompt or the
        output; None while no option asks for it.
    """

    seen: Array | None


class Scores(NamedTuple):
    """What `process` makes of logits.

    Attributes:
      log_probs: f32[V], the law a token is drawn from; -inf for tokens cut off. At temperature
        0 it is a point mass on the argmax.
      report: f32[V], what `Generation.log_probs` reports: `log_probs`, but for a greedy row the
        law at temperature 1, before any cut.
    """

    log_probs: Array
    report: Array


_NEUTRAL = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
_RANGES = {
    "temperature": (lambda x: x >= 0, "at least 0"),
    "top_k": (
        lambda x: (x >= 0) & (x == np.floor(x)) & (x < 2**31),
        "a whole number of at least 0 (0 switches it off)",
    ),
    "top_p": (lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "in [0, 1]"),
    "repetition_penalty": (lambda x: x > 0, "above 0"),
}


def _is_python_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def check(sampling: Sampling) -> Options:
    """Checks the options' values.

    Returns:
      `Options` with arrays [] or [B], as given.

    Raises:
      ValueError: a value known before running is out of range, or an array has more axes. Values
        under a trace are not checked.
    """
    arrays: dict[str, Array | None] = {}
    for name, neutral in _NEUTRAL.items():
        value = getattr(sampling, name)
        if value is None or (_is_python_number(value) and value == neutral):
            arrays[name] = None
            continue
        if not isinstance(value, jax.core.Tracer):
            in_range, meaning = _RANGES[name]
            concrete = np.asarray(value)
            is_real = any(jnp.issubdtype(concrete.dtype, k) for k in (np.integer, np.floating))
            if not is_real or not np.all(np.isfinite(concrete) & in_range(concrete)):
                raise ValueError(f"{name} must be {meaning}, got {value!r}.")
        dtype = jnp.int32 if name == "top_k" else jnp.float32
        array = jnp.asarray(value).astype(dtype)
        if array.ndim > 1:
            raise ValueError(_shape_message(name, "(B,)", array.shape))
        arrays[name] = array
    if sampling.is_greedy:
        arrays |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
    return Options(**arrays, is_greedy=sampling.is_greedy)


def spread(options: Options, batch: int, *, whose: str = "") -> Options:
    """Spreads checked options over the rows.

    Args:
      options: from `check`.
      batch: B.
      whose: stands before an option's name in errors.

    Returns:
      `Options` with arrays [B].

    Raises:
      ValueError: an array's shape is neither [] nor [B].
    """
    for name in _NEUTRAL:
        array = getattr(options, name)
        if array is not None and array.shape not in ((), (batch,)):
            raise ValueError(_shape_message(whose + name, f"({batch},)", array.shape))
    return jax.tree.map(lambda array: jnp.broadcast_to(array, (batch,)), options)


def resolve(sampling: Sampling, batch: int) -> Options:
    """Checks the options and spreads them over the rows; see `check` and `spread`."""
    return spread(check(sampling), batch)


def _shape_message(name: str, wanted: str, shape: tuple[int, ...]) -> str:
    return (
        f"{name} must be one number or an array of one number a row, shape {wanted}; "
        f"got shape {shape}."
    )


# ---------------------------------------------------------------------------------------------
# History.


def init_history(options: Options, tokens: Array, lengths: Array, vocab_size: int) -> History:
    """The history of the prompts.

    Args:
      options: decides what must be remembered.
      tokens: i32[B, N], prompts.
      lengths: i32[B], prompt lengths.
      vocab_size: V.
    """
    if options.repetition_penalty is None:
        return History(None)
    is_prompt = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    empty = jnp.zeros((tokens.shape[0], vocab_size), bool)
    return History(_mark(empty, tokens, is_prompt))


def update_history(history: History, tokens: Array, num_tokens: Array) -> History:
    """Adds the first `num_tokens` i32[B] of `tokens` i32[B, K + 1] to each row's history."""
    if history.seen is None:
        return history
    is_new = jnp.arange(tokens.shape[1])[None] < num_tokens[:, None]
    return History(_mark(history.seen, tokens, is_new))


def _mark(seen: Array, tokens: Array, where: Array) -> Array:
    ids = jnp.where(where, tokens, seen.shape[1])  # out of range: dropped
    rows = jnp.arange(seen.shape[0])[:, None]
    return seen.at[rows, ids].set(True, mode="drop")


# ---------------------------------------------------------------------------------------------
# From logits to log-probabilities (unbatched).


def process(
    logits: Array, options: Options, history: History, prefix: Array, prefix_length: Any
) -> Scores:
    """The law of the next token under the sampling options.

    Args:
      logits: float[V].
      options: one row's options (arrays []).
      history: one row's history.
      prefix: i32[K], drafted tokens behind the history.
      prefix_length: i32[], how many of them precede this position; they count as emitted.

    Returns:
      `Scores`, each f32[V], normalised.
    """
    logits = logits.astype(jnp.float32)
    if options.repetition_penalty is not None:
        logits = _penalize_repetition(
            logits, options.repetition_penalty, history.seen, prefix, prefix_length
        )
    if options.is_greedy:
        return Scores(_point_mass(logits), log_softmax(logits))
    warped = logits
    if options.temperature is not None:
        is_greedy_row = options.temperature == 0
        # From the top down: a tiny temperature overflows to -inf below the top, not to NaN.
        warped = (logits - _finite_max(logits)) / jnp.where(is_greedy_row, 1.0, options.temperature)
    if options.top_k is not None:
        warped = keep_top_k(warped, options.top_k)
    if options.top_p is not None:
        warped = keep_top_p(warped, options.top_p)
    if options.min_p is not None:
        floor = jnp.max(warped) + jnp.log(options.min_p)
        warped = jnp.where(warped >= floor, warped, -jnp.inf)
    log_probs = log_softmax(warped)
    if options.temperature is None:
        return Scores(log_probs, log_probs)
    # A point mass, not a tiny "sentinel" temperature: exact, also where two logits are close.
    return Scores(
        jnp.where(is_greedy_row, _point_mass(logits), log_probs),
        jnp.where(is_greedy_row, log_softmax(logits), log_probs),
    )


def _point_mass(logits: Array) -> Array:
    """Log 1 at the (first) largest logit, log 0 elsewhere: f32[V]."""
    return jnp.where(jnp.arange(logits.shape[0]) == drawing.argmax(logits), 0.0, -jnp.inf)


def log_softmax(logits: Array) -> Array:
    """f32[V] -> f32[V]; -inf logits stay -inf."""
    shifted = logits - _finite_max(logits)
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted)))


def _finite_max(logits: Array) -> Array:
    """The largest of f32[V]; 0 where that is not finite."""
    top = jnp.max(logits)
    return jnp.where(jnp.isfinite(top), top, 0.0)


def _penalize_repetition(logits, penalty, seen, prefix, prefix_length):
    def penalize(x):
        return jnp.where(x > 0, x / penalty, x * penalty)

    out = jnp.where(seen, penalize(logits), logits)
    # Written from the raw logits, so that a token is penalised once however often it occurs.
    counts = jnp.arange(prefix.shape[0]) < prefix_length
    ids = jnp.where(counts, prefix, logits.shape[0])  # out of range: dropped
    raw = logits[jnp.where(counts, prefix, 0)]
    return out.at[ids].set(penalize(raw), mode="drop")


def _ordered_bits(x: Array) -> Array:
    """A monotone map from float32 to uint32: x < y iff bits(x) < bits(y); -0 equals +0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(condition: Callable[[Array], Array], low: Any, high: Any) -> Array:
    """The largest x in [low, high) with `condition`, monotone from true to false, uint32[].

    `condition(low)` must hold.
    """

    def is_open(interval):
        low, high = interval
        return high - low > 1

    def halve(interval):
        low, high = interval
        middle = low + (high - low) // 2
        holds = condition(middle)
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    return lax.while_loop(is_open, halve, (low, high))[0]


_LOWEST, _HIGHEST = np.uint32(0), np.uint32(0xFFFFFFFF)


def keep_top_k(logits: Array, k: Array) -> Array:
    """-inf for all but the k largest of f32[V] and the ties of the k-th; k = 0 keeps all."""
    keys = _ordered_bits(logits)
    k = jnp.clip(k, 0, logits.shape[0])
    threshold = _largest(lambda t: jnp.sum(keys >= t) >= k, _LOWEST, _HIGHEST)
    return jnp.where((keys >= threshold) | (k == 0), logits, -jnp.inf)


def keep_top_p(logits: Array, p: Array) -> Array:
    """-inf for all but the nucleus of f32[V] (arXiv 1904.09751).

    A token stays if the mass ahead of it, of likelier tokens and of equal ones with a higher
    id, is below p: so the token that crosses p stays, and at least one does.
    """
    keys = _ordered_bits(logits)
    probs = jnp.exp(log_softmax(logits))
    p = jnp.maximum(p, jnp.finfo(jnp.float32).tiny)  # never 0: the likeliest token stays

    # The nucleus reaches down to the lowest value with a mass of likelier tokens below p: one
    # above the largest t at which the tokens beyond t still have mass ≥ p.
    def is_below_threshold(t):
        return jnp.sum(jnp.where(keys > t, probs, 0.0)) >= p

    threshold = _largest(is_below_threshold, _LOWEST, _HIGHEST) + 1
    threshold = jnp.where(is_below_threshold(_LOWEST), threshold, _LOWEST)
    ahead = jnp.sum(jnp.where(keys > threshold, probs, 0.0))
    is_tie = keys == threshold
    ids = jnp.arange(logits.shape[0], dtype=jnp.uint32)
    size = np.uint32(logits.shape[0])

    # Of the ties, those from the lowest id on that still has mass below p ahead of it.
    def leaves_out(i):
        return ahead + jnp.sum(jnp.where(is_tie & (ids > i), probs, 0.0)) >= p

    num_ties = jnp.sum(is_tie)
    high = jnp.where((num_ties > 1) & leaves_out(jnp.uint32(0)), size, np.uint32(1))
    last_left_out = _largest(leaves_out, np.uint32(0), high)
    stays = jnp.where(high > 1, ids > last_left_out, True)
    keep = (keys > threshold) | (is_tie & stays)
    return jnp.where(keep | (p >= 1), logits, -jnp.inf)
