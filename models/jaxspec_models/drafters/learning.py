"""What trained drafters learn from, how their laws are judged, and what is minimised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxspec
from jaxspec import drawing
from jaxspec.training import losses, steps
from jaxspec_models import layers, llama
from jaxspec_models.drafters import parts

Array: TypeAlias = jax.Array


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


def frozen_part(
    target: jaxspec.LanguageModel, config: parts.DrafterConfig, draft_ids: Array
) -> Frozen:
    """What training reads of the target, in float32.

    Args:
      target: a Llama of `jaxspec_models`.
      config: the drafter's shape.
      draft_ids: i32[W].
    """
    shape, params = config.target, target.params
    return Frozen(
        embeddings=parts.embed(
            shape, params["embed"], jnp.arange(shape.vocab_size, dtype=jnp.int32)
        ),
        head=llama.head_rows(shape, params, draft_ids),
        positions=parts.positions_in(draft_ids, shape.vocab_size),
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

    cross_entropy: float = 1.0
    total_variation: float = 1.0
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


def target_laws(part: Part, frozen: Frozen, slots: Array | None = None) -> Array:
    """Log p of the token behind each token, over the draft vocabulary.

    Args:
      part: the texts.
      frozen: the target's.
      slots: i32[B, M, K], behind which tokens; None: behind every one.

    Returns:
      f32[B, M, K, W] or f32[B, T, W].
    """
    final, log_normalizers = part.final, part.log_normalizers
    if slots is not None:
        final, log_normalizers = final[_rows(part), slots], log_normalizers[_rows(part), slots]
    logits = jnp.einsum("...d,wd->...w", final.astype(jnp.float32), frozen.head)
    return logits - log_normalizers[..., None]


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
    is_same = _likeliest(log_q) == _likeliest(log_p)
    is_same &= jnp.exp(jnp.max(log_p, axis=-1)) > missing
    is_known = chosen < log_q.shape[-1]
    at = jnp.where(is_known, chosen, 0)[..., None]
    difference = jnp.take_along_axis(log_q, at, -1) - jnp.take_along_axis(log_p, at, -1)
    ratio = jnp.where(is_known, jnp.exp(jnp.minimum(difference[..., 0], 0.0)), 0.0)
    return Judged(_of_laws(losses.acceptance)(log_q, log_p), is_same, ratio)


def _of_laws(loss: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return jnp.vectorize(loss, signature="(w),(w)->()")


# `jnp.argmax` takes a tenth of a training step on the CPU.
_likeliest = jnp.vectorize(drawing.argmax, signature="(w)->()")


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
    log_p = target_laws(part, frozen, slots)
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
      tokens; "tokens_per_step_greedy" f32[], in greedy answers, and "tokens_per_step_sampled" f32[]
      in those drawn at temperature 1: what `rounds_along` makes of them, and 0 of weight 0 unless
      the anchors of a text stand one behind the other. Where acceptance is predicted, "predicted"
      and "accepted" f32[10], by the tenth that the prediction falls in.
    """
    learned = exists.astype(jnp.float32)
    by_slot = jnp.sum(learned, axis=(0, 1))
    is_same = judged.is_same.astype(jnp.float32)
    found = {
        "acceptance": (jnp.sum(learned * judged.accepted, axis=(0, 1)), by_slot),
        "agreement": (jnp.sum(learned * is_same, axis=(0, 1)), by_slot),
    }
    is_block = part.anchors < part.length[:, None]
    stands_behind = part.anchors[:, 1:] == part.anchors[:, :-1] + 1
    is_window = jnp.all(stands_behind | ~is_block[:, 1:], axis=1)
    for name, temperature, passes in (
        ("greedy", 0.0, is_same),
        ("sampled", 1.0, lax.stop_gradient(judged.ratio)),
    ):
        counts = exists[:, :, -1] & (is_window & (part.temperature == temperature))[:, None]
        counts &= jnp.arange(counts.shape[1])[None] >= exists.shape[2]  # see `rounds_along`
        # A walk takes as many steps as there are anchors: none where they are scattered, to learn.
        found[f"tokens_per_step_{name}"] = lax.cond(
            jnp.any(counts), _of_rounds, lambda *_: (jnp.zeros((), jnp.float32),) * 2,
            passes, exists, counts.astype(jnp.float32),
        )  # fmt: skip
    if predicted is not None:
        probability = jax.nn.sigmoid(predicted)
        tenth = jnp.minimum((probability * _BINS).astype(jnp.int32), _BINS - 1)
        members = jax.nn.one_hot(tenth, _BINS) * learned[..., None]
        number = jnp.sum(members, axis=(0, 1, 2))
        for name, value in (("predicted", probability), ("accepted", judged.accepted)):
            found[name] = (jnp.sum(members * value[..., None], axis=(0, 1, 2)), number)
    return found


def _of_rounds(passes: Array, exists: Array, counts: Array) -> tuple[Array, Array]:
    begins, emitted = rounds_along(passes, exists)
    weight = begins * counts
    return jnp.sum(weight * emitted), jnp.sum(weight)


def rounds_along(passes: Array, exists: Array) -> tuple[Array, Array]:
    """Rounds over a stretch of text whose every token is an anchor.

    Rounds begin where the one before has ended: seldom where drafting is easy. A mean over all
    tokens would count those as often as the others, and promise far too much. The first rounds,
    which begin at an arbitrary token, are left out.

    Args:
      passes: f32[B, M, K], the probability that the draft of each slot is accepted once those
        before it are, given the text.
      exists: bool[B, M, K], whether the text is long enough.

    Returns:
      f32[B, M], the probability that a round begins at each anchor, 0 at the first K; and f32[B, M]
      how many tokens it emits there, the correction or the bonus included.

    Example:
      >>> import jax.numpy as jnp
      >>> passes = jnp.array([[[1.0], [0.0], [0.0], [1.0], [1.0]]])
      >>> begins, emitted = rounds_along(passes, jnp.ones((1, 5, 1), bool))
      >>> begins.tolist(), emitted.tolist()
      ([[0.0, 0.0, 1.0, 1.0, 0.0]], [[2.0, 1.0, 1.0, 2.0, 2.0]])
    """
    batch, _, count = passes.shape
    whole = jnp.cumprod(passes * exists.astype(passes.dtype), axis=2)
    ends = jnp.ones((batch, whole.shape[1], 1)), jnp.zeros((batch, whole.shape[1], 1))
    # The probability that exactly 0 … K drafts are accepted.
    exactly = jnp.concatenate([ends[0], whole], axis=2) - jnp.concatenate([whole, ends[1]], axis=2)

    def go(coming: Array, exactly: Array) -> tuple[Array, Array]:
        # `coming` f32[B, K + 1]: the probability that a round begins here, one token further, ….
        behind = jnp.pad(coming[:, 1:], ((0, 0), (0, 1)))
        return behind + coming[:, :1] * exactly, coming[:, 0]

    first = jnp.zeros((batch, count + 1)).at[:, 0].set(1.0)
    _, begins = lax.scan(go, first, jnp.swapaxes(exactly, 0, 1))
    begins = jnp.swapaxes(begins, 0, 1)
    begins = jnp.where(jnp.arange(begins.shape[1])[None] < count, 0.0, begins)
    return begins, 1.0 + jnp.sum(whole, axis=2)


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
