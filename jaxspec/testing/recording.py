"""What a drafter proposes in the shipped loop, recorded; its form is checked while tracing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import arguments, loop, policies, prefilling, pytree
from jaxspec.sampling import Sampling
from jaxspec.testing.rows import pad_prompts, per_prompt
from jaxspec.types import NO_TOKEN, Context, Draft, Drafter, LanguageModel, Outcome, Verdict

Array: TypeAlias = np.ndarray[Any, Any]

_NUM_ROUNDS = 3

Round: TypeAlias = tuple[Array, Array, Draft]
"""Texts i32[B, N] before a round (-1 behind them), drafts asked for i32[B], and the `Draft`."""


class Recording:
    """Three rounds of the loop, for any of the rows: none of the drafts is accepted, all, none.

    Args:
      drafter: the drafter.
      target: the model.
      sampling: the target's options, by prompt.
      prompts: token ids, one list a prompt; row r belongs to prompt r % P.
      num_draft_tokens: K. Every eighth row of a prompt is asked for fewer, from none up.

    Raises:
      ValueError: the arguments are refused by `generate`.
    """

    def __init__(
        self,
        drafter: Drafter,
        target: LanguageModel,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        num_draft_tokens: int,
    ):
        self.drafter, self.target, self.sampling = drafter, target, sampling
        self.num_draft_tokens = num_draft_tokens
        self.max_new_tokens = _NUM_ROUNDS * (num_draft_tokens + 1)
        self.prompts, self.lengths = pad_prompts(prompts, 0)

    def rounds(self, keys: jax.Array, rows: Array, padding: int = 0) -> list[Round]:
        """What each round proposes, for some rows.

        Args:
          keys: key[B], one for each of the rows.
          rows: i[B], the rows' numbers, which decide about prompt and draft length.
          padding: by how much the prompts' array, and so the token buffer, is wider.

        Raises:
          FormError: a shape or a dtype breaks the contract.
        """
        sample, kind = np.divmod(rows, len(self.lengths))
        asked = np.where(
            sample % 8 == 7, sample // 8 % self.num_draft_tokens, self.num_draft_tokens
        ).astype(np.int32)
        prepared = arguments.prepare(
            self.target,
            np.pad(self.prompts[kind], ((0, 0), (0, padding))),
            prompt_lengths=self.lengths[kind],
            drafter=_Recorder(self.drafter),
            verifier=_Scripted(jnp.int32(0)),
            policy=policies.fixed(jnp.asarray(asked)),
            sampling=per_prompt(self.sampling, kind, len(self.lengths)),
            max_new_tokens=self.max_new_tokens,
            num_draft_tokens=self.num_draft_tokens,
            eos_ids=(),
            key=keys,
            exact=False,  # verdicts are scripted
        )
        state = _prefill(
            prepared.engine, prepared.request, prepared.prompts, max_new_tokens=self.max_new_tokens
        )
        rounds = []
        for number in range(_NUM_ROUNDS):
            tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
            is_text = np.arange(tokens.shape[1])[None] < lengths[:, None]
            engine = dataclasses.replace(
                prepared.engine,
                verifier=_Scripted(jnp.int32(self.num_draft_tokens * (number % 2))),
            )
            state = _one_round(engine, prepared.request, state)
            rounds.append((np.where(is_text, tokens, -1), asked, state.drafter.draft))
            # Taken out, so that every round has one form and runs one program.
            state = state._replace(drafter=state.drafter._replace(draft=None))
        return rounds


_one_round = jax.jit(loop.one_round)
_prefill = jax.jit(prefilling.prefill, static_argnames="max_new_tokens")


class FormError(Exception):
    """A shape or a dtype breaks the contract: nothing else can be checked."""


class _Recorded(NamedTuple):
    inner: Any
    draft: Draft | None


@pytree.dataclass
class _Recorder:
    """A drafter that keeps what another one proposed, and checks its form while tracing."""

    inner: Any

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.inner, "vocab_size", None)

    @property
    def max_length(self) -> int | None:
        return getattr(self.inner, "max_length", None)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        return self.inner.hidden_layers

    def init(self, batch: int, capacity: int) -> _Recorded:
        return _Recorded(self.inner.init(batch, capacity), None)

    def prefill(
        self, state: _Recorded, tokens: Any, hidden: Any, start: Any, num_new: Any
    ) -> _Recorded:
        new = self.inner.prefill(state.inner, tokens, hidden, start, num_new)
        _check_state("prefill", state.inner, new)
        return _Recorded(new, None)

    def propose(
        self,
        keys: jax.Array,
        state: _Recorded,
        context: Context,
        num_draft: jax.Array,
        keep_drafting: Callable[..., Any],
    ) -> tuple[Draft, _Recorded]:
        proposed = self.inner.propose(keys, state.inner, context, num_draft, keep_drafting)
        if isinstance(proposed, Draft) or not isinstance(proposed, tuple) or len(proposed) != 2:
            raise FormError("propose must return two things, (jaxspec.Draft, state)")
        draft, new = proposed
        _check_state("propose", state.inner, new)
        _check_form(draft, keys.shape[0], keys.shape[1])
        return draft, _Recorded(new, draft)

    def commit(self, state: _Recorded, outcome: Outcome) -> _Recorded:
        new = self.inner.commit(state.inner, outcome)
        _check_state("commit", state.inner, new)
        return _Recorded(new, state.draft)


def _check_state(method: str, old: Any, new: Any) -> None:
    """The loop carries the state: its structure, shapes and dtypes must not change."""

    def form(state: Any) -> Any:
        return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state)

    if (jax.tree.structure(old), form(old)) != (jax.tree.structure(new), form(new)):
        raise FormError(
            f"{method} changes the form of the drafter's state, from {form(old)} to {form(new)}; "
            "the loop needs the same pytree, shapes and dtypes throughout"
        )


def _check_form(draft: Any, batch: int, num_slots: int) -> None:
    if not isinstance(draft, Draft):
        raise FormError(f"propose must return (jaxspec.Draft, state), got {type(draft).__name__}")
    for name, wanted in (("tokens", (batch, num_slots)), ("length", (batch,))):
        array = getattr(draft, name)
        if jnp.shape(array) != wanted or jnp.result_type(array) != jnp.int32:
            raise FormError(
                f"Draft.{name} must be i32{list(wanted)} (B = {batch} rows, K = {num_slots} "
                f"slots), got {jnp.result_type(array)}{list(jnp.shape(array))}"
            )
    if draft.log_probs is not None and not isinstance(draft.log_probs, jax.Array):
        raise FormError("Draft.log_probs must be one array f32[B, K, V], or None")
    if draft.log_probs is not None and (
        draft.log_probs.ndim != 3
        or draft.log_probs.shape[:2] != (batch, num_slots)
        or draft.log_probs.dtype != jnp.float32
    ):
        raise FormError(
            f"Draft.log_probs must be f32[{batch}, {num_slots}, V] or None, got "
            f"{draft.log_probs.dtype}{list(draft.log_probs.shape)}"
        )


@pytree.dataclass
class _Scripted:
    """A rule that accepts so many drafts and then says token 0: every row's text is known."""

    num_accepted: Any

    guarantee = "none"

    def __call__(self, keys: Any, draft: Draft, target_log_probs: Any) -> Verdict:
        del keys
        count = jnp.minimum(jnp.asarray(self.num_accepted, jnp.int32), draft.length)
        slots = jnp.arange(target_log_probs.shape[0])
        drafted = jnp.concatenate([draft.tokens, jnp.zeros((1,), jnp.int32)])
        tokens = jnp.where(slots < count, drafted, NO_TOKEN)
        return Verdict(jnp.where(slots == count, 0, tokens), count)
