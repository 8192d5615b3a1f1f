"""`drawing`: the inverse CDF, its edges, and its law; the largest score."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

from jaxspec import drawing

pytestmark = pytest.mark.optimized

_LAST = np.float32(1 - 2**-23)  # the largest uniform that JAX makes


@functools.cache
def compiled(module):
    return jax.jit(jax.vmap(module.draw, in_axes=(0, None)))


def draw_many(module, uniforms, weights):
    count = len(uniforms)
    padded = np.resize(uniforms, (-(-count // 4096) * 4096, 2))  # few shapes, few programs
    tokens = compiled(module)(jnp.asarray(padded, jnp.float32), jnp.asarray(weights, jnp.float32))
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)[:count]


def edges(mass):
    """Uniforms on JAX's grid of 2⁻²³ around every step of the CDF, the two ends included."""
    steps = np.unique(np.cumsum(mass, dtype=np.float64) / np.sum(mass, dtype=np.float64))
    near = np.floor(steps[:, None] * 2**23) + np.arange(-3, 5)
    grid = np.concatenate([near.reshape(-1), [0, 2**23 - 1]])
    return (np.clip(grid, 0, 2**23 - 1) / 2**23).astype(np.float32)


def check_never_an_index_of_weight_zero(module, weights):
    """Neither uniform can reach a weight of zero, nor the padding behind the vocabulary."""
    blocks = np.pad(weights, (0, -len(weights) % 256)).reshape(-1, 256)
    mass = blocks.sum(axis=1)
    first = edges(mass)
    pairs = [np.stack([first, np.full_like(first, inner)], 1) for inner in (0, 0.5, _LAST)]
    # Inside a few blocks: the first uniform in the middle of the block's share.
    ends = np.cumsum(mass, dtype=np.float64) / mass.sum(dtype=np.float64)
    for block in np.flatnonzero(mass > 1e-3 * mass.sum())[:4]:
        second = edges(blocks[block])
        middle = (ends[block] + (ends[block - 1] if block else 0.0)) / 2
        pairs.append(np.stack([np.full_like(second, middle), second], 1))
    tokens = draw_many(module, np.concatenate(pairs), weights)
    assert tokens.min() >= 0
    assert tokens.max() < len(weights)
    assert np.all(weights[tokens] > 0)


def sparse_weights(rng, size, share=0.5):
    weights = rng.random(size).astype(np.float32) ** 3
    weights[rng.random(size) < share] = 0
    weights[rng.integers(size)] = 0.3
    return weights


