"""EAGLE-3: drafts token by token on the target's own features (arXiv 2503.01840).

Three of the target's hidden states are fused to one feature. At the token behind, a decoder layer
reads the token's embedding beside the feature; its output gives the next draft's law and stands
for the feature that the target has not computed. In training as well (training-time test): the
layer is unrolled over its own outputs, so that it learns from what it will be given.

Deviations from the paper, for little data: keys and values of the text come from the features of
its tokens themselves, and embedding and feature are mixed before the layer and not within it, so
that the layer can begin as the target's own last one (see `reading`); and training unrolls from
anchors drawn at random, not from every position, which costs K cells an anchor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

import jaxspec
from jaxspec import pytree
from jaxspec.training import steps
from jaxspec.types import Context, Draft, Outcome, Signals
from jaxspec_models import layers, llama
from jaxspec_models.drafters import parts, reading

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class EagleConfig(parts.DrafterConfig):
    """The shape of an EAGLE-3 drafter."""

    method: ClassVar[str] = "eagle3"


class EagleModel(reading.Reader):
    """The trained part of the drafter."""


abstract = functools.partial(parts.abstract, EagleModel)


# ---------------------------------------------------------------------------------------------
# Training.


def init_params(
    config: EagleConfig, target: jaxspec.LanguageModel, sample: parts.Part, seed: int
) -> Any:
    """See `reading.init_params`."""
    return reading.init_params(EagleModel, config, target, sample, seed)


def forward(model: EagleModel, part: parts.Part, frozen: parts.Frozen) -> Array:
    """All blocks of the texts, unrolled over their own features: logits f32[B, M, K, W]."""
    text = reading.text_of(model, part)
    slots, _ = parts.slots_of(part, model.config.num_draft_tokens)
    rows = jnp.arange(part.tokens.shape[0])[:, None]
    last = text.context[rows, text.anchors - 1]
    own: list[list[reading.KeysValues]] = [[] for _ in model.layers]
    found = []
    for step in range(model.config.num_draft_tokens):
        angles = llama.rotary_tables(model.config.layer, text.anchors + step)
        x = model.guess(frozen.embeddings[part.tokens[rows, slots[:, :, step]]], last)
        for i, layer in enumerate(model.layers):
            normed = layer.input_norm(x)
            q = layer.attention.queries(normed, *angles)[:, :, None]
            own[i].append(layer.attention.keys_values(normed, *angles))
            keys, values = (jnp.stack(each, axis=2) for each in zip(*own[i], strict=True))
            sees = jnp.ones((1, step + 1), bool)
            mixed = reading.attend(q, text, i, (keys, values), sees)
            x = layer.finish(x, mixed[:, :, 0])
        found.append(parts.products(model.norm(x), frozen, model.fuse))
        last = x
    return jnp.stack(found, axis=2)


def loss(
    graphdef: Any,
    params: Any,
    part: parts.Part,
    frozen: parts.Frozen,
    *,
    objective: parts.Objective,
) -> steps.Totals:
    """See `parts.of_blocks`; no loss on features.

    Args:
      graphdef: of the model.
      params: what is trained.
      part: texts.
      frozen: the target's.
      objective: what is minimised.
    """
    model = nnx.merge(graphdef, nnx.State(params))
    log_q = jax.nn.log_softmax(forward(model, part, frozen), axis=-1)
    return parts.of_blocks(objective, part, frozen, log_q)


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
        """The target's features take the place of what stood for them."""
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
        """Cell by cell, each on what the one before has made."""
        batch, num_slots = keys.shape
        parts.check_num_draft_tokens(num_slots, self.config)
        model, start = self._model(), context.lengths - 1
        certain = jnp.ones((batch,), jnp.float32)

        def next_step(
            slot: Array, token: Array, carry: tuple[layers.KVCache, Array]
        ) -> tuple[parts.Step, tuple[layers.KVCache, Array]]:
            cache, last = carry
            embedded = parts.embed(self.config.target, self.embeddings, token)
            x = model.guess(embedded, last)[:, None]
            x, cache = reading.forward(model, cache, x, start + slot)
            h = model.norm(x)
            return parts.Step(parts.logits(self.head, h)[:, 0], h[:, 0], certain), (cache, x[:, 0])

        draft, (cache, _) = parts.draft_tokens(
            next_step,
            (state.cache, state.last),
            keys,
            context,
            num_draft,
            keep_drafting,
            draft_ids=self.draft_ids,
            vocab_size=self.vocab_size,
            stop_below=jnp.zeros((), jnp.float32),
        )
        return draft, state._replace(cache=cache)


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
