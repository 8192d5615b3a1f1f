"""What users pass, checked and spread over the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import pytree
from jaxspec.sampling import grammar as grammars
from jaxspec.sampling.grammar import Grammar

Array: TypeAlias = jax.Array
PerRow: TypeAlias = Any  # a Python number, an array [] or [B], or None

NO_ID = -1
"""Fills lists of token ids that are shorter than their neighbours, on the left."""


@pytree.dataclass
class Sampling:
    """How tokens are drawn from the target's logits. A registered pytree.

    A row whose bans leave no token stops with status `NONFINITE`.

    Each numeric option is one number for all rows or an array [B]. A neutral Python value, or
    None, switches an option off before tracing, at no cost; every other value is traced data: new
    values never retrace. What looks back counts drafted tokens as if they had been emitted.

    The order is HF's: logit bias, repetition penalty, frequency and presence penalties, the bans
    (n-grams, bad words, end of text, grammar, suppressed tokens), `processor`; then temperature,
    top-k, top-p, min-p, typical-p.

    Attributes:
      temperature: f32 ≥ 0, divides the logits; 0 is greedy. The Python number 0 makes the whole
        program greedy, without keys; in an array, rows at 0 are greedy beside sampled ones.
      top_k: i32 ≥ 0, keeps the k likeliest tokens and all ties of the last one; 0: off.
      top_p: f32 in (0, 1], keeps the smallest set of likeliest tokens whose probability reaches
        top_p; of equal tokens the lower id is removed first; 1: off.
      min_p: f32 in [0, 1], keeps tokens at least min_p times as likely as the likeliest; 0: off.
      repetition_penalty: f32 > 0 (arXiv 1909.05858): divides positive and multiplies negative
        logits of tokens that stand in the prompt or the output; 1: off.
      typical_p: f32 in (0, 1] (arXiv 2202.00666), keeps the smallest set of tokens with a
        surprise closest to the law's entropy whose probability reaches typical_p, and all ties of
        the last one; 1: off.
      presence_penalty: f32, taken off the logits of tokens that stand in the output; 0: off.
      frequency_penalty: f32, taken off a token's logit for each time it stands in the output; 0:
        off.
      no_repeat_ngram_size: i32 ≥ 0, bans tokens that would complete an n-gram of this size that
        stands in the prompt or the output already; 0: off.
      min_new_tokens: i32 ≥ 0, bans the EOS tokens until so many tokens are written; 0: off. (A stop
        sequence still ends its row.)
      logit_bias: added to the logits: {token id: bias}, f32[V], or f32[B, V].
      bad_words: token-id lists, or i32[W, L] or i32[B, W, L] filled with -1 on the left: the last
        token of each is banned where the tokens before it stand at the end of the text.
      suppress_tokens: ids i32[S], or i32[B, S] filled with -1: never written.
      grammar: a `sampling.Grammar`, which the output follows from its first token on: from
        `sampling.grammar_of`, or of an expression or a JSON schema from
        `jaxspec_models.grammars`; `sampling.join_grammars` gives each row its own.
      processor: a function `(sampling.Text, logits f32[V]) -> logits f32[V]` of one row, pure and
        traceable; logits of -inf ban a token. It compares by value: pass a module-level function,
        or `jax.tree_util.Partial(function, parameters)` for one with arrays in it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxspec import sampling
      >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
      >>> options = sampling.resolve(Sampling(top_k=2), batch=1, vocab_size=3)
      >>> history = sampling.recall(options, jnp.zeros((1, 1), jnp.int32), jnp.array([1]))
      >>> scores = sampling.process_rows(logits, options, history)
      >>> (jnp.exp(scores.log_probs) > 0).tolist()
      [[True, True, False]]
    """

    temperature: PerRow = 1.0
    top_k: PerRow = 0
    top_p: PerRow = 1.0
    min_p: PerRow = 0.0
    repetition_penalty: PerRow = 1.0
    typical_p: PerRow = 1.0
    presence_penalty: PerRow = 0.0
    frequency_penalty: PerRow = 0.0
    no_repeat_ngram_size: PerRow = 0
    min_new_tokens: PerRow = 0
    logit_bias: Any = None
    bad_words: Any = None
    suppress_tokens: Any = None
    grammar: Grammar | None = None
    processor: Any = None

    @property
    def is_greedy(self) -> bool:
        """Whether temperature is the Python number 0: no row draws anything."""
        return _is_python_number(self.temperature) and self.temperature == 0


@pytree.dataclass
class Options:
    """`Sampling` resolved: None where statically off. See `resolve`.

    Attributes:
      temperature: f32[B] or None (1, or irrelevant because `is_greedy`).
      top_k: i32[B] or None.
      top_p: f32[B] or None.
      min_p: f32[B] or None.
      repetition_penalty: f32[B] or None.
      typical_p: f32[B] or None.
      presence_penalty: f32[B] or None.
      frequency_penalty: f32[B] or None.
      no_repeat_ngram_size: i32[B] or None.
      min_new_tokens: i32[B] or None.
      logit_bias: f32[B, V] or None.
      bad_words: i32[B, W, L] or None.
      suppress_tokens: i32[B, S] or None.
      grammar: one for all rows, with a start for each, i32[B]; or None.
      processor: the user's, one for all rows, or None.
      is_greedy: static; every row takes the argmax.
    """

    temperature: Array | None
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None
    repetition_penalty: Array | None
    typical_p: Array | None
    presence_penalty: Array | None
    frequency_penalty: Array | None
    no_repeat_ngram_size: Array | None
    min_new_tokens: Array | None
    logit_bias: Array | None
    bad_words: Array | None
    suppress_tokens: Array | None
    grammar: Grammar | None
    processor: Any
    is_greedy: bool = pytree.static()

    @property
    def are_on(self) -> bool:
        """Whether an option changes the law of a token (of a greedy row: at temperature 1)."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "is_greedy")
        return any(getattr(self, name) is not None for name in names)

    @property
    def can_ban(self) -> bool:
        """Whether an option might leave no token at all."""
        return any(getattr(self, name) is not None for name in _BANS)

    def row_axes(self) -> Options:
        """The axes to map over for one row after another: 0, but None for what all rows share."""
        axes = jax.tree.map(lambda _: 0, dataclasses.replace(self, processor=None, grammar=None))
        nothing: Any = None  # is mapped over in the tables
        grammar = self.grammar and Grammar(nothing, nothing, nothing, start=0)  # type: ignore[arg-type]
        return dataclasses.replace(axes, grammar=grammar)

    def repeat(self, times: int) -> Options:
        """Every row's options as often, next to each other."""
        if times == 1:
            return self
        own = dataclasses.replace(self, processor=None, grammar=None)
        grammar = self.grammar
        if grammar is not None:
            grammar = dataclasses.replace(grammar, start=jnp.repeat(grammar.start, times))
        return dataclasses.replace(
            jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), own),
            grammar=grammar,
            processor=self.processor,
        )


