"""The exact law of a target's texts, in float64 NumPy: an implementation apart from the loop's.

Nothing here is shared with `jaxspec.sampling`: options are applied with sorts, token by token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.sampling import Sampling
from jaxspec.sampling import Text as Prefix
from jaxspec.types import LanguageModel

Text: TypeAlias = tuple[int, ...]
Law: TypeAlias = dict[Text, float]
Array: TypeAlias = np.ndarray[Any, Any]

_MOST_TEXTS = 20_000
_UNDECIDED = 1e-6
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


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
      stop_sequences: lists of tokens that end a text, where all of them are new.

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
        stop_sequences: Sequence[Sequence[int]] = (),
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
        self._stops = [tuple(sequence) for sequence in stop_sequences]
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
        ends = bool(text) and (
            text[-1] in self._eos or any(text[-len(stop) :] == stop for stop in self._stops)
        )
        if ends or len(text) == self._num_tokens:
            self.law[text] = mass
            return
        probs = self.next_token(text)
        if not probs.any():  # bans leave nothing: the row stops here
            self.law[text] = mass
        for token in np.flatnonzero(probs).tolist():
            self._extend((*text, token), mass * float(probs[token]))

    def next_token(self, text: Text) -> Array:
        """The law of the token behind `text`, under the options, float64[V]."""
        return self._law(text, self._options)

    def _law(self, text: Text, options: dict[str, Any]) -> Array:
        return next_token_law(
            self._logits[text],
            self._prompt + text,
            prompt_length=len(self._prompt),
            eos_ids=self._eos,
            **options,
        )

    def log_probs(self, text: Text) -> list[float]:
        """What `Generation.log_probs` should say of each token of `text`."""
        options = self._options
        if options["temperature"] == 0:  # reported before any cut, at temperature 1
            options = {name: value for name, value in options.items() if name not in _DRAWING}
        reported = []
        for i, token in enumerate(text):
            reported.append(float(np.log(self._law(text[:i], options)[token])))
        return reported


def next_token_law(
    logits: Array,
    context: Sequence[int],
    *,
    prompt_length: int | None = None,
    eos_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    **penalties: Any,
) -> Array:
    """The law of one token under `jaxspec.Sampling`'s options, float64[V].

    Args:
      logits: float64[V].
      context: prompt and output so far.
      prompt_length: how much of it is prompt; None: all.
      eos_ids: what `min_new_tokens` bans.
      temperature: see `jaxspec.Sampling`, like the others.
      top_k: keeps ties.
      top_p: of ties the lower id goes first.
      min_p: relative to the likeliest token.
      typical_p: keeps ties.
      **penalties: `Sampling`'s other options, which change the logits.

    Returns:
      Probabilities; all 0 where bans leave no token.

    Raises:
      ValueError: top_p, min_p or typical_p lies so close to a token's own mass that rounding
        would decide whether it stays: no law is exact there.

    Example:
      >>> import numpy as np
      >>> next_token_law(np.log([0.5, 0.3, 0.2]), [], top_k=2).round(3).tolist()
      [0.625, 0.375, 0.0]
    """
    prompt_length = len(context) if prompt_length is None else prompt_length
    logits = _penalized(logits, list(context), prompt_length, eos_ids, **penalties)
    if logits.max() == -np.inf:
        return np.zeros(len(logits))
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    logits = logits / temperature
    if top_k:
        logits[logits < np.sort(logits)[-min(top_k, len(logits))]] = -np.inf
    probs = _softmax(logits)
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
    probs /= probs.sum()
    if typical_p < 1:
        probs[_is_atypical(probs, typical_p)] = 0.0
    return probs / probs.sum()


def _softmax(logits: Array) -> Array:
    probs = np.exp(logits - logits.max())
    return probs / probs.sum()


def _is_atypical(probs: Array, typical_p: float) -> Array:
    """Which tokens' surprise is further from the entropy than typical_p's last one's, bool[V]."""
    surprise = -np.log(np.where(probs > 0, probs, 1.0))
    distance = np.where(probs > 0, np.abs(surprise - np.sum(probs * surprise)), np.inf)
    order = np.argsort(distance, kind="stable")
    reached = np.cumsum(probs[order])
    _check_decided("typical_p", typical_p, np.abs(reached - typical_p))
    last = order[np.argmax(reached >= typical_p)]
    # Equal tokens stay together; others equally far, one likelier and one less, are undecided.
    is_equal = np.isclose(probs, probs[last], rtol=1e-12, atol=0)
    distances = np.abs(distance - distance[last])
    _check_decided("typical_p", typical_p, distances[~is_equal & (probs > 0)])
    return (distance > distance[last]) & ~is_equal


