"""Shapes of trees, and what a forward over one is told."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import Profile, trees
from jaxspec.types import NO_NODE

_TREES = {
    "chain": trees.chain(4),
    "kary": trees.kary((3, 2)),
    "comb": trees.comb((3, 2, 2)),
    "sequoia": trees.sequoia([0.6, 0.2, 0.1], 9),
    "one node": trees.chain(1),
}


def ways_of(parents, tokens):
    """The tokens on the way to each node, in plain Python."""
    ways = []
    for parent, token in zip(parents, tokens, strict=True):
        ways.append([*(ways[parent] if parent >= 0 else []), token])
    return [[], *ways]


@pytest.mark.parametrize("name", _TREES)
def test_a_node_sees_its_ancestors_and_itself(name):
    tree = _TREES[name]
    numbers = np.arange(1, tree.num_nodes + 1)
    ways = ways_of(tree.parents, numbers.tolist())
    sees = np.asarray(jax.jit(trees.ancestors)(jnp.array(tree.parents)))
    for node, way in enumerate(ways):
        assert np.flatnonzero(sees[node]).tolist() == sorted({0, node, *way})
    found, depths = jax.jit(trees.paths)(jnp.array(tree.parents), jnp.array(numbers) * 10)
    assert depths.tolist() == [0, *tree.depths]
    for node, way in enumerate(ways):
        assert found[node, : len(way)].tolist() == [10 * number for number in way]


def test_a_slot_without_a_draft_sees_itself_and_is_seen_by_none():
    sees = np.asarray(trees.ancestors(jnp.array([-1, NO_NODE, 0, NO_NODE])))
    assert sees.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("name", _TREES)
def test_a_topology_knows_its_levels_and_ranks(name):
    tree = _TREES[name]
    assert tree.depths == tuple(len(way) for way in ways_of(tree.parents, tree.parents)[1:])
    assert tree.depth == max(tree.depths)
    nodes = [n for first, end in tree.levels for n in range(first, end)]
    assert nodes == list(range(tree.num_nodes))
    assert all(set(tree.depths[a:b]) == {d} for d, (a, b) in enumerate(tree.levels, 1))
    for node, rank in enumerate(tree.ranks):
        siblings = [i for i, p in enumerate(tree.parents) if p == tree.parents[node]]
        assert siblings[rank] == node
    assert tree.is_chain == (name in ("chain", "one node"))
    assert hash(tree) == hash(trees.Topology(tuple(tree.parents)))


def all_trees(size, acceptance):
    """Every tree of so many nodes whose nodes have all their elder siblings."""
    found = {frozenset()}
    for _ in range(size):
        longer = set()
        for nodes in found:
            for head in [(), *nodes]:
                rank = sum(path[:-1] == head for path in nodes)
                if rank < len(acceptance):
                    longer.add(nodes | {(*head, rank)})
        found = longer
    return [trees.from_paths(nodes) for nodes in found]


@pytest.mark.parametrize(
    "acceptance", [[0.6, 0.2, 0.1], [0.9, 0.05], [0.4, 0.3, 0.2, 0.1], [0.5, 0.5], [1.0, 0.0]]
)
@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_sequoia_is_the_best_of_all_trees_of_its_size(size, acceptance):
    best = max(trees.expected_accepted(t, acceptance) for t in all_trees(size, acceptance))
    ours = trees.sequoia(acceptance, size)
    assert ours.num_nodes <= size
    assert trees.expected_accepted(ours, acceptance) == pytest.approx(best)


@pytest.mark.parametrize("size", [2, 5, 6])
def test_sequoia_follows_acceptance_that_changes_with_depth(size):
    acceptance = [[0.5, 0.3, 0.1], [0.8, 0.1], [0.3, 0.25, 0.2]]
    best = max(trees.expected_accepted(t, acceptance) for t in all_trees(size, [0, 0, 0]))
    ours = trees.sequoia(acceptance, size)
    assert trees.expected_accepted(ours, acceptance) == pytest.approx(best)


@pytest.mark.parametrize("acceptance", [[0.6, 0.2, 0.1], [0.3, 0.25], [0.9], [0.1]])
@pytest.mark.parametrize(
    ("verify", "level"),
    [([1, 1, 1.1, 1.2, 1.6, 1.7], 0.1), ([1, 1, 1, 1, 1, 1], 0.4), ([1, 1.5, 2, 2.5, 3, 3.5], 0)],
)
def test_the_plan_is_the_best_of_all_trees(verify, level, acceptance):
    cost = Profile(jnp.array(verify, float), jnp.float32(level), jnp.float32(0.2))
    ours = trees.plan(acceptance, cost)
    speeds = [1.0]
    for size in range(1, len(verify)):
        for tree in all_trees(size, acceptance):
            seconds = verify[size] + tree.depth * level + 0.2
            speeds.append((1 + trees.expected_accepted(tree, acceptance)) * 1.2 / seconds)
    assert ours.speedup == pytest.approx(max(speeds))
    assert (ours.tree is None) == (ours.speedup == 1.0)


@pytest.mark.parametrize("acceptance", [[0.6, 0.2, 0.1], [0.9, 0.02]])
@pytest.mark.parametrize("per_draft", [0.1, 0.3, 2.0])
def test_chains_are_planned_at_their_own_cost(per_draft, acceptance):
    """Of chains up to the longest that was timed, and trees that are none, the best."""
    verify = [1, 1.1, 1.2, 1.3, 1.4, 1.5]
    cost = Profile(jnp.array(verify, float), jnp.float32(0.1), jnp.float32(0.0))
    of_chains = Profile(1 + per_draft * jnp.arange(4.0), jnp.float32(0), jnp.float32(0))
    ours = trees.plan(acceptance, cost, chain_cost=of_chains)
    seconds = {trees.chain(n): 1 + n * per_draft for n in range(1, 4)}
    for size in range(2, len(verify)):
        for tree in all_trees(size, acceptance):
            if not tree.is_chain:
                seconds[tree] = verify[size] + tree.depth * 0.1
    speeds = {t: (1 + trees.expected_accepted(t, acceptance)) / x for t, x in seconds.items()}
    assert ours.speedup == pytest.approx(max(1.0, *speeds.values()))
    assert ours.tree is None or speeds[ours.tree] == pytest.approx(ours.speedup)
    kept = trees.plan(acceptance, cost, chain_cost=of_chains, max_depth=1)
    assert kept.tree is None or kept.tree.depth == 1


def test_a_plan_keeps_to_a_depth():
    cost = Profile(jnp.ones(7), jnp.float32(0), jnp.float32(0))
    assert trees.plan([0.9, 0.05], cost).tree == trees.chain(6)
    assert trees.plan([0.9, 0.05], cost, max_depth=3).tree.depth == 3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_sequoia_keeps_to_a_depth(depth):
    acceptance = [0.7, 0.2, 0.1]
    best = (
        max(
            trees.expected_accepted(t, acceptance)
            for t in all_trees(6, acceptance)
            if t.depth <= depth
        )
        if depth > 1
        else 1.0
    )
    ours = trees.sequoia(acceptance, 6, max_depth=depth)
    assert ours.depth <= depth
    assert trees.expected_accepted(ours, acceptance) == pytest.approx(best)


def test_expected_accepted_is_what_a_walk_with_these_chances_makes():
    """By counting: at each node, child b is accepted with p_b, or none."""
    acceptance, tree = [0.5, 0.25], trees.comb((2, 2))

    def accepted(node):
        children = [i for i, p in enumerate(tree.parents) if p == node]
        return sum(p * (1 + accepted(c)) for p, c in zip(acceptance, children, strict=False))

    assert trees.expected_accepted(tree, acceptance) == pytest.approx(accepted(-1))


def test_wrong_shapes_are_refused():
    for parents in ((), (0,), (-2,), (-1, 2), (-1, 0.5)):
        with pytest.raises(ValueError, match="earlier node"):
            trees.Topology(parents)
    for parents in ((-1, 0, -1), (-1, -1, 1, 0)):
        with pytest.raises(ValueError, match="level by level"):
            trees.Topology(parents)
    for call in (
        lambda: trees.kary(()),
        lambda: trees.kary((2, 0)),
        lambda: trees.comb((0,)),
        lambda: trees.chain(0),
        lambda: trees.from_paths([]),
        lambda: trees.from_paths([(-1,)]),
        lambda: trees.sequoia([0.2, 0.6], 3),
        lambda: trees.sequoia([1.2], 3),
        lambda: trees.sequoia([], 3),
        lambda: trees.sequoia([0.5], 0),
        lambda: trees.sequoia([0.5], 3, max_depth=0),
    ):
        with pytest.raises(ValueError, match=r"tree|takes|path|acceptance|at least"):
            call()


def test_helpers_make_the_trees_they_name():
    assert trees.comb((1, 1, 1)) == trees.chain(3) == trees.kary((1, 1, 1))
    assert trees.comb((2, 3)).parents == (-1, -1, 0, 0, 0)
    assert trees.kary((2, 1)).parents == (-1, -1, 0, 1)
    assert trees.from_paths(itertools.product(range(2), repeat=2)) == trees.kary((2, 2))