_BANS = (
    "no_repeat_ngram_size",
    "min_new_tokens",
    "logit_bias",
    "bad_words",
    "suppress_tokens",
    "grammar",
    "processor",
)


class _Number(NamedTuple):
    """An option of one number a row."""

    neutral: float
    dtype: Any
    is_in_range: Callable[[Any], Any]
    meaning: str


def _is_count(x: Any) -> Any:
    return (x >= 0) & (x == np.floor(x)) & (x < 2**31)


_A_COUNT = "a whole number of at least 0 (0 switches it off)"
_FLOAT, _INT = jnp.float32, jnp.int32
_NUMBERS = {
    "temperature": _Number(1.0, _FLOAT, lambda x: x >= 0, "at least 0"),
    "top_k": _Number(0, _INT, _is_count, _A_COUNT),
    "top_p": _Number(1.0, _FLOAT, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
    "min_p": _Number(0.0, _FLOAT, lambda x: (x >= 0) & (x <= 1), "in [0, 1]"),
    "repetition_penalty": _Number(1.0, _FLOAT, lambda x: x > 0, "above 0"),
    "typical_p": _Number(1.0, _FLOAT, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
    "presence_penalty": _Number(0.0, _FLOAT, np.isfinite, "a finite number"),
    "frequency_penalty": _Number(0.0, _FLOAT, np.isfinite, "a finite number"),
    "no_repeat_ngram_size": _Number(0, _INT, _is_count, _A_COUNT),
    "min_new_tokens": _Number(0, _INT, _is_count, _A_COUNT),
}
_DRAWING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def _is_python_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def check(sampling: Sampling, vocab_size: int) -> Options:
    """Checks the options' values.

    Args:
      sampling: as the user gave it.
      vocab_size: V.

    Returns:
      `Options` as given: numbers [] or [B], lists with or without their axis B.

    Raises:
      ValueError: a value known before running is out of range, or an array's shape fits no batch.
        Values under a trace are not checked.
    """
    arrays = {name: _number(name, getattr(sampling, name)) for name in _NUMBERS}
    if sampling.is_greedy:
        arrays |= dict.fromkeys(_DRAWING_ONLY)
    processor = sampling.processor
    if processor is not None and not callable(processor):
        raise ValueError(
            "processor must be a function (sampling.Text, logits f32[V]) -> logits f32[V], got "
            f"{processor!r}."
        )
    if any(leaf is processor for leaf in jax.tree.leaves(processor)):
        processor = jax.tree_util.Partial(processor)  # a plain function, as a pytree
    return Options(
        **arrays,
        logit_bias=_logit_bias(sampling.logit_bias, vocab_size),
        bad_words=id_lists("bad_words", sampling.bad_words, vocab_size),
        suppress_tokens=_ids("suppress_tokens", sampling.suppress_tokens, vocab_size),
        grammar=grammars.check(sampling.grammar, vocab_size),
        processor=processor,
        is_greedy=sampling.is_greedy,
    )


def _number(name: str, value: Any) -> Array | None:
    neutral, dtype, is_in_range, meaning = _NUMBERS[name]
    if value is None or (_is_python_number(value) and value == neutral):
        return None
    if not isinstance(value, jax.core.Tracer):
        concrete = np.asarray(value)
        is_real = any(jnp.issubdtype(concrete.dtype, k) for k in (np.integer, np.floating))
        if not is_real or not np.all(np.isfinite(concrete) & is_in_range(concrete)):
            raise ValueError(f"{name} must be {meaning}, got {value!r}.")
    array = jnp.asarray(value).astype(dtype)
    if array.ndim > 1:
        raise ValueError(_shape_message(name, "(B,)", array.shape))
    return array


def _logit_bias(value: Any, vocab_size: int) -> Array | None:
    """f32[V] or f32[B, V]."""
    if value is None or (isinstance(value, Mapping) and not value):
        return None
    if isinstance(value, Mapping):
        ids = np.asarray(list(value))
        _check_ids("logit_bias", ids, vocab_size)
        return (
            jnp.zeros((vocab_size,), jnp.float32)
            .at[ids]
            .set(jnp.asarray(list(value.values()), jnp.float32))
        )
    if jnp.ndim(value) not in (1, 2) or jnp.shape(value)[-1] != vocab_size:
        raise ValueError(
            f"logit_bias must be {{token id: bias}}, or an array [V] or [B, V] with V = "
            f"{vocab_size}; got shape {jnp.shape(value)}."
        )
    if not isinstance(value, jax.core.Tracer):
        # An infinite bonus makes no law; -inf is a ban.
        concrete = np.asarray(value, np.float32)
        if np.any(np.isnan(concrete) | (concrete == np.inf)):
            raise ValueError("logit_bias must hold numbers, or -inf for a ban; got NaN or +inf.")
    return jnp.asarray(value).astype(jnp.float32)


def id_lists(name: str, value: Any, vocab_size: int) -> Array | None:
    """i32[W, L] or i32[B, W, L], filled with `NO_ID` on the left."""
    if value is None:
        return None
    if isinstance(value, Sequence):
        if not value:
            return None
        if not all(isinstance(ids, Sequence) and ids for ids in value):
            raise ValueError(f"{name} must be a list of token-id lists, none of them empty.")
        longest = max(map(len, value))
        value = jnp.asarray([[NO_ID] * (longest - len(ids)) + list(ids) for ids in value])
    return _id_array(name, value, vocab_size, (2, 3), "[W, L] or [B, W, L]")


def _ids(name: str, value: Any, vocab_size: int) -> Array | None:
    """i32[S] or i32[B, S], filled with `NO_ID`."""
    if value is None:
        return None
    if isinstance(value, Sequence):
        if not value:
            return None
        value = jnp.asarray(value)
    return _id_array(name, value, vocab_size, (1, 2), "[S] or [B, S]")


def _id_array(
    name: str, value: Any, vocab_size: int, axes: tuple[int, int], meaning: str
) -> Array | None:
    if jnp.ndim(value) not in axes or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(
            f"{name} must be token ids, as lists or as an integer array {meaning}; got "
            f"{jnp.result_type(value)}{list(jnp.shape(value))}."
        )
    if 0 in jnp.shape(value)[-2:]:
        return None
    if not isinstance(value, jax.core.Tracer):
        ids = np.asarray(value)
        _check_ids(name, ids[ids != NO_ID], vocab_size)
    return jnp.asarray(value).astype(jnp.int32)


def _check_ids(name: str, ids: Any, vocab_size: int) -> None:
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} must hold token ids, which are integers; got {ids.dtype}.")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"{name} holds the token id {ids.min() if ids.min() < 0 else ids.max()}; the "
            f"target's ids are 0 … {vocab_size - 1}."
        )


