"""Attention and its cache by themselves: rows are independent to the last bit, none is copied."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant
from support.real import load

from jaxspec_models import layers

pytestmark = pytest.mark.optimized

_DIM, _CAPACITY = 64, 1024
_LENGTHS = np.array([700, 10, 300, 40, 900, 5])  # rows share some blocks and have others alone


def _attention(module, num_kv_heads, groups):
    """`f(rows, width)`: the first `width` tokens of some of six rows, behind their lengths."""
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.normal(size=(6, num_kv_heads, _DIM, _CAPACITY)), jnp.float32)
    values = jnp.asarray(rng.normal(size=(6, num_kv_heads, _CAPACITY, _DIM)), jnp.float32)
    queries = jnp.asarray(rng.normal(size=(6, 5, num_kv_heads * groups, _DIM)) * 3, jnp.float32)

    @functools.partial(jax.jit, static_argnames="width")
    def attend(q, keys, values, start, width):
        visibility = module.Visibility(
            prefix=start, mask=None, start=start, live=start + width, width=width
        )
        return module.attention(q, keys, values, visibility, dtype=jnp.float32)

    def run(rows, width):
        start = jnp.asarray(_LENGTHS[rows], jnp.int32)
        q = queries[jnp.asarray(rows), :width]
        return np.asarray(
            attend(q, keys[jnp.asarray(rows)], values[jnp.asarray(rows)], start, width)
        )

    return run, (queries, keys, values)


def _num_differing(module, num_kv_heads, groups):
    """In how many smaller batches and widths a row is not bit for bit what it is among all."""
    run, _ = _attention(module, num_kv_heads, groups)
    together = run(np.arange(6), 5)
    count = 0
    for rows in ([0], [2], [4], [0, 1, 2, 4]):
        for width in (1, 2, 5):
            count += not np.array_equal(run(np.array(rows), width), together[rows][:, :width])
    return count


@pytest.mark.parametrize(("num_kv_heads", "groups"), [(1, 1), (1, 3), (2, 2), (3, 3)])
def test_a_row_is_bit_equal_whoever_stands_beside_it(num_kv_heads, groups):
    assert _num_differing(layers, num_kv_heads, groups) == 0


def test_the_values_are_those_of_dense_attention():
    run, (queries, keys, values) = _attention(layers, 2, 2)
    ours = run(np.arange(6), 5).reshape(6, 5, 4, _DIM)
    for row, length in enumerate(_LENGTHS):
        for token in range(5):
            seen = length + token + 1
            for head in range(4):
                scores = queries[row, token, head] @ keys[row, head // 2, :, :seen] * _DIM**-0.5
                want = jax.nn.softmax(scores) @ values[row, head // 2, :seen]
                np.testing.assert_allclose(ours[row, token, head], want, atol=2e-5)


def _under_64_bits(module):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return _attention(module, 2, 2)[0](np.arange(6), 5)


def test_the_same_under_64_bit_jax():
    """What is summed up from block to block stays float32."""
    wanted = _attention(layers, 2, 2)[0](np.arange(6), 5)
    np.testing.assert_array_equal(_under_64_bits(layers), wanted)
    module = mutant(
        "jaxspec_models.layers", ("_UNSEEN / 2, jnp.float32)", "_UNSEEN / 2, jnp.float_)")
    )
    with pytest.raises(TypeError, match="carry"):
        _under_64_bits(module)


@pytest.mark.parametrize(
    "patch",
    [
        ("_MIN_SUMS = 16", "_MIN_SUMS = 2"),
        ("fori_loop(0, ends[-1], add_own", "fori_loop(0, ends[-1] - 1, add_own"),
        ("jnp.sum(ends <= number", "jnp.sum(ends < number"),
        ("index = num_shared + number", "index = number"),
        ("visibility.of_row(row),", "visibility.of_row(0 * row),"),
    ],
)
def test_planted_bugs_are_noticed(patch):
    assert _num_differing(mutant("jaxspec_models.layers", patch), 1, 3) > 0


def _cache_copies(module):
    """Copies of whole buffers in a compiled loop that feeds trees and moves accepted nodes."""
    nodes, model = 5, load("int8")
    cache = model.init_cache(1, 2 * layers.KV_BLOCK, nodes)

    def repeat(params, cache, tokens, count):
        def step(i, carry):
            cache, tokens = carry
            start = jnp.full((1,), 7, jnp.int32) + i
            output, cache = model.apply(
                params,
                tokens,
                cache,
                start=start,
                prefix=start,
                mask=jnp.tri(nodes, dtype=bool)[None],
                positions=start[:, None] + jnp.arange(nodes)[None],
            )
            is_moved = (output.logits[:, :1, 0] > 0).astype(jnp.int32)  # known late, as verdicts
            path = jnp.arange(nodes - 1)[None] + is_moved
            cache = layers.KVCache(*module.compact(module.KVCache(*cache), start + 1, path))
            return cache, jnp.argmax(output.logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, count, step, (cache, tokens))

    tokens = jnp.ones((1, nodes), jnp.int32)
    text = jax.jit(repeat).lower(model.params, cache, tokens, 3).compile().as_text()
    inside = text[: text.index("ENTRY")]  # at the entry a caller's own buffers are copied
    sizes = {x.size for x in jax.tree.leaves(cache)}
    found = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", inside)
    return sum(np.prod([int(n) for n in shape.split(",")]) in sizes for shape in found)


@pytest.mark.real_model
def test_an_accepted_path_is_moved_without_copying_the_cache():
    assert _cache_copies(layers) == 0
    fused = mutant(
        "jaxspec_models.layers",
        ("lax.fori_loop(\n        0,\n        moves,\n        lambda _, moved: of_all(",
         "(lambda moved, *_: moved)(\n        of_all("),
        ("return lax.fori_loop(\n        0,\n        moves,\n        lambda _, cache:",
         "return (lambda f, cache: f(0, cache))(\n        lambda _, cache:"),
    )  # fmt: skip
    assert _cache_copies(fused) > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_a_path_may_lead_beyond_its_own_length(batch):
    cache = layers.init_cache(
        batch, 256, num_layers=1, num_kv_heads=2, head_dim=4, dtype=jnp.float32
    )
    slots = jnp.arange(256.0)
    cache = layers.KVCache(
        (cache.keys[0] + slots[None, None, None],), (cache.values[0] + slots[None, None, :, None],)
    )
    start = jnp.full((batch,), 10, jnp.int32)
    moved = layers.compact(cache, start, jnp.tile(jnp.array([[1, 6]]), (batch, 1)))
    expected = slots.at[jnp.array([10, 11])].set(jnp.array([11.0, 16.0]))
    assert jnp.all(moved.keys[0] == expected[None, None, None])
    assert jnp.all(moved.values[0] == expected[None, None, :, None])