def _penalized(
    logits: Array,
    context: list[int],
    prompt_length: int,
    eos_ids: Collection[int],
    *,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    no_repeat_ngram_size: int = 0,
    min_new_tokens: int = 0,
    logit_bias: Any = None,
    bad_words: Any = None,
    suppress_tokens: Any = None,
    grammar: Any = None,
    processor: Any = None,
) -> Array:
    """What the options make of the logits before anything is cut off, float64[V]."""
    logits = np.array(logits, np.float64)
    output = context[prompt_length:]
    if isinstance(logit_bias, Mapping):
        for token, bias in logit_bias.items():
            logits[token] += bias
    elif logit_bias is not None:
        logits += np.asarray(logit_bias, np.float64)
    for token in set(context) if repetition_penalty != 1.0 else ():
        above = logits[token] > 0
        logits[token] = (
            logits[token] / repetition_penalty if above else (logits[token] * repetition_penalty)
        )
    for token in set(output):
        logits[token] -= frequency_penalty * output.count(token) + presence_penalty
    banned: set[int] = set()
    if size := no_repeat_ngram_size:
        ngrams = [tuple(context[i : i + size]) for i in range(len(context) - size + 1)]
        end = tuple(context[len(context) - size + 1 :])
        banned |= {ngram[-1] for ngram in ngrams if ngram[:-1] == end}
    for word in () if bad_words is None else np.asarray(_padded(bad_words)).tolist():
        ids = [token for token in word if token >= 0]
        if ids and context[len(context) - len(ids) + 1 :] == ids[:-1]:
            banned.add(ids[-1])
    if len(output) < min_new_tokens:
        banned |= set(eos_ids)
    if grammar is not None:
        banned |= _disallowed(grammar, output)
    if suppress_tokens is not None:
        banned |= {token for token in np.asarray(suppress_tokens).tolist() if token >= 0}
    logits[[token for token in banned if token < len(logits)]] = -np.inf
    if processor is not None:
        tokens = jnp.asarray(context, jnp.int32)
        text = Prefix(tokens, jnp.int32(len(context)), jnp.int32(prompt_length))
        logits = np.array(processor(text, jnp.asarray(logits, jnp.float32)), np.float64)
    return logits


def _disallowed(grammar: Any, output: Sequence[int]) -> set[int]:
    """The tokens that may not follow `output`, by the machine's transitions alone."""
    table = np.asarray(grammar.next_states)[:, np.asarray(grammar.classes)]
    state = np.asarray(grammar.start).item()
    for token in output:
        state = table[state, token]
    return set(np.flatnonzero(table[state] < 0).tolist())


def _padded(words: Any) -> Any:
    """Lists of different lengths as rows of one, filled with -1."""
    if not isinstance(words, (list, tuple)):
        return words
    longest = max(map(len, words))
    return [[-1] * (longest - len(word)) + list(word) for word in words]


def _check_decided(name: str, value: float, distances: Array) -> None:
    if distances.size and distances.min() < _UNDECIDED:
        raise ValueError(
            f"{name} = {value} lies within {_UNDECIDED} of a token's own mass, where rounding "
            "decides whether the token stays; choose a value between two masses."
        )


def _numbers(options: Sampling) -> dict[str, Any]:
    """The options, numbers as Python's."""
    numbers: dict[str, Any] = {}
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.default is None:
            numbers[option.name] = value
            continue
        # float32 as in the loop: a threshold must not lie between two roundings of one number.
        number: Any = option.default if value is None else np.asarray(value, np.float32).item()
        numbers[option.name] = int(number) if isinstance(option.default, int) else number
    return numbers