ROW_AXES = {"logit_bias": 1, "bad_words": 2, "suppress_tokens": 1}
"""How many axes an option's value has for one row, where it is not a number."""


def spread(options: Options, batch: int, *, whose: str = "") -> Options:
    """Spreads checked options over the rows.

    Args:
      options: from `check`.
      batch: B.
      whose: stands before an option's name in errors.

    Returns:
      `Options` whose arrays have a leading axis B.

    Raises:
      ValueError: an array is given row by row, for another number of rows.
    """
    spread_out: dict[str, Any] = {}
    for name in (*_NUMBERS, *ROW_AXES):
        array = getattr(options, name)
        if array is None:
            continue
        row_axes = ROW_AXES.get(name, 0)
        row_shape = array.shape[array.ndim - row_axes :]
        if array.shape not in (row_shape, (batch, *row_shape)):
            wanted = ", ".join(map(str, (batch, *row_shape)))
            raise ValueError(
                _shape_message(whose + name, f"({wanted}{',' * (not row_axes)})", array.shape)
            )
        spread_out[name] = jnp.broadcast_to(array, (batch, *row_shape))
    if options.grammar is not None:
        start = options.grammar.start
        if start.shape not in ((), (batch,)):
            raise ValueError(_shape_message(whose + "grammar.start", f"({batch},)", start.shape))
        spread_out["grammar"] = dataclasses.replace(
            options.grammar, start=jnp.broadcast_to(start, (batch,))
        )
    return dataclasses.replace(options, **spread_out)


def resolve(sampling: Sampling, batch: int, vocab_size: int) -> Options:
    """Checks the options and spreads them over the rows; see `check` and `spread`."""
    return spread(check(sampling, vocab_size), batch)


def _shape_message(name: str, wanted: str, shape: tuple[int, ...]) -> str:
    return (
        f"{name} must be one value for all rows or an array of one a row, shape {wanted}; "
        f"got shape {shape}."
    )
