"""A language model drafts for a larger one, with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec import pytree, sampling
from jaxspec.drafters import branching, model_tree
from jaxspec.drafters.choosing import chooser
from jaxspec.sampling import Sampling, check, processing
from jaxspec.trees import Beam, Topology
from jaxspec.types import (
    PREFILL_CHUNK,
    Cache,
    Context,
    Draft,
    LanguageModel,
    Outcome,
    Signals,
)

Array: TypeAlias = jax.Array

# A draft step feeds up to two tokens: after a draft was accepted whole, its last token was never
# fed, so the cache lags by one. Two rows cost what one costs (see benchmarks/README.md).
_STEP = 2
# A row that was not drafted for lags behind its text by more, and is fed so many tokens at once.
_CATCH_UP = 8


class ModelState(NamedTuple):
    """The drafter's state.

    Attributes:
      cache: the draft model's.
      num_cached: i32[B], tokens of the committed text that the cache holds; at most length - 1.
    """

    cache: Cache
    num_cached: Array


class _Progress(NamedTuple):
    """One row after another reaches its own end of the draft phase."""

    cache: Cache
    tokens: Array  # i32[B, N], the text with the drafts behind it
    num_cached: Array  # i32[B]
    num_known: Array  # i32[B], length of the text with the drafts
    log_probs: Array | None  # f32[B, K, V]
    is_open: Array  # bool[B], whether the row drafts on
    acceptance: Array  # f32[B], predicted, of all drafts so far


@pytree.dataclass
class ModelDrafter:
    """See `model`."""

    lm: LanguageModel
    options: sampling.Options | None  # its own; None: the target's

    hidden_layers: ClassVar[tuple[int, ...]] = ()

    @property
    def vocab_size(self) -> int:
        """V of the draft model."""
        return self.lm.vocab_size

    @property
    def max_length(self) -> int | None:
        """The draft model's limit, in tokens."""
        return self.lm.max_length

    def init(self, batch: int, capacity: int) -> ModelState:
        """An empty cache."""
        cache = self.lm.init_cache(batch, capacity, PREFILL_CHUNK)
        return ModelState(cache, jnp.zeros((batch,), jnp.int32))

    def prefill(
        self,
        state: ModelState,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> ModelState:
        """Feeds one chunk of the prompts."""
        del hidden
        none = jnp.zeros((tokens.shape[0], 0), jnp.int32)
        _, cache = self.lm.forward(
            tokens, state.cache, start=start, num_new=num_new, logits_at=none
        )
        # Behind a gap, the cache counts as far as to the gap, and catches up from there.
        has_gap = state.num_cached < start
        return ModelState(cache, jnp.where(has_gap, state.num_cached, start + num_new))

    def propose(
        self,
        keys: Array,
        state: ModelState,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, ModelState]:
        """Drafts token by token, each row at its own pace, until every row has stopped.

        A row that lags behind its text (it was not drafted for in earlier rounds) first catches
        up, while the others draft.
        """
        batch, num_slots = keys.shape
        rows = jnp.arange(batch)
        options, history = self.options_for(context)
        shape = (batch, num_slots, self.lm.vocab_size)
        log_probs = None if options.is_greedy else jnp.full(shape, -jnp.inf, jnp.float32)
        choose = chooser(keys, context)

        def step(progress: _Progress) -> _Progress:
            # Feed what is known and not cached.
            lag = progress.num_known - progress.num_cached
            num_new = jnp.where(progress.is_open, jnp.minimum(lag, _STEP), 0)
            fed = jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (_STEP,)))(
                progress.tokens, progress.num_cached
            )
            last = jnp.maximum(num_new - 1, 0)[:, None]
            output, cache = self.lm.forward(
                fed, progress.cache, start=progress.num_cached, num_new=num_new, logits_at=last
            )
            num_cached = progress.num_cached + num_new
            has_next = progress.is_open & (num_cached == progress.num_known)

            # The law of the next token, then the policy's say, and only then the token.
            slot = progress.num_known - context.lengths
            prefix = jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (num_slots,)))(
                progress.tokens, context.lengths
            )
            scores, report = processing.process_rows(
                output.logits[:, 0], options, history, prefix, slot
            )
            # The highest probability is near the acceptance rate (EAGLE-2, arXiv 2406.16858).
            acceptance = progress.acceptance * jnp.exp(jnp.max(report, axis=-1))
            goes_on = keep_drafting(Signals(slot, scores, acceptance=acceptance))
            if options.can_ban:  # where bans leave no token, there is nothing to draw
                goes_on = goes_on & jnp.isfinite(jnp.max(scores, axis=-1))
            is_open = progress.is_open & (goes_on | ~has_next)
            draws = has_next & is_open
            if progress.log_probs is None:
                token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
                new_log_probs = None
            else:
                token = choose(jnp.minimum(slot, num_slots - 1), scores)
                at = jnp.where(draws, slot, num_slots)  # out of range: dropped
                new_log_probs = progress.log_probs.at[rows, at].set(scores, mode="drop")
            at = jnp.where(draws, progress.num_known, progress.tokens.shape[1])
            num_known = progress.num_known + draws.astype(jnp.int32)
            return _Progress(
                cache=cache,
                tokens=progress.tokens.at[rows, at].set(token, mode="drop"),
                num_cached=num_cached,
                num_known=num_known,
                log_probs=new_log_probs,
                is_open=is_open & (num_known - context.lengths < num_draft),
                acceptance=jnp.where(draws, acceptance, progress.acceptance),
            )

        cache, num_cached = self.catch_up(state, context, num_draft > 0)
        progress = lax.while_loop(
            lambda progress: jnp.any(progress.is_open),
            step,
            _Progress(
                cache=cache,
                tokens=context.tokens,
                num_cached=num_cached,
                num_known=context.lengths,
                log_probs=log_probs,
                is_open=num_draft > 0,
                acceptance=jnp.ones((batch,), jnp.float32),
            ),
        )
        tokens = jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (num_slots,)))(
            progress.tokens, context.lengths
        )
        draft = Draft(tokens, progress.log_probs, progress.num_known - context.lengths)
        return draft, ModelState(progress.cache, progress.num_cached)

    def in_tree(self, tree: Topology) -> model_tree.ModelTreeDrafter:
        """The same model, drafting a tree."""
        return model_tree.ModelTreeDrafter(self, tree, branching.check(tree, None))

    def options_for(self, context: Context) -> tuple[sampling.Options, sampling.History]:
        """The sampling options that shape q, and what they look back on."""
        options, history = context.sampling, context.history
        if self.options is not None:
            options = sampling.spread(
                self.options, context.lengths.shape[0], whose="the drafter's "
            )
            history = sampling.recall(
                options,
                context.tokens,
                context.lengths,
                vocab_size=self.lm.vocab_size,
                prompt_lengths=history.prompt_length,
                eos_ids=history.eos_ids,
            )
        return options, history

    def read_text(self, state: ModelState, context: Context, is_open: Array) -> tuple[Array, Cache]:
        """Feeds what is known and not cached: the logits f32[B, 1, V] behind the pending token."""

        def lags(num_cached: Array) -> Array:
            return is_open & (num_cached < context.lengths)

        def feed(carry: tuple[Cache, Array, Array]) -> tuple[Cache, Array, Array]:
            cache, num_cached, logits = carry
            num_new = jnp.clip(context.lengths - num_cached, 0, _STEP)
            num_new = jnp.where(lags(num_cached), num_new, 0)
            fed = jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (_STEP,)))(
                context.tokens, num_cached
            )
            last = jnp.maximum(num_new - 1, 0)[:, None]
            output, cache = self.lm.forward(
                fed, cache, start=num_cached, num_new=num_new, logits_at=last
            )
            logits = jnp.where((num_new > 0)[:, None, None], output.logits, logits)
            num_cached = num_cached + num_new
            return cache, num_cached, logits

        cache, num_cached = self.catch_up(state, context, is_open)
        logits = jnp.zeros((is_open.shape[0], 1, self.lm.vocab_size), jnp.float32)
        cache, _, logits = lax.while_loop(
            lambda carry: jnp.any(lags(carry[1])), feed, (cache, num_cached, logits)
        )
        return logits, cache

    def catch_up(self, state: ModelState, context: Context, is_open: Array) -> tuple[Cache, Array]:
        """Feeds rows that lag whole chunks of their text.

        The other rows are fed their beginning once more: a chunk behind their text might not fit,
        and would be shifted over what is valid. They write what they had written.
        """
        if context.tokens.shape[1] < _CATCH_UP:
            return state.cache, state.num_cached

        def lags(num_cached: Array) -> Array:  # the pending token is left to the first step
            return is_open & (context.lengths - 1 - num_cached >= _CATCH_UP)

        def feed(carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, num_cached = carry
            num_new = jnp.where(lags(num_cached), _CATCH_UP, 0)
            start = jnp.where(lags(num_cached), num_cached, 0)
            tokens = jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (_CATCH_UP,)))(
                context.tokens, start
            )
            none = jnp.zeros((tokens.shape[0], 0), jnp.int32)
            _, cache = self.lm.forward(tokens, cache, start=start, num_new=num_new, logits_at=none)
            return cache, num_cached + num_new

        return lax.while_loop(
            lambda carry: jnp.any(lags(carry[1])), feed, (state.cache, state.num_cached)
        )

    def commit(self, state: ModelState, outcome: Outcome) -> ModelState:
        """Keeps what was cached of the text that stands; the rest is overwritten later."""
        # The pending token at `start` and the accepted drafts behind it are right.
        standing = outcome.start + 1 + outcome.num_accepted
        num_cached = jnp.minimum(state.num_cached, standing)
        return state._replace(num_cached=jnp.where(outcome.is_active, num_cached, state.num_cached))


