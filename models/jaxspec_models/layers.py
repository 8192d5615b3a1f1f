"""Shared Flax NNX layers: linear, norm, rotary positions, attention over an in-place KV cache.

Two rules hold throughout, both measured (see `benchmarks/README.md`):

- **Arithmetic does not depend on the width or the batch.** On the CPU reductions over fewer than
  eight rows take other code paths, with other roundings: they are padded where they happen
  (`reduce_rows`, attention). Everything else is the same from two rows on (`padded_width`), so a
  text's logits are bit-equal at any width, and nothing but reductions pays for padding.
- **The cache is never copied.** It is written by `dynamic_update_slice` and read in blocks up to
  the live length; bfloat16 is kept as its bits in uint16, because the CPU backend rewrites a
  whole bfloat16 buffer (convert, update, convert back) for an update of one slot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxspec import pytree
from jaxspec_models import fusion, native, quantization

Array: TypeAlias = jax.Array

MIN_ROWS = 8
"""Rows that norms, attention and everything else that sums has at least."""
MIN_PRODUCT_ROWS = 2
"""Rows that a model is padded to: one row leaves the fast path of the CPU backend's products, and
elementwise work on it is fused, and so rounded, in other ways."""
MIN_BFLOAT16_ROWS = 4
"""Rows that bfloat16 products have at least: on a CPU with a matrix unit (AMX) two are summed by
another kernel than three or more, with other roundings; elsewhere four cost what two do."""
KV_BLOCK = 256
"""Slots that attention reads at a time on the CPU."""


class WeightConfig(Protocol):
    """What layers ask of a model's config: `dtype` and `quantization` of its weights."""

    @property
    def dtype(self) -> str:
        """Either "float32" or "bfloat16"."""
        ...

    @property
    def quantization(self) -> str | None:
        """None or "int8"."""
        ...


