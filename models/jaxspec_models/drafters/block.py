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
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import jaxspec
from jaxspec import pytree
from jaxspec.drafters.choosing import chooser
from jaxspec.training import losses, steps
from jaxspec.types import Context, Draft, Outcome, Signals
from jaxspec_models import layers, llama, quantization
from jaxspec_models.drafters import parts

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The shape of a block drafter; hashable, compares by value.

    Attributes:
      target: the target's shape, whose width, heads' width and rotary positions it shares.
      tapped_layers: the target's hidden states it reads, numbered as for `LanguageModel.apply`.
      num_draft_tokens: K, slots of a block.
      draft_vocab_size: W, tokens it can draft.
      num_hidden_layers: of its own.
      intermediate_size: width inside its MLPs.
      markov_rank: R, of the bias.
      dtype: "float32" or "bfloat16", of weights and cache.
      quantization: None or "int8", of the products' weights.
    """

    target: llama.LlamaConfig
    tapped_layers: tuple[int, ...]
    num_draft_tokens: int
    draft_vocab_size: int
    num_hidden_layers: int = 1
    intermediate_size: int = 1024
    markov_rank: int = 128
    dtype: str = "float32"
    quantization: str | None = None

    @property
    def layer(self) -> llama.LlamaConfig:
        """The shape of its layers."""
        return dataclasses.replace(
            self.target,
            intermediate_size=self.intermediate_size,
            attention_bias=False,
            mlp_bias=False,
            dtype=self.dtype,
            quantization=self.quantization,
        )


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
        self.slots = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.num_draft_tokens, width))
        )
        self.layers = nnx.List(
            [BlockLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = norm()
        self.head = linear(width, config.draft_vocab_size)
        # One row more, for tokens that are not in the draft vocabulary.
        self.markov_in = nnx.Param(
            0.02
            * jax.random.normal(rngs.params(), (config.draft_vocab_size + 1, config.markov_rank))
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

    def block(self, pending: Array, count: int) -> Array:
        """The block's input from the pending tokens' embeddings: f32[B, D] -> f32[B, count, D]."""
        x = jnp.broadcast_to(
            self.slots[...][None, :count], (pending.shape[0], count, pending.shape[1])
        )
        return x.at[:, 0].add(pending)

    def bias(self, before: Array) -> tuple[Array, Array]:
        """Of the tokens before, i32[...] in the draft vocabulary: f32[..., R] and f32[..., W]."""
        known = self.markov_in[...][before]
        return known, self.markov_out(known)

    def predicted(self, h: Array, known: Array) -> Array:
        """The confidence's logit of each slot: f32[..., D], f32[..., R] -> f32[...]."""
        weight = self.confidence[...]
        inputs = jnp.concatenate([h, known], axis=-1)
        return jnp.sum(inputs * weight[:-1].reshape((1,) * (h.ndim - 1) + (-1,)), -1) + weight[-1]


# ---------------------------------------------------------------------------------------------
# Training.


class BlockPart(NamedTuple):
    """Texts with blocks to be learned, as `loss` takes them.

    Attributes:
      tokens: i32[B, T], with at least K behind every anchor.
      hidden: bfloat16[B, T, taps, D], the target's states of the tapped layers at each token.
      final: bfloat16[B, T, D], what its head reads.
      log_normalizers: f32[B, T], of its logits.
      anchors: i32[B, M], where the pending token of each block stands, at least 1.
      weights: f32[B, M, K], of each slot's loss; 0: not learned.
    """

    tokens: Array
    hidden: Array
    final: Array
    log_normalizers: Array
    anchors: Array
    weights: Array


class Frozen(NamedTuple):
    """What training reads of the target.

    Attributes:
      embeddings: f32[V, D].
      head: f32[W, D], the rows of the draft vocabulary.
      positions: i32[V], of each token in the draft vocabulary; W: not in it.
    """

    embeddings: Array
    head: Array
    positions: Array


