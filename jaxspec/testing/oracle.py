"""The exact law of a target's texts, in float64 NumPy: an implementation apart from the loop's.

Nothing here is shared with `jaxspec.sampling`: options are applied with sorts, token by token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.sampling import Sampling
from jaxspec.types import LanguageModel

Text: TypeAlias = tuple[int, ...]
Law: TypeAlias = dict[Text, float]
Array: TypeAlias = np.ndarray[Any, Any]

_MOST_TEXTS = 20_000
_UNDECIDED = 1e-6


@jax.jit
def _forward(lm: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Logits [B, T, V] of whole texts, fed at once into an empty cache."""
    batch, length = tokens.shape
    cache = lm.init_cache(batch, length, length)
    start = jnp.zeros((batch,), jnp.int32)
    return lm.forward(tokens, cache, start=start, num_new=jnp.full((batch,), length))[0].logits


class Oracle:
    """Everything about one row's texts of up to `num_tokens` tokens, exactly.

    Args:
      target: the model; each text is fed to it whole, so that nothing depends on its caching.
      prompt: token ids.
      num_tokens: T, new tokens at most.
      sampling: options of this row: numbers, or arrays of one element.
      eos_ids: tokens that end a text; None: the model's own.

    Attributes:
      law: {text: probability}, float64; a text is the tuple of new tokens, an EOS included.

    Raises:
      ValueError: more than 20,000 texts would have to be enumerated; the prompt is empty or holds
        ids outside the vocabulary; an option's threshold is undecided up to rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxspec.testing import table_model
      >>> lm = table_model(jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]])), order=1)
      >>> {text: round(p, 3) for text, p in Oracle(lm, [0], 2).law.items()}
      {(0, 0): 0.25, (0, 1): 0.25, (1, 0): 0.125, (1, 1): 0.375}
    """

    def __init__(
        self,
        target: LanguageModel,
        prompt: Sequence[int],
        num_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        *,
        eos_ids: Sequence[int] | None = None,
    ):
        if not isinstance(target, LanguageModel):
            raise ValueError(
                f"target must be a jaxspec.LanguageModel, got {type(target).__name__}; "
                "jaxspec.testing.table_model makes a small one."
            )
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling must be a jaxspec.Sampling, got {sampling!r}.")
        size = target.vocab_size
        ids = np.asarray(prompt)
        is_text = ids.ndim == 1 and ids.size > 0 and np.issubdtype(ids.dtype, np.integer)
        if not is_text or ids.min() < 0 or ids.max() >= size:
            raise ValueError(
                f"a prompt must be a list of token ids, 0 … {size - 1}, and not empty; "
                f"got {prompt!r}."
            )
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}.")
        if size**num_tokens > _MOST_TEXTS:
            raise ValueError(
                f"{size} tokens and {num_tokens} new tokens make {size**num_tokens} texts, more "
                f"than the {_MOST_TEXTS} that are enumerated; use a smaller vocabulary or fewer "
                "tokens."
            )
        self._prompt = tuple(int(token) for token in prompt)
        self._num_tokens = num_tokens
        self._eos = frozenset(target.eos_ids if eos_ids is None else eos_ids)
        self._options = _numbers(sampling)
        texts = list(itertools.product(range(size), repeat=num_tokens - 1))
        fed = np.array([self._prompt + text for text in texts], np.int32)
        logits = np.asarray(_forward(target, jnp.asarray(fed)), np.float64)
        self._logits: dict[Text, Array] = {}
        for text, rows in zip(texts, logits[:, len(self._prompt) - 1 :], strict=True):
            for length in range(num_tokens):
                self._logits.setdefault(text[:length], rows[length])
        self.law: Law = {}
        self._extend((), 1.0)

    def _extend(self, text: Text, mass: float) -> None:
        if len(text) == self._num_tokens or (text and text[-1] in self._eos):
            self.law[text] = mass
            return
        probs = self.next_token(text)
        for token in np.flatnonzero(probs).tolist():
            self._extend((*text, token), mass * float(probs[token]))

    def next_token(self, text: Text) -> Array:
        """The law of the token behind `text`, under the options, float64[V]."""
        return next_token_law(self._logits[text], self._prompt + text, **self._options)

    def log_probs(self, text: Text) -> list[float]:
        """What `Generation.log_probs` should say of each token of `text`."""
        options = self._options
        if options["temperature"] == 0:  # reported before any cut, at temperature 1
            options = {"repetition_penalty": options["repetition_penalty"]}
        reported = []
        for i, token in enumerate(text):
            law = next_token_law(self._logits[text[:i]], self._prompt + text[:i], **options)
            reported.append(float(np.log(law[token])))
        return reported


def next_token_law(
    logits: Array,
    context: Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Array:
    """The law of one token under `jaxspec.Sampling`'s options, float64[V].

    Args:
      logits: float64[V].
      context: prompt and output so far.
      temperature: see `jaxspec.Sampling`, like the others.
      top_k: keeps ties.
      top_p: of ties the lower id goes first.
      min_p: relative to the likeliest token.
      repetition_penalty: on every token of the context.

    Raises:
      ValueError: top_p or min_p lies so close to a token's own mass that rounding would decide
        whether it stays: no law is exact there.

    Example:
      >>> import numpy as np
      >>> next_token_law(np.log([0.5, 0.3, 0.2]), [], top_k=2).round(3).tolist()
      [0.625, 0.375, 0.0]
    """
    logits = np.array(logits, np.float64)
    for token in set(context) if repetition_penalty != 1.0 else ():
        above = logits[token] > 0
        logits[token] = (
            logits[token] / repetition_penalty if above else (logits[token] * repetition_penalty)
        )
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    logits = logits / temperature
    if top_k:
        logits[logits < np.sort(logits)[-min(top_k, len(logits))]] = -np.inf
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    # Likelier tokens first, and of equal ones the higher id.
    order = np.lexsort((np.arange(len(probs)), probs))[::-1]
    ahead = np.cumsum(probs[order]) - probs[order]
    if top_p < 1:
        _check_decided("top_p", top_p, np.abs(ahead - top_p))
        probs[order[ahead >= top_p]] = 0.0
    share = probs / probs.max()
    if min_p > 0:  # a share of exactly 1 is a tie with the likeliest: it stays
        _check_decided("min_p", min_p, np.abs(share - min_p)[(probs > 0) & (share < 1)])
    probs[share < min_p] = 0.0
    return probs / probs.sum()


def _check_decided(name: str, value: float, distances: Array) -> None:
    if distances.size and distances.min() < _UNDECIDED:
        raise ValueError(
            f"{name} = {value} lies within {_UNDECIDED} of a token's own mass, where rounding "
            "decides whether the token stays; choose a value between two masses."
        )


def _numbers(sampling: Sampling) -> dict[str, Any]:
    """The options as Python numbers."""
    numbers: dict[str, Any] = {}
    for option in dataclasses.fields(sampling):
        value = getattr(sampling, option.name)
        # float32 as in the loop: a threshold must not lie between two roundings of one number.
        number: Any = option.default if value is None else np.asarray(value, np.float32).item()
        numbers[option.name] = int(number) if option.name == "top_k" else number
    return numbers
