"""What trained drafters share: their shapes, what they learn from, and how they draft.

All of them share the target's embeddings and the rows of its vocabulary head that belong to the
tokens they can draft: neither is trained, neither is stored with the drafter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jaxspec
from jaxspec.drafters.choosing import chooser
from jaxspec.sampling import processing
from jaxspec.training import losses, steps
from jaxspec.types import Context, Draft, Signals
from jaxspec_models import layers, llama, quantization

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """The shape of a trained drafter; hashable, compares by value.

    Attributes:
      target: the target's shape, whose width, heads and rotary positions it shares.
      tapped_layers: the target's hidden states it reads, numbered as for `LanguageModel.apply`.
      num_draft_tokens: K, the most drafts of a round.
      draft_vocab_size: W, tokens it can draft.
      num_hidden_layers: of its own.
      intermediate_size: width inside its MLPs.
      dtype: "float32" or "bfloat16", of weights and cache.
      quantization: None or "int8", of the products' weights.
    """

    method: ClassVar[str]

    target: llama.LlamaConfig
    tapped_layers: tuple[int, ...] = ()
    num_draft_tokens: int = 6
    draft_vocab_size: int = 8192
    num_hidden_layers: int = 1
    intermediate_size: int = 1024
    dtype: str = "float32"
    quantization: str | None = None

    @property
    def layer(self) -> llama.LlamaConfig:
        """The shape of its layers."""
        return dataclasses.replace(
            self.target,
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=self.intermediate_size,
            attention_bias=False,
            mlp_bias=False,
            dtype=self.dtype,
            quantization=self.quantization,
        )


# ---------------------------------------------------------------------------------------------
# Vocabularies.


def draft_vocabulary(
    texts: list[np.ndarray], size: int, *, vocab_size: int, always: tuple[int, ...] = ()
) -> np.ndarray:
    """The tokens that a drafter of a reduced vocabulary can propose.

    Args:
      texts: i32[N] each, what the target wrote.
      size: how many.
      vocab_size: V of the target.
      always: ids that are taken however seldom they are, such as those that end a text.

    Returns:
      i32[size], the most frequent ids of the texts in rising order; of equally frequent ones, the
      lower.

    Raises:
      ValueError: more are asked for than there are.

    Example:
      >>> draft_vocabulary([np.array([5, 3, 5]), np.array([3, 1])], 3, vocab_size=8, always=(7,))
      array([3, 5, 7], dtype=int32)
    """
    if not 0 < size <= vocab_size:
        raise ValueError(f"a draft vocabulary has 1 to {vocab_size} tokens, got {size}.")
    counts = np.zeros((vocab_size,), np.int64)
    for text in texts:
        np.add.at(counts, text, 1)
    counts[list(always)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def positions_in(draft_ids: Array, vocab_size: int) -> Array:
    """Where each target token stands in the draft vocabulary, i32[V]; its size: nowhere."""
    size = draft_ids.shape[0]
    return (
        jnp.full((vocab_size,), size, jnp.int32)
        .at[draft_ids]
        .set(jnp.arange(size, dtype=jnp.int32))
    )


def spread(draft_logits: Array, draft_ids: Array, vocab_size: int) -> Array:
    """f32[..., W] of the draft vocabulary -> f32[..., V]; -inf for the other tokens."""
    whole = jnp.full((*draft_logits.shape[:-1], vocab_size), -jnp.inf, jnp.float32)
    return whole.at[..., draft_ids].set(draft_logits, unique_indices=True, indices_are_sorted=True)


# ---------------------------------------------------------------------------------------------
# Of the target.


def embed(config: llama.LlamaConfig, params: Any, tokens: Array) -> Array:
    """The target's embeddings: its shape, its table's weights, i32[...] -> f32[..., D]."""
    return nnx.merge(_embedding(config), nnx.State(params))(tokens)


@functools.lru_cache(maxsize=32)
def _embedding(config: llama.LlamaConfig) -> Any:
    make = functools.partial(layers.Embedding, config.vocab_size, config.hidden_size, config=config)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


def head_of(target: jaxspec.LanguageModel, config: llama.LlamaConfig, draft_ids: Array) -> Any:
    """The head's rows for the draft vocabulary, kept as the target keeps them; for `logits`."""
    head = target.params["embed" if config.tie_word_embeddings else "head"]
    return {name: head[name][draft_ids] for name in ("weight", "scale") if name in head}


