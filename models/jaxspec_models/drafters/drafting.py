"""How trained drafters draft: a token at a time, every q exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

import jaxspec
from jaxspec.drafters.choosing import chooser
from jaxspec.sampling import processing
from jaxspec.types import Context, Draft, Signals
from jaxspec_models.drafters import parts

Array: TypeAlias = jax.Array


def check_num_draft_tokens(num_draft_tokens: int, config: parts.DrafterConfig) -> None:
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
      acceptance: f32[B], the predicted probability that it is accepted once those before it are;
        None: its highest probability, which is near it (Li et al., EAGLE-2, arXiv 2406.16858).
    """

    logits: Array
    hidden: Array
    acceptance: Array | None = None


# (slot i32[], the tokens before it i32[B], what was handed on) -> (`Step`, what is handed on).
NextStep: TypeAlias = Callable[[Array, Array, Any], tuple[Step, Any]]


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
    next_step: NextStep,
    state: Any,
    keys: Array,
    context: Context,
    num_draft: Array,
    keep_drafting: Callable[[Signals], Array],
    *,
    draft_ids: Array,
    vocab_size: int,
) -> tuple[Draft, Any]:
    """Draws drafts from left to right under the target's own options; every q is exact.

    Args:
      next_step: what is known of the draft in a slot.
      state: handed from slot to slot.
      keys: key[B, K].
      context: the round's.
      num_draft: i32[B].
      keep_drafting: the policy's say.
      draft_ids: i32[W].
      vocab_size: V.

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
            parts.spread(step.logits, draft_ids, vocab_size),
            options,
            context.history,
            carry.tokens,
            slot,
        ).log_probs
        slots = jnp.full((batch,), slot)
        acceptance = step.acceptance
        if acceptance is None:
            acceptance = jnp.exp(jnp.max(jax.nn.log_softmax(step.logits), axis=-1))
        hope = carry.hope * acceptance
        goes_on = keep_drafting(Signals(slots, scores, step.hidden, hope))
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
