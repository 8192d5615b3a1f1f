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
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

import jaxspec
from jaxspec.training import steps
from jaxspec_models import layers, llama
from jaxspec_models.drafters import drafting, learning, parts, reading

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class EagleConfig(parts.DrafterConfig):
    """The shape of an EAGLE-3 drafter."""

    method: ClassVar[str] = "eagle3"


class EagleModel(reading.Reader):
    """The trained part of the drafter."""

    def draft_from(
        self,
        own: reading.ReaderDrafter,
        state: reading.ReaderState,
        pending: Array,
        start: Array,
        num_draft: Array,
        count: int,
    ) -> tuple[drafting.NextStep, tuple[layers.KVCache, Array]]:
        """Cell by cell, each on what the one before has made."""
        del pending, num_draft, count

        def next_step(slot: Array, token: Array, carry: Any) -> tuple[drafting.Step, Any]:
            cache, last = carry
            x = self.guess(own.embed(token), last)[:, None]
            x, cache = reading.forward(self, cache, x, start + slot)
            h = self.norm(x)
            logits = parts.logits(own.head, h)
            return drafting.Step(logits[:, 0], h[:, 0]), (cache, x[:, 0])

        return next_step, (state.cache, state.last)


abstract = functools.partial(parts.abstract, EagleModel)


# ---------------------------------------------------------------------------------------------
# Training.


def init_params(
    config: EagleConfig, target: jaxspec.LanguageModel, sample: learning.Part, seed: int
) -> Any:
    """See `reading.init_params`."""
    return reading.init_params(EagleModel, config, target, sample, seed)


def forward(model: EagleModel, part: learning.Part, frozen: learning.Frozen) -> Array:
    """All blocks of the texts, unrolled over their own features: logits f32[B, M, K, W]."""
    text = reading.text_of(model, part)
    slots, _ = learning.slots_of(part, model.config.num_draft_tokens)
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
        found.append(learning.products(model.norm(x), frozen, model.fuse))
        last = x
    return jnp.stack(found, axis=2)


def loss(
    model: EagleModel,
    part: learning.Part,
    frozen: learning.Frozen,
    *,
    objective: learning.Objective,
) -> steps.Totals:
    """See `learning.of_blocks`; no loss on features.

    Args:
      model: what is trained.
      part: texts.
      frozen: the target's.
      objective: what is minimised.
    """
    log_q = jax.nn.log_softmax(forward(model, part, frozen), axis=-1)
    return learning.of_blocks(objective, part, frozen, log_q)


# ---------------------------------------------------------------------------------------------
# Drafting.


def drafter(
    target: jaxspec.LanguageModel,
    config: EagleConfig,
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
    """
    return reading.drafter(EagleModel, target, config, params, draft_ids)
