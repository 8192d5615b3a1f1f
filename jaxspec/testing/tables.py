"""Language models small enough to enumerate, with a real cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.types import LanguageModel, ModelOutput

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class _Apply:
    """Logits from a table indexed by the last `order` tokens, read back from the cache.

    The cache holds the tokens of every slot. Reading the context from it, and not from the
    call's own tokens, makes a stale slot, a wrong start or a missing token change the law. So
    does a position that is not the number of tokens seen before.
    """

    order: int
    vocab_size: int

    def __call__(
        self,
        params: Array,
        tokens: Array,
        cache: Array,
        *,
        start: Array,
        positions: Array | None = None,
        num_new: Array | None = None,
        prefix: Array | None = None,
        mask: Array | None = None,
        logits_at: Array | None = None,
    ) -> tuple[ModelOutput, Array]:
        del num_new
        batch, width = tokens.shape

        def row(slots: Array, new: Array, at: Array) -> tuple[Array, Array]:
            slots = jax.lax.dynamic_update_slice(slots, new, (at,))
            last = at + jnp.arange(width)
            index = jnp.zeros((width,), jnp.int32)
            for back in range(self.order - 1, -1, -1):
                slot = last - back
                token = jnp.where(slot >= 0, slots[jnp.maximum(slot, 0)], 0)
                index = index * self.vocab_size + token
            return slots, params[index]

        def branching_row(
            slots: Array, new: Array, at: Array, prefix: Array, mask: Array, positions: Array
        ) -> tuple[Array, Array]:
            slots = jax.lax.dynamic_update_slice(slots, new, (at,))
            numbers = jnp.arange(slots.shape[0], dtype=jnp.int32)
            offset = numbers - prefix
            is_inside = (offset >= 0) & (offset < mask.shape[1])
            allowed = mask[:, jnp.where(is_inside, offset, 0)]
            is_seen = (offset < 0)[None] | (is_inside[None] & allowed)
            latest, _ = jax.lax.top_k(jnp.where(is_seen, numbers[None], -1), self.order)
            seen = jnp.where(latest >= 0, slots[jnp.maximum(latest, 0)], 0)
            index = jnp.zeros((width,), jnp.int32)
            for back in range(self.order - 1, -1, -1):
                index = index * self.vocab_size + seen[:, back]
            is_right = positions == jnp.sum(is_seen, axis=1) - 1
            logits = params[index]
            return slots, jnp.where(is_right[:, None], logits, logits[:, ::-1])

        if mask is None:
            cache, logits = jax.vmap(row)(cache, tokens, start)
        else:
            assert prefix is not None
            assert positions is not None
            mask = mask if mask.ndim == 3 else mask[None]
            mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
            cache, logits = jax.vmap(branching_row)(cache, tokens, start, prefix, mask, positions)
        if logits_at is not None:
            logits = jnp.take_along_axis(logits, logits_at[:, :, None], axis=1)
        return ModelOutput(logits), cache


def _init_cache(batch: int, capacity: int, max_step: int) -> Array:
    del max_step
    return jnp.zeros((batch, capacity), jnp.int32)


def _compact(cache: Array, start: Array, path: Array) -> Array:
    def row(slots: Array, start: Array, path: Array) -> Array:
        return slots.at[start + jnp.arange(path.shape[0])].set(slots[start + path])

    return jax.vmap(row)(cache, start, path)


def table_model(logits: Any, *, order: int, eos_ids: Sequence[int] = ()) -> LanguageModel:
    """A language model given by a table of next-token logits.

    Args:
      logits: float[V ** order, V], kept in its own float type (bfloat16 and float16 make a
        low-precision model). Row i belongs to the context of the last `order` tokens read as a
        number in base V, the oldest first; tokens before the text count as 0.
      order: how many tokens back the model looks, ≥ 1.
      eos_ids: the model's EOS tokens.

    Returns:
      A `jaxspec.LanguageModel`. Two of one shape share every compiled program.

    Raises:
      ValueError: the table does not have V ** order rows.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxspec
      >>> table = 9.0 * jnp.eye(3)[jnp.array([1, 2, 0])]  # 0 -> 1 -> 2 -> 0
      >>> out = jaxspec.generate(table_model(table, order=1), [[0]], max_new_tokens=4,
      ...                        sampling=jaxspec.Sampling(temperature=0))
      >>> out.tokens.tolist()
      [[1, 2, 0, 1]]
    """
    table = jnp.asarray(logits)
    if table.ndim != 2 or order < 1 or table.shape[0] != table.shape[1] ** order:
        raise ValueError(
            f"a table of order {order} needs logits [V ** order, V], got {table.shape}."
        )
    size = table.shape[1]
    return LanguageModel(
        table,
        _Apply(order, size),
        _init_cache,
        vocab_size=size,
        compact=_compact,
        eos_ids=tuple(eos_ids),
    )


def random_logits(
    seed: int, *, vocab_size: int, order: int, scale: float = 1.5
) -> np.ndarray[Any, Any]:
    """A random table for `table_model`.

    Args:
      seed: of `numpy.random.default_rng`.
      vocab_size: V.
      order: how many tokens back the model looks.
      scale: standard deviation of the logits; the default moves laws well away from uniform.

    Returns:
      f32[V ** order, V], NumPy.

    Example:
      >>> random_logits(0, vocab_size=3, order=2).shape
      (9, 3)
    """
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((vocab_size**order, vocab_size)).astype(np.float32)
