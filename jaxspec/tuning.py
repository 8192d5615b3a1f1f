"""Finding what is fastest, tree or chain: how often each child is accepted, and the choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import costs, pytree, trees
from jaxspec.generate import generate
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
"""Of the trees and chains that are timed."""


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
    drafter: costs.Growing,
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


def tune_tree(
    target: LanguageModel,
    drafter: costs.Growing,
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
    cost = costs.measure_tree_costs(
        target,
        drafter,
        topologies,
        sorted({min(size, max_depth or size) for size in sizes}),
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