def padded_width(batch: int, width: int) -> int:
    """The tokens a row is padded to, so that a batch has at least `MIN_PRODUCT_ROWS` rows.

    Example:
      >>> padded_width(batch=1, width=1), padded_width(batch=4, width=1)
      (2, 1)
    """
    return max(width, -(-MIN_PRODUCT_ROWS // batch))


def pad_axis(x: Array, axis: int, size: int) -> Array:
    """Pads `axis` with zeros up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def reduce_rows(reduce: Callable[[Array], Array], x: Array) -> Array:
    """Reduces the last axis of f32[..., D] with at least `MIN_ROWS` rows: f32[...].

    Sums over fewer rows take another code path on the CPU, with other roundings; and no path is
    faster for fewer.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count < MIN_ROWS:
        rows = pad_axis(rows, 0, MIN_ROWS)
    return reduce(rows)[:count].reshape(x.shape[:-1])


def product(x: Array, weight: Array, scale: Array | None = None) -> Array:
    """`x @ weight.T` with exact or float32 accumulation, of as many rows as bit-equality needs.

    Args:
      x: float[..., I]; cast to the weight's dtype, or for an int8 weight quantised row by row.
      weight: [O, I], the layout of checkpoints and the fast one on the CPU.
      scale: f32[O], what one step of an int8 weight stands for; None for other weights.

    Returns:
      f32[..., O].
    """
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    least = MIN_BFLOAT16_ROWS if weight.dtype == jnp.bfloat16 else MIN_PRODUCT_ROWS
    if count < least:
        rows = pad_axis(rows, 0, least)
    if scale is None:
        y = lax.dot_general(
            rows.astype(weight.dtype),
            weight,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    elif (most := quantization.max_native_rows()) > 0:
        y = _native_linear(
            rows.astype(jnp.float32), weight, scale.astype(jnp.float32), rows.shape[0] <= most
        )
    else:
        y = _quantized_linear(rows, weight, scale)
    return y[:count].reshape(*x.shape[:-1], weight.shape[0])


def _rescale(sums: Array, step: Array, scale: Array) -> Array:
    return sums.astype(jnp.float32) * (step[:, None] * scale[None])


def _quantized_linear(
    rows: Array, weight: Array, scale: Array, rescale: Callable[..., Array] = _rescale
) -> Array:
    largest = reduce_rows(functools.partial(jnp.max, axis=-1), jnp.abs(rows))
    steps, step = quantization.quantize_rows(rows, largest)
    return rescale(quantization.product(steps, weight), step, scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _native_linear(rows: Array, weight: Array, scale: Array, is_few: bool) -> Array:
    """The same by our own kernel where the program runs on a CPU: of more rows, what XLA fuses."""
    many = functools.partial(_quantized_linear, rescale=native.rescale)
    return lax.platform_dependent(
        rows, weight, scale, cpu=native.linear if is_few else many, default=_quantized_linear
    )


@_native_linear.defjvp
def _jvp_of_native_linear(
    is_few: bool, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    _, tangent = jax.jvp(_quantized_linear, primals, tangents)
    return _native_linear(*primals, is_few), tangent


def _like(vector: Array, x: Array) -> Array:
    """f32[D] with leading axes, to meet x [..., D] under strict rank promotion."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class Matrix(nnx.Module):
    """A weight [out, in] in float32, bfloat16, or int8 with one float32 scale a row."""

    def __init__(
        self, num_in: int, num_out: int, *, stddev: float, config: WeightConfig, rngs: nnx.Rngs
    ):
        weight = stddev * jax.random.normal(rngs.params(), (num_out, num_in), jnp.float32)
        self.is_quantized = config.quantization is not None
        if self.is_quantized:
            weight, scale = quantization.quantize_rows(weight)
            self.weight, self.scale = nnx.Param(weight), nnx.Param(scale)
        else:
            self.weight = nnx.Param(weight.astype(jnp.dtype(config.dtype)))

    def product(self, x: Array) -> Array:
        """f32[..., in] -> f32[..., out]."""
        return product(x, self.weight[...], self.scale[...] if self.is_quantized else None)


class Linear(Matrix):
    """`y = x W^T + b`; W is [out, in], y is float32."""

    def __init__(
        self, num_in: int, num_out: int, *, bias: bool, config: WeightConfig, rngs: nnx.Rngs
    ):
        super().__init__(num_in, num_out, stddev=num_in**-0.5, config=config, rngs=rngs)
        if bias:
            self.bias = nnx.Param(jnp.zeros((num_out,), jnp.float32))
        self.has_bias = bias

    def __call__(self, x: Array) -> Array:
        """f32[..., in] -> f32[..., out]."""
        y = self.product(x)
        return y + _like(self.bias[...], y) if self.has_bias else y


class Embedding(Matrix):
    """A table of token vectors, also usable as the vocabulary head (tied weights)."""

    def __init__(self, num_embeddings: int, width: int, *, config: WeightConfig, rngs: nnx.Rngs):
        super().__init__(width, num_embeddings, stddev=1.0, config=config, rngs=rngs)
        if self.is_quantized:
            # What each channel of the table was multiplied with for the head's sake.
            self.factors = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, tokens: Array) -> Array:
        """i32[...] -> f32[..., D]."""
        # The barrier ties the table to the tokens: the CPU backend would otherwise cast all of it
        # and hoist that out of the decoding loop, as a float32 copy of the table.
        table, tokens = lax.optimization_barrier((self.weight[...], tokens))
        rows = table[tokens].astype(jnp.float32)
        if not self.is_quantized:
            return rows
        rows = rows * self.scale[...][tokens][..., None] / _like(self.factors[...], rows)
        # Written out: fused into a sum, the last product would be rounded with it (a fused
        # multiply-add) in some programs and by itself in others.
        return fusion.computed_once(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + ε) · w` in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs):
        del rngs
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        """f32[..., D] -> f32[..., D]."""
        mean_square = reduce_rows(functools.partial(jnp.mean, axis=-1), jnp.square(x))
        return x * lax.rsqrt(mean_square + self.epsilon)[..., None] * _like(self.weight[...], x)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Applies rotary positions (arXiv 2104.09864), halves convention of HF.

    Args:
      x: f32[B, T, H, D].
      cos: f32[B, T, D // 2].
      sin: f32[B, T, D // 2].

    Returns:
      f32[B, T, H, D].
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# ---------------------------------------------------------------------------------------------
# The cache.


class KVCache(NamedTuple):
    """Keys and values of every layer, written in place.

    Each as the product that reads it wants its right-hand side, [in, out]: the CPU backend would
    turn keys of [S, D] around for every step, which costs more than the product.

    Attributes:
      keys: one [B, KV, D, S] a layer, float32 or the bits of bfloat16 in uint16.
      values: one [B, KV, S, D] a layer, likewise.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


def to_bits(x: Array) -> Array:
    """The storage form of an array: 16-bit floats as uint16, float32 as it is."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: Any) -> Array:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def storable(keys: Array, values: Array, dtype: Any) -> tuple[Array, Array]:
    """New keys and values in storage form, so that a broken token harms none that cannot see it.

    Attention multiplies the values of unseen slots by zero, and 0 · NaN is NaN. So values are
    always finite, and a token whose key or value is not gets a key of NaN: scores of unseen
    slots are replaced, not multiplied, and whoever sees the token still gets NaN.

    Args:
      keys: f32[B, T, KV, D].
      values: f32[B, T, KV, D].
      dtype: of the cache.

    Returns:
      Both as stored (see `to_bits`).
    """
    # NaN and infinity survive the sum and the maximum.
    size = reduce_rows(functools.partial(jnp.max, axis=-1), jnp.abs(keys) + jnp.abs(values))
    keys, values = keys.astype(dtype), values.astype(dtype)
    is_sound = (size < float(jnp.finfo(dtype).max))[..., None]
    keys = jnp.where(is_sound, keys, jnp.full((), jnp.nan, keys.dtype))
    return to_bits(keys), to_bits(jnp.where(is_sound, values, jnp.zeros((), values.dtype)))


def init_cache(
    batch: int, capacity: int, *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> KVCache:
    """Makes an empty cache of at least `capacity` slots, all zero, a whole number of blocks."""
    slots = -(-capacity // KV_BLOCK) * KV_BLOCK
    stored = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else jnp.float32

    def buffers(*shape: int) -> tuple[Array, ...]:
        return tuple(jnp.zeros((batch, num_kv_heads, *shape), stored) for _ in range(num_layers))

    return KVCache(keys=buffers(head_dim, slots), values=buffers(slots, head_dim))


def write_slots(buffer: Array, new: Array, start: Array, *, axis: int) -> Array:
    """Writes new keys or values at each row's own slots, in place.

    Args:
      buffer: [B, KV, D, S] or [B, KV, S, D].
      new: the same with T slots, of the buffer's dtype.
      start: i32[B]; row b's token i goes to slot start[b] + i. The caller keeps
        start + T ≤ S: `dynamic_update_slice` would clamp silently.
      axis: the axis of the slots, 3 or 2.

    Returns:
      The updated buffer.
    """

    def write_row(row: Array, new_row: Array, slot: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(row, new_row, slot, axis - 1)

    if buffer.shape[0] == 1:  # a vmapped update is a scatter; one row needs none
        return write_row(buffer[0], new[0], start[0])[None]
    return jax.vmap(write_row)(buffer, new, start)


def compact(cache: KVCache, start: Array, path: Array) -> KVCache:
    """Moves the nodes of an accepted path together: `jaxspec.LanguageModel.compact`.

    Keys stay valid, as a node's position is its depth and not its slot.

    Args:
      cache: written in place.
      start: i32[B], the slot of each row's first draft.
      path: i32[B, P] rising; slot start + i takes what slot start + path[i] holds.

    Returns:
      The cache.
    """
    axes = KVCache(keys=3, values=2)  # type: ignore[arg-type]  # of the slots

    def of_all(function: Callable[..., Array], *trees: KVCache) -> KVCache:
        return KVCache(
            *(
                tuple(function(axis, *buffers) for buffers in zip(*layers, strict=True))
                for axis, *layers in zip(axes, *trees, strict=True)
            )
        )

    def read(axis: int, buffer: Array) -> Array:
        # A path may lead beyond its own length: drafters cache only the nodes that have children.
        def read_row(row: Array, slot: Array, path: Array) -> Array:
            return jnp.take(row, slot + path, axis=axis - 1, mode="clip")

        if buffer.shape[0] == 1:  # as in `write_slots`
            return read_row(buffer[0], start[0], path[0])[None]
        return jax.vmap(read_row)(buffer, start, path)

    # Two loops of one trip, or of none where nothing moves. Fused, reading and writing would be one
    # pass over the buffer, which is unsafe in place: the CPU backend would copy the whole of it.
    moves = jnp.any(path != jnp.arange(path.shape[1])[None]).astype(jnp.int32)
    shapes = jax.eval_shape(functools.partial(of_all, read), cache)
    moved = lax.fori_loop(
        0,
        moves,
        lambda _, moved: of_all(read, cache),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    )
    return lax.fori_loop(
        0,
        moves,
        lambda _, cache: of_all(
            lambda axis, buffer, new: write_slots(buffer, new, start, axis=axis), cache, moved
        ),
        cache,
    )


# ---------------------------------------------------------------------------------------------
# Attention.


@pytree.dataclass
class Visibility:
    """Which cache slots each new token sees.

    Attributes:
      prefix: i32[B]; every slot below it is visible.
      mask: bool[B, T, W] for the slots prefix … prefix + W, or None: causal from `start`.
      start: i32[B], the slot of the first new token.
      live: i32[B], slots at or beyond it need not be read for the row.
      width: T; rows beyond it are padding, whose keys and values are not stored (static).
    """

    prefix: Array
    mask: Array | None
    start: Array
    live: Array
    width: int = pytree.static()

    def of_row(self, row: Array) -> Visibility:
        """That of one row, i32[], as of a batch of one."""
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, 1), self)

    def at(self, slots: Array, num_rows: int) -> Array:
        """Whether token t of row b sees each of `slots` i32[S]: bool[B, num_rows, S]."""
        if self.mask is None:
            last = self.start[:, None] + jnp.arange(num_rows)[None]
            return slots[None, None] <= last[:, :, None]
        offset = slots[None] - self.prefix[:, None]  # [B, S]
        inside = (offset >= 0) & (offset < self.mask.shape[-1])
        index = jnp.where(inside, offset, 0)
        allowed = jnp.take_along_axis(
            self.mask, jnp.broadcast_to(index[:, None], (*self.mask.shape[:2], slots.size)), axis=2
        )
        return (offset < 0)[:, None] | (inside[:, None] & allowed)


_MIN_SUMS = 16
"""Sums over fewer rows of scores (heads times queries) would round otherwise than over more."""


def attention(q: Array, keys: Array, values: Array, visibility: Visibility, *, dtype: Any) -> Array:
    """Grouped-query attention of new tokens over the cache, in float32.

    Args:
      q: f32[B, T, H, D], rotated.
      keys: [B, KV, D, S] as stored.
      values: [B, KV, S, D] as stored.
      visibility: which slots each token sees.
      dtype: what the cache's bits mean.

    Returns:
      f32[B, T, H · D].
    """
    batch, width, heads, dim = q.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    q = (q * dim**-0.5).reshape(batch, width, kv_heads, groups, dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * width, dim)
    # Padding costs as much as real queries: no more of it than the softmax's sums need. An odd
    # number is slower than the even one above it.
    num_queries = max(groups * width, -(-_MIN_SUMS // kv_heads))
    num_queries += num_queries % 2
    q = pad_axis(q, 2, num_queries)

    def see(visibility: Visibility, slots: Array) -> Array:  # bool[B, 1, queries, slots]
        visible = jnp.tile(visibility.at(slots, width), (1, groups, 1))
        return pad_axis(visible, 1, num_queries)[:, None]

    out = lax.platform_dependent(
        q,
        keys,
        values,
        visibility,
        cpu=functools.partial(_blocked_attention, see=see, dtype=dtype),
        default=functools.partial(_dense_attention, see=see, dtype=dtype),
    )
    out = out[:, :, : groups * width].reshape(batch, kv_heads, groups, width, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, width, heads * dim)


def _dense_attention(q, keys, values, visibility, *, see, dtype):
    """Over the whole capacity: for accelerators, where a loop of dynamic length is dear."""
    keys = from_bits(keys, dtype).astype(jnp.float32)
    values = from_bits(values, dtype).astype(jnp.float32)
    scores = jnp.einsum("bhqd,bhds->bhqs", q, keys)
    visible = see(visibility, jnp.arange(keys.shape[3]))
    scores = jnp.where(visible, scores, -jnp.inf)
    # A padding query sees nothing: keep it finite.
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    return jnp.einsum("bhqs,bhsd->bhqd", weights / total, values)


_UNSEEN = -1e30
"""A score so far below the least maximum, half of it, that its exponential is zero."""


def _blocked_attention(q, keys, values, visibility, *, see, dtype):
    """Online softmax over the live blocks (arXiv 1805.02867): the cost follows the lengths.

    All rows share the blocks that more than a quarter of them need (where four rows or more
    share one, it costs less than row by row); beyond, each row has its own. A block that a row
    does not see adds exact zeros to it, so a row's result does not depend on its neighbours.
    """

    def add_block(index, carry, q, keys, values, visibility):
        top, total, out = carry
        first = index * KV_BLOCK

        def read(buffer: Array, axis: int) -> Array:
            block = lax.dynamic_slice_in_dim(buffer, first, KV_BLOCK, axis)
            return from_bits(block, dtype).astype(jnp.float32)

        visible = see(visibility, first + jnp.arange(KV_BLOCK))
        scores = jnp.einsum("bhqd,bhds->bhqs", q, read(keys, 3))
        scores = jnp.where(visible, scores, _UNSEEN)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        decay = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])  # exactly 0 where unseen
        total = total * decay + jnp.sum(weights, axis=-1)
        new_out = jnp.einsum("bhqs,bhsd->bhqd", weights, read(values, 2))
        return new_top, total, out * decay[..., None] + new_out

    empty = jnp.full(q.shape[:3], _UNSEEN / 2, jnp.float32)
    carry = (empty, jnp.zeros_like(empty), jnp.zeros_like(q))
    num_blocks = (visibility.live + KV_BLOCK - 1) // KV_BLOCK
    few = q.shape[0] // 4
    blocks = jnp.arange(keys.shape[3] // KV_BLOCK)
    num_rows = jnp.sum(num_blocks[:, None] > blocks[None], axis=0)  # that need each block
    num_shared = jnp.sum(num_rows > few, dtype=jnp.int32)
    carry = lax.fori_loop(
        0, num_shared, lambda i, carry: add_block(i, carry, q, keys, values, visibility), carry
    )
    if few:
        num_own = jnp.maximum(num_blocks - num_shared, 0)
        ends = jnp.cumsum(num_own, dtype=jnp.int32)

        def add_own(number, carry):
            row = jnp.sum(ends <= number, dtype=jnp.int32)
            index = num_shared + number - (ends - num_own)[row]

            def of_row(x):
                return lax.dynamic_slice_in_dim(x, row, 1)

            part = add_block(
                index,
                jax.tree.map(of_row, carry),
                of_row(q),
                of_row(keys),
                of_row(values),
                visibility.of_row(row),
            )
            return jax.tree.map(
                lambda x, new: lax.dynamic_update_slice_in_dim(x, new, row, 0), carry, part
            )

        carry = lax.fori_loop(0, ends[-1], add_own, carry)
    _, total, out = carry
    return out / jnp.maximum(total, 1e-30)[..., None]
