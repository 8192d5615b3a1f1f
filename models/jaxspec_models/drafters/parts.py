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


def least_squares(inputs: Array, outputs: Array, *, ridge: float = 1e-3) -> Array:
    """The matrix [O, I] that maps inputs f32[N, I] to outputs f32[N, O] best.

    Args:
      inputs: one a row.
      outputs: one a row.
      ridge: added to the inputs' second moments, over their mean.
    """
    x, y = np.asarray(inputs, np.float64), np.asarray(outputs, np.float64)
    moments = x.T @ x
    moments += ridge * np.mean(np.diag(moments)) * np.eye(len(moments))
    return jnp.asarray(np.linalg.solve(moments, x.T @ y).T, jnp.float32)


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
      temperature: f32[B], that the answers were drawn at.
    """

    tokens: Array
    hidden: Array
    final: Array
    log_normalizers: Array
    first: Array
    length: Array
    anchors: Array
    temperature: Array


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


def products(h: Array, frozen: Frozen, like: layers.Matrix) -> Array:
    """Logits of the draft vocabulary, as exact as the products of a trained matrix.

    Args:
      h: f32[..., D].
      frozen: the target's.
      like: whose weights are float32 or bfloat16; of others, in float32.

    Returns:
      f32[..., W].
    """
    dtype = jnp.float32 if like.is_quantized else like.weight[...].dtype
    return layers.product(h, frozen.head.astype(dtype))


def target_laws(part: Part, frozen: Frozen) -> Array:
    """Log p of the token behind each token, over the draft vocabulary: f32[B, T, W]."""
    products = jnp.einsum("btd,wd->btw", part.final.astype(jnp.float32), frozen.head)
    return products - part.log_normalizers[:, :, None]


class Judged(NamedTuple):
    """What the target makes of a drafter's laws; any leading axes.

    Attributes:
      accepted: f32[...], Σ min(p, q), the probability that a draft is accepted.
      is_same: bool[...], whether both have the same likeliest token.
      ratio: f32[...], min(1, q(x) / p(x)) of the token x that stands in the text. Where texts are
        drawn from p, the mean of its product over the first k slots of a block is the probability
        that k drafts are accepted: Σ min(p, q) = E_p[min(1, q / p)].
    """

    accepted: Array
    is_same: Array
    ratio: Array


def judge(log_q: Array, log_p: Array, chosen: Array) -> Judged:
    """Judges laws over the draft vocabulary.

    Args:
      log_q: f32[..., W].
      log_p: f32[..., W].
      chosen: i32[...], the text's next token in the draft vocabulary; W: not in it.
    """
    # What the reduced vocabulary lacks may be the target's likeliest: then p is above what is left.
    missing = 1 - jnp.sum(jnp.exp(log_p), axis=-1)
    is_same = jnp.argmax(log_q, axis=-1) == jnp.argmax(log_p, axis=-1)
    is_same &= jnp.exp(jnp.max(log_p, axis=-1)) > missing
    is_known = chosen < log_q.shape[-1]
    at = jnp.where(is_known, chosen, 0)[..., None]
    difference = jnp.take_along_axis(log_q, at, -1) - jnp.take_along_axis(log_p, at, -1)
    ratio = jnp.where(is_known, jnp.exp(jnp.minimum(difference[..., 0], 0.0)), 0.0)
    return Judged(_of_laws(losses.acceptance)(log_q, log_p), is_same, ratio)


def _of_laws(loss: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return jnp.vectorize(loss, signature="(w),(w)->()")


def totals(
    objective: Objective,
    log_q: Array,
    log_p: Array,
    judged: Judged,
    weights: Array,
    predicted: Array | None = None,
) -> steps.Totals:
    """The objective, summed over drafts; without metrics.

    Args:
      objective: what is minimised.
      log_q: f32[..., W].
      log_p: f32[..., W].
      judged: of these laws.
      weights: f32[...]; 0: not learned, whatever stands there.
      predicted: f32[...], the logit of the acceptance that was predicted.
    """
    each = jnp.zeros_like(judged.accepted)
    if objective.cross_entropy:
        each += objective.cross_entropy * _of_laws(losses.cross_entropy)(log_q, log_p)
    if objective.total_variation:
        each += objective.total_variation * (1 - judged.accepted)
    if objective.lk_lambda:
        each += objective.lk_lambda * _of_laws(losses.lk_lambda)(log_q, log_p)
    if predicted is not None and objective.confidence:
        error = jnp.vectorize(losses.confidence)(predicted, judged.accepted)
        each += objective.confidence * error
    # A product with 0 would keep NaN, and what padding computes may be anything.
    return steps.Totals(jnp.sum(jnp.where(weights > 0, weights * each, 0.0)), jnp.sum(weights), {})


def of_blocks(
    objective: Objective,
    part: Part,
    frozen: Frozen,
    log_q: Array,
    predicted: Array | None = None,
) -> steps.Totals:
    """The objective and the metrics of drafts in the blocks that begin at the anchors.

    Args:
      objective: what is minimised.
      part: the texts.
      frozen: the target's.
      log_q: f32[B, M, K, W].
      predicted: f32[B, M, K], the logit of the acceptance that was predicted.
    """
    count = log_q.shape[2]
    slots, exists = slots_of(part, count)
    log_p = target_laws(part, frozen)[_rows(part), slots]
    judged = judge(log_q, log_p, next_tokens(part, frozen)[_rows(part), slots])
    decay = objective.slot_decay ** jnp.arange(count, dtype=jnp.float32)
    weights = exists.astype(jnp.float32) * decay[None, None]
    found = totals(objective, log_q, log_p, judged, weights, predicted)
    return found._replace(metrics=metrics(part, judged, exists, predicted))


_BINS = 10


def metrics(
    part: Part, judged: Judged, exists: Array, predicted: Array | None = None
) -> dict[str, tuple[Array, Array]]:
    """How good drafts in blocks are.

    Args:
      part: the texts.
      judged: of each slot, [B, M, K].
      exists: bool[B, M, K].
      predicted: f32[B, M, K], the logit of the acceptance that was predicted.

    Returns:
      Pairs of a sum and a weight: "acceptance" f32[K], the probability at temperature 1 that the
      draft of each slot is accepted once those before it are; "agreement" f32[K], of the likeliest
      tokens; "tokens_per_step_greedy" f32[], of whole blocks in greedy answers, and
      "tokens_per_step_sampled" f32[] in those drawn at temperature 1: both what a round emits, the
      correction or the bonus included. Where acceptance is predicted, "predicted" and
      "accepted" f32[10], by the tenth that the prediction falls in.
    """
    learned = exists.astype(jnp.float32)
    by_slot = jnp.sum(learned, axis=(0, 1))
    is_same = judged.is_same.astype(jnp.float32)
    found = {
        "acceptance": (jnp.sum(learned * judged.accepted, axis=(0, 1)), by_slot),
        "agreement": (jnp.sum(learned * is_same, axis=(0, 1)), by_slot),
    }
    for name, temperature, passes in (
        ("greedy", 0.0, is_same),
        ("sampled", 1.0, judged.ratio),
    ):
        is_whole = exists[:, :, -1] & (part.temperature == temperature)[:, None]
        emitted = 1.0 + jnp.sum(jnp.cumprod(passes, axis=2), axis=2)
        weight = is_whole.astype(jnp.float32)
        found[f"tokens_per_step_{name}"] = (jnp.sum(weight * emitted), jnp.sum(weight))
    if predicted is not None:
        probability = jax.nn.sigmoid(predicted)
        tenth = jnp.minimum((probability * _BINS).astype(jnp.int32), _BINS - 1)
        members = jax.nn.one_hot(tenth, _BINS) * learned[..., None]
        number = jnp.sum(members, axis=(0, 1, 2))
        for name, value in (("predicted", probability), ("accepted", judged.accepted)):
            found[name] = (jnp.sum(members * value[..., None], axis=(0, 1, 2)), number)
    return found


def calibration_error(predicted: np.ndarray, accepted: np.ndarray, number: np.ndarray) -> float:
    """The mean distance between what was predicted and what came, by tenths (arXiv 1706.04599).

    Args:
      predicted: f32[10], the mean of each tenth.
      accepted: f32[10], likewise.
      number: f32[10], drafts of each tenth.

    Example:
      >>> calibration_error(np.array([0.1, 0.9]), np.array([0.2, 0.8]), np.array([3, 1]))
      0.1
    """
    error = np.sum(number * np.abs(predicted - accepted)) / max(np.sum(number), 1)
    return round(float(error), 6)


def next_tokens(part: Part, frozen: Frozen) -> Array:
    """The token behind each token, in the draft vocabulary: i32[B, T]; W: not in it."""
    return frozen.positions[jnp.roll(part.tokens, -1, axis=1)]


def _rows(part: Part) -> Array:
    return jnp.arange(part.tokens.shape[0])[:, None, None]


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