def model(
    lm: LanguageModel,
    *,
    sampling: Sampling | None = None,
    tree: Topology | Beam | None = None,
    children: str | None = None,
) -> ModelDrafter | model_tree.ModelTreeDrafter:
    """Drafts with a smaller language model over the same vocabulary.

    By default it samples under the target's own options, so that temperature, top-k, … shape q
    as they shape p. With options of its own it stays exact, since the q that is verified is the
    one that was sampled; acceptance is what changes. At temperature 0 (the Python number) its
    drafts are point masses. Each draft step feeds only what is new.

    Args:
      lm: the draft model.
      sampling: the draft's own options, each one number or an array [B]; None: the target's.
      tree: drafts this tree (`jaxspec.trees`) in the place of a chain, one forward a level; K is
        its number of nodes then, whatever `num_draft_tokens` says.
      children: how the children of a node are found, at temperatures above 0:
        "without_replacement" (drawn from q, none twice), "independent" (each drawn from q), or
        "top_k" (q's likeliest tokens, not drawn). At temperature 0 they are the likeliest. None:
        the first, and "top_k" for a `trees.Beam` that keeps its best nodes, which takes no other.

    Returns:
      A drafter.

    Raises:
      ValueError: `lm` is no `LanguageModel`, or one that cannot be fed trees where it has to;
        `sampling` no `Sampling` or out of range; `tree` none, or one that `children` do not go
        with. (That its vocabulary is the target's, `generate` checks.)

    References:
      Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxspec
      >>> def apply(params, tokens, cache, *, start):
      ...     return jaxspec.ModelOutput(params[tokens]), cache
      >>> def init_cache(batch, capacity, max_step):
      ...     return ()
      >>> lm = jaxspec.LanguageModel(10.0 * jnp.eye(4)[jnp.array([1, 2, 3, 0])],
      ...                            apply, init_cache, vocab_size=4)
      >>> out = jaxspec.generate(lm, [[0]], drafter=model(lm), max_new_tokens=5,
      ...                        sampling=jaxspec.Sampling(temperature=0))
      >>> out.tokens.tolist(), out.stats.num_spec_steps.tolist()
      ([[1, 2, 3, 0, 1]], [1])
    """
    if not isinstance(lm, LanguageModel):
        raise ValueError(
            f"drafters.model takes a jaxspec.LanguageModel, got {type(lm).__name__}; "
            "jaxspec_models.load returns one, beside its tokenizer."
        )
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a jaxspec.Sampling, got {type(sampling).__name__}.")
    options = None if sampling is None else check(sampling, lm.vocab_size)
    if tree is None:
        return ModelDrafter(lm, options)
    children = branching.check(tree, children)
    lm.require_trees("drafters.model with a tree")
    return model_tree.ModelTreeDrafter(ModelDrafter(lm, options), tree, children)
