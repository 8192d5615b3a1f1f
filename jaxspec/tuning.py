"""Finding the tree that is fastest: how often each child is accepted, and what a round costs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import arguments, costs, pytree, trees
from jaxspec.generate import generate, prefill, run
from jaxspec.profile import Profile
from jaxspec.sampling import Sampling
from jaxspec.settings import Settings
from jaxspec.types import Context, Draft, LanguageModel, Outcome, Signals

Array: TypeAlias = jax.Array

_GREEDY = Sampling(temperature=0)
_PROBED = (0.6, 0.2, 0.1, 0.05)  # the shape that acceptance is measured on: `trees.sequoia` of it
_MOST_PROBED, _DEEPEST = 24, 6
_WEIGHT = 8.0
"""Of the level above, in nodes, where a level's acceptance is estimated: few rounds get deep."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Of the trees that are timed."""


class Growing(Protocol):
    """A drafter that can draft any tree."""

    def in_tree(self, tree: trees.Topology) -> Any:
        """A drafter of that tree."""
        ...


class _Counts(NamedTuple):
    """A state, and what became of the nodes.

    Attributes:
      state: the drafter's.
      accepted: i32[B, K], how often each node was accepted.
      num_rounds: i32[B], in which the whole tree was drafted.
    """

    state: Any
    accepted: Array
    num_rounds: Array


