"""A parallel block drafter: all drafts of a round from one forward (after DFlash and DSpark).

The block is the pending token and, behind it, a learned slot for every further draft. Each layer
attends to the target's features of the text so far, injected as keys and values, and to the slots
before. So the forward does not wait for tokens; what it cannot know, which tokens the earlier
slots were drawn as, comes in as a Markov bias of low rank on each slot's logits, from left to
right. Every q is the exact law of its draft. A confidence head predicts whether it is accepted.

Slots see those before them only, where DFlash's block is bidirectional: a slot that holds no token
has nothing to tell, and a block may be cut to any number of drafts without changing the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import jaxspec
from jaxspec import pytree
from jaxspec.training import steps
from jaxspec.types import Context, Draft, Outcome, Signals
from jaxspec_models import layers, llama
from jaxspec_models.drafters import parts

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockConfig(parts.DrafterConfig):
    """The shape of a block drafter.

    Attributes:
      markov_rank: R, of the bias.
    """

    method: ClassVar[str] = "block"

    markov_rank: int = 128


class Attention(nnx.Module):
    """Of slots to the target's features and to each other; keys and values of both alike."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config = shape = config.layer
        linear = functools.partial(layers.Linear, bias=False, config=shape, rngs=rngs)
        width = shape.num_attention_heads * shape.head_dim
        self.q = linear(shape.hidden_size, width)
        self.kv = linear(shape.hidden_size, 2 * shape.num_key_value_heads * shape.head_dim)
        self.out = linear(width, shape.hidden_size)

    def queries(self, x: Array, cos: Array, sin: Array) -> Array:
        """f32[B, T, D] -> f32[B, T, H, D']."""
        q = self.q(x).reshape(*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)
        return layers.rotate(q, cos, sin)

    def keys_values(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        """f32[B, T, D] -> two of f32[B, T, KV, D']."""
        heads = self.config.num_key_value_heads
        kv = self.kv(x).reshape(*x.shape[:2], 2 * heads, self.config.head_dim)
        k, v = jnp.split(kv, 2, axis=2)
        return layers.rotate(k, cos, sin), v


class BlockLayer(nnx.Module):
    """A decoder layer whose context is given."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        shape = config.layer
        norm = functools.partial(
            layers.RMSNorm, shape.hidden_size, epsilon=shape.rms_norm_eps, rngs=rngs
        )
        self.input_norm, self.context_norm, self.post_attention_norm = norm(), norm(), norm()
        self.attention = Attention(config, rngs=rngs)
        self.mlp = llama.MLP(shape, rngs=rngs)

    def finish(self, x: Array, mixed: Array) -> Array:
        """The residuals and the MLP around attention's result, f32[B, T, H · D']."""
        x = x + self.attention.out(mixed)
        return x + self.mlp(self.post_attention_norm(x))


class BlockModel(nnx.Module):
    """The trained part of the drafter.

    Args:
      config: the shape.
      rngs: for random weights.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config, shape = config, config.layer
        width, taps = shape.hidden_size, len(config.tapped_layers)
        norm = functools.partial(layers.RMSNorm, width, epsilon=shape.rms_norm_eps, rngs=rngs)
        linear = functools.partial(layers.Linear, bias=False, config=shape, rngs=rngs)
        self.tap_norms = nnx.List([norm() for _ in range(taps)])
        self.fuse = linear(taps * width, width)
        self.token_norm, self.last_norm = norm(), norm()
        self.begin = linear(2 * width, width)
        self.slots = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.num_draft_tokens, width))
        )
        self.layers = nnx.List(
            [BlockLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = norm()
        # One row more, for tokens that are not in the draft vocabulary.
        self.markov_in = layers.Embedding(
            config.draft_vocab_size + 1, config.markov_rank, config=shape, rngs=rngs
        )
        self.markov_out = linear(config.markov_rank, config.draft_vocab_size)
        self.confidence = nnx.Param(jnp.zeros((width + config.markov_rank + 1,)))

    def context(self, hidden: tuple[Array, ...]) -> Array:
        """The target's tapped states, float[B, T, D] each -> f32[B, T, D]."""
        normed = [
            norm(state.astype(jnp.float32))
            for norm, state in zip(self.tap_norms, hidden, strict=True)
        ]
        return self.fuse(jnp.concatenate(normed, axis=-1))

    def block(self, pending: Array, last: Array, count: int) -> Array:
        """The block's input: f32[B, count, D].

        Args:
          pending: f32[B, D], the pending tokens' embeddings.
          last: f32[B, D], `context` of the tokens before them.
          count: slots.
        """
        known = jnp.concatenate([self.token_norm(pending), self.last_norm(last)], axis=-1)
        return self.begin(known)[:, None] + self.slots[...][None, :count]

    def bias(self, before: Array) -> tuple[Array, Array]:
        """Of the tokens before, i32[...] in the draft vocabulary: f32[..., R] and f32[..., W]."""
        known = self.markov_in(before)
        return known, self.markov_out(known)

    def predicted(self, h: Array, known: Array) -> Array:
        """The confidence's logit of each slot: f32[..., D], f32[..., R] -> f32[...]."""
        weight = self.confidence[...]
        inputs = jnp.concatenate([h, known], axis=-1)
        return jnp.sum(inputs * weight[:-1].reshape((1,) * (h.ndim - 1) + (-1,)), -1) + weight[-1]


abstract = functools.partial(parts.abstract, BlockModel)


# ---------------------------------------------------------------------------------------------
# Training.


def init_params(config: BlockConfig, target: jaxspec.LanguageModel, seed: int) -> Any:
    """Weights before training: the layers are the target's last ones where their shapes agree.

    Args:
      config: the shape, in float32.
      target: the target.
      seed: another one, other random weights.

    Returns:
      A nested dict of f32 arrays as `abstract(config)`.
    """
    _, state = nnx.split(BlockModel(config, rngs=nnx.Rngs(seed)))
    params = nnx.to_pure_dict(state)
    width = params["slots"].shape[1]
    # At first the block sees the pending token only, and the bias is weak.
    both = params["begin"]["weight"]
    params["begin"]["weight"] = both.at[:, width:].multiply(0.1)
    params["markov_in"]["weight"] *= 0.02
    depth = config.target.num_hidden_layers
    for i in range(config.num_hidden_layers):
        source = depth - config.num_hidden_layers + i
        if source < 0:
            continue
        given, ours = parts.in_float32(target.params["layers"][source]), params["layers"][i]
        heads = config.target.num_attention_heads * config.target.head_dim
        qkv = given["attention"]["qkv"]["weight"]
        ours["attention"] = {
            "q": {"weight": qkv[:heads]},
            "kv": {"weight": qkv[heads:]},
            "out": {"weight": given["attention"]["out"]["weight"]},
        }
        ours["input_norm"] = given["input_norm"]
        ours["post_attention_norm"] = given["post_attention_norm"]
        if config.intermediate_size == config.target.intermediate_size:
            ours["mlp"] = {name: {"weight": given["mlp"][name]["weight"]} for name in given["mlp"]}
    return params


def forward(model: BlockModel, part: parts.Part, frozen: parts.Frozen) -> tuple[Array, Array]:
    """All blocks of the texts at once, teacher-forced.

    Args:
      model: the drafter.
      part: the texts.
      frozen: the target's.

    Returns:
      The logits f32[B, M, K, W] of each slot, and the confidence's logits f32[B, M, K].
    """
    config, shape = model.config, model.config.layer
    batch, width = part.tokens.shape
    num_blocks, count = part.anchors.shape[1], config.num_draft_tokens
    context = model.context(tuple(part.hidden[:, :, i] for i in range(part.hidden.shape[2])))
    rows = jnp.arange(batch)[:, None]
    anchors = jnp.minimum(part.anchors, width - 1)
    pending = frozen.embeddings[part.tokens[rows, anchors]]
    last = context[rows, anchors - 1]

    def flat(x: Array) -> Array:
        return x.reshape(-1, shape.hidden_size)

    x = model.block(flat(pending), flat(last), count)
    x = x.reshape(batch, num_blocks * count, shape.hidden_size)
    text_angles = llama.rotary_tables(
        shape, jnp.broadcast_to(jnp.arange(width)[None], (batch, width))
    )
    positions = anchors[:, :, None] + jnp.arange(count, dtype=jnp.int32)[None, None]
    slot_angles = llama.rotary_tables(shape, positions.reshape(batch, -1))
    sees_text = jnp.arange(width)[None, None] < jnp.repeat(anchors, count, axis=1)[:, :, None]
    of_block = jnp.repeat(jnp.arange(num_blocks), count)
    at = jnp.tile(jnp.arange(count), num_blocks)
    sees_slots = (of_block[:, None] == of_block[None]) & (at[:, None] >= at[None])
    sees = jnp.concatenate(
        [sees_text, jnp.broadcast_to(sees_slots[None], (batch, *sees_slots.shape))], axis=2
    )
    for layer in model.layers:
        attention = layer.attention
        normed = layer.input_norm(x)
        q = attention.queries(normed, *slot_angles)
        own = attention.keys_values(normed, *slot_angles)
        given = attention.keys_values(layer.context_norm(context), *text_angles)
        keys, values = (jnp.concatenate([a, b], axis=1) for a, b in zip(given, own, strict=True))
        x = layer.finish(x, parts.attend(q, keys, values, sees))
    h = model.norm(x).reshape(batch, num_blocks, count, shape.hidden_size)
    slots, _ = parts.slots_of(part, count)
    known, bias = model.bias(frozen.positions[part.tokens[rows[:, :, None], slots]])
    logits = jnp.einsum("bmkd,wd->bmkw", h, frozen.head) + bias
    return logits, model.predicted(lax.stop_gradient(h), lax.stop_gradient(known))


def loss(
    graphdef: Any,
    params: Any,
    part: parts.Part,
    frozen: parts.Frozen,
    *,
    objective: parts.Objective,
) -> steps.Totals:
    """See `parts.totals`.

    Args:
      graphdef: of the model.
      params: what is trained.
      part: texts.
      frozen: the target's.
      objective: what is minimised.
    """
    model = nnx.merge(graphdef, nnx.State(params))
    logits, predicted = forward(model, part, frozen)
    slots, exists = parts.slots_of(part, logits.shape[2])
    rows = jnp.arange(part.tokens.shape[0])[:, None, None]
    log_p = parts.target_laws(part, frozen)[rows, slots]
    return parts.totals(objective, jax.nn.log_softmax(logits, axis=-1), log_p, exists, predicted)


def quantize(config: BlockConfig, params: Any) -> tuple[BlockConfig, Any]:
    """The drafter with products in int8, one scale an output channel.

    Args:
      config: the shape, in float32.
      params: trained weights.

    Returns:
      The new shape and weights.
    """
    quantized = dataclasses.replace(config, quantization="int8")
    return quantized, parts.in_int8(abstract(quantized)[1], params)


# ---------------------------------------------------------------------------------------------
# Drafting.


class BlockState(NamedTuple):
    """The drafter's state.

    Attributes:
      cache: keys and values of its layers, of the target's features at each slot.
      last: f32[B, D], `BlockModel.context` of the token before the pending one.
    """

    cache: layers.KVCache
    last: Array


@pytree.dataclass
class BlockDrafter:
    """See `drafter`."""

    params: Any
    embeddings: Any  # the target's table, as `layers.Embedding` holds it
    head: Any  # see `parts.head_of`
    draft_ids: Array
    positions: Array
    stop_below: Array
    config: BlockConfig = pytree.static()

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The layers it taps."""
        return self.config.tapped_layers

    @property
    def vocab_size(self) -> int:
        """V of the target."""
        return self.config.target.vocab_size

    def _model(self) -> BlockModel:
        graphdef, _ = abstract(self.config)
        return nnx.merge(graphdef, nnx.State(self.params))

    def init(self, batch: int, capacity: int) -> BlockState:
        """An empty cache of its own layers."""
        shape = self.config.layer
        cache = layers.init_cache(
            batch,
            capacity,
            num_layers=self.config.num_hidden_layers,
            num_kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
        )
        return BlockState(cache, jnp.zeros((batch, shape.hidden_size), jnp.float32))

    def prefill(
        self,
        state: BlockState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> BlockState:
        """Takes in the features of one chunk of the prompts."""
        del tokens
        return self._take_in(state, hidden, start, num_new)

    def commit(self, state: BlockState, outcome: Outcome) -> BlockState:
        """Takes in the features of the verified tokens; those of rejected ones are overwritten."""
        return self._take_in(state, outcome.hidden, outcome.start, outcome.num_emitted)

    def _take_in(
        self, state: BlockState, hidden: tuple[Array, ...], start: Array, num_new: Array
    ) -> BlockState:
        model, shape, cache = self._model(), self.config.layer, state.cache
        batch, width = hidden[0].shape[:2]
        num_rows = layers.padded_width(batch, width)
        context = model.context(tuple(layers.pad_axis(state, 1, num_rows) for state in hidden))
        angles = llama.rotary_tables(shape, start[:, None] + jnp.arange(num_rows)[None])
        keys, values = list(cache.keys), list(cache.values)
        for i, layer in enumerate(model.layers):
            k, v = layer.attention.keys_values(layer.context_norm(context), *angles)
            keys[i], values[i] = parts.write(
                keys[i], values[i], k[:, :width], v[:, :width], start, shape
            )
        last = context[jnp.arange(batch), jnp.maximum(num_new - 1, 0)]
        return BlockState(
            layers.KVCache(tuple(keys), tuple(values)),
            jnp.where(num_new[:, None] > 0, last, state.last),
        )

    def propose(
        self,
        keys: Array,
        state: BlockState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, BlockState]:
        """One forward over the block, then the tokens from left to right."""
        batch, num_slots = keys.shape
        parts.check_num_draft_tokens(num_slots, self.config)
        model, start = self._model(), context.lengths - 1
        pending = context.tokens[jnp.arange(batch), start]
        h, cache = self._forward(model, state, pending, start, num_slots)
        logits = parts.logits(self.head, h)

        def next_step(slot: Array, before: Array, none: None) -> tuple[parts.Step, None]:
            known, bias = model.bias(self.positions[before])
            h_slot = lax.dynamic_index_in_dim(h, slot, 1, keepdims=False)
            at_slot = lax.dynamic_index_in_dim(logits, slot, 1, keepdims=False) + bias
            return parts.Step(at_slot, h_slot, jax.nn.sigmoid(model.predicted(h_slot, known))), none

        draft, _ = parts.draft_tokens(
            next_step,
            None,
            keys,
            context,
            num_draft,
            keep_drafting,
            draft_ids=self.draft_ids,
            vocab_size=self.vocab_size,
            stop_below=self.stop_below,
        )
        return draft, state._replace(cache=cache)

    def _forward(
        self, model: BlockModel, state: BlockState, pending: Array, start: Array, count: int
    ) -> tuple[Array, layers.KVCache]:
        """The slots' states f32[B, count, D]; the block's keys are overwritten by `commit`."""
        shape, batch, cache = self.config.layer, pending.shape[0], state.cache
        known = parts.embed(self.config.target, self.embeddings, pending)
        x = model.block(known, state.last, count)
        num_rows = layers.padded_width(batch, count)
        x = layers.pad_axis(x, 1, num_rows)
        angles = llama.rotary_tables(shape, start[:, None] + jnp.arange(num_rows)[None])
        visibility = layers.Visibility(
            prefix=start, mask=None, start=start, live=start + count, width=count
        )
        keys, values = list(cache.keys), list(cache.values)
        for i, layer in enumerate(model.layers):
            normed = layer.input_norm(x)
            q = layer.attention.queries(normed, *angles)
            k, v = layer.attention.keys_values(normed, *angles)
            keys[i], values[i] = parts.write(
                keys[i], values[i], k[:, :count], v[:, :count], start, shape
            )
            mixed = layers.attention(
                q, keys[i], values[i], visibility, dtype=jnp.dtype(shape.dtype)
            )
            x = layer.finish(x, mixed)
        return model.norm(x)[:, :count], layers.KVCache(tuple(keys), tuple(values))


def drafter(
    target: jaxspec.LanguageModel,
    config: BlockConfig,
    params: Any,
    draft_ids: Any,
    *,
    stop_below: Any = 0.0,
) -> BlockDrafter:
    """The drafter of trained weights.

    Args:
      target: the model it was trained for, whose embeddings and head it shares.
      config: the shape.
      params: the weights.
      draft_ids: i32[W], its vocabulary, in rising order.
      stop_below: f32[], it stops before a draft if the predicted probability that this one and all
        before it are accepted is lower; 0: never.

    Returns:
      A drafter for `jaxspec.generate`, for at most `config.num_draft_tokens` drafts.

    References:
      DFlash; Cheng et al., DSpark, arXiv 2607.05147.
    """
    draft_ids = jnp.asarray(draft_ids, jnp.int32)
    return BlockDrafter(
        params=params,
        embeddings=target.params["embed"],
        head=parts.head_of(target, config.target, draft_ids),
        draft_ids=draft_ids,
        positions=parts.positions_in(draft_ids, config.target.vocab_size),
        stop_below=jnp.asarray(stop_below, jnp.float32),
        config=config,
    )
