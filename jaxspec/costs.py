"""Measuring what a round costs on this machine, for the policies and plans that weigh it."""

from __future__ import annotations

import functools
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxspec import arguments, drawing, loop, policies, programs, pytree, states, trees
from jaxspec.generate import prefill, run
from jaxspec.profile import Profile
from jaxspec.sampling import Sampling
from jaxspec.types import Context, Draft, Drafter, LanguageModel, Outcome, Signals

Array: TypeAlias = jax.Array


class Growing(Protocol):
    """A drafter that can draft any tree."""

    def in_tree(self, tree: trees.Topology) -> Any:
        """A drafter of that tree."""
        ...


@pytree.dataclass
class _Insistent:
    """Drafts as much as it is asked for, whatever `drafter` found; without one, for nothing."""

    drafter: Drafter | None

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        return () if self.drafter is None else self.drafter.hidden_layers

    def init(self, batch: int, capacity: int) -> Any:
        return () if self.drafter is None else self.drafter.init(batch, capacity)

    def prefill(
        self, state: Any, tokens: Array, hidden: tuple[Array, ...], start: Array, num_new: Array
    ) -> Any:
        if self.drafter is None:
            return state
        return self.drafter.prefill(state, tokens, hidden, start, num_new)

    def propose(
        self,
        keys: Array,
        state: Any,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, Any]:
        if self.drafter is None:
            return Draft(jnp.zeros(keys.shape, jnp.int32), None, num_draft), state
        draft, state = self.drafter.propose(keys, state, context, num_draft, keep_drafting)
        return draft._replace(length=num_draft), state

    def commit(self, state: Any, outcome: Outcome) -> Any:
        return state if self.drafter is None else self.drafter.commit(state, outcome)


@pytree.dataclass
class _Idle:
    """Drafts a tree of zeros, at no cost."""

    tree: trees.Topology = pytree.static()
    children: str = pytree.static()
    vocab_size: int = pytree.static()

    hidden_layers = ()

    @property
    def num_nodes(self) -> int:
        return self.tree.num_nodes

    def init(self, batch: int, capacity: int) -> tuple[()]:
        return ()

    def prefill(
        self, state: Any, tokens: Array, hidden: tuple[Array, ...], start: Array, num_new: Array
    ) -> Any:
        return state

    def propose(
        self,
        keys: Array,
        state: Any,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, Any]:
        log_probs = None
        if self.children != "top_k" and not context.sampling.is_greedy:
            log_probs = jnp.full((*keys.shape, self.vocab_size), -np.log(self.vocab_size))
        parents = jnp.tile(jnp.asarray(self.tree.parents, jnp.int32)[None], (keys.shape[0], 1))
        return Draft(jnp.zeros(keys.shape, jnp.int32), log_probs, num_draft, parents), state

    def commit(self, state: Any, outcome: Outcome) -> Any:
        return state


