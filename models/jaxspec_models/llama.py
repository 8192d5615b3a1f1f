"""The Llama family (arXiv 2302.13971, 2407.21783) in Flax NNX: HF `model_type` "llama".

Grouped-query attention, rotary positions (default, linear and llama3 scaling), RMSNorm, SwiGLU,
tied or untied head, biases where the config says so. SmolLM and SmolLM2 are Llamas.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxspec
from jaxspec_models import fusion, layers

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Attributes:
      kind: "default", "linear" or "llama3" (HF's `rope_type`).
      factor: the stretch.
      low_freq_factor: llama3 only.
      high_freq_factor: llama3 only.
      original_max_position: llama3 only, the context before stretching, in tokens.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model, with HF's names; hashable, compares by value.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      intermediate_size: width inside the MLP.
      num_hidden_layers: decoder layers.
      num_attention_heads: query heads.
      num_key_value_heads: key/value heads; divides the query heads.
      head_dim: width of a head.
      max_position_embeddings: the context the model was made for, in tokens.
      rms_norm_eps: ε of RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: see `RopeScaling`.
      tie_word_embeddings: the head is the embedding table.
      attention_bias: q, k, v and output products have biases.
      mlp_bias: gate, up and down products have biases.
      eos_ids: the tokens that end a text.
      dtype: "float32" or "bfloat16": the weights and the cache; sums are float32 always.
      quantization: None or "int8": the products' weights (see `jaxspec_models.quantization`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    quantization: str | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, dtype: str = "bfloat16") -> LlamaConfig:
        """Reads the dictionary of an HF `config.json`, of transformers 4 or 5.

        Args:
          config: the dictionary.
          dtype: of weights and cache.

        Raises:
          ValueError: the model type, activation or rope scaling is not supported.

        Example:
          >>> hf = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16,
          ...       "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
          >>> LlamaConfig.from_hf(hf).head_dim
          8
        """
        if (kind := config.get("model_type")) != "llama":
            raise ValueError(
                f"model_type {kind!r} is not supported; the supported one is 'llama' "
                "(CONTRIBUTING.md tells how to add a family)."
            )
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act {activation!r} is not supported; Llama uses 'silu'.")
        if config.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor is not supported; Llama rotates whole heads.")
        heads = config["num_attention_heads"]
        # transformers 5 writes `rope_parameters`; 4 writes `rope_theta` and `rope_scaling`.
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(
                f"rope scaling {kind!r} is not supported; use 'default', 'linear' or 'llama3'."
            )
        scaling = RopeScaling(
            kind=kind,
            factor=float(rope.get("factor", 1.0)),
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
            original_max_position=int(
                rope.get(
                    "original_max_position_embeddings",
                    config.get("max_position_embeddings", 2048),
                )
            ),
        )
        eos = config.get("eos_token_id")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            rope_scaling=scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
            dtype=dtype,
        )


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """The rotary frequencies f32[head_dim // 2], in radians a token, after scaling."""
    dim, scaling = config.head_dim, config.rope_scaling
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    if scaling.kind == "llama3":
        # Long wavelengths are stretched, short ones kept, those between interpolated.
        wavelength = 2 * math.pi / frequencies
        low = scaling.original_max_position / scaling.low_freq_factor
        high = scaling.original_max_position / scaling.high_freq_factor
        smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        scaled = np.where(wavelength > low, frequencies / scaling.factor, frequencies)
        middle = (wavelength >= high) & (wavelength <= low)
        return np.where(middle, between, scaled).astype(np.float32)
    return frequencies


def rotary_tables(config: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of the rotary angles at i32[B, T]: f32[B, T, head_dim // 2] each."""
    angles = positions.reshape(-1, 1).astype(jnp.float32) * inverse_frequencies(config)[None]
    # Otherwise every layer would compute them again, for each of its heads.
    tables = fusion.computed_once(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))
    cos, sin = jnp.split(tables.reshape(*positions.shape, -1), 2, axis=-1)
    return cos, sin


class Attention(nnx.Module):
    """Grouped-query attention with one fused product for q, k and v."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        make = functools.partial(
            layers.Linear, bias=config.attention_bias, config=config, rngs=rngs
        )
        self.qkv = make(config.hidden_size, (heads + 2 * kv_heads) * config.head_dim)
        self.out = make(heads * config.head_dim, config.hidden_size)

    def __call__(self, x, keys, values, cos, sin, visibility):
        """f32[B, T, D] -> f32[B, T, D], and the two updated buffers of the cache."""
        config = self.config
        batch, num_rows, _ = x.shape
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = self.qkv(x).reshape(batch, num_rows, heads + 2 * kv_heads, config.head_dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        q, k = layers.rotate(q, cos, sin), layers.rotate(k, cos, sin)
        dtype = jnp.dtype(config.dtype)
        k, v = layers.storable(k[:, : visibility.width], v[:, : visibility.width], dtype)
        keys = layers.write_slots(keys, k.transpose(0, 2, 3, 1), visibility.start, axis=3)
        values = layers.write_slots(values, v.swapaxes(1, 2), visibility.start, axis=2)
        mixed = layers.attention(q, keys, values, visibility, dtype=dtype)
        return self.out(mixed), keys, values


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202) with one fused product for gate and up."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        make = functools.partial(layers.Linear, bias=config.mlp_bias, config=config, rngs=rngs)
        self.gate_up = make(config.hidden_size, 2 * config.intermediate_size)
        self.down = make(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Array) -> Array:
        """f32[..., D] -> f32[..., D]."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(nnx.silu(gate) * up)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each with a norm before it and a residual around it."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        norm = functools.partial(
            layers.RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs
        )
        self.input_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.post_attention_norm = norm()
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, keys, values, cos, sin, visibility):
        """f32[B, T, D] -> f32[B, T, D], and the two updated buffers of the cache."""
        mixed, keys, values = self.attention(self.input_norm(x), keys, values, cos, sin, visibility)
        x = x + mixed
        return x + self.mlp(self.post_attention_norm(x)), keys, values


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef, params, x, keys, values, cos, sin, visibility):
    """One decoder layer under a jit of its own: equal layers are traced and lowered once."""
    layer = nnx.merge(graphdef, nnx.State(params))
    return layer(x, keys, values, cos, sin, visibility)


