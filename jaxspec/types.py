"""The contracts: what a language model, a draft and a verdict are.

Shape letters, used in every signature of the project:

| letter | meaning |
|---|---|
| B | rows of a batch |
| L | prompt length (of the padded array) |
| N | length of a row's token buffer: prompt, output and slack |
| T | new tokens in one call of a model |
| K | drafted tokens in one round (the static maximum) |
| P | length of an accepted path |
| S | slots of a key/value cache |
| W | width of an attention mask |
| M | positions for which logits are formed |
| V | vocabulary size |
| D | width of the hidden states |
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from jaxspec import pytree

Array: TypeAlias = jax.Array
Params: TypeAlias = Any  # a pytree of arrays
Cache: TypeAlias = Any  # a pytree of arrays, owned by the model

PREFILL_CHUNK = 256
"""The most tokens that one prefill call feeds to a model or a drafter."""

NO_TOKEN = -1
"""Fills the slots of a `Verdict` behind its last token."""

NO_NODE = -2
"""The parent of a slot of a tree that holds no draft."""


class ModelOutput(NamedTuple):
    """What a model's `apply` returns beside its cache.

    Attributes:
      logits: f32[B, M, V] (M = T without `logits_at`); other float types are cast by the engine.
      hidden: one [B, T, D] for each layer asked for by `hidden_layers`.
    """

    logits: Array
    hidden: tuple[Array, ...] = ()


class Branches(NamedTuple):
    """How the tokens of one forward see each other where they are nodes of a tree.

    Attributes:
      prefix: i32[B], every slot below it is seen.
      mask: bool[T, W] or bool[B, T, W], which of the slots prefix … prefix + W each token sees.
      positions: i32[B, T], a node's is that of the pending token plus its depth.
    """

    prefix: Array
    mask: Array
    positions: Array


@pytree.dataclass
class LanguageModel:
    """A language model as pure functions: anything that can be written so is a target or a draft.

    A registered pytree: `params` and `default_drafter` are leaves, everything else is static and
    compares by value, so that `replace(params=...)` and loading the same model twice never
    retrace. `apply` and `init_cache` are therefore module-level functions or frozen dataclasses
    with a `__call__`, not lambdas or closures made anew on each call.

    `apply(params, tokens, cache, *, start, ...) -> (ModelOutput, cache)`:

    - `tokens` i32[B, T] are the new tokens; `start` i32[B] counts the cached slots in use: new
      token i of a row goes to slot start + i and, by default, sees the slots 0 … start + i.
    - `positions` i32[B, T] (default start + i) are the positions for rotary or learned embeddings.
      Padding and drafts may reach beyond `max_length`; the engine passes positions cut to it.
    - `num_new` i32[B] (default T): tokens at or beyond it are padding. They are not written where
      a write would do harm (a sliding window); elsewhere they are harmless garbage.
    - `prefix` i32[B] (default start) and `mask` bool[T, W] or bool[B, T, W] (default causal): a
      token sees every slot below `prefix` and, of the slots prefix … prefix + W, those that its
      mask row allows.
    - `logits_at` i32[B, M]: form logits only for these token indices. M may be 0.
    - `hidden_layers`: static indices of the layers whose outputs are returned.

    Only `start` is obligatory: the engine passes the others where they are needed, does without
    `num_new` and `logits_at`, and refuses, by name, a model that lacks one it must have.

    `init_cache(batch, capacity, max_step) -> cache` makes a cache of at least `capacity` slots;
    `max_step` is the most tokens that one call will write. A call never writes at or beyond
    `capacity`. All slots must be finite. A larger cache has the slots of a smaller one first, so
    that zeros behind a cache make it larger (`generate(state=…)` does that).

    Attributes:
      params: pytree of arrays.
      apply: see above (static).
      init_cache: see above (static).
      vocab_size: V, the number of token ids and of logits (static).
      compact: `compact(cache, start i32[B], path i32[B, P]) -> cache` moves the nodes of an
        accepted path together: slot start + i takes what slot start + path[i] holds, where path
        rises and path[i] ≥ i; needed for trees only (static).
      max_length: the longest prompt + output that the model is made for; None: no limit (static).
      eos_ids: the tokens that end a text by default (static).
      default_drafter: what `generate(drafter="auto")` uses; None: prompt lookup.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxspec
      >>> def apply(params, tokens, cache, *, start):  # a bigram table needs no cache
      ...     return jaxspec.ModelOutput(params[tokens]), cache
      >>> def init_cache(batch, capacity, max_step):
      ...     return ()
      >>> count = jaxspec.LanguageModel(10.0 * jnp.eye(4)[jnp.array([1, 2, 3, 0])],
      ...                               apply, init_cache, vocab_size=4)
      >>> out = jaxspec.generate(count, [[0]], max_new_tokens=5,
      ...                        sampling=jaxspec.Sampling(temperature=0))
      >>> out.tokens.tolist()
      [[1, 2, 3, 0, 1]]
    """

    params: Params
    apply: Callable[..., tuple[ModelOutput, Cache]] = pytree.static()
    init_cache: Callable[[int, int, int], Cache] = pytree.static()
    vocab_size: int = pytree.static()
    compact: Callable[[Cache, Array, Array], Cache] | None = pytree.static(default=None)
    max_length: int | None = pytree.static(default=None)
    eos_ids: tuple[int, ...] = pytree.static(default=())
    default_drafter: Any = None

    def replace(self, **changes: Any) -> LanguageModel:
        """Returns a copy with the given fields changed; new `params` never retrace."""
        return dataclasses.replace(self, **changes)

    def accepts(self, name: str) -> bool:
        """Whether `apply` takes the optional argument `name`."""
        parameters = inspect.signature(self.apply).parameters
        return name in parameters or any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )

    def forward(
        self,
        tokens: Array,
        cache: Cache,
        *,
        start: Array,
        num_new: Array,
        logits_at: Array | None = None,
        hidden_layers: tuple[int, ...] = (),
        branches: Branches | None = None,
    ) -> tuple[ModelOutput, Cache]:
        """Calls `apply` with what it understands, and makes good what it does not.

        Args:
          tokens: i32[B, T].
          cache: the model's.
          start: i32[B].
          num_new: i32[B].
          logits_at: i32[B, M] or None: all T positions.
          hidden_layers: a must where not empty.
          branches: where the tokens are nodes of a tree; None: a chain.

        Returns:
          `ModelOutput` with logits f32[B, M or T, V], and the new cache.

        Raises:
          ValueError: the output is no `ModelOutput`, or its logits are not `vocab_size` wide.
        """
        kwargs: dict[str, Any] = {"hidden_layers": hidden_layers} if hidden_layers else {}
        if self.accepts("num_new"):
            kwargs["num_new"] = num_new
        if logits_at is not None and self.accepts("logits_at"):
            kwargs["logits_at"] = logits_at
        positions = None
        if branches is not None:
            kwargs["prefix"], kwargs["mask"] = branches.prefix, branches.mask
            kwargs["positions"] = positions = branches.positions
        if self.max_length is not None and self.accepts("positions"):
            # Padding may lie behind the last position that a model has an embedding for.
            if positions is None:
                positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            kwargs["positions"] = jnp.minimum(positions, self.max_length - 1)
        output, cache = self.apply(self.params, tokens, cache, start=start, **kwargs)
        if not isinstance(output, ModelOutput):
            raise ValueError(
                f"{self.apply!r} must return (jaxspec.ModelOutput(logits), cache), got "
                f"{type(output).__name__} in the place of the ModelOutput."
            )
        logits = output.logits.astype(jnp.float32)
        if logits.ndim != 3 or logits.shape[2] != self.vocab_size:
            raise ValueError(
                f"the model's logits must be [B, T, vocab_size = {self.vocab_size}], got "
                f"{logits.shape}; correct vocab_size or the head."
            )
        if logits_at is not None and logits.shape[1] != logits_at.shape[1]:
            logits = jnp.take_along_axis(logits, logits_at[:, :, None], axis=1)
        return output._replace(logits=logits), cache

    def require_trees(self, whose: str) -> None:
        """Raises ValueError naming what keeps the model from being fed trees."""
        purpose = f"{whose} drafts trees, which"
        self.require(["prefix", "mask", "positions"], purpose)
        if self.compact is None:
            raise ValueError(
                f"{purpose} needs a model with a compact function, which moves an accepted path's "
                "cache entries together (jaxspec.LanguageModel documents it); without one, draft "
                "chains."
            )

    def require(self, names: Sequence[str], purpose: str) -> None:
        """Raises ValueError naming the arguments of `names` that `apply` does not take."""
        if missing := [name for name in names if not self.accepts(name)]:
            raise ValueError(
                f"{purpose} needs a model whose apply takes {', '.join(missing)}; add "
                f"{'it' if len(missing) == 1 else 'them'} to {self.apply!r} "
                "(jaxspec.LanguageModel documents each argument)."
            )


class Draft(NamedTuple):
    """Tokens proposed for one row, to be verified by one target forward.

    Attributes:
      tokens: i32[K]; slots at or beyond `length` hold garbage.
      log_probs: f32[K, V], the distribution that each token was drawn from, bit for bit, after
        every sampling option; None: each token is a point mass (a deterministic draft).
      length: i32[], how many tokens were drafted, 0 … K.
      parents: i32[K], the tree: each draft's parent, which is a draft before it, or -1 for the
        pending token; `NO_NODE` (-2) for a slot that holds none; None: a chain. Siblings are
        judged in the order of their slots, and children that were drawn without replacement all
        have the law of the first of them as their `log_probs`.
    """

    tokens: Array
    log_probs: Array | None
    length: Array
    parents: Array | None = None


class Verdict(NamedTuple):
    """What a verifier makes of a draft.

    Attributes:
      tokens: i32[K + 1]: the accepted drafts, then the correction or the bonus, then `NO_TOKEN`.
      num_accepted: i32[], the number of accepted drafts, 0 … K.
      path: i32[P], trees only: the slots of the accepted drafts, and behind them each slot its
        own number: what `LanguageModel.compact` takes.
      is_fallback: bool[], whether rounding left no residual to draw the correction from, so that
        it was drawn from the target; None: cannot happen. Counted in `Stats.num_fallbacks`.
    """

    tokens: Array
    num_accepted: Array
    path: Array | None = None
    is_fallback: Array | None = None


class Context(NamedTuple):
    """What a drafter may look at when it proposes.

    Attributes:
      tokens: i32[B, N], prompt and output; slots at or beyond `lengths` hold garbage. N leaves
        room for K tokens behind any row's length.
      lengths: i32[B], the committed tokens of each row; the last of them is pending: no model has
        been fed it yet.
      sampling: the resolved `jaxspec.sampling.Options` of each row.
      history: the `jaxspec.sampling.History` of each row: the committed text as options that look
        back see it. `jaxspec.sampling.process_rows` makes a law of logits with both.
      noise_keys: key[B, K], what the verifier will draw the tokens at the drafted offsets with,
        where it shares its noise (`verifiers.match`): a drafter that runs
        `jaxspec.drawing.race` with `gumbel_noise` of these keys agrees with it more often. None:
        noise is not shared. Using them is optional; drawing with `keys` is always right.
    """

    tokens: Array
    lengths: Array
    sampling: Any
    history: Any
    noise_keys: Array | None = None


class Signals(NamedTuple):
    """What a policy may look at before a slot is drafted: never that slot's token or a later one.

    Dropping a token for its own value changes the output's law (algorithm of 2211.17192, its
    condition that the draft length is non-anticipating).

    Attributes:
      slot: i32[B], the index of the slot about to be drafted, 0 … K - 1.
      log_probs: f32[B, V], the distribution it will be drawn from.
      hidden: the drafter's own hidden states [B, D] there, or None.
      acceptance: f32[B], the drafter's prediction of the probability that this draft and all
        before it in the round are accepted; None: it predicts nothing.
    """

    slot: Array
    log_probs: Array
    hidden: Array | None = None
    acceptance: Array | None = None


class Outcome(NamedTuple):
    """What one round did, for drafters and policies to learn from.

    Attributes:
      draft: the `Draft` of every row (leading axis B).
      verdict: the `Verdict` of every row (leading axis B), before truncation.
      start: i32[B], the slot of the token that was pending in this round.
      num_emitted: i32[B], tokens committed in this round, after truncation at EOS or at the
        limit; 0 for a row that had stopped.
      num_accepted: i32[B], drafts among the committed tokens.
      is_active: bool[B], whether the row took part.
      target_log_probs: f32[B, K + 1, V], the target after the sampling options, at the pending
        token and at each draft: in a tree too, node by node (`verdict.path` tells the way).
      hidden: the target's hidden states [B, K + 1, D] of each layer the drafter asked for.
      top_tokens: i32[B, K + 1, n], the target's likeliest tokens there, the first ones first,
        under the law that `Generation.log_probs` reports; `NO_TOKEN` where it allows no more; n
        is the drafter's `num_top_tokens`.
    """

    draft: Draft
    verdict: Verdict
    start: Array
    num_emitted: Array
    num_accepted: Array
    is_active: Array
    target_log_probs: Array
    hidden: tuple[Array, ...]
    top_tokens: Array | None = None


@runtime_checkable
class Verifier(Protocol):
    """An acceptance rule: unbatched and pure; the loop vmaps it. A registered pytree.

    A rule may also have, all of them static and off where missing:

    - `needs_greedy_sampling`: it is exact at temperature 0 only; `generate` refuses it elsewhere.
    - `is_keyed_by_position`: its keys follow (row, position in the text), not (row, round,
      offset). A position that is tried again then sees its old numbers, which is right for rules
      that draw each token from the target alone, and for no others.
    - `shares_noise`: the drafter may look at those keys (`Context.noise_keys`). Right only for a
      rule whose tokens do not depend on the draft.
    - `takes_children`: the trees that it is exact for, by how a node's children were found:
      "top_k" (not drawn: chosen for their q or otherwise), "independent" (each drawn from the
      same q), "without_replacement" (each drawn from q without the siblings before it). Empty
      where missing: chains only.
    - `judge(numbers f32[K + 1, 3], draft, target_log_probs) -> Verdict`, where calling the rule
      is `judge` on `jaxspec.verifiers.ratio.uniforms(keys)`: each number [i, 0] decides about
      draft i, passing above a threshold, and [i, 2] draws the token behind i drafts, monotonically.
      `jaxspec.testing.check_verifier` then computes the rule's exact law.
    """

    @property
    def guarantee(self) -> str:
        """What `Generation.guarantee` says (static).

        "distribution": lossless; "tokens": lossless, and the tokens follow the key alone; "none":
        lossy, see `jaxspec.lossy`.
        """
        ...

    def __call__(self, keys: Array, draft: Draft, target_log_probs: Array) -> Verdict:
        """Judges one row's draft.

        Args:
          keys: key[K + 1], one for each offset; each is consumed at most once.
          draft: the row's `Draft`.
          target_log_probs: f32[K + 1, V], after the sampling options; row i is the target's
            distribution of the token behind draft i - 1 (row 0: behind the pending token).
        """
        ...


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens, sees the batch, keeps its own state. A registered pytree.

    A drafter of trees also has, static:

    - `num_nodes`: K. Its drafts have `parents`, and K slots whatever `num_draft_tokens` says.
    - `children`: how a node's children are found, as in `Verifier`'s `takes_children`.

    A drafter that has a static `num_top_tokens` is told so many of the target's likeliest tokens
    (`Outcome.top_tokens`).

    A drafter of trees drafts as many nodes as `num_draft` says, the first ones of K, and need not
    ask `keep_drafting`.
    """

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The target layers whose hidden states this drafter reads (static)."""
        ...

    def init(self, batch: int, capacity: int) -> Any:
        """Returns the state of `batch` rows that will hold at most `capacity` tokens each."""
        ...

    def prefill(
        self, state: Any, tokens: Array, hidden: tuple[Array, ...], start: Array, num_new: Array
    ) -> Any:
        """Takes in one chunk of the prompts.

        Where a text is taken up again (`generate(state=…)`), `start` is the slot of the token that
        was pending. What the drafter has not seen of the tokens before it, it finds in
        `Context.tokens`.

        Args:
          state: the drafter's state.
          tokens: i32[B, T], T ≤ `PREFILL_CHUNK`.
          hidden: the target's hidden states [B, T, D] of each layer in `hidden_layers`.
          start: i32[B], the number of tokens before the chunk.
          num_new: i32[B], tokens of this chunk that belong to the row; the rest is padding. The
            last prompt token is never part of a chunk: it is pending.
        """
        ...

    def propose(
        self,
        keys: Array,
        state: Any,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, Any]:
        """Drafts at most `num_draft` tokens behind each row's pending token.

        Args:
          keys: key[B, K], one for each offset; K is the static maximum of drafts.
          state: the drafter's state.
          context: what there is so far.
          num_draft: i32[B], 0 … K; 0 for a row that has stopped.
          keep_drafting: the policy's say before each slot, given `Signals` -> bool[B].

        Returns:
          A `Draft` with a leading axis B, and the new state.
        """
        ...

    def commit(self, state: Any, outcome: Outcome) -> Any:
        """Takes in what was accepted. Rolling back is not advancing: nothing is erased."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Chooses how much is drafted, round by round. A registered pytree.

    For sampled drafts, whether slot k is drafted may depend only on the tokens before it, on the
    distribution q_k and on hidden states: never on token k itself. A policy (or a drafter) that
    breaks this says so with a static `is_anticipating = True`, and needs `exact=False`.
    """

    def init(self, batch: int) -> Any:
        """Returns the state of `batch` rows."""
        ...

    def num_draft(self, state: Any) -> Array:
        """The number of tokens to draft in the coming round, i32[B]; the loop clips it to 0 … K."""
        ...

    def keep_drafting(self, state: Any, signals: Signals) -> Array:
        """Whether to go on with the slot that `signals` describes, bool[B]."""
        ...

    def update(self, state: Any, outcome: Outcome) -> Any:
        """Learns from a round; rows that were not active keep their state."""
        ...