def measure_costs(
    target: LanguageModel,
    drafter: Drafter | str | None = None,
    *,
    batch: int = 1,
    num_draft_tokens: int = 4,
    context_length: int = 128,
    sampling: Sampling = Sampling(temperature=0),  # noqa: B008 (frozen)
    num_rounds: int = 16,
    repeats: int = 9,
) -> Profile:
    """Times the parts of a round, each apart, in alternation, and takes medians.

    It compiles the loop twice and a forward, and runs them; nothing else should keep the machine
    busy meanwhile. Call it once for a model, a drafter, a batch size and K, and keep the profile.

    Args:
      target: the model that verifies.
      drafter: from `jaxspec.drafters`, or "auto"; None: the profile of plain decoding (K = 0).
      batch: B, rows.
      num_draft_tokens: K ≥ 1, the most tokens drafted in a round.
      context_length: tokens of each row's prompt.
      sampling: the options; 0 temperature by default.
      num_rounds: rounds in one timing.
      repeats: timings of each part; medians count.

    Returns:
      A `Profile` in seconds.

    Raises:
      ValueError: as `jaxspec.generate`, or counts below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxspec
      >>> def apply(params, tokens, cache, *, start):
      ...     return jaxspec.ModelOutput(params[tokens]), cache
      >>> def init_cache(batch, capacity, max_step):
      ...     return ()
      >>> lm = jaxspec.LanguageModel(jnp.eye(4), apply, init_cache, vocab_size=4)
      >>> profile = measure_costs(lm, jaxspec.drafters.model(lm), num_draft_tokens=2, repeats=1)
      >>> profile.verify.shape
      (3,)
    """
    counts = {
        "batch": batch,
        "num_draft_tokens": num_draft_tokens,
        "context_length": context_length,
        "num_rounds": num_rounds,
        "repeats": repeats,
    }
    for name, count in counts.items():
        if not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
    prepared = arguments.prepare(
        target,
        [[0] * context_length] * batch,
        drafter=drafter,
        policy=policies.fixed(0),
        sampling=sampling,
        max_new_tokens=num_rounds * (num_draft_tokens + 1) + 1,
        num_draft_tokens=num_draft_tokens,
        eos_ids=(),
        key=jax.random.key(0),
    )
    request, num_slots = prepared.request, prepared.engine.num_draft_tokens
    engines = {
        name: prepared.engine.replace(drafter=_Insistent(found))
        for name, found in (("timed", prepared.engine.drafter), ("free", None))
    }

    @functools.cache
    def prefilled(name: str) -> states.State:
        size = prepared.max_new_tokens
        return prefill(engines[name], request, prepared.prompts, max_new_tokens=size)

    def begin(name: str) -> states.State:  # a copy: the loop takes what it is given
        return jax.block_until_ready(jax.tree.map(jnp.copy, prefilled(name)))

    def rounds(name: str, length: int) -> float:
        engine, state = engines[name].replace(policy=policies.fixed(length)), begin(name)
        return time_call(lambda: run(engine, request, state, num_rounds)) / num_rounds

    def forwards() -> float:
        state = begin("free")
        fed, cache, start = engines["free"].target, state.cache, state.lengths - 1
        return time_call(lambda: _forwards(fed, cache, start, num_rounds)) / num_rounds

    widths = loop.verification_widths(num_slots)
    parts: dict[Any, Callable[[], float]] = {"forward": forwards}
    parts |= {width: functools.partial(rounds, "timed", width - 1) for width in widths}
    if num_slots:
        parts |= {"free": functools.partial(rounds, "free", num_slots)}
        parts |= {"free, plain": functools.partial(rounds, "free", 0)}
    seconds = typical_times(parts, repeats, reference=widths[0])

    draft = 0.0
    if num_slots:
        drafting = seconds[widths[-1]] - seconds["free"]
        idling = seconds[1] - seconds["free, plain"]  # what the drafter does for no drafts
        draft = max(0.0, drafting - idling) / num_slots
    overhead = max(0.0, seconds[1] - seconds["forward"])
    verify = [
        seconds[width] - (width - 1) * draft - overhead for width in loop.paid_widths(num_slots)
    ]
    rising = np.maximum.accumulate(verify)  # noise must not make more tokens cheaper
    return Profile(*(jnp.asarray(x, jnp.float32) for x in (rising, draft, overhead)))


class RoundCosts(NamedTuple):
    """What rounds cost, in seconds. Chains run without masks and compaction, at less than trees.

    Attributes:
      trees: by nodes: `draft` a level of drafting, `verify` what else a round takes; together, for
        the trees that were timed, what their rounds took.
      chains: by drafts: `verify` all that a round takes, drafting included; `draft` 0.
    """

    trees: Profile
    chains: Profile