def logits(head: Any, h: Array) -> Array:
    """Logits of the draft vocabulary: of `head_of`, f32[..., D] -> f32[..., W]."""
    return layers.product(h, head["weight"], head.get("scale"))


# ---------------------------------------------------------------------------------------------
# Weights.


@functools.lru_cache(maxsize=64)
def abstract(model: Callable[..., nnx.Module], config: DrafterConfig) -> tuple[Any, Any]:
    """The graph definition and the shapes of a module's weights, as a nested dict."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def in_int8(wanted: Any, given: Any) -> Any:
    """Weights with one scale an output channel, wherever the wanted shapes have one."""
    if not isinstance(wanted, dict):
        return given
    if "scale" in wanted:
        steps, scale = quantization.quantize_rows(given["weight"])
        found = {"weight": steps, "scale": scale}
        if "factors" in wanted:
            found["factors"] = jnp.ones(wanted["factors"].shape, jnp.float32)
        return found
    return {name: in_int8(wanted[name], given[name]) for name in wanted}


def in_float32(given: Any) -> Any:
    """The inverse of `in_int8`, up to its rounding; other weights are cast."""
    if not isinstance(given, dict):
        return given.astype(jnp.float32)
    if "scale" in given:
        rest = {name: value for name, value in given.items() if name != "scale"}
        weight = given["weight"].astype(jnp.float32) * given["scale"][:, None]
        return in_float32(rest | {"weight": weight})
    return {name: in_float32(value) for name, value in given.items()}


# ---------------------------------------------------------------------------------------------
# Training.


class Part(NamedTuple):
    """Texts to be learned from, as a method's `loss` takes them.

    Attributes:
      tokens: i32[B, T].
      hidden: bfloat16[B, T, taps, D], the target's states of the tapped layers at each token.
      final: bfloat16[B, T, D], what its head reads.
      log_normalizers: f32[B, T], of its logits.
      first: i32[B], where the prompt's last token stands: the first one that is pending.
      length: i32[B], of each text; what stands behind it is padding.
      anchors: i32[B, M], where the pending token of each drafted block stands, at least 1; `length`
        or more: no block.
    """

    tokens: Array
    hidden: Array
    final: Array
    log_normalizers: Array
    first: Array
    length: Array
    anchors: Array


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


def frozen_part(target: jaxspec.LanguageModel, config: DrafterConfig, draft_ids: Array) -> Frozen:
    """What training reads of the target, in float32.

    Args:
      target: a Llama of `jaxspec_models`.
      config: the drafter's shape.
      draft_ids: i32[W].
    """
    shape, params = config.target, target.params
    return Frozen(
        embeddings=embed(shape, params["embed"], jnp.arange(shape.vocab_size, dtype=jnp.int32)),
        head=llama.head_rows(shape, params, draft_ids),
        positions=positions_in(draft_ids, shape.vocab_size),
    )


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised at each draft; a sum of losses of `jaxspec.training.losses`.

    Attributes:
      cross_entropy: its weight.
      total_variation: its weight.
      lk_lambda: its weight.
      confidence: its weight, where the method predicts acceptance.
      slot_decay: the weight of each draft of a block over that of the one before it.
    """

    cross_entropy: float = 0.1
    total_variation: float = 1.8
    lk_lambda: float = 0.0
    confidence: float = 1.0
    slot_decay: float = 0.85


