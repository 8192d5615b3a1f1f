"""int8 weights and activations: what a row becomes, what smoothing keeps, what is cached."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mutants import mutant
from support.real import benchmark, load

import jaxspec_models
from jaxspec_models import checkpoint, layers, llama, llama_int8, quantization

pytestmark = pytest.mark.optimized

CONFIG = llama.LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, dtype="float32",
)  # fmt: skip


def params_with_outliers(config, size=50.0):
    """Random weights in which two channels are larger behind each norm."""
    params = llama.init_params(config, seed=0)
    outliers = jnp.ones((config.hidden_size,)).at[jnp.array([3, 17])].set(size)
    for layer in params["layers"].values():
        for norm in ("input_norm", "post_attention_norm"):
            layer[norm]["weight"] *= outliers
    params["norm"]["weight"] *= outliers
    return params


def logits_of(config, params, tokens):
    model = llama.language_model(config, params)
    cache = model.init_cache(*tokens.shape, tokens.shape[1])
    start = jnp.zeros((tokens.shape[0],), jnp.int32)
    return jax.jit(model.apply)(model.params, tokens, cache, start=start)[0].logits


# ---------------------------------------------------------------------------------------------
# One row.


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-30, 30))
def test_rows_are_rounded_to_the_nearest_step(seed, log_scale):
    x = np.random.default_rng(seed).normal(size=(3, 40)).astype(np.float32) * np.exp(log_scale)
    x = x.astype(np.float32)
    steps, step = jax.jit(quantization.quantize_rows)(x)
    chex.assert_shape((steps, step), [(3, 40), (3,)])
    assert steps.dtype == jnp.int8
    np.testing.assert_allclose(step, np.abs(x).max(1) / 127, rtol=1e-6)
    # Half a step, and what float32 rounds in between.
    error = np.abs(np.asarray(steps, np.float64) * np.asarray(step)[:, None] - x)
    assert np.all(error <= (0.5 + 1e-4) * np.asarray(step)[:, None])
    assert np.abs(steps).max(1).tolist() == [127] * 3


def test_zeros_and_broken_rows():
    x = jnp.array([[0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [2.0, 1.0]])
    steps, step = quantization.quantize_rows(x)
    y = steps.astype(jnp.float32) * step[:, None]
    assert y[0].tolist() == [0.0, 0.0]
    assert not np.isfinite(y[1]).all()
    assert not np.isfinite(y[2]).all()
    np.testing.assert_allclose(y[3], x[3], atol=1 / 127)


def test_product_is_exact_in_integers():
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (24, 300)).astype(np.int8)
    scale = rng.uniform(0.5, 2, 24).astype(np.float32)
    x = rng.integers(-127, 128, (5, 300)).astype(np.float32)
    x[:, 0] = 127  # so that a step is 1
    expected = (x.astype(np.int64) @ weight.astype(np.int64).T) * scale.astype(np.float64)
    np.testing.assert_allclose(layers.product(x, weight, scale), expected, rtol=1e-6)


@pytest.mark.parametrize("has_unit", [False, True])
@pytest.mark.parametrize("rows", range(1, quantization.MAX_SUMMED_ROWS + 3))
@pytest.mark.parametrize("num_in", [1, 2, 33, 1536])
def test_the_integer_product_at_its_extremes(rows, num_in, has_unit, monkeypatch):
    """Both ways of computing it, the largest sums included; beside each other also in a loop."""
    monkeypatch.setattr(quantization, "has_matrix_unit", lambda: has_unit)
    rng = np.random.default_rng(rows)
    weight = rng.integers(-127, 128, (7, num_in)).astype(np.int8)
    weight[0], weight[1] = 127, -127
    steps = rng.integers(-127, 128, (rows, num_in)).astype(np.int8)
    steps[0] = 127
    expected = steps.astype(np.int64) @ weight.astype(np.int64).T
    np.testing.assert_array_equal(quantization.product(steps, weight), expected)

    @jax.jit
    def repeat(steps, weight, count):
        def add(_, total):
            return total + quantization.product(steps, weight)

        return jax.lax.fori_loop(0, count, add, jnp.zeros((rows, 7), jnp.int32))

    np.testing.assert_array_equal(repeat(steps, weight, 3), 3 * expected)


def _temporary_bytes(module, rows, *, size=1024):
    """Of a loop over one product, where a widened weight would be four times its size."""

    def repeat(steps, weight, count):
        def step(_, steps):
            return module._sum_products(steps, weight).astype(jnp.int8)

        return jax.lax.fori_loop(0, count, step, steps)

    steps, weight = jnp.ones((rows, size), jnp.int8), jnp.ones((size, size), jnp.int8)
    compiled = jax.jit(repeat).lower(steps, weight, 3).compile()
    return compiled.memory_analysis().temp_size_in_bytes / weight.nbytes


def test_the_weight_is_neither_widened_nor_copied():
    for rows in (2, 5):
        assert _temporary_bytes(quantization, rows) < 0.1
    hoisted = mutant(
        "jaxspec_models.quantization",
        ("weight, steps = lax.optimization_barrier((weight, steps))", "pass"),
    )
    assert _temporary_bytes(hoisted, 2) > 3


def _loops_that_round_and_sum(module):
    """Computations of the compiled product in which the rows are rounded for each output anew."""

    def product(x, weight):
        return module._sum_products(module.quantize_rows(x)[0], weight)

    x, weight = jnp.ones((3, 64)), jnp.ones((24, 64), jnp.int8)
    text = jax.jit(product).lower(x, weight).compile().as_text()
    bodies = [
        body for body in text.split("\n\n") if re.search(r" reduce\(.*s32|s32.* reduce\(", body)
    ]
    assert bodies
    return [body for body in bodies if "round-nearest-even(" in body]


def test_rows_are_rounded_once():
    assert not _loops_that_round_and_sum(quantization)
    fused = mutant(
        "jaxspec_models.quantization",
        ("fusion.computed_once(steps)", "steps"),
    )
    assert _loops_that_round_and_sum(fused)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 20])
def test_a_row_does_not_depend_on_its_neighbours(rows):
    rng = np.random.default_rng(1)
    weight = rng.integers(-127, 128, (24, 64)).astype(np.int8)
    scale = rng.uniform(0.5, 2, 24).astype(np.float32)
    x = rng.normal(size=(rows, 64)).astype(np.float32)
    product = jax.jit(layers.product)
    together = product(x, weight, scale)
    for i in range(rows):
        np.testing.assert_array_equal(product(x[i : i + 1], weight, scale)[0], together[i])


# ---------------------------------------------------------------------------------------------
# A model.


# A random model whose head is its own is chaotic under large outliers, in float32 as well.
@pytest.mark.parametrize(("tied", "size"), [(True, 50.0), (False, 3.0)])
def test_quantised_model_has_the_declared_form_and_stays_close(tied, size):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = params_with_outliers(config, size)
    quantized_config, quantized = llama_int8.quantize(config, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        quantized, llama.abstract_params(quantized_config)
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 20)), jnp.int32)
    exact = logits_of(config, params, tokens)
    ours = logits_of(quantized_config, quantized, tokens)
    error = jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact)
    assert error < _ALLOWED
    # Two rounded matrices a product, a handful of products: a percent or two is what must be.
    assert error > 1e-3


_ALLOWED = 0.05


@pytest.mark.parametrize(
    "patch",
    [
        ('norm["weight"] / factors', 'norm["weight"]'),  # the norm keeps its size
        ("weight * factors[None]", "weight"),
        ('params["norm"]["weight"] / norm["weight"]', 'jnp.ones_like(norm["weight"])'),
        ("0.5 * (", "0.0 * ("),  # no smoothing: outliers cost the others their precision
    ],
)
def test_planted_bugs_move_the_logits(patch):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    params = params_with_outliers(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 20)), jnp.int32)
    exact = logits_of(config, params, tokens)
    ours = logits_of(*mutant("jaxspec_models.llama_int8", patch).quantize(config, params), tokens)
    assert jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact) > _ALLOWED


# ---------------------------------------------------------------------------------------------
# Converted once.


def test_a_directory_is_converted_once_and_again_when_it_changes(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path / "cache"))
    path = tiny.write_directory(tmp_path / "model")
    load_int8 = functools.partial(jaxspec_models.load_model, path, quantization="int8")
    first = load_int8()
    assert first.params["embed"]["weight"].dtype == jnp.int8
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_directory", None)  # later loads do without
        again = load_int8()
    chex.assert_trees_all_equal(again.params, first.params)
    assert again.apply == first.apply
    (path / "config.json").touch()
    with monkeypatch.context() as patch:
        patch.setattr(llama_int8, "quantize", lambda *_: pytest.fail("converted"))
        with pytest.raises(pytest.fail.Exception, match="converted"):
            load_int8()


# ---------------------------------------------------------------------------------------------
# The real model.


@pytest.mark.real_model
def test_memory_is_a_byte_a_parameter():
    leaves = jax.tree.leaves(load("int8").params)
    assert sum(leaf.nbytes for leaf in leaves) <= 1.01 * sum(leaf.size for leaf in leaves)


@pytest.mark.real_model
def test_perplexity_stays_within_three_percent():
    """`benchmarks/quality.py` measures 10k tokens."""
    quality = benchmark("quality")
    figures = quality.measure("smollm2-135m", quality.text_of(None), 4096, ["int8"])
    assert figures["int8"]["ratio"] <= 1.03
    assert figures["int8"]["greedy_agreement"] >= 0.9