def forward(model: BlockModel, part: BlockPart, frozen: Frozen) -> tuple[Array, Array]:
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
    slots = part.anchors[:, :, None] + jnp.arange(count, dtype=jnp.int32)[None, None]  # [B, M, K]
    rows = jnp.arange(batch)[:, None]
    pending = frozen.embeddings[part.tokens[rows, part.anchors]].astype(jnp.float32)
    x = model.block(pending.reshape(-1, shape.hidden_size), count)
    x = x.reshape(batch, num_blocks * count, shape.hidden_size)

    text_angles = llama.rotary_tables(
        shape, jnp.broadcast_to(jnp.arange(width)[None], (batch, width))
    )
    slot_angles = llama.rotary_tables(shape, slots.reshape(batch, -1))
    sees_text = jnp.arange(width)[None, None] < jnp.repeat(part.anchors, count, axis=1)[:, :, None]
    sees_slot = jnp.tril(jnp.ones((count, count), bool))
    for layer in model.layers:
        attention = layer.attention
        normed = layer.input_norm(x)
        q = attention.queries(normed, *slot_angles)
        own = attention.keys_values(normed, *slot_angles)
        given = attention.keys_values(layer.context_norm(context), *text_angles)
        mixed = _attend(q, given, own, sees_text, sees_slot)
        x = layer.finish(x, mixed)
    h = model.norm(x).reshape(batch, num_blocks, count, shape.hidden_size)
    before = frozen.positions[part.tokens[rows[:, :, None], slots]]
    known, bias = model.bias(before)
    return model.head(h) + bias, model.predicted(lax.stop_gradient(h), lax.stop_gradient(known))


