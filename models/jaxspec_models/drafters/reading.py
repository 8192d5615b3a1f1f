"""What drafters share that read the target's hidden states: a few decoder layers behind the text.

Of every token that the target was fed, they read the hidden states of some of its layers, fused to
one feature: keys and values of the text come from it. Of the pending token and of the drafts behind
it the target has computed nothing yet: what the layers go through there is a guess, from the
token's embedding and from what is known at the token before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxspec
from jaxspec import pytree
from jaxspec.types import Branches, Context, Draft, Outcome, Signals
from jaxspec_models import layers, llama
from jaxspec_models.drafters import drafting, learning, parts

Array: TypeAlias = jax.Array
KeysValues: TypeAlias = tuple[Array, Array]  # f32[B, T, KV, D'] each


class Attention(nnx.Module):
    """Of drafts to the text and to each other; keys and values of both alike."""

    def __init__(self, config: parts.DrafterConfig, *, rngs: nnx.Rngs):
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

    def keys_values(self, x: Array, cos: Array, sin: Array) -> KeysValues:
        """f32[B, T, D] -> two of f32[B, T, KV, D']."""
        heads = self.config.num_key_value_heads
        kv = self.kv(x).reshape(*x.shape[:2], 2 * heads, self.config.head_dim)
        k, v = jnp.split(kv, 2, axis=2)
        return layers.rotate(k, cos, sin), v


class Layer(nnx.Module):
    """A decoder layer to which the text is given as features."""

    def __init__(self, config: parts.DrafterConfig, *, rngs: nnx.Rngs):
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


class Reader(nnx.Module):
    """The trained part that both methods have.

    Args:
      config: the shape.
      rngs: for random weights.
    """

    def __init__(self, config: parts.DrafterConfig, *, rngs: nnx.Rngs):
        self.config, shape = config, config.layer
        width, taps = shape.hidden_size, len(config.tapped_layers)
        norm = functools.partial(layers.RMSNorm, width, epsilon=shape.rms_norm_eps, rngs=rngs)
        linear = functools.partial(layers.Linear, bias=False, config=shape, rngs=rngs)
        self.tap_norms = nnx.List([norm() for _ in range(taps)])
        self.fuse = linear(taps * width, width)
        self.token_norm, self.last_norm = norm(), norm()
        self.begin = linear(2 * width, width)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = norm()

    def context(self, hidden: tuple[Array, ...]) -> Array:
        """The features of tokens: tapped states, float[B, T, D] each -> f32[B, T, D]."""
        normed = [
            norm(state.astype(jnp.float32))
            for norm, state in zip(self.tap_norms, hidden, strict=True)
        ]
        return self.fuse(jnp.concatenate(normed, axis=-1))

    def guess(self, token: Array, last: Array) -> Array:
        """What the layers go through at a token that the target has not seen: f32[..., D].

        Args:
          token: f32[..., D], its embedding.
          last: f32[..., D], the feature of the token before it, or the layers' output there.
        """
        return self.begin(jnp.concatenate([self.token_norm(token), self.last_norm(last)], axis=-1))

    def draft_from(
        self,
        own: ReaderDrafter,
        state: ReaderState,
        pending: Array,
        start: Array,
        num_draft: Array,
        count: int,
    ) -> tuple[drafting.NextStep, tuple[Any, ...]]:
        """How a round is drafted; each method's own.

        Args:
          own: the drafter, for what it shares with the target.
          state: before the round.
          pending: i32[B], the tokens to draft behind.
          start: i32[B], their slots.
          num_draft: i32[B], the most drafts of each row: where all are 0, nothing is computed.
          count: K, drafts at most.

        Returns:
          What `drafting.draft_tokens` calls for each draft, and what is handed from one to the
          next: the cache first.
        """
        raise NotImplementedError


def init_params(
    model: Callable[..., Reader],
    config: parts.DrafterConfig,
    target: jaxspec.LanguageModel,
    sample: learning.Part,
    seed: int,
) -> Any:
    """Weights before training: the target's last layers, on a guess of what they would read.

    What the drafter is told of the text is the target's last tapped state, so that its keys and
    values are nearly the target's. What its layers go through at the pending token is the best
    linear guess of that state, by least squares over the sample.

    Args:
      model: the module's class.
      config: the shape, in float32.
      target: the target.
      sample: texts.
      seed: another one, other random weights, where the target has none to begin with.

    Returns:
      A nested dict of f32 arrays.

    Raises:
      ValueError: there are more layers than the target's.
    """
    width, taps = config.target.hidden_size, len(config.tapped_layers)
    first = config.target.num_hidden_layers - config.num_hidden_layers
    if first < 0:
        raise ValueError(
            f"the drafter has {config.num_hidden_layers} layers, more than its target."
        )
    graphdef, state = nnx.split(model(config, rngs=nnx.Rngs(seed)))
    params = nnx.to_pure_dict(state)
    params["norm"] = parts.in_float32(target.params["norm"])
    params["fuse"]["weight"] = jnp.zeros((width, taps * width)).at[:, -width:].set(jnp.eye(width))
    heads = config.target.num_attention_heads * config.target.head_dim
    for i in range(config.num_hidden_layers):
        given, ours = parts.in_float32(target.params["layers"][first + i]), params["layers"][i]
        qkv = given["attention"]["qkv"]["weight"]
        ours["attention"] = {
            "q": {"weight": qkv[:heads]},
            "kv": {"weight": qkv[heads:]},
            "out": {"weight": given["attention"]["out"]["weight"]},
        }
        ours["input_norm"] = ours["context_norm"] = given["input_norm"]
        ours["post_attention_norm"] = given["post_attention_norm"]
        if config.intermediate_size == config.target.intermediate_size:
            ours["mlp"] = {name: {"weight": given["mlp"][name]["weight"]} for name in given["mlp"]}

    reader = nnx.merge(graphdef, nnx.State(params))
    context = reader.context(tuple(sample.hidden[:, :, i] for i in range(taps)))
    tokens = parts.embed(config.target, target.params["embed"], jnp.asarray(sample.tokens))
    known = jnp.concatenate(
        [reader.token_norm(tokens)[:, 1:], reader.last_norm(context)[:, :-1]], axis=-1
    )
    wanted = jnp.asarray(sample.hidden[:, 1:, -1]).astype(jnp.float32)
    # The target may never have been fed a text's last token.
    exists = np.arange(2, sample.tokens.shape[1] + 1)[None] < np.asarray(sample.length)[:, None]
    params["begin"]["weight"] = learning.least_squares(known[exists], wanted[exists])
    return params


class Text(NamedTuple):
    """What training knows of the text.

    Attributes:
      context: f32[B, T, D], features.
      keys_values: of each layer.
      sees: bool[B, M, T], which tokens each block sees: those before its anchor.
      anchors: i32[B, M], cut to the text.
    """

    context: Array
    keys_values: tuple[KeysValues, ...]
    sees: Array
    anchors: Array


def text_of(model: Reader, part: learning.Part) -> Text:
    """Reads texts as a whole."""
    batch, width = part.tokens.shape
    at = jnp.broadcast_to(jnp.arange(width)[None], (batch, width))
    angles = llama.rotary_tables(model.config.layer, at)
    context = model.context(tuple(part.hidden[:, :, i] for i in range(part.hidden.shape[2])))
    anchors = jnp.minimum(part.anchors, width - 1)
    return Text(
        context,
        tuple(
            layer.attention.keys_values(layer.context_norm(context), *angles)
            for layer in model.layers
        ),
        at[:, None] < anchors[:, :, None],
        anchors,
    )


def attend(q: Array, text: Text, layer: int, own: KeysValues, sees_own: Array) -> Array:
    """Attention of blocks, in training: to the text, and to their own cells.

    Args:
      q: f32[B, M, C, H, D'].
      text: the texts.
      layer: whose.
      own: f32[B, M, O, KV, D'] each.
      sees_own: bool[C, O].

    Returns:
      f32[B, M, C, H · D'].
    """
    keys, values = text.keys_values[layer]
    batch, num_blocks, count, heads, dim = q.shape
    kv_heads = keys.shape[2]
    q = (q * dim**-0.5).reshape(batch, num_blocks, count, kv_heads, heads // kv_heads, dim)
    to_text = jnp.einsum("bmqhgd,bshd->bmhgqs", q, keys)
    to_text = jnp.where(text.sees[:, :, None, None, None], to_text, -jnp.inf)
    to_own = jnp.einsum("bmqhgd,bmshd->bmhgqs", q, own[0])
    to_own = jnp.where(sees_own[None, None, None, None], to_own, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([to_text, to_own], axis=-1), axis=-1)
    of_text, of_own = jnp.split(weights, [keys.shape[1]], axis=-1)
    out = jnp.einsum("bmhgqs,bshd->bmqhgd", of_text, values)
    out = out + jnp.einsum("bmhgqs,bmshd->bmqhgd", of_own, own[1])
    return out.reshape(batch, num_blocks, count, heads * dim)


class ReaderState(NamedTuple):
    """A drafter's state.

    Attributes:
      cache: keys and values of its layers, of the target's features at each slot.
      last: f32[B, D], the feature of the token before the pending one.
    """

    cache: layers.KVCache
    last: Array


def init(config: parts.DrafterConfig, batch: int, capacity: int) -> ReaderState:
    """An empty cache."""
    shape = config.layer
    cache = layers.init_cache(
        batch,
        capacity,
        num_layers=config.num_hidden_layers,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
    )
    return ReaderState(cache, jnp.zeros((batch, shape.hidden_size), jnp.float32))


def take_in(
    model: Reader, state: ReaderState, hidden: tuple[Array, ...], start: Array, num_new: Array
) -> ReaderState:
    """Takes in the features of tokens that the target was fed.

    Args:
      model: the trained part.
      state: what is known so far.
      hidden: f32[B, T, D], of each tapped layer.
      start: i32[B], the slot of the first token.
      num_new: i32[B], how many of them stand; the others' slots are overwritten later.
    """
    shape, cache = model.config.layer, state.cache
    batch, width = hidden[0].shape[:2]
    num_rows = layers.padded_width(batch, width)
    context = model.context(tuple(layers.pad_axis(x, 1, num_rows) for x in hidden))
    angles = llama.rotary_tables(shape, start[:, None] + jnp.arange(num_rows)[None])
    keys, values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(model.layers):
        k, v = layer.attention.keys_values(layer.context_norm(context), *angles)
        keys[i], values[i] = write(keys[i], values[i], k[:, :width], v[:, :width], start, shape)
    last = context[jnp.arange(batch), jnp.maximum(num_new - 1, 0)]
    return ReaderState(
        layers.KVCache(tuple(keys), tuple(values)),
        jnp.where(num_new[:, None] > 0, last, state.last),
    )


def forward(
    model: Reader,
    cache: layers.KVCache,
    x: Array,
    start: Array,
    branches: Branches | None = None,
) -> tuple[Array, layers.KVCache]:
    """Cells behind the text, each seeing the text and the cells before it.

    Args:
      model: the trained part.
      cache: filled below `start`.
      x: f32[B, C, D], their guesses.
      start: i32[B], the slot of the first one.
      branches: where they are nodes of a tree.

    Returns:
      f32[B, C, D] before the last norm; the cells' keys are overwritten by `take_in`.
    """
    shape = model.config.layer
    batch, count = x.shape[:2]
    num_rows = layers.padded_width(batch, count)
    x = layers.pad_axis(x, 1, num_rows)
    prefix, mask, at = start, None, start[:, None] + jnp.arange(num_rows)[None]
    if branches is not None:
        prefix, at = branches.prefix, layers.pad_axis(branches.positions, 1, num_rows)
        mask = branches.mask if branches.mask.ndim == 3 else branches.mask[None]
        mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
        mask = layers.pad_axis(mask, 1, num_rows)
    angles = llama.rotary_tables(shape, at)
    visibility = layers.Visibility(
        prefix=prefix, mask=mask, start=start, live=start + count, width=count
    )
    keys, values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(model.layers):
        normed = layer.input_norm(x)
        q = layer.attention.queries(normed, *angles)
        k, v = layer.attention.keys_values(normed, *angles)
        keys[i], values[i] = write(keys[i], values[i], k[:, :count], v[:, :count], start, shape)
        mixed = layers.attention(q, keys[i], values[i], visibility, dtype=jnp.dtype(shape.dtype))
        x = layer.finish(x, mixed)
    return x[:, :count], layers.KVCache(tuple(keys), tuple(values))


def write(
    keys: Array, values: Array, k: Array, v: Array, start: Array, shape: llama.LlamaConfig
) -> tuple[Array, Array]:
    """Writes f32[B, T, KV, D'] into one layer's buffers from the slots i32[B] on."""
    k, v = layers.storable(k, v, jnp.dtype(shape.dtype))
    keys = layers.write_slots(keys, k.transpose(0, 2, 3, 1), start, axis=3)
    return keys, layers.write_slots(values, v.swapaxes(1, 2), start, axis=2)


@pytree.dataclass
class ReaderDrafter:
    """A drafter for `jaxspec.generate` that reads the target's features.

    Attributes:
      params: the trained weights.
      embeddings: the target's table, as `layers.Embedding` holds it.
      head: see `parts.head_of`.
      draft_ids: i32[W].
      positions: see `parts.positions_in`.
      config: the shape.
      model_type: the method's module.
    """

    params: Any
    embeddings: Any
    head: Any
    draft_ids: Array
    positions: Array
    config: parts.DrafterConfig = pytree.static()
    model_type: type[Reader] = pytree.static()

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The layers it taps."""
        return self.config.tapped_layers

    @property
    def vocab_size(self) -> int:
        """V of the target."""
        return self.config.target.vocab_size

    @property
    def max_draft_tokens(self) -> int:
        """The most that it was trained to draft in a round."""
        return self.config.num_draft_tokens

    def model(self) -> Any:
        """The trained part with its weights."""
        graphdef, _ = parts.abstract(self.model_type, self.config)
        return nnx.merge(graphdef, nnx.State(self.params))

    def in_tree(self, tree: Any) -> Any:
        """The same weights, drafting a tree: `jaxspec_models.in_trees`."""
        from jaxspec_models.drafters import tree as trees  # which imports this module

        return trees.in_trees(self, tree)

    def embed(self, tokens: Array) -> Array:
        """The target's embeddings, i32[...] -> f32[..., D]."""
        return parts.embed(self.config.target, self.embeddings, tokens)

    def init(self, batch: int, capacity: int) -> ReaderState:
        """An empty cache of its own layers."""
        return init(self.config, batch, capacity)

    def prefill(
        self,
        state: ReaderState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> ReaderState:
        """Takes in the features of one chunk of the prompts."""
        del tokens
        return take_in(self.model(), state, hidden, start, num_new)

    def commit(self, state: ReaderState, outcome: Outcome) -> ReaderState:
        """Takes in the features of the verified tokens, in the place of what was guessed.

        Those of rejected drafts stand behind them and are overwritten.
        """
        model, hidden = self.model(), outcome.hidden
        return take_in(model, state, hidden, outcome.start, outcome.num_emitted)

    def propose(
        self,
        keys: Array,
        state: ReaderState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, ReaderState]:
        """Drafts as the method does."""
        batch, count = keys.shape
        drafting.check_num_draft_tokens(count, self.config)
        start = context.lengths - 1
        pending = context.tokens[jnp.arange(batch), start]
        next_step, carry = self.model().draft_from(self, state, pending, start, num_draft, count)
        draft, (cache, *_) = drafting.draft_tokens(
            next_step,
            carry,
            keys,
            context,
            num_draft,
            keep_drafting,
            draft_ids=self.draft_ids,
            vocab_size=self.vocab_size,
        )
        return draft, state._replace(cache=cache)


def drafter(
    model_type: type[Reader],
    target: jaxspec.LanguageModel,
    config: parts.DrafterConfig,
    params: Any,
    draft_ids: Any,
) -> ReaderDrafter:
    """The drafter of trained weights; see the methods' own."""
    draft_ids = jnp.asarray(draft_ids, jnp.int32)
    return ReaderDrafter(
        params=params,
        embeddings=target.params["embed"],
        head=parts.head_of(target, config.target, draft_ids),
        draft_ids=draft_ids,
        positions=parts.positions_in(draft_ids, config.target.vocab_size),
        config=config,
        model_type=model_type,
    )