@pytree.dataclass
class _Counting:
    """Counts how often each node of a drafter's tree is accepted."""

    drafter: Any

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        return self.drafter.hidden_layers

    @property
    def num_nodes(self) -> int:
        return self.drafter.num_nodes

    @property
    def children(self) -> str:
        return self.drafter.children

    @property
    def num_top_tokens(self) -> int:
        return getattr(self.drafter, "num_top_tokens", 0)

    def init(self, batch: int, capacity: int) -> _Counts:
        accepted = jnp.zeros((batch, self.num_nodes), jnp.int32)
        return _Counts(self.drafter.init(batch, capacity), accepted, jnp.zeros((batch,), jnp.int32))

    def prefill(
        self,
        state: _Counts,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> _Counts:
        own = self.drafter.prefill(state.state, tokens, hidden, start, num_new)
        return state._replace(state=own)

    def propose(
        self,
        keys: Array,
        state: _Counts,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, _Counts]:
        draft, own = self.drafter.propose(keys, state.state, context, num_draft, keep_drafting)
        return draft, state._replace(state=own)

    def commit(self, state: _Counts, outcome: Outcome) -> _Counts:
        path = outcome.verdict.path
        assert path is not None  # of a tree
        # Towards a text's end fewer nodes are drafted: such rounds do not count.
        is_whole = outcome.is_active & (outcome.draft.length == self.num_nodes)
        counts = jnp.arange(path.shape[1])[None] < outcome.verdict.num_accepted[:, None]
        counts = counts & is_whole[:, None]
        rows = jnp.arange(path.shape[0])[:, None]
        return _Counts(
            self.drafter.commit(state.state, outcome),
            state.accepted.at[rows, path].add(counts.astype(jnp.int32)),
            state.num_rounds + is_whole.astype(jnp.int32),
        )


def measure_acceptance(
    target: LanguageModel,
    drafter: Growing,
    prompts: Any,
    *,
    probe: trees.Topology | None = None,
    sampling: Sampling = _GREEDY,
    max_new_tokens: int = 64,
    key: Array | None = None,
    **kwargs: Any,
) -> list[list[float]]:
    """How often the first, second, … child of a node is the one that is accepted, by depth.

    The texts are written with one tree, and every accepted node is counted. Of a depth that few
    rounds get to, the estimate leans on the one above.

    Args:
      target: the model that verifies.
      drafter: one with `in_tree`, as most of `jaxspec.drafters`.
      prompts: as in `jaxspec.generate`.
      probe: the tree; children that it does not have are not measured. None: 24 nodes, down to
        depth 6.
      sampling: the options; temperature 0 by default.
      max_new_tokens: written behind each prompt.
      key: as in `jaxspec.generate`.
      **kwargs: further arguments of `jaxspec.generate`.

    Returns:
      A list for each depth: the probabilities of its children, falling; for `trees.plan`.

    Raises:
      ValueError: as `jaxspec.generate`.

    References:
      Chen et al., Sequoia, arXiv 2402.12374, section 4.1.

    Example:
      >>> import jaxspec
      >>> lm = jaxspec.testing.table_model(10.0 * jnp.eye(4)[jnp.array([1, 2, 3, 0])], order=1)
      >>> found = measure_acceptance(
      ...     lm, jaxspec.drafters.model(lm), [[0]], probe=trees.kary((2,)), eos_ids=()
      ... )
      >>> [[round(share, 3) for share in shares] for shares in found]
      [[1.0, 0.0]]
    """
    probe = _probe(drafter) if probe is None else probe
    out = generate(
        target,
        prompts,
        drafter=_Counting(drafter.in_tree(probe)),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        key=key,
        return_state=True,
        **kwargs,
    )
    assert out.state is not None  # it is asked for
    counts = out.state.state.drafter
    return _shares(probe, np.asarray(counts.accepted).sum(axis=0), int(counts.num_rounds.sum()))


def _probe(drafter: Any) -> trees.Topology:
    depth = getattr(drafter, "max_draft_tokens", None) or _DEEPEST
    return trees.sequoia(_PROBED, _MOST_PROBED, min(depth, _DEEPEST))


def _shares(probe: trees.Topology, accepted: np.ndarray, num_rounds: int) -> list[list[float]]:
    """The probabilities behind the counts i64[K] of accepted nodes."""
    found: list[list[float]] = []
    for first, end in probe.levels:
        shares = []
        for rank in range(max(probe.ranks[first:end]) + 1):
            nodes = [node for node in range(first, end) if probe.ranks[node] == rank]
            hits = float(sum(accepted[node] for node in nodes))
            chances = float(
                sum(
                    num_rounds if probe.parents[n] < 0 else accepted[probe.parents[n]]
                    for n in nodes
                )
            )
            if found and rank < len(found[-1]):
                hits, chances = hits + _WEIGHT * found[-1][rank], chances + _WEIGHT
            shares.append(hits / chances if chances else 0.0)
        found.append(np.minimum.accumulate(shares).tolist())  # as a plan takes them
    return found


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
    *,
    chains: Sequence[int] = (1, 2),
    batch: int = 1,
    context_length: int = 128,
    sampling: Sampling = _GREEDY,
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
            engine = engine.replace(drafter=costs.insistent(engine.drafter))

        @functools.cache
        def prefilled() -> Any:
            return prefill(engine, request, prepared.prompts, max_new_tokens=most)

        def seconds() -> float:
            state = jax.block_until_ready(jax.tree.map(jnp.copy, prefilled()))
            return costs.time_call(lambda: run(engine, request, state, num_rounds)) / num_rounds

        return seconds

    parts: dict[Any, Callable[[], float]] = {"plain": rounds(None, 0)}
    for tree in topologies:
        own = drafter.in_tree(tree)
        idle = _Idle(tree, own.children, target.vocab_size)
        parts["drafted", tree] = rounds(own, tree.num_nodes)
        parts["idle", tree] = rounds(idle, tree.num_nodes)
    parts |= {("chain", length): rounds(drafter, length, insists=True) for length in chains}
    found = costs.typical_times(parts, repeats, reference="plain")
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


def tune_tree(
    target: LanguageModel,
    drafter: Growing,
    prompts: Any,
    *,
    sizes: Sequence[int] = SIZES,
    sampling: Sampling = _GREEDY,
    max_new_tokens: int = 64,
    repeats: int = 15,
    key: Array | None = None,
) -> Settings:
    """Finds how much to draft, and in what shape, for one text at a time on this machine.

    Args:
      target: the model that verifies.
      drafter: one with `in_tree`.
      prompts: as in `jaxspec.generate`, such as will be written behind.
      sizes: of the trees and chains whose costs are measured, rising; up to the last one they are
        considered.
      sampling: the options.
      max_new_tokens: written behind each prompt, to measure acceptance.
      repeats: timings of each cost.
      key: as in `jaxspec.generate`.

    Returns:
      `Settings`, for `jaxspec.generate`.

    Raises:
      ValueError: as `jaxspec.generate`; the sizes are not rising.
    """
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"sizes must be rising numbers of at least 1, got {sizes!r}.")
    acceptance = measure_acceptance(
        target, drafter, prompts, sampling=sampling, max_new_tokens=max_new_tokens, key=key
    )
    max_depth = getattr(drafter, "max_draft_tokens", None)
    topologies = list(
        dict.fromkeys(trees.sequoia(acceptance, size, max_depth) for size in sizes)
    )  # where no child has a chance, larger ones are the same
    cost = measure_tree_costs(
        target,
        drafter,
        topologies,
        chains=[size for size in sizes if size <= (max_depth or size)] or [1],
        sampling=sampling,
        repeats=repeats,
    )
    best = trees.plan(acceptance, cost.trees, chain_cost=cost.chains, max_depth=max_depth)
    measured = {
        "acceptance_by_depth": [[round(share, 4) for share in shares] for shares in acceptance],
        "seconds_of_a_round_by_nodes": [round(float(x), 6) for x in cost.trees.verify],
        "seconds_of_a_drafted_level": round(float(cost.trees.draft), 6),
        "seconds_of_a_round_by_length_of_chain": [round(float(x), 6) for x in cost.chains.verify],
        "predicted_tokens_per_step": round(1 + best.expected_accepted, 3),
        "predicted_speedup": round(best.speedup, 3),
    }
    if best.tree is None:
        return Settings(0, None, measured)
    size = best.tree.num_nodes
    return Settings(size, None if best.tree.is_chain else best.tree, measured)