def _attend(
    q: Array,
    given: tuple[Array, Array],
    own: tuple[Array, Array],
    sees_text: Array,
    sees_slot: Array,
) -> Array:
    """Attention of blocks to the text and to themselves.

    Args:
      q: f32[B, M · K, H, D'].
      given: keys and values of the text, f32[B, T, KV, D'].
      own: of the slots, f32[B, M · K, KV, D'].
      sees_text: bool[B, M · K, T].
      sees_slot: bool[K, K].

    Returns:
      f32[B, M · K, H · D'].
    """
    batch, num_rows, heads, dim = q.shape
    count = sees_slot.shape[0]
    kv_heads = given[0].shape[2]
    q = (q * dim**-0.5).reshape(batch, num_rows, kv_heads, heads // kv_heads, dim)
    to_text = jnp.einsum("bqhgd,bshd->bhgqs", q, given[0])
    to_text = jnp.where(sees_text[:, None, None], to_text, -jnp.inf)

    def blocks(x: Array) -> Array:  # [B, M · K, …] -> [B, M, K, …]
        return x.reshape(batch, num_rows // count, count, *x.shape[2:])

    to_slots = jnp.einsum("bmqhgd,bmshd->bhgmqs", blocks(q), blocks(own[0]))
    to_slots = jnp.where(sees_slot[None, None, None, None], to_slots, -jnp.inf)
    to_slots = to_slots.reshape(*to_text.shape[:-1], count)
    weights = jax.nn.softmax(jnp.concatenate([to_text, to_slots], axis=-1), axis=-1)
    text_weights, slot_weights = jnp.split(weights, [to_text.shape[-1]], axis=-1)
    out = jnp.einsum("bhgqs,bshd->bqhgd", text_weights, given[1])
    slot_weights = slot_weights.reshape(*slot_weights.shape[:3], -1, count, count)
    from_slots = jnp.einsum("bhgmqs,bmshd->bmqhgd", slot_weights, blocks(own[1]))
    return (out + from_slots.reshape(out.shape)).reshape(batch, num_rows, heads * dim)


def loss(
    graphdef: Any,
    params: Any,
    part: BlockPart,
    frozen: Frozen,
    *,
    cross_entropy: float = 0.1,
    total_variation: float = 0.9,
    confidence: float = 1.0,
) -> steps.Totals:
    """0.1 cross-entropy + 0.9 total variation + confidence, as DSpark weighs them.

    Args:
      graphdef: of the model.
      params: what is trained.
      part: texts.
      frozen: the target's.
      cross_entropy: its weight.
      total_variation: its weight.
      confidence: its weight.

    Returns:
      Sums over slots; metrics "acceptance" f32[K], "agreement" f32[K] (of the likeliest tokens),
      "confidence_error" f32[].
    """
    model = nnx.merge(graphdef, nnx.State(params))
    logits, predicted = forward(model, part, frozen)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    count = logits.shape[2]
    rows = jnp.arange(part.tokens.shape[0])[:, None, None]
    slots = part.anchors[:, :, None] + jnp.arange(count, dtype=jnp.int32)[None, None]
    log_p = jnp.einsum("btd,wd->btw", part.final.astype(jnp.float32), frozen.head)
    log_p = (log_p - part.log_normalizers[:, :, None])[rows, slots]

    def over_slots(function: Any, *args: Array) -> Array:
        return jax.vmap(jax.vmap(jax.vmap(function)))(*args)

    accepted = over_slots(losses.acceptance, log_q, log_p)
    each = cross_entropy * over_slots(losses.cross_entropy, log_q, log_p)
    each += total_variation * (1 - accepted)
    each += confidence * over_slots(losses.confidence, predicted, accepted)
    is_same = jnp.argmax(log_q, axis=-1) == jnp.argmax(log_p, axis=-1)
    # What the reduced vocabulary lacks may be the target's likeliest: then p is above what is left.
    best = jnp.max(log_p, axis=-1)
    missing = 1 - jnp.sum(jnp.exp(log_p), axis=-1)
    is_same &= jnp.exp(best) > missing
    weights = jnp.asarray(part.weights)
    learned = (weights > 0).astype(jnp.float32)
    by_slot = jnp.sum(learned, axis=(0, 1))
    error = jnp.abs(jax.nn.sigmoid(predicted) - accepted)
    return steps.Totals(
        jnp.sum(weights * each),
        jnp.sum(weights),
        {
            "acceptance": (jnp.sum(learned * accepted, axis=(0, 1)), by_slot),
            "agreement": (jnp.sum(jnp.where(is_same, learned, 0.0), axis=(0, 1)), by_slot),
            "confidence_error": (jnp.sum(learned * error), jnp.sum(learned)),
        },
    )


# ---------------------------------------------------------------------------------------------
# Drafting.


@pytree.dataclass
class BlockDrafter:
    """See `block`."""

    params: Any
    embeddings: Any  # the target's table, as `layers.Embedding` holds it
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

    def init(self, batch: int, capacity: int) -> layers.KVCache:
        """An empty cache of its own layers."""
        shape = self.config.layer
        return layers.init_cache(
            batch,
            capacity,
            num_layers=self.config.num_hidden_layers,
            num_kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
        )

    def prefill(
        self,
        state: layers.KVCache,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> layers.KVCache:
        """Takes in the features of one chunk of the prompts."""
        del tokens, num_new
        return self._take_in(state, hidden, start)

    def commit(self, state: layers.KVCache, outcome: Outcome) -> layers.KVCache:
        """Takes in the features of the verified tokens; those of rejected ones are overwritten."""
        return self._take_in(state, outcome.hidden, outcome.start)

    def _take_in(
        self, cache: layers.KVCache, hidden: tuple[Array, ...], start: Array
    ) -> layers.KVCache:
        model, shape = self._model(), self.config.layer
        batch, width = hidden[0].shape[:2]
        num_rows = layers.padded_width(batch, width)
        context = model.context(tuple(layers.pad_axis(state, 1, num_rows) for state in hidden))
        angles = llama.rotary_tables(shape, start[:, None] + jnp.arange(num_rows)[None])
        keys, values = list(cache.keys), list(cache.values)
        for i, layer in enumerate(model.layers):
            k, v = layer.attention.keys_values(layer.context_norm(context), *angles)
            keys[i], values[i] = _write(
                keys[i], values[i], k[:, :width], v[:, :width], start, shape
            )
        return layers.KVCache(tuple(keys), tuple(values))

    def propose(
        self,
        keys: Array,
        state: layers.KVCache,
        context: Context,
        num_draft: Array,
        keep_drafting: Any,
    ) -> tuple[Draft, layers.KVCache]:
        """One forward over the block, then the tokens from left to right."""
        batch, num_slots = keys.shape
        if num_slots > self.config.num_draft_tokens:
            raise ValueError(
                f"num_draft_tokens is {num_slots}, and this drafter was trained for at most "
                f"{self.config.num_draft_tokens}; lower num_draft_tokens."
            )
        rows, model = jnp.arange(batch), self._model()
        start = context.lengths - 1
        pending = context.tokens[rows, start]
        h, state = self._forward(model, state, pending, start, num_slots)
        logits = model.head(h)
        choose = chooser(keys, context)
        options = context.sampling
        shape = (batch, num_slots, self.vocab_size)
        log_probs = None if options.is_greedy else jnp.full(shape, -jnp.inf, jnp.float32)

        def step(slot: Array, carry: _Drafting) -> _Drafting:
            known, bias = model.bias(self.positions[carry.last])
            at_slot = lax.dynamic_index_in_dim(logits, slot, 1, keepdims=False) + bias
            h_slot = lax.dynamic_index_in_dim(h, slot, 1, keepdims=False)
            scores = parts.process(
                at_slot, self.draft_ids, self.vocab_size, context, carry.tokens, slot
            )
            slots = jnp.full((batch,), slot)
            hope = carry.hope * jax.nn.sigmoid(model.predicted(h_slot, known))
            goes_on = keep_drafting(Signals(slots, scores, h_slot))
            goes_on &= hope >= self.stop_below
            if options.can_ban:  # where bans leave no token, there is nothing to draw
                goes_on &= jnp.isfinite(jnp.max(scores, axis=-1))
            is_open = carry.is_open & goes_on & (slot < num_draft)
            if carry.log_probs is None:
                token = jax.vmap(jaxspec.drawing.argmax)(scores)
                new_log_probs = None
            else:
                token = choose(slots, scores)
                new_log_probs = lax.dynamic_update_index_in_dim(carry.log_probs, scores, slot, 1)
            return _Drafting(
                tokens=lax.dynamic_update_index_in_dim(carry.tokens, token, slot, 1),
                last=token,
                log_probs=new_log_probs,
                length=carry.length + is_open.astype(jnp.int32),
                is_open=is_open,
                hope=hope,
            )

        # Nobody waits for slots that no row will use.
        drafting = lax.fori_loop(
            0,
            jnp.max(num_draft),
            step,
            _Drafting(
                tokens=jnp.zeros((batch, num_slots), jnp.int32),
                last=pending,
                log_probs=log_probs,
                length=jnp.zeros((batch,), jnp.int32),
                is_open=jnp.ones((batch,), bool),
                hope=jnp.ones((batch,), jnp.float32),
            ),
        )
        return Draft(drafting.tokens, drafting.log_probs, drafting.length), state

    def _forward(
        self, model: BlockModel, cache: layers.KVCache, pending: Array, start: Array, count: int
    ) -> tuple[Array, layers.KVCache]:
        """The slots' states f32[B, count, D]; the block's keys are overwritten by `commit`."""
        shape, batch = self.config.layer, pending.shape[0]
        x = model.block(embed(self.config.target, self.embeddings, pending), count)
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
            keys[i], values[i] = _write(
                keys[i], values[i], k[:, :count], v[:, :count], start, shape
            )
            mixed = layers.attention(
                q, keys[i], values[i], visibility, dtype=jnp.dtype(shape.dtype)
            )
            x = layer.finish(x, mixed)
        return model.norm(x)[:, :count], layers.KVCache(tuple(keys), tuple(values))


class _Drafting(NamedTuple):
    tokens: Array  # i32[B, K]
    last: Array  # i32[B], the token before the slot
    log_probs: Array | None  # f32[B, K, V]
    length: Array  # i32[B]
    is_open: Array  # bool[B]
    hope: Array  # f32[B], the predicted probability that all drafts so far are accepted


def _write(
    keys: Array, values: Array, k: Array, v: Array, start: Array, shape: llama.LlamaConfig
) -> tuple[Array, Array]:
    k, v = layers.storable(k, v, jnp.dtype(shape.dtype))
    keys = layers.write_slots(keys, k.transpose(0, 2, 3, 1), start, axis=3)
    return keys, layers.write_slots(values, v.swapaxes(1, 2), start, axis=2)


@functools.lru_cache(maxsize=32)
def abstract(config: BlockConfig) -> tuple[Any, Any]:
    """The graph definition and the shapes of a config's weights, as a nested dict."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: BlockModel(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


@functools.lru_cache(maxsize=32)
def _embedding(config: llama.LlamaConfig) -> Any:
    make = functools.partial(layers.Embedding, config.vocab_size, config.hidden_size, config=config)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


def embed(config: llama.LlamaConfig, params: Any, tokens: Array) -> Array:
    """The target's embeddings: i32[...] -> f32[..., D]."""
    return nnx.merge(_embedding(config), nnx.State(params))(tokens)


def init_params(config: BlockConfig, frozen: Frozen, seed: int) -> Any:
    """Weights before training: random, but for the head, which is the target's.

    Args:
      config: the shape, in float32.
      frozen: of the target, see `frozen_part`.
      seed: another one, other weights.

    Returns:
      A nested dict of f32 arrays as `abstract(config)`.
    """
    _, state = nnx.split(BlockModel(config, rngs=nnx.Rngs(seed)))
    params = nnx.to_pure_dict(state)
    params["head"]["weight"] = frozen.head.astype(jnp.float32)
    return params


def frozen_part(target: jaxspec.LanguageModel, config: BlockConfig, draft_ids: Array) -> Frozen:
    """What training reads of the target, in float32.

    Args:
      target: a Llama of `jaxspec_models`.
      config: the drafter's shape.
      draft_ids: i32[W].
    """
    shape, params = config.target, target.params
    tokens = jnp.arange(shape.vocab_size, dtype=jnp.int32)
    return Frozen(
        embeddings=embed(shape, params["embed"], tokens),
        head=llama.head_rows(shape, params, draft_ids),
        positions=parts.positions_in(draft_ids, shape.vocab_size),
    )


def quantize(config: BlockConfig, params: Any) -> tuple[BlockConfig, Any]:
    """The drafter with products in int8, one scale an output channel.

    Args:
      config: the shape, in float32.
      params: trained weights.

    Returns:
      The new shape and weights.
    """
    quantized = dataclasses.replace(config, quantization="int8")

    def convert(wanted: Any, given: Any) -> Any:
        if not isinstance(wanted, dict):
            return given
        if "scale" in wanted:
            steps, scale = quantization.quantize_rows(given["weight"])
            return {"weight": steps, "scale": scale}
        return {name: convert(wanted[name], given[name]) for name in wanted}

    return quantized, convert(abstract(quantized)[1], params)


def block(
    target: jaxspec.LanguageModel,
    config: BlockConfig,
    params: Any,
    draft_ids: Any,
    *,
    stop_below: Any = 0.0,
) -> BlockDrafter:
    """The drafter of trained weights.

    Args:
      target: the model it was trained for, whose embeddings it shares.
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
        draft_ids=draft_ids,
        positions=parts.positions_in(draft_ids, config.target.vocab_size),
        stop_below=jnp.asarray(stop_below, jnp.float32),
        config=config,
    )