class Llama(nnx.Module):
    """The decoder. `language_model` wraps it as pure functions.

    Args:
      config: the shape.
      rngs: for random weights.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        make_table = functools.partial(
            layers.Embedding, config.vocab_size, config.hidden_size, config=config, rngs=rngs
        )
        self.embed = make_table()
        self.layers = nnx.List(
            [DecoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = layers.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        if not config.tie_word_embeddings:
            self.head = make_table()

    def __call__(
        self,
        tokens: Array,
        cache: layers.KVCache,
        *,
        start: Array,
        positions: Array | None = None,
        num_new: Array | None = None,
        prefix: Array | None = None,
        mask: Array | None = None,
        logits_at: Array | None = None,
        hidden_layers: tuple[int, ...] = (),
    ) -> tuple[jaxspec.ModelOutput, layers.KVCache]:
        """The contract of `jaxspec.LanguageModel.apply`.

        `hidden_layers` counts as HF's `hidden_states`: 0 is the embeddings, i the output of the
        i-th layer, and the last one (also -1) comes after the final norm.
        """
        config = self.config
        batch, width = tokens.shape
        if positions is None:
            positions = start[:, None] + jnp.arange(width)[None]
        # A row without new tokens is fed garbage, or its beginning again, which must come out as it
        # was (`drafters.model`): what such tokens see lies within `width` slots.
        fed = start + width if num_new is None else jnp.where(num_new > 0, start + num_new, width)
        num_rows = layers.padded_width(batch, width)
        if mask is not None:
            mask = mask if mask.ndim == 3 else mask[None]
            mask = jnp.broadcast_to(mask, (batch, width, mask.shape[-1]))
            mask = layers.pad_axis(mask, 1, num_rows)
        visibility = layers.Visibility(
            prefix=start if prefix is None else prefix,
            mask=mask,
            start=start,
            live=fed,
            width=width,
        )
        tokens = layers.pad_axis(tokens, 1, num_rows)
        cos, sin = rotary_tables(config, layers.pad_axis(positions, 1, num_rows))

        x = self.embed(tokens)
        hidden = [x]
        keys, values = list(cache.keys), list(cache.values)
        for i, layer in enumerate(self.layers):
            graphdef, params = nnx.split(layer)
            x, keys[i], values[i] = _run_layer(
                graphdef, nnx.to_pure_dict(params), x, keys[i], values[i], cos, sin, visibility
            )
            hidden.append(x)
        cache = layers.KVCache(tuple(keys), tuple(values))

        if logits_at is not None and logits_at.shape[1] == 0:
            logits = jnp.zeros((batch, 0, config.vocab_size), jnp.float32)
            if not hidden_layers:
                return jaxspec.ModelOutput(logits), cache
        x = hidden[-1] = self.norm(x)
        if logits_at is None or logits_at.shape[1] > 0:
            if logits_at is None:
                x = x[:, :width]
            else:
                x = jnp.take_along_axis(x, logits_at[:, :, None], axis=1)
            logits = (self.embed if config.tie_word_embeddings else self.head).product(x)
        kept = tuple(hidden[i][:, :width] for i in hidden_layers)
        return jaxspec.ModelOutput(logits, kept), cache


@functools.lru_cache(maxsize=32)
def _abstract(config: LlamaConfig) -> tuple[Any, Any]:
    """The graph definition and the shapes of a config's weights, as a nested dict."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


