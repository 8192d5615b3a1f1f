"""A student: a Llama of few of the target's layers, trained to say what the target says.

It begins as a copy of layers chosen from the target, shares its embeddings and the head's rows for
the tokens it can draft, and reads no features: it is a language model of its own, which drafts
through `jaxspec.drafters.model`, token by token (arXiv 2211.17192; trained on the target's own
answers as in DistillSpec, arXiv 2310.08461).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

import jaxspec
from jaxspec.drafters.model import ModelDrafter
from jaxspec.training import steps
from jaxspec_models import layers, llama
from jaxspec_models.drafters import learning, parts

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class StudentConfig(parts.DrafterConfig):
    """The shape of a student.

    Attributes:
      source_layers: the target's layers it begins with, counted from 0; empty: spread evenly, the
        first and the last among them.
    """

    method: ClassVar[str] = "student"

    source_layers: tuple[int, ...] = ()


class StudentModel(nnx.Module):
    """The trained part: layers and the norm behind them.

    Args:
      config: the shape.
      rngs: for random weights.
    """

    def __init__(self, config: StudentConfig, *, rngs: nnx.Rngs):
        self.config, shape = config, config.layer
        self.layers = nnx.List(
            [llama.DecoderLayer(shape, rngs=rngs) for _ in range(shape.num_hidden_layers)]
        )
        self.norm = layers.RMSNorm(shape.hidden_size, epsilon=shape.rms_norm_eps, rngs=rngs)


abstract = functools.partial(parts.abstract, StudentModel)


# ---------------------------------------------------------------------------------------------
# Training.


def init_params(
    config: StudentConfig, target: jaxspec.LanguageModel, sample: learning.Part, seed: int
) -> Any:
    """The target's layers, and its last norm.

    Args:
      config: the shape, in float32.
      target: the target.
      sample: of texts, which this method does not look at.
      seed: of nothing; every method has one.

    Returns:
      A nested dict of f32 arrays as `abstract(config)`.

    Raises:
      ValueError: the layers have other shapes than the target's or no such biases, or there are no
        such layers.
    """
    del sample, seed
    depth, count = config.target.num_hidden_layers, config.num_hidden_layers
    sources = config.source_layers or evenly(depth, count)
    if len(sources) != count or not all(0 <= i < depth for i in sources):
        raise ValueError(
            f"a student of {count} layers takes {count} of the target's, numbered 0 to "
            f"{depth - 1}; got {list(sources)}."
        )
    if config.intermediate_size != config.target.intermediate_size:
        raise ValueError(
            "a student begins with its target's layers: intermediate_size must be "
            f"{config.target.intermediate_size}, got {config.intermediate_size}."
        )
    if config.target.mlp_bias or config.target.attention_bias:
        raise ValueError("a student has no biases, and its target's layers have; try eagle3.")
    return {
        "layers": {i: parts.in_float32(target.params["layers"][j]) for i, j in enumerate(sources)},
        "norm": parts.in_float32(target.params["norm"]),
    }


def evenly(depth: int, count: int) -> tuple[int, ...]:
    """`count` of `depth` layers, from the first to the last.

    Example:
      >>> evenly(30, 2), evenly(30, 3), evenly(30, 1)
      ((0, 29), (0, 14, 29), (29,))
    """
    if count == 1:
        return (depth - 1,)
    return tuple(round(i * (depth - 1) / (count - 1) - 1e-9) for i in range(count))


def attend(q: Array, keys: Array, values: Array, sees: Array) -> Array:
    """Grouped-query attention in training: dense, differentiable.

    Args:
      q: f32[..., Q, H, D'], rotated.
      keys: f32[..., S, KV, D'].
      values: f32[..., S, KV, D'].
      sees: bool[..., Q, S]; every query sees something.

    Returns:
      f32[..., Q, H · D'].
    """
    *lead, num_queries, heads, dim = q.shape
    kv_heads = keys.shape[-2]
    q = (q * dim**-0.5).reshape(*lead, num_queries, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("...qhgd,...shd->...hgqs", q, keys)
    scores = jnp.where(sees[..., None, None, :, :], scores, -jnp.inf)
    out = jnp.einsum("...hgqs,...shd->...qhgd", jax.nn.softmax(scores, axis=-1), values)
    return out.reshape(*lead, num_queries, heads * dim)


def forward(model: StudentModel, part: learning.Part, frozen: learning.Frozen) -> Array:
    """Logits behind each token of the texts, f32[B, T, W]."""
    shape = model.config.layer
    batch, width = part.tokens.shape
    cos, sin = llama.rotary_tables(shape, jnp.broadcast_to(jnp.arange(width)[None], (batch, width)))
    sees = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool))[None], (batch, width, width))
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    x = frozen.embeddings[part.tokens]
    for layer in model.layers:
        attention = layer.attention
        qkv = attention.qkv(layer.input_norm(x))
        qkv = qkv.reshape(batch, width, heads + 2 * kv_heads, shape.head_dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        q, k = layers.rotate(q, cos, sin), layers.rotate(k, cos, sin)
        x = x + attention.out(attend(q, k, v, sees))
        x = x + layer.mlp(layer.post_attention_norm(x))
    return learning.products(model.norm(x), frozen, model.layers[0].mlp.down)


def loss(
    model: StudentModel,
    part: learning.Part,
    frozen: learning.Frozen,
    *,
    objective: learning.Objective,
) -> steps.Totals:
    """Every answer token is learned once; metrics are of the blocks that begin at the anchors.

    Args:
      model: what is trained.
      part: texts.
      frozen: the target's.
      objective: what is minimised, without a slot decay: no token is nearer than another.
    """
    log_q = jax.nn.log_softmax(forward(model, part, frozen), axis=-1)
    log_p = learning.target_laws(part, frozen)
    judged = learning.judge(log_q, log_p, learning.next_tokens(part, frozen))
    at = jnp.arange(part.tokens.shape[1])[None]
    is_learned = (at >= part.first[:, None]) & (at + 1 < part.length[:, None])
    found = learning.totals(objective, log_q, log_p, judged, is_learned.astype(jnp.float32))
    slots, exists = learning.slots_of(part, model.config.num_draft_tokens)
    rows = jnp.arange(part.tokens.shape[0])[:, None, None]
    in_blocks = jax.tree.map(lambda x: x[rows, slots], judged)
    return found._replace(metrics=learning.metrics(part, in_blocks, exists))


# ---------------------------------------------------------------------------------------------
# Drafting.


@dataclasses.dataclass(frozen=True)
class _Apply:
    config: StudentConfig

    def __call__(
        self,
        params: Any,
        tokens: Array,
        cache: layers.KVCache,
        *,
        start: Array,
        num_new: Array | None = None,
        logits_at: Array | None = None,
    ) -> tuple[jaxspec.ModelOutput, layers.KVCache]:
        config, shape = self.config, self.config.layer
        graphdef, _ = abstract(config)
        model = nnx.merge(graphdef, nnx.State(params["student"]))
        batch, width = tokens.shape
        num_rows = layers.padded_width(batch, width)
        fed = start + width if num_new is None else jnp.where(num_new > 0, start + num_new, width)
        visibility = layers.Visibility(prefix=start, mask=None, start=start, live=fed, width=width)
        positions = start[:, None] + jnp.arange(num_rows)[None]
        cos, sin = llama.rotary_tables(shape, positions)
        tokens = layers.pad_axis(tokens, 1, num_rows)
        x = parts.embed(config.target, params["embed"], tokens)
        keys, values = list(cache.keys), list(cache.values)
        for i, layer in enumerate(model.layers):
            x, keys[i], values[i] = layer(x, keys[i], values[i], cos, sin, visibility)
        cache = layers.KVCache(tuple(keys), tuple(values))
        vocab_size = config.target.vocab_size
        if logits_at is not None and logits_at.shape[1] == 0:
            return jaxspec.ModelOutput(jnp.zeros((batch, 0, vocab_size), jnp.float32)), cache
        x = x[:, :width]
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, :, None], axis=1)
        few = parts.logits(params["head"], model.norm(x))
        return jaxspec.ModelOutput(parts.spread(few, params["draft_ids"], vocab_size)), cache


def drafter(
    target: jaxspec.LanguageModel,
    config: StudentConfig,
    params: Any,
    draft_ids: Any,
) -> ModelDrafter:
    """The drafter of trained weights.

    Args:
      target: the model it was trained for, whose embeddings and head it shares.
      config: the shape.
      params: the weights.
      draft_ids: i32[W], its vocabulary, in rising order; q = 0 for the other tokens.

    Returns:
      A drafter for `jaxspec.generate`.
    """
    draft_ids = jnp.asarray(draft_ids, jnp.int32)
    lm = jaxspec.LanguageModel(
        params={
            "student": params,
            "embed": target.params["embed"],
            "head": parts.head_of(target, config.target, draft_ids),
            "draft_ids": draft_ids,
        },
        apply=_Apply(config),
        init_cache=llama.InitCache(config.layer),
        vocab_size=config.target.vocab_size,
        max_length=config.target.max_position_embeddings,
        eos_ids=config.target.eos_ids,
    )
    return ModelDrafter(lm, None)
