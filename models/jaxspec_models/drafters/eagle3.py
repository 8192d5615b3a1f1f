"""EAGLE-3: a decoder layer that goes on from the target's own features (arXiv 2503.01840).

Three of the target's hidden states are fused into one feature. For the token at position u the
layer reads the token's embedding beside the feature of the token before it, and its output stands
for the feature of u: the next draft goes on from it. In training as well (training-time test): the
layer is unrolled over its own outputs from anchors in the text, so that it learns from what it
will be given.

Where the paper trains every position, anchors drawn at random are: each costs K cells, and only
keys and values are needed of all others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

import jaxspec
from jaxspec import pytree
from jaxspec.training import steps
from jaxspec.types import Context, Draft, Outcome, Signals
from jaxspec_models import layers, llama
from jaxspec_models.drafters import parts

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class EagleConfig(parts.DrafterConfig):
    """The shape of an EAGLE-3 drafter; it has one layer."""

    method: ClassVar[str] = "eagle3"


class EagleModel(nnx.Module):
    """The trained part of the drafter.

    Args:
      config: the shape.
      rngs: for random weights.
    """

    def __init__(self, config: EagleConfig, *, rngs: nnx.Rngs):
        self.config, shape = config, config.layer
        width, taps = shape.hidden_size, len(config.tapped_layers)
        norm = functools.partial(layers.RMSNorm, width, epsilon=shape.rms_norm_eps, rngs=rngs)
        linear = functools.partial(layers.Linear, bias=False, config=shape, rngs=rngs)
        of_heads = shape.num_attention_heads * shape.head_dim
        of_kv = 2 * shape.num_key_value_heads * shape.head_dim
        self.tap_norms = nnx.List([norm() for _ in range(taps)])
        self.fuse = linear(taps * width, width)
        self.token_norm, self.feature_norm = norm(), norm()
        self.q = linear(2 * width, of_heads)
        self.kv = linear(2 * width, of_kv)
        self.out = linear(of_heads, width)
        self.post_attention_norm = norm()
        self.mlp = llama.MLP(shape, rngs=rngs)
        self.norm = norm()

    def feature(self, hidden: tuple[Array, ...]) -> Array:
        """The target's tapped states, float[B, T, D] each -> f32[B, T, D]."""
        normed = [
            norm(state.astype(jnp.float32))
            for norm, state in zip(self.tap_norms, hidden, strict=True)
        ]
        return self.fuse(jnp.concatenate(normed, axis=-1))

    def cell(self, token: Array, feature: Array) -> Array:
        """What a cell reads: embeddings and features f32[B, T, D] -> f32[B, T, 2 · D]."""
        return jnp.concatenate([self.token_norm(token), self.feature_norm(feature)], axis=-1)

    def queries(self, cell: Array, cos: Array, sin: Array) -> Array:
        """f32[B, T, 2 · D] -> f32[B, T, H, D']."""
        shape = self.config.layer
        q = self.q(cell).reshape(*cell.shape[:2], shape.num_attention_heads, shape.head_dim)
        return layers.rotate(q, cos, sin)

    def keys_values(self, cell: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        """f32[B, T, 2 · D] -> two of f32[B, T, KV, D']."""
        shape = self.config.layer
        kv = self.kv(cell)
        kv = kv.reshape(*cell.shape[:2], 2 * shape.num_key_value_heads, shape.head_dim)
        k, v = jnp.split(kv, 2, axis=2)
        return layers.rotate(k, cos, sin), v

    def finish(self, feature: Array, mixed: Array) -> Array:
        """The next feature: residuals and MLP around attention's result f32[B, T, H · D']."""
        x = feature + self.out(mixed)
        return x + self.mlp(self.post_attention_norm(x))


abstract = functools.partial(parts.abstract, EagleModel)


# ---------------------------------------------------------------------------------------------
# Training.


def init_params(config: EagleConfig, target: jaxspec.LanguageModel, seed: int) -> Any:
    """Random weights, but what reads features begins as the target's last layer.

    Args:
      config: the shape, in float32.
      target: the target.
      seed: another one, other random weights.

    Returns:
      A nested dict of f32 arrays as `abstract(config)`.

    Raises:
      ValueError: more than one layer is asked for.
    """
    if config.num_hidden_layers != 1:
        raise ValueError(f"EAGLE-3 has one layer; got {config.num_hidden_layers}.")
    _, state = nnx.split(EagleModel(config, rngs=nnx.Rngs(seed)))
    params = nnx.to_pure_dict(state)
    given = parts.in_float32(target.params["layers"][config.target.num_hidden_layers - 1])
    width, heads = config.target.hidden_size, params["q"]["weight"].shape[0]
    qkv = given["attention"]["qkv"]["weight"]
    for name, rows in (("q", qkv[:heads]), ("kv", qkv[heads:])):
        params[name]["weight"] = params[name]["weight"].at[:, width:].set(rows)
    params["out"] = {"weight": given["attention"]["out"]["weight"]}
    params["feature_norm"] = given["input_norm"]
    params["post_attention_norm"] = given["post_attention_norm"]
    params["norm"] = parts.in_float32(target.params["norm"])
    if config.intermediate_size == config.target.intermediate_size:
        params["mlp"] = {name: {"weight": given["mlp"][name]["weight"]} for name in given["mlp"]}
    return params


def forward(model: EagleModel, part: parts.Part, frozen: parts.Frozen) -> Array:
    """All blocks of the texts, unrolled over their own features: logits f32[B, M, K, W]."""
    config, shape = model.config, model.config.layer
    batch, width = part.tokens.shape
    num_blocks, count = part.anchors.shape[1], config.num_draft_tokens
    rows = jnp.arange(batch)[:, None]
    anchors = jnp.minimum(part.anchors, width - 1)
    slots, _ = parts.slots_of(part, count)
    feature = model.feature(tuple(part.hidden[:, :, i] for i in range(part.hidden.shape[2])))
    # The cell of a token reads the feature of the token before it; the first token's reads none.
    before = jnp.pad(feature, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    text = model.cell(frozen.embeddings[part.tokens], before)
    text_angles = llama.rotary_tables(
        shape, jnp.broadcast_to(jnp.arange(width)[None], (batch, width))
    )
    keys, values = model.keys_values(text, *text_angles)
    sees = jnp.arange(width)[None, None] <= anchors[:, :, None]  # the pending token's own, too
    of_block = jnp.arange(num_blocks)
    found, at_anchor = [], before[rows, anchors]
    for step in range(count):
        position = anchors + step
        angles = llama.rotary_tables(shape, position)
        cell = model.cell(frozen.embeddings[part.tokens[rows, slots[:, :, step]]], at_anchor)
        if step > 0:  # the anchor's cell is the text's
            k, v = model.keys_values(cell, *angles)
            keys, values = jnp.concatenate([keys, k], axis=1), jnp.concatenate([values, v], axis=1)
            own = jnp.broadcast_to(
                (of_block[:, None] == of_block[None])[None], (batch, num_blocks, num_blocks)
            )
            sees = jnp.concatenate([sees, own], axis=2)
        mixed = parts.attend(model.queries(cell, *angles), keys, values, sees)
        at_anchor = model.finish(at_anchor, mixed)
        found.append(jnp.einsum("bmd,wd->bmw", model.norm(at_anchor), frozen.head))
    return jnp.stack(found, axis=2)


def loss(
    graphdef: Any,
    params: Any,
    part: parts.Part,
    frozen: parts.Frozen,
    *,
    objective: parts.Objective,
) -> steps.Totals:
    """See `parts.totals`; no loss on features.

    Args:
      graphdef: of the model.
      params: what is trained.
      part: texts.
      frozen: the target's.
      objective: what is minimised.
    """
    model = nnx.merge(graphdef, nnx.State(params))
    log_q = jax.nn.log_softmax(forward(model, part, frozen), axis=-1)
    slots, exists = parts.slots_of(part, log_q.shape[2])
    rows = jnp.arange(part.tokens.shape[0])[:, None, None]
    log_p = parts.target_laws(part, frozen)[rows, slots]
    return parts.totals(objective, log_q, log_p, exists)


def quantize(config: EagleConfig, params: Any) -> tuple[EagleConfig, Any]:
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


class EagleState(NamedTuple):
    """The drafter's state.

    Attributes:
      cache: keys and values of the cells of the text; one layer.
      before: f32[B, D], the feature of the token before the pending one; 0 where there is none.
      pending: i32[B], the pending token of the last round.
    """

    cache: layers.KVCache
    before: Array
    pending: Array


@pytree.dataclass
class EagleDrafter:
    """See `drafter`."""

    params: Any
    embeddings: Any  # the target's table, as `layers.Embedding` holds it
    head: Any  # see `parts.head_of`
    draft_ids: Array
    config: EagleConfig = pytree.static()

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The layers it taps."""
        return self.config.tapped_layers

    @property
    def vocab_size(self) -> int:
        """V of the target."""
        return self.config.target.vocab_size

    def _model(self) -> EagleModel:
        graphdef, _ = abstract(self.config)
        return nnx.merge(graphdef, nnx.State(self.params))

    def _embed(self, tokens: Array) -> Array:
        return parts.embed(self.config.target, self.embeddings, tokens)

    def init(self, batch: int, capacity: int) -> EagleState:
        """An empty cache."""
        shape = self.config.layer
        cache = layers.init_cache(
            batch,
            capacity,
            num_layers=1,
            num_kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
        )
        before = jnp.zeros((batch, shape.hidden_size), jnp.float32)
        return EagleState(cache, before, jnp.zeros((batch,), jnp.int32))

    def prefill(
        self,
        state: EagleState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> EagleState:
        """Takes in one chunk of the prompts; features go to the cells of the next tokens."""
        return self._take_in(state, tokens, self._model().feature(hidden), start, num_new)

    def commit(self, state: EagleState, outcome: Outcome) -> EagleState:
        """The cells of what was emitted get the target's features in place of the drafter's."""
        # The pending token's cell once more, which is there unless nothing was drafted. That of the
        # token behind the accepted ones is written when it is pending.
        tokens = jnp.concatenate([state.pending[:, None], outcome.draft.tokens], axis=1)
        feature = self._model().feature(outcome.hidden)
        return self._take_in(state, tokens, feature, outcome.start, outcome.num_emitted)

    def _take_in(
        self, state: EagleState, tokens: Array, feature: Array, start: Array, num_new: Array
    ) -> EagleState:
        """The cells of i32[B, T] tokens, whose own features are f32[B, T, D]."""
        model, shape = self._model(), self.config.layer
        batch, width = tokens.shape
        before = jnp.concatenate([state.before[:, None], feature[:, :-1]], axis=1)
        cell = model.cell(self._embed(tokens), before)
        angles = llama.rotary_tables(shape, start[:, None] + jnp.arange(width)[None])
        k, v = model.keys_values(cell, *angles)
        keys, values = parts.write(state.cache.keys[0], state.cache.values[0], k, v, start, shape)
        last = feature[jnp.arange(batch), jnp.maximum(num_new - 1, 0)]
        return state._replace(
            cache=layers.KVCache((keys,), (values,)),
            before=jnp.where(num_new[:, None] > 0, last, state.before),
        )

    def propose(
        self,
        keys: Array,
        state: EagleState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, EagleState]:
        """Cell by cell, each on the feature that the one before has made."""
        batch, num_slots = keys.shape
        parts.check_num_draft_tokens(num_slots, self.config)
        model, shape, start = self._model(), self.config.layer, context.lengths - 1

        def next_step(
            slot: Array, token: Array, carry: tuple[layers.KVCache, Array]
        ) -> tuple[parts.Step, tuple[layers.KVCache, Array]]:
            cache, feature = carry
            position = start + slot
            num_rows = layers.padded_width(batch, 1)
            cell = model.cell(self._embed(token)[:, None], feature[:, None])
            cell = layers.pad_axis(cell, 1, num_rows)
            angles = llama.rotary_tables(shape, position[:, None] + jnp.arange(num_rows)[None])
            k, v = model.keys_values(cell, *angles)
            buffers = parts.write(
                cache.keys[0], cache.values[0], k[:, :1], v[:, :1], position, shape
            )
            visibility = layers.Visibility(
                prefix=position, mask=None, start=position, live=position + 1, width=1
            )
            mixed = layers.attention(
                model.queries(cell, *angles), *buffers, visibility, dtype=jnp.dtype(shape.dtype)
            )
            padded = layers.pad_axis(feature[:, None], 1, num_rows)
            new = model.finish(padded, mixed)
            logits = parts.logits(self.head, model.norm(new)[:, :1])[:, 0]
            step = parts.Step(logits, new[:, 0], jnp.ones((batch,), jnp.float32))
            return step, (layers.KVCache(buffers[:1], buffers[1:]), new[:, 0])

        draft, (cache, _) = parts.draft_tokens(
            next_step,
            (state.cache, state.before),
            keys,
            context,
            num_draft,
            keep_drafting,
            draft_ids=self.draft_ids,
            vocab_size=self.vocab_size,
            stop_below=jnp.zeros((), jnp.float32),
        )
        pending = context.tokens[jnp.arange(batch), start]
        return draft, state._replace(cache=cache, pending=pending)


def drafter(
    target: jaxspec.LanguageModel,
    config: EagleConfig,
    params: Any,
    draft_ids: Any,
    *,
    stop_below: Any = 0.0,
) -> EagleDrafter:
    """The drafter of trained weights.

    Args:
      target: the model it was trained for, whose embeddings and head it shares.
      config: the shape.
      params: the weights.
      draft_ids: i32[W], its vocabulary, in rising order.
      stop_below: must be 0: no acceptance is predicted.

    Returns:
      A drafter for `jaxspec.generate`, for at most `config.num_draft_tokens` drafts.

    Raises:
      ValueError: `stop_below` is not 0.
    """
    if stop_below != 0:
        raise ValueError("EAGLE-3 predicts no acceptance: stop_below must be 0.")
    draft_ids = jnp.asarray(draft_ids, jnp.int32)
    return EagleDrafter(
        params=params,
        embeddings=target.params["embed"],
        head=parts.head_of(target, config.target, draft_ids),
        draft_ids=draft_ids,
        config=config,
    )