@dataclasses.dataclass(frozen=True)
class _Apply:
    config: LlamaConfig

    def __call__(
        self,
        params,
        tokens,
        cache,
        *,
        start,
        positions=None,
        num_new=None,
        prefix=None,
        mask=None,
        logits_at=None,
        hidden_layers=(),
    ):
        graphdef, _ = _abstract(self.config)
        return nnx.merge(graphdef, nnx.State(params))(
            tokens,
            cache,
            start=start,
            positions=positions,
            num_new=num_new,
            prefix=prefix,
            mask=mask,
            logits_at=logits_at,
            hidden_layers=hidden_layers,
        )


@dataclasses.dataclass(frozen=True)
class InitCache:
    """`init_cache` of a model of this shape."""

    config: LlamaConfig

    def __call__(self, batch: int, capacity: int, max_step: int) -> layers.KVCache:
        """Empty."""
        del max_step  # a full cache needs no slack of its own: capacity has it
        return layers.init_cache(
            batch,
            capacity,
            num_layers=self.config.num_hidden_layers,
            num_kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            dtype=self.config.dtype,
        )


def language_model(config: LlamaConfig, params: Any) -> jaxspec.LanguageModel:
    """Wraps weights as a `jaxspec.LanguageModel`.

    Args:
      config: the shape.
      params: nested dict as `abstract_params(config)`.

    Returns:
      The model as pure functions; two models of equal config share every trace.

    Example:
      >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
      ...                      num_hidden_layers=1, num_attention_heads=2,
      ...                      num_key_value_heads=1, head_dim=8, dtype="float32")
      >>> model = language_model(config, init_params(config, seed=0))
      >>> model.vocab_size
      32
    """
    return jaxspec.LanguageModel(
        params=params,
        apply=_Apply(config),
        init_cache=InitCache(config),
        vocab_size=config.vocab_size,
        compact=layers.compact,
        max_length=config.max_position_embeddings,
        eos_ids=config.eos_ids,
    )


def config_of(model: jaxspec.LanguageModel) -> LlamaConfig:
    """The shape of a model made by `language_model`.

    Raises:
      ValueError: it was not.
    """
    if not isinstance(model, jaxspec.LanguageModel) or not isinstance(model.apply, _Apply):
        raise ValueError("drafters are trained for Llamas of jaxspec_models, and this is none.")
    return model.apply.config