@pytest.mark.parametrize("size", [1, 2, 3, 256, 257, 1000])
def test_never_an_index_of_weight_zero(size):
    rng = np.random.default_rng(size)
    for share in (0.5, 0.97):
        check_never_an_index_of_weight_zero(drawing, sparse_weights(rng, size, share))
    ends_in_zeros = sparse_weights(rng, size)
    ends_in_zeros[size // 2 + 1 :] = 0
    check_never_an_index_of_weight_zero(drawing, ends_in_zeros)
    last_only = np.zeros(size, np.float32)
    last_only[-1] = 1e-3
    check_never_an_index_of_weight_zero(drawing, last_only)


def test_whole_blocks_of_zeros():
    rng = np.random.default_rng(1)
    for seed in range(3):
        blocks = sparse_weights(rng, 9 * 256).reshape(9, 256)
        blocks[np.random.default_rng(seed).permutation(9)[:6]] = 0
        blocks[seed, 17] = 0.2
        check_never_an_index_of_weight_zero(drawing, blocks.reshape(-1)[: 9 * 256 - 3])


@pytest.mark.parametrize("num_blocks", [257, 501])
def test_vocabularies_of_many_blocks(num_blocks):
    """Above 256 blocks (V > 65536, Llama 3 has 128256) a scan may add in another order.

    Then a block of weight zero need not repeat its predecessor's sum.
    """
    rng = np.random.default_rng(num_blocks)
    for _ in range(5):
        weights = np.zeros(num_blocks * 256, np.float32)
        weights[::256] = sparse_weights(rng, num_blocks)
        weights /= weights.sum()
        check_never_an_index_of_weight_zero(drawing, weights)


def test_denormal_weights_beside_others():
    """A denormal counts as itself or as zero, as the backend has it; zeros are never drawn."""
    rng = np.random.default_rng(3)
    weights = sparse_weights(rng, 700)
    weights[rng.random(700) < 0.3] = 1e-42
    weights[600:] = 0
    check_never_an_index_of_weight_zero(drawing, weights)
    smallest = np.zeros(300, np.float32)
    smallest[[7, 290]] = np.finfo(np.float32).tiny
    check_never_an_index_of_weight_zero(drawing, smallest)


# ---------------------------------------------------------------------------------------------
# The law.


def check_law(module, weights, *, points=4096):
    """Shares of a grid of uniforms against the weights.

    An index owns an interval of each uniform. A grid of n points counts an interval of length x
    within 1 of n·x. Its two ends are float32 sums of at most m terms, each off by at most
    m · 2⁻²⁴ of the total: n · m · 2⁻²³ points together.
    """
    blocks = np.pad(weights, (0, -len(weights) % 256)).reshape(-1, 256).astype(np.float64)
    mass = blocks.sum(axis=1)
    grid = (np.arange(points) + 0.5) / points
    tokens = draw_many(module, np.stack([grid, np.full(points, 0.4)], 1), weights)
    counts = np.bincount(tokens // 256, minlength=len(mass))
    bound = 1 + points * max(len(mass), 256) * 2**-23
    assert np.max(np.abs(counts - points * mass / mass.sum())) <= bound
    ends = np.cumsum(mass) / mass.sum()
    for block in np.flatnonzero(mass > 0):
        middle = (ends[block] + (ends[block - 1] if block else 0.0)) / 2
        tokens = draw_many(module, np.stack([np.full(points, middle), grid], 1), weights)
        assert np.all(tokens // 256 == block)
        counts = np.bincount(tokens - block * 256, minlength=256)
        assert np.max(np.abs(counts - points * blocks[block] / mass[block])) <= bound


@pytest.mark.parametrize("size", [2, 256, 700])
def test_the_law_is_the_weights(size):
    check_law(drawing, sparse_weights(np.random.default_rng(size), size))
    check_law(drawing, np.ones(size, np.float32))


@pytest.mark.parametrize(
    "patch",
    [
        ("uniforms[1], blocks[block]", "uniforms[0], blocks[block]"),  # one number used twice
        ("* cumulative[-1]", ""),  # weights taken as normalised
        ("uniforms[0], jnp.sum(blocks, axis=1)", "uniforms[0], jnp.max(blocks, axis=1)"),
    ],
)
def test_planted_bugs_change_the_law(patch):
    with pytest.raises(AssertionError):
        check_law(mutant("jaxspec.drawing", patch), sparse_weights(np.random.default_rng(0), 700))


def test_a_planted_bug_draws_a_weight_of_zero():
    weights = np.array([0.0, 1.0, 0.0, 3.0], np.float32)
    check_never_an_index_of_weight_zero(drawing, weights)
    weak = mutant(
        "jaxspec.drawing",
        (
            "is_beyond = (cumulative > uniform * cumulative[-1]) & can_be_drawn",
            "is_beyond = cumulative >= uniform * cumulative[-1]",
        ),
    )
    with pytest.raises(AssertionError):
        check_never_an_index_of_weight_zero(weak, weights)


def test_weights_need_not_be_normalised():
    """Scaled by a power of two, every draw is the same."""
    rng = np.random.default_rng(6)
    weights = sparse_weights(rng, 300)
    uniforms = rng.random((4096, 2)).astype(np.float32)
    tokens = draw_many(drawing, uniforms, weights)
    for power in (-80, -1, 1, 100):
        scaled = np.ldexp(weights, power)
        np.testing.assert_array_equal(draw_many(drawing, uniforms, scaled), tokens)


def test_by_hand_with_and_without_jit():
    weights = jnp.array([0.0, 1.0, 0.0, 3.0])
    for function in (drawing.draw, jax.jit(drawing.draw)):
        for uniform, expected in ((0.0, 1), (0.24, 1), (0.25, 3), (0.99, 3), (_LAST, 3)):
            assert int(function(jnp.array([0.7, uniform], jnp.float32), weights)) == expected


def check_argmax(module):
    """As NumPy's: the first of equal scores, NaN the largest, no index of the padding."""
    rng = np.random.default_rng(9)
    largest = jax.jit(module.argmax)
    for size in (1, 5, 256, 257, 1000):
        for kind in range(5):
            scores = rng.normal(size=size).astype(np.float32) - 9
            if kind == 1:
                scores = np.round(scores)  # many equal ones, in several blocks
            if kind == 2:
                scores[rng.random(size) < 0.3] = np.nan
            if kind == 3:
                scores[:] = -np.inf
            if kind == 4:
                scores[rng.random(size) < 0.9] = -np.inf
            index = largest(jnp.asarray(scores))
            assert index.dtype == jnp.int32
            assert int(index) == np.argmax(scores)


def test_argmax_is_numpys():
    check_argmax(drawing)


@pytest.mark.parametrize(
    "patch",
    [
        ("constant_values=-jnp.inf", "constant_values=0.0"),
        ("jnp.argmax(jnp.max(blocks, axis=1))", "jnp.nanargmax(jnp.max(blocks, axis=1))"),
        ("block * _BLOCK + jnp.argmax(blocks[block])", "block * _BLOCK"),
    ],
)
def test_planted_bugs_change_the_largest(patch):
    with pytest.raises(AssertionError):
        check_argmax(mutant("jaxspec.drawing", patch))