def target_laws(part: Part, frozen: Frozen) -> Array:
    """Log p of the token behind each token, over the draft vocabulary: f32[B, T, W]."""
    products = jnp.einsum("btd,wd->btw", part.final.astype(jnp.float32), frozen.head)
    return products - part.log_normalizers[:, :, None]


def totals(
    objective: Objective,
    log_q: Array,
    log_p: Array,
    is_learned: Array,
    predicted: Array | None = None,
) -> steps.Totals:
    """The objective of drafts in blocks.

    Args:
      objective: what is minimised.
      log_q: f32[B, M, K, W].
      log_p: f32[B, M, K, W].
      is_learned: bool[B, M, K].
      predicted: f32[B, M, K], the logit of the acceptance that was predicted.

    Returns:
      Sums over slots; metrics "acceptance" f32[K], "agreement" f32[K] (of the likeliest tokens),
      and, where it is predicted, "confidence_error" f32[].
    """

    def over_slots(function: Any, *args: Array) -> Array:
        return jax.vmap(jax.vmap(jax.vmap(function)))(*args)

    accepted = over_slots(losses.acceptance, log_q, log_p)
    each = jnp.zeros_like(accepted)
    if objective.cross_entropy:
        each += objective.cross_entropy * over_slots(losses.cross_entropy, log_q, log_p)
    if objective.total_variation:
        each += objective.total_variation * (1 - accepted)
    if objective.lk_lambda:
        each += objective.lk_lambda * over_slots(losses.lk_lambda, log_q, log_p)
    if predicted is not None and objective.confidence:
        each += objective.confidence * over_slots(losses.confidence, predicted, accepted)
    is_same = jnp.argmax(log_q, axis=-1) == jnp.argmax(log_p, axis=-1)
    # What the reduced vocabulary lacks may be the target's likeliest: then p is above what is left.
    best = jnp.max(log_p, axis=-1)
    missing = 1 - jnp.sum(jnp.exp(log_p), axis=-1)
    is_same &= jnp.exp(best) > missing

    learned = is_learned.astype(jnp.float32)
    decay = objective.slot_decay ** jnp.arange(log_q.shape[2], dtype=jnp.float32)
    weights = learned * decay[None, None]
    by_slot = jnp.sum(learned, axis=(0, 1))
    metrics = {
        "acceptance": (jnp.sum(learned * accepted, axis=(0, 1)), by_slot),
        "agreement": (jnp.sum(learned * is_same.astype(jnp.float32), axis=(0, 1)), by_slot),
    }
    if predicted is not None:
        error = jnp.abs(jax.nn.sigmoid(predicted) - accepted)
        metrics["confidence_error"] = (jnp.sum(learned * error), jnp.sum(learned))
    # A product with 0 would keep NaN, and what padding computes may be anything.
    summed = jnp.sum(jnp.where(is_learned, weights * each, 0.0))
    return steps.Totals(summed, jnp.sum(weights), metrics)


def slots_of(part: Part, count: int) -> tuple[Array, Array]:
    """Where the tokens before each draft of the blocks stand, and whether the drafts exist.

    Args:
      part: the texts.
      count: K.

    Returns:
      i32[B, M, K], cut to the text, and bool[B, M, K].
    """
    slots = part.anchors[:, :, None] + jnp.arange(count, dtype=jnp.int32)[None, None]
    # Slot k is the draft of token anchor + k + 1.
    exists = slots + 1 < part.length[:, None, None]
    return jnp.minimum(slots, part.tokens.shape[1] - 1), exists


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


# ---------------------------------------------------------------------------------------------
# Drafting.


def check_num_draft_tokens(num_draft_tokens: int, config: DrafterConfig) -> None:
    """Raises ValueError where more drafts are wanted than a block has slots."""
    if num_draft_tokens > config.num_draft_tokens:
        raise ValueError(
            f"num_draft_tokens is {num_draft_tokens}, and this drafter was trained for at most "
            f"{config.num_draft_tokens}; lower num_draft_tokens."
        )


