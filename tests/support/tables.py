"""Language models small enough to enumerate, with a real cache."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import jaxspec


@dataclasses.dataclass(frozen=True)
class _Apply:
    """Logits from a table indexed by the last `order` tokens, read back from the cache.

    The cache holds the tokens of every slot. Reading the context from it, and not from the
    call's own tokens, makes a stale slot, a wrong start or a missing token change the law.
    """

    order: int
    vocab_size: int

    def __call__(self, params, tokens, cache, *, start, num_new=None, logits_at=None):
        del num_new
        width = tokens.shape[1]

        def row(slots, new, at):
            slots = jax.lax.dynamic_update_slice(slots, new, (at,))
            last = at + jnp.arange(width)
            index = jnp.zeros((width,), jnp.int32)
            for back in range(self.order - 1, -1, -1):
                slot = last - back
                token = jnp.where(slot >= 0, slots[jnp.maximum(slot, 0)], 0)
                index = index * self.vocab_size + token
            return slots, params[index]

        cache, logits = jax.vmap(row)(cache, tokens, start)
        if logits_at is not None:
            logits = jnp.take_along_axis(logits, logits_at[:, :, None], axis=1)
        return jaxspec.ModelOutput(logits), cache


def _init_cache(batch, capacity, max_step):
    del max_step
    return jnp.zeros((batch, capacity), jnp.int32)


def table_model(logits, *, order, eos_ids=()):
    """A model whose next-token logits are `logits[context]`, f32[V ** order, V].

    The context is the last `order` tokens as a number in base V, the oldest first; missing ones
    count as 0.
    """
    vocab_size = logits.shape[1]
    assert logits.shape[0] == vocab_size**order
    return jaxspec.LanguageModel(
        jnp.asarray(logits, jnp.float32),
        _Apply(order, vocab_size),
        _init_cache,
        vocab_size=vocab_size,
        eos_ids=eos_ids,
    )


def random_logits(seed, *, vocab_size, order, scale=1.5):
    """A random table; the default scale moves laws well away from uniform."""
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((vocab_size**order, vocab_size)).astype(np.float32)


def conditional(logits, context, *, order, transform):
    """The law of the next token behind `context` (a list), float64, by `transform(logits)`."""
    vocab_size = logits.shape[1]
    last = ([0] * order + list(context))[-order:]
    index = 0
    for token in last:
        index = index * vocab_size + token
    return transform(np.asarray(logits[index], np.float64), context)


def softmax(logits, context=None):
    """The plain law, float64."""
    del context
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def joint_law(logits, prompt, num_tokens, *, order, transform=softmax, eos_ids=()):
    """The exact law of a row's text: {tuple of new tokens: probability}, float64.

    A text ends behind an EOS token or at `num_tokens`.
    """
    law = {}

    def extend(text, mass):
        done = len(text) == num_tokens or (text and text[-1] in eos_ids)
        if done:
            law[tuple(text)] = law.get(tuple(text), 0.0) + mass
            return
        probs = conditional(logits, [*prompt, *text], order=order, transform=transform)
        for token in np.flatnonzero(probs):
            extend([*text, int(token)], mass * probs[token])

    extend([], 1.0)
    assert abs(sum(law.values()) - 1) < 1e-9
    return law


def all_texts(vocab_size, num_tokens):
    """Every sequence of that length."""
    return list(itertools.product(range(vocab_size), repeat=num_tokens))