def measure_tree_costs(
    target: LanguageModel,
    drafter: Growing,
    topologies: Sequence[trees.Topology],
    chains: Sequence[int],
    *,
    batch: int = 1,
    context_length: int = 128,
    sampling: Sampling = Sampling(temperature=0),  # noqa: B008 (frozen)
    num_rounds: int = 16,
    repeats: int = 15,
) -> RoundCosts:
    """Times rounds over trees, with the drafter and without, over chains, and plain decoding.

    In alternation. Every tree is two programs to compile, every chain one. Nothing else should keep
    the machine busy meanwhile.

    Args:
      target: the model that verifies.
      drafter: one with `in_tree`, which drafts chains itself.
      topologies: trees of different sizes; the costs of sizes between them are interpolated.
      chains: their lengths; the costs of lengths between them are interpolated.
      batch: B, rows.
      context_length: tokens of each row's prompt.
      sampling: the options.
      num_rounds: rounds in one timing.
      repeats: timings of each part; medians count.

    Returns:
      `RoundCosts` of up to as many nodes as the largest tree has, and as many drafts as the longest
      chain; no overhead, which `verify` includes.

    Raises:
      ValueError: as `jaxspec.generate`.
    """

    def rounds(own: Any, num_drafts: int, *, insists: bool = False) -> Callable[[], float]:
        most = num_rounds * (num_drafts + 1) + 1
        prepared = arguments.prepare(
            target,
            [[0] * context_length] * batch,
            drafter=own,
            num_draft_tokens=num_drafts,
            sampling=sampling,
            max_new_tokens=most,
            eos_ids=(),
            key=jax.random.key(0),
        )
        engine, request = prepared.engine, prepared.request
        if insists:
            engine = engine.replace(drafter=_Insistent(engine.drafter))

        @functools.cache
        def prefilled() -> Any:
            return prefill(engine, request, prepared.prompts, max_new_tokens=most)

        def seconds() -> float:
            state = jax.block_until_ready(jax.tree.map(jnp.copy, prefilled()))
            return time_call(lambda: run(engine, request, state, num_rounds)) / num_rounds

        return seconds

    parts: dict[Any, Callable[[], float]] = {"plain": rounds(None, 0)}
    for tree in topologies:
        own = drafter.in_tree(tree)
        idle = _Idle(tree, own.children, target.vocab_size)
        parts["drafted", tree] = rounds(own, tree.num_nodes)
        parts["idle", tree] = rounds(idle, tree.num_nodes)
    parts |= {("chain", length): rounds(drafter, length, insists=True) for length in chains}
    found = typical_times(parts, repeats, reference="plain")
    level = _level_cost(
        [tree.depth for tree in topologies],
        [found["drafted", tree] - found["idle", tree] for tree in topologies],
    )
    plain = found["plain"]
    # So that what was timed is foreseen as it was timed: what drafting costs once a round, and for
    # each node (children are drawn one by one), stands here.
    of_trees = {t.num_nodes: found["drafted", t] - level * t.depth for t in topologies}
    of_chains = {length: found["chain", length] for length in chains}
    return RoundCosts(_profile(plain, of_trees, level), _profile(plain, of_chains, 0.0))


def _profile(plain: float, seconds: dict[int, float], level: float) -> Profile:
    """Of rounds over some numbers of drafts; those between are interpolated."""
    sizes, times = zip(*sorted({0: plain, **seconds}.items()), strict=True)
    verify = np.interp(np.arange(sizes[-1] + 1), sizes, times)
    rising = np.maximum.accumulate(verify)  # noise must not make more drafts cheaper
    return Profile(*(jnp.asarray(x, jnp.float32) for x in (rising, level, 0.0)))


def _level_cost(depths: Sequence[int], seconds: Sequence[float]) -> float:
    """What drafting takes for each level, by what it takes in trees of some depths; at least 0.

    Not what it takes once a round, whatever the depth (an EAGLE drafter takes in the target's
    states): for a part of the levels, that would make shallow trees too cheap.
    """
    deviations = np.asarray(depths) - np.mean(depths)
    if not np.any(deviations):  # one depth tells them not apart
        return max(0.0, statistics.median(s / d for s, d in zip(seconds, depths, strict=True)))
    # The least squares of a line; where it would be below zero at no level, a line without that.
    level = float(np.dot(deviations, seconds) / np.dot(deviations, deviations))
    if np.mean(seconds) < level * np.mean(depths):
        level = float(np.dot(depths, seconds) / np.dot(depths, depths))
    return max(0.0, level)


def time_call(compute: Callable[[], Any]) -> float:
    """Seconds until what is computed is there."""
    start = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - start


def typical_times(
    parts: dict[Any, Callable[[], float]], repeats: int, reference: Any
) -> dict[Any, float]:
    """What each part takes, timed in turn; the first turn compiles and does not count.

    The median over the turns of its ratio to `reference` within a turn, times the median of that
    one: a machine that is slower for a while slows the parts of a turn alike.
    """
    times: dict[Any, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 1):
        for name, part in parts.items():
            seconds = part()
            if turn:
                times[name].append(seconds)
    scale = statistics.median(times[reference])
    return {
        name: scale * statistics.median(map(operator.truediv, values, times[reference]))
        for name, values in times.items()
    }


def _compute_forwards(target: LanguageModel, cache: Any, start: Array, count: Array | int) -> Any:
    """Target forwards over one token of every row, each fed what the one before found."""

    def forward(index: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        tokens, cache = carry
        output, cache = target.forward(
            tokens, cache, start=start + index, num_new=jnp.ones_like(start)
        )
        return jax.vmap(jax.vmap(drawing.argmax))(output.logits), cache

    return lax.fori_loop(0, count, forward, (jnp.zeros((start.size, 1), jnp.int32), cache))


_forwards = programs.Program(_compute_forwards, donate_argnames="cache")
