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
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import jaxspec
from jaxspec import pytree
from jaxspec.training import steps
from jaxspec.types import Context, Draft, Outcome, Signals
from jaxspec_models import layers, llama
from jaxspec_models.drafters import parts, reading

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockConfig(parts.DrafterConfig):
    """The shape of a block drafter.

    Attributes:
      markov_rank: R, of the bias.
    """

    method: ClassVar[str] = "block"

    markov_rank: int = 128


class BlockModel(reading.Reader):
    """The trained part of the drafter.

    Args:
      config: the shape.
      rngs: for random weights.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        shape = config.layer
        width = shape.hidden_size
        self.slots = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.num_draft_tokens, width))
        )
        # One row more, for tokens that are not in the draft vocabulary.
        self.markov_in = layers.Embedding(
            config.draft_vocab_size + 1, config.markov_rank, config=shape, rngs=rngs
        )
        self.markov_out = layers.Linear(
            config.markov_rank, config.draft_vocab_size, bias=False, config=shape, rngs=rngs
        )
        self.confidence = nnx.Param(jnp.zeros((width + config.markov_rank + 1,)))

    def block(self, pending: Array, last: Array, count: int) -> Array:
        """The block's input: f32[B, count, D].

        Args:
          pending: f32[B, D], the pending tokens' embeddings.
          last: f32[B, D], the features of the tokens before them.
          count: slots.
        """
        return self.guess(pending, last)[:, None] + self.slots[...][None, :count]

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


def init_params(
    config: BlockConfig, target: jaxspec.LanguageModel, sample: parts.Part, seed: int
) -> Any:
    """See `reading.init_params`; at first the bias is weak."""
    params = reading.init_params(BlockModel, config, target, sample, seed)
    params["markov_in"]["weight"] *= 0.02
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
    batch, num_blocks = part.anchors.shape
    count = config.num_draft_tokens
    text = reading.text_of(model, part)
    rows = jnp.arange(batch)[:, None]

    def flat(x: Array) -> Array:  # [B, M, …] -> [B · M, …]
        return x.reshape(-1, *x.shape[2:])

    pending = frozen.embeddings[part.tokens[rows, text.anchors]]
    x = model.block(flat(pending), flat(text.context[rows, text.anchors - 1]), count)
    positions = text.anchors[:, :, None] + jnp.arange(count, dtype=jnp.int32)[None, None]
    angles = llama.rotary_tables(shape, flat(positions))

    def blocks(x: Array) -> Array:  # [B · M, …] -> [B, M, …]
        return x.reshape(batch, num_blocks, *x.shape[1:])

    for i, layer in enumerate(model.layers):
        normed = layer.input_norm(x)
        q = blocks(layer.attention.queries(normed, *angles))
        k, v = (blocks(y) for y in layer.attention.keys_values(normed, *angles))
        mixed = reading.attend(q, text, i, (k, v), jnp.tril(jnp.ones((count, count), bool)))
        x = layer.finish(x, flat(mixed))
    h = blocks(model.norm(x))
    slots, _ = parts.slots_of(part, count)
    known, bias = model.bias(frozen.positions[part.tokens[rows[:, :, None], slots]])
    logits = parts.products(h, frozen, model.fuse) + bias
    return logits, model.predicted(lax.stop_gradient(h), lax.stop_gradient(known))


def loss(
    graphdef: Any,
    params: Any,
    part: parts.Part,
    frozen: parts.Frozen,
    *,
    objective: parts.Objective,
) -> steps.Totals:
    """See `parts.of_blocks`.

    Args:
      graphdef: of the model.
      params: what is trained.
      part: texts.
      frozen: the target's.
      objective: what is minimised.
    """
    model = nnx.merge(graphdef, nnx.State(params))
    logits, predicted = forward(model, part, frozen)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    return parts.of_blocks(objective, part, frozen, log_q, predicted)


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

    def _embed(self, tokens: Array) -> Array:
        return parts.embed(self.config.target, self.embeddings, tokens)

    def init(self, batch: int, capacity: int) -> reading.ReaderState:
        """An empty cache of its own layers."""
        return reading.init(self.config, batch, capacity)

    def prefill(
        self,
        state: reading.ReaderState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> reading.ReaderState:
        """Takes in the features of one chunk of the prompts."""
        del tokens
        return reading.take_in(self._model(), state, hidden, start, num_new)

    def commit(self, state: reading.ReaderState, outcome: Outcome) -> reading.ReaderState:
        """Takes in the features of the verified tokens; those of rejected ones are overwritten."""
        model, hidden = self._model(), outcome.hidden
        return reading.take_in(model, state, hidden, outcome.start, outcome.num_emitted)

    def propose(
        self,
        keys: Array,
        state: reading.ReaderState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, reading.ReaderState]:
        """One forward over the block, then the tokens from left to right."""
        batch, num_slots = keys.shape
        parts.check_num_draft_tokens(num_slots, self.config)
        model, start = self._model(), context.lengths - 1
        pending = self._embed(context.tokens[jnp.arange(batch), start])
        x = model.block(pending, state.last, num_slots)
        x, cache = reading.forward(model, state.cache, x, start)
        h = model.norm(x)
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
