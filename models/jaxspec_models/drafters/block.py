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
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import jaxspec
from jaxspec.training import steps
from jaxspec_models import layers, llama
from jaxspec_models.drafters import drafting, learning, parts, reading

Array: TypeAlias = jax.Array


class _Block(NamedTuple):
    """What one forward makes.

    Attributes:
      is_wanted: bool[], whether it is still to be made.
      cache: with the block's own keys and values.
      h: f32[B, K, D], the slots' states.
      logits: f32[B, K, W], theirs, without the bias.
    """

    is_wanted: Array
    cache: layers.KVCache
    h: Array
    logits: Array


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

    def draft_from(
        self,
        own: reading.ReaderDrafter,
        state: reading.ReaderState,
        pending: Array,
        start: Array,
        num_draft: Array,
        count: int,
    ) -> tuple[drafting.NextStep, tuple[layers.KVCache]]:
        """One forward over the block, then the tokens from left to right."""
        batch, width = pending.shape[0], state.last.shape[-1]

        def fill(block: _Block) -> _Block:
            x = self.block(own.embed(pending), state.last, count)
            x, cache = reading.forward(self, block.cache, x, start)
            h = self.norm(x)
            return _Block(jnp.array(False), cache, h, parts.logits(own.head, h))

        # A round without drafts pays for none: a loop of one turn at most, which updates the cache
        # in place as the drafts' own loop does.
        _, cache, h, logits = lax.while_loop(
            lambda block: block.is_wanted,
            fill,
            _Block(
                is_wanted=jnp.any(num_draft > 0),
                cache=state.cache,
                h=jnp.zeros((batch, count, width), jnp.float32),
                logits=jnp.zeros((batch, count, self.config.draft_vocab_size), jnp.float32),
            ),
        )

        def next_step(slot: Array, before: Array, carry: Any) -> tuple[drafting.Step, Any]:
            known, bias = self.bias(own.positions[before])
            h_slot = lax.dynamic_index_in_dim(h, slot, 1, keepdims=False)
            at_slot = lax.dynamic_index_in_dim(logits, slot, 1, keepdims=False) + bias
            acceptance = jax.nn.sigmoid(self.predicted(h_slot, known))
            return drafting.Step(at_slot, h_slot, acceptance), carry

        return next_step, (cache,)


abstract = functools.partial(parts.abstract, BlockModel)


# ---------------------------------------------------------------------------------------------
# Training.


def init_params(
    config: BlockConfig, target: jaxspec.LanguageModel, sample: learning.Part, seed: int
) -> Any:
    """See `reading.init_params`; at first the bias is weak."""
    params = reading.init_params(BlockModel, config, target, sample, seed)
    params["markov_in"]["weight"] *= 0.02
    return params


def forward(model: BlockModel, part: learning.Part, frozen: learning.Frozen) -> tuple[Array, Array]:
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
    slots, _ = learning.slots_of(part, count)
    known, bias = model.bias(frozen.positions[part.tokens[rows[:, :, None], slots]])
    logits = learning.products(h, frozen, model.fuse) + bias
    return logits, model.predicted(lax.stop_gradient(h), lax.stop_gradient(known))


def loss(
    model: BlockModel,
    part: learning.Part,
    frozen: learning.Frozen,
    *,
    objective: learning.Objective,
) -> steps.Totals:
    """See `learning.of_blocks`.

    Args:
      model: what is trained.
      part: texts.
      frozen: the target's.
      objective: what is minimised.
    """
    logits, predicted = forward(model, part, frozen)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    return learning.of_blocks(objective, part, frozen, log_q, predicted)


# ---------------------------------------------------------------------------------------------
# Drafting.


def drafter(
    target: jaxspec.LanguageModel,
    config: BlockConfig,
    params: Any,
    draft_ids: Any,
) -> reading.ReaderDrafter:
    """The drafter of trained weights.

    Args:
      target: the model it was trained for, whose embeddings and head it shares.
      config: the shape.
      params: the weights.
      draft_ids: i32[W], its vocabulary, in rising order.

    Returns:
      A drafter for `jaxspec.generate`, for at most `config.num_draft_tokens` drafts.

    References:
      DFlash; Cheng et al., DSpark, arXiv 2607.05147.
    """
    return reading.drafter(BlockModel, target, config, params, draft_ids)