def head_rows(config: LlamaConfig, params: Any, tokens: Array) -> Array:
    """Rows of the vocabulary head: i32[W] -> f32[W, D]; logits are `hidden @ rows.T`."""
    head = params["embed" if config.tie_word_embeddings else "head"]
    rows: Array = head["weight"][tokens].astype(jnp.float32)
    return rows * head["scale"][tokens][:, None] if "scale" in head else rows


def init_params(config: LlamaConfig, seed: int) -> Any:
    """Random weights: a nested dict of arrays as `abstract_params(config)`."""
    _, state = nnx.split(Llama(config, rngs=nnx.Rngs(seed)))
    return nnx.to_pure_dict(state)


def abstract_params(config: LlamaConfig) -> Any:
    """The nested dict of `jax.ShapeDtypeStruct` that `language_model` expects."""
    return _abstract(config)[1]


class Target(NamedTuple):
    """Where one checkpoint tensor goes.

    Attributes:
      path: the keys that lead to the parameter in `abstract_params`.
      row: the first row of the (fused) parameter that it fills.
      shape: the tensor's shape in the checkpoint.
      gguf_key: its name in a GGUF file.
      gguf_heads: llama.cpp permutes the rows of q and k of so many heads; 0: not permuted.
    """

    path: tuple[str | int, ...]
    row: int
    shape: tuple[int, ...]
    gguf_key: str
    gguf_heads: int = 0


def checkpoint_table(config: LlamaConfig) -> dict[str, Target]:
    """Maps every HF checkpoint key of a config to its place: the one table for all formats."""
    dim, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q_rows, kv_rows = heads * config.head_dim, kv_heads * config.head_dim
    table = {
        "model.embed_tokens.weight": Target(
            ("embed", "weight"), 0, (config.vocab_size, dim), "token_embd.weight"
        )
    }

    def add(key, path, row, rows, columns, gguf_key, *, bias, gguf_heads=0):
        table[f"{key}.weight"] = Target(
            (*path, "weight"), row, (rows, columns), f"{gguf_key}.weight", gguf_heads
        )
        if bias:
            table[f"{key}.bias"] = Target(
                (*path, "bias"), row, (rows,), f"{gguf_key}.bias", gguf_heads
            )

    for i in range(config.num_hidden_layers):
        key, path, gguf = f"model.layers.{i}", ("layers", i), f"blk.{i}"
        attention = functools.partial(add, bias=config.attention_bias)
        qkv, out = (*path, "attention", "qkv"), (*path, "attention", "out")
        attention(
            f"{key}.self_attn.q_proj", qkv, 0, q_rows, dim, f"{gguf}.attn_q", gguf_heads=heads
        )
        attention(
            f"{key}.self_attn.k_proj",
            qkv,
            q_rows,
            kv_rows,
            dim,
            f"{gguf}.attn_k",
            gguf_heads=kv_heads,
        )
        attention(f"{key}.self_attn.v_proj", qkv, q_rows + kv_rows, kv_rows, dim, f"{gguf}.attn_v")
        attention(f"{key}.self_attn.o_proj", out, 0, dim, q_rows, f"{gguf}.attn_output")
        mlp = functools.partial(add, bias=config.mlp_bias)
        mlp(f"{key}.mlp.gate_proj", (*path, "mlp", "gate_up"), 0, ffn, dim, f"{gguf}.ffn_gate")
        mlp(f"{key}.mlp.up_proj", (*path, "mlp", "gate_up"), ffn, ffn, dim, f"{gguf}.ffn_up")
        mlp(f"{key}.mlp.down_proj", (*path, "mlp", "down"), 0, dim, ffn, f"{gguf}.ffn_down")
        table[f"{key}.input_layernorm.weight"] = Target(
            (*path, "input_norm", "weight"), 0, (dim,), f"{gguf}.attn_norm.weight"
        )
        table[f"{key}.post_attention_layernorm.weight"] = Target(
            (*path, "post_attention_norm", "weight"), 0, (dim,), f"{gguf}.ffn_norm.weight"
        )
    table["model.norm.weight"] = Target(("norm", "weight"), 0, (dim,), "output_norm.weight")
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = Target(
            ("head", "weight"), 0, (config.vocab_size, dim), "output.weight"
        )
    return table
