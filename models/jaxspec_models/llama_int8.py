"""Turns a float Llama into an int8 one.

A row of activations has one step for all its channels, so a channel that is always large costs
all others their precision. Where a norm feeds a product, such channels are made smaller in the
norm's weight and larger in the product's, which changes nothing in exact arithmetic
(SmoothQuant, arXiv 2211.10438). What is large is found by one forward over random tokens: on
SmolLM2-135M they serve as well as text does (see `benchmarks/README.md`).

`qwix` (0.1.8) was tried first and does not serve: its products keep the [in, out] layout, and one
row for one token, and leave the CPU backend's fast path (576 × 3072, two rows: 612 µs against 184;
one row: 3.5 ms against 182 µs).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec_models import layers, llama, quantization

Array: TypeAlias = jax.Array

_CALIBRATION_TOKENS = 512


def quantize(config: llama.LlamaConfig, params: Any) -> tuple[llama.LlamaConfig, Any]:
    """Quantises the weights of all products, embedding and head included.

    Args:
      config: of a model in float32 or bfloat16.
      params: as `llama.abstract_params(config)`.

    Returns:
      The config with `quantization="int8"`, and its parameters.

    Example:
      >>> config = llama.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
      ...                            num_hidden_layers=1, num_attention_heads=2,
      ...                            num_key_value_heads=1, head_dim=8)
      >>> config, params = quantize(config, llama.init_params(config, seed=0))
      >>> config.quantization, str(params["embed"]["weight"].dtype)
      ('int8', 'int8')
    """
    into_layers, into_head = input_ranges(config, params)
    quantized_layers = {}
    for i, ranges in enumerate(into_layers):
        layer = params["layers"][i]
        input_norm, qkv = _smooth(layer["input_norm"], layer["attention"]["qkv"], ranges[0])
        mlp_norm, gate_up = _smooth(
            layer["post_attention_norm"], layer["mlp"]["gate_up"], ranges[1]
        )
        quantized_layers[i] = {
            "input_norm": input_norm,
            "attention": {"qkv": qkv, "out": _quantize(layer["attention"]["out"])},
            "post_attention_norm": mlp_norm,
            "mlp": {"gate_up": gate_up, "down": _quantize(layer["mlp"]["down"])},
        }
    tied = config.tie_word_embeddings
    norm, head = _smooth(params["norm"], params["embed" if tied else "head"], into_head)
    ones = {"factors": jnp.ones((config.hidden_size,), jnp.float32)}
    factors = {"factors": params["norm"]["weight"] / norm["weight"]} if tied else ones
    quantized = {
        "embed": head | factors if tied else _quantize(params["embed"]) | ones,
        "layers": quantized_layers,
        "norm": norm,
    }
    if not tied:
        quantized["head"] = head | ones
    return dataclasses.replace(config, quantization="int8"), quantized


def input_ranges(config: llama.LlamaConfig, params: Any) -> tuple[list[list[Array]], Array]:
    """The largest magnitude of each channel behind each norm, over random tokens.

    Args:
      config: of the model.
      params: its parameters.

    Returns:
      For each layer f32[D] before attention and before the MLP; f32[D] before the head.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, nnx.State(params))
    count = min(_CALIBRATION_TOKENS, config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, count))
    x = model.embed(jnp.asarray(tokens, jnp.int32))
    start = jnp.zeros((1,), jnp.int32)
    cos, sin = llama.rotary_tables(config, jnp.arange(count, dtype=jnp.int32)[None])
    visibility = layers.Visibility(
        prefix=start,
        mask=None,
        start=start,
        live=jnp.full((1,), count, jnp.int32),
        width=count,
    )
    cache = llama.language_model(
        dataclasses.replace(config, num_hidden_layers=1), params
    ).init_cache(1, count, count)
    ranges = []
    for layer in model.layers:
        layer_graphdef, state = nnx.split(layer)
        x, attention_input, mlp_input = _feed_layer(
            layer_graphdef, nnx.to_pure_dict(state), x, cache, cos, sin, visibility
        )
        ranges.append([attention_input, mlp_input])
    return ranges, _range(model.norm(x))


@functools.partial(jax.jit, static_argnums=0)
def _feed_layer(graphdef, params, x, cache, cos, sin, visibility):
    layer = nnx.merge(graphdef, nnx.State(params))
    attention_input = layer.input_norm(x)
    mixed, _, _ = layer.attention(
        attention_input, cache.keys[0], cache.values[0], cos, sin, visibility
    )
    x = x + mixed
    mlp_input = layer.post_attention_norm(x)
    return x + layer.mlp(mlp_input), _range(attention_input), _range(mlp_input)


def _range(x: Array) -> Array:
    """f32[B, T, D] -> f32[D]."""
    return jnp.max(jnp.abs(x), axis=(0, 1))


@jax.jit
def _smooth(norm: dict[str, Array], linear: dict[str, Array], ranges: Array) -> Any:
    """Moves half of the range, in logarithms, from the activations into the weights."""
    weight = linear["weight"].astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    log_factors = 0.5 * (
        jnp.log(jnp.maximum(ranges, tiny)) - jnp.log(jnp.maximum(jnp.max(jnp.abs(weight), 0), tiny))
    )
    # Only their proportions matter; a channel that is always zero says nothing.
    factors = jnp.exp(jnp.clip(log_factors - jnp.median(log_factors), -7.0, 7.0))
    return {"weight": norm["weight"] / factors}, _quantize(
        linear | {"weight": weight * factors[None]}
    )


@jax.jit
def _quantize(linear: dict[str, Array]) -> dict[str, Array]:
    weight, scale = quantization.quantize_rows(linear["weight"])
    return linear | {"weight": weight, "scale": scale}