def write(
    keys: Array, values: Array, k: Array, v: Array, start: Array, shape: llama.LlamaConfig
) -> tuple[Array, Array]:
    """Writes f32[B, T, KV, D'] into one layer's buffers from the slots i32[B] on."""
    k, v = layers.storable(k, v, jnp.dtype(shape.dtype))
    keys = layers.write_slots(keys, k.transpose(0, 2, 3, 1), start, axis=3)
    return keys, layers.write_slots(values, v.swapaxes(1, 2), start, axis=2)


class Step(NamedTuple):
    """What a drafter knows of the next draft.

    Attributes:
      logits: f32[B, W].
      hidden: f32[B, D], for `Signals`.
      acceptance: f32[B], the predicted probability that it is accepted; 1: nothing is predicted.
    """

    logits: Array
    hidden: Array
    acceptance: Array


class _Drafting(NamedTuple):
    slot: Array  # i32[]
    tokens: Array  # i32[B, K]
    last: Array  # i32[B], the token before the slot
    log_probs: Array | None  # f32[B, K, V]
    length: Array  # i32[B]
    is_open: Array  # bool[B]
    hope: Array  # f32[B], the predicted probability that all drafts so far are accepted
    state: Any


def draft_tokens(
    next_step: Callable[[Array, Array, Any], tuple[Step, Any]],
    state: Any,
    keys: Array,
    context: Context,
    num_draft: Array,
    keep_drafting: Callable[[Signals], Array],
    *,
    draft_ids: Array,
    vocab_size: int,
    stop_below: Array,
) -> tuple[Draft, Any]:
    """Draws drafts from left to right under the target's own options; every q is exact.

    Args:
      next_step: (slot i32[], the tokens before it i32[B], state) -> (`Step`, state).
      state: handed from slot to slot.
      keys: key[B, K].
      context: the round's.
      num_draft: i32[B].
      keep_drafting: the policy's say.
      draft_ids: i32[W].
      vocab_size: V.
      stop_below: f32[], a row stops before a draft if the predicted probability that this one and
        all before it are accepted is lower.

    Returns:
      The drafts and the last state.
    """
    batch, num_slots = keys.shape
    options = context.sampling
    choose = chooser(keys, context)
    shape = (batch, num_slots, vocab_size)
    log_probs = None if options.is_greedy else jnp.full(shape, -jnp.inf, jnp.float32)

    def goes_further(carry: _Drafting) -> Array:
        # Nobody waits for slots that no row will use.
        return (carry.slot < jnp.max(num_draft)) & jnp.any(carry.is_open)

    def draft_one(carry: _Drafting) -> _Drafting:
        slot = carry.slot
        step, state = next_step(slot, carry.last, carry.state)
        scores = processing.process_rows(
            spread(step.logits, draft_ids, vocab_size), options, context.history, carry.tokens, slot
        ).log_probs
        slots = jnp.full((batch,), slot)
        hope = carry.hope * step.acceptance
        goes_on = keep_drafting(Signals(slots, scores, step.hidden))
        goes_on &= hope >= stop_below
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
            slot=slot + 1,
            tokens=lax.dynamic_update_index_in_dim(carry.tokens, token, slot, 1),
            last=token,
            log_probs=new_log_probs,
            length=carry.length + is_open.astype(jnp.int32),
            is_open=is_open,
            hope=hope,
            state=state,
        )

    drafting = lax.while_loop(
        goes_further,
        draft_one,
        _Drafting(
            slot=jnp.int32(0),
            tokens=jnp.zeros((batch, num_slots), jnp.int32),
            last=context.tokens[jnp.arange(batch), context.lengths - 1],
            log_probs=log_probs,
            length=jnp.zeros((batch,), jnp.int32),
            is_open=num_draft > 0,
            hope=jnp.ones((batch,), jnp.float32),
            state=state,
        ),
    )
    return Draft(drafting.tokens, drafting.log_probs, drafting.length), drafting.state
