"""Trees of drafts: their shapes, and what a target forward over one needs to know.

A topology is fixed when traced, and numbers its nodes level by level: the nodes of a level stand
together, and the children of a node follow each other, the likeliest first. The pending token is
no node of it; a node's parent is a node before it, or -1 for the pending token. A beam fixes the
number of nodes alone: a drafter finds the shape as it drafts, in each round another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.profile import Profile
from jaxspec.types import NO_NODE

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class Topology:
    """The shape of a tree; hashable, compares by value.

    Attributes:
      parents: of each node, an earlier one or -1 for the pending token, level by level.

    Raises:
      ValueError: the parents are no such tree, or there is none.

    Example:
      >>> tree = Topology((-1, -1, 0, 0, 1))
      >>> tree.num_nodes, tree.depth, tree.depths
      (5, 2, (1, 1, 2, 2, 2))
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or not all(
            isinstance(p, (int, np.integer)) and -1 <= p < i for i, p in enumerate(self.parents)
        ):
            raise ValueError(
                "a tree's parents must name an earlier node each, or -1 for the pending token, got "
                f"{self.parents!r}."
            )
        object.__setattr__(self, "parents", tuple(int(p) for p in self.parents))
        order = list(zip(self.depths, self.parents, strict=True))
        if order != sorted(order):
            raise ValueError(
                "a tree's nodes must be numbered level by level, in the order of their parents; "
                "trees.from_paths brings any tree into that order."
            )

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """The depth of each node; that of the pending token is 0."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def num_nodes(self) -> int:
        """K."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """Of the deepest node: the most drafts that a round can accept."""
        return self.depths[-1]

    @property
    def is_chain(self) -> bool:
        """Whether no two nodes are siblings."""
        return self.depth == self.num_nodes

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        """How many siblings stand before each node."""
        return tuple(self.parents[:i].count(p) for i, p in enumerate(self.parents))

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """The first node of each level from depth 1 on, and the first behind it."""
        return tuple(
            (self.depths.index(d), self.num_nodes - self.depths[::-1].index(d))
            for d in range(1, self.depth + 1)
        )


@dataclasses.dataclass(frozen=True)
class Beam:
    """A tree that grows where the drafter sees a chance, in each round another; hashable.

    On each level, the nodes that the drafter finds likeliest, by the product of q on the way to
    them, are given children, the others none. Without `best` the tree is made of all nodes that
    were drafted. With it, only the likeliest of them are verified: as that would drop tokens for
    what they are, such trees take the likeliest children alone (`children="top_k"`), not drawn.

    Attributes:
      width: the most nodes of a level that have children.
      depth: of the deepest node.
      branching: children of a node; None: `width`.
      best: how many nodes are verified; None: all that are drafted.

    Raises:
      ValueError: a size is below 1, or `best` is more than what is drafted.

    References:
      Li et al., EAGLE-2, arXiv 2406.16858 (width 10, depth 6, best 60).

    Example:
      >>> Beam(width=2, depth=3).num_nodes, Beam(width=2, depth=3, best=6).num_nodes
      (10, 6)
    """

    width: int
    depth: int
    branching: int | None = None
    best: int | None = None

    def __post_init__(self) -> None:
        sizes = [self.width, self.depth, self.num_children]
        if not all(isinstance(size, (int, np.integer)) and size >= 1 for size in sizes):
            raise ValueError(f"the sizes of a beam must be whole numbers of at least 1: {self!r}.")
        if self.best is not None and not 1 <= self.best <= self.num_drafted:
            raise ValueError(
                f"best must be 1 … {self.num_drafted}, the nodes that are drafted: {self!r}."
            )

    @property
    def num_children(self) -> int:
        """Of each node that has some."""
        return self.width if self.branching is None else self.branching

    @property
    def widths(self) -> tuple[int, ...]:
        """How many nodes have children on each level, from that of the pending token on."""
        widths = [1]
        while len(widths) < self.depth:
            widths.append(min(self.width, widths[-1] * self.num_children))
        return tuple(widths)

    @property
    def num_drafted(self) -> int:
        """Nodes, before the best are chosen."""
        return sum(self.widths) * self.num_children

    @property
    def num_nodes(self) -> int:
        """K."""
        return self.num_drafted if self.best is None else self.best


def from_paths(paths: Sequence[Sequence[int]]) -> Topology:
    """A tree of the nodes that paths lead to.

    Args:
      paths: each names a node by the ranks of the children on the way to it, from the pending
        token down: (0, 2) is the third child of the first child. A node's elder siblings and its
        ancestors belong to the tree.

    Returns:
      A `Topology`.

    Raises:
      ValueError: there are no paths, or one is empty or has a negative rank.

    Example:
      >>> from_paths([(0, 1), (1,)]).parents
      (-1, -1, 0, 0)
    """
    nodes: set[tuple[int, ...]] = set()
    for path in map(tuple, paths):
        if not path or min(path) < 0:
            raise ValueError(f"a path is made of ranks of at least 0, got {path!r}.")
        for depth in range(1, len(path) + 1):
            head = path[: depth - 1]
            nodes.update((*head, rank) for rank in range(path[depth - 1] + 1))
    order = sorted(nodes, key=lambda path: (len(path), path))
    number = {(): -1} | {path: i for i, path in enumerate(order)}
    return Topology(tuple(number[path[:-1]] for path in order))


def chain(depth: int) -> Topology:
    """One node behind the other.

    Args:
      depth: nodes.

    Example:
      >>> chain(3).parents
      (-1, 0, 1)
    """
    return Topology(tuple(range(-1, depth - 1)))


def kary(branching: Sequence[int]) -> Topology:
    """Every node of a level has the same number of children.

    Args:
      branching: the number of children at each depth, from the pending token on.

    Returns:
      A `Topology`.

    Raises:
      ValueError: a number is below 1, or there is none.

    Example:
      >>> kary((2, 2)).parents
      (-1, -1, 0, 0, 1, 1)
    """
    if not branching or min(branching) < 1:
        raise ValueError(f"kary takes at least one number of children ≥ 1, got {branching!r}.")
    parents: list[int] = []
    level = [-1]
    for count in branching:
        first = len(parents)
        parents += [node for node in level for _ in range(count)]
        level = list(range(first, len(parents)))
    return Topology(tuple(parents))


def comb(widths: Sequence[int]) -> Topology:
    """A chain of first children, each with siblings that have no children.

    Args:
      widths: the number of children at each depth of the chain, from the pending token on.

    Returns:
      A `Topology`.

    Raises:
      ValueError: a number is below 1, or there is none.

    Example:
      >>> comb((3, 2, 1)).parents
      (-1, -1, -1, 0, 0, 3)
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"comb takes at least one number of children ≥ 1, got {widths!r}.")
    return from_paths([(0,) * depth + (count - 1,) for depth, count in enumerate(widths)])


def sequoia(
    acceptance: Sequence[float] | Sequence[Sequence[float]],
    num_nodes: int,
    max_depth: int | None = None,
) -> Topology:
    """The tree of a given size that is expected to have most accepted.

    With p_b, the probability that the b-th child of a node is accepted (its elder siblings having
    failed), a node is worth the product of the p on the way to it, and a tree the sum over its
    nodes. Where p falls, the best tree is that of the nodes of most worth: each node's parent and
    elder siblings are worth no less.

    Args:
      acceptance: p_1, p_2, …, falling, in [0, 1]; or such a list for each depth, whose last one
        counts for what is deeper.
      num_nodes: K ≥ 1.
      max_depth: the deepest node; None: as deep as pays.

    Returns:
      A `Topology`; smaller than `num_nodes` where no further child has a chance.

    Raises:
      ValueError: the probabilities do not fall, or lie outside [0, 1]; a size is below 1.

    References:
      Chen et al., Sequoia, arXiv 2402.12374.

    Example:
      >>> sequoia([0.6, 0.2], 4).parents
      (-1, -1, 0, 2)
      >>> round(expected_accepted(sequoia([0.6, 0.2], 4), [0.6, 0.2]), 3)
      1.376
    """
    shares = _shares(acceptance)
    if num_nodes < 1 or (max_depth is not None and max_depth < 1):
        raise ValueError(
            f"num_nodes and max_depth must be at least 1, got {num_nodes} and {max_depth}."
        )
    # Each step takes the best node that a tree may grow by: the next sibling of a node that it
    # has, or the first child of one. Of equal ones the shallower.
    frontier: list[tuple[float, int, tuple[int, ...]]] = [(-shares[0][0], 1, (0,))]
    chosen: list[tuple[int, ...]] = []
    while frontier and len(chosen) < num_nodes:
        best = min(frontier)
        frontier.remove(best)
        worth, depth, path = -best[0], best[1], best[2]
        if worth == 0 and chosen:
            break
        chosen.append(path)
        rank, here, deeper = path[-1], _at(shares, depth), _at(shares, depth + 1)
        if rank + 1 < len(here):
            parent = worth / here[rank] if here[rank] else 0.0
            frontier.append((-parent * here[rank + 1], depth, (*path[:-1], rank + 1)))
        if max_depth is None or depth < max_depth:
            frontier.append((-worth * deeper[0], depth + 1, (*path, 0)))
    return from_paths(chosen)


def expected_accepted(
    tree: Topology, acceptance: Sequence[float] | Sequence[Sequence[float]]
) -> float:
    """How many drafts of a tree are accepted, where the b-th child of a node is with p_b.

    Args:
      tree: the shape.
      acceptance: as for `sequoia`; children beyond what it names have no chance.

    Example:
      >>> expected_accepted(kary((2,)), [0.5, 0.25])
      0.75
    """
    shares = _shares(acceptance)
    worth: list[float] = []
    for parent, rank, depth in zip(tree.parents, tree.ranks, tree.depths, strict=True):
        here = _at(shares, depth)
        share = here[rank] if rank < len(here) else 0.0
        worth.append(share * (1.0 if parent < 0 else worth[parent]))
    return sum(worth)


def _shares(acceptance: Any) -> list[list[float]]:
    """Checked, one list for each depth."""
    rows = acceptance if np.ndim(acceptance[0] if len(acceptance) else 0.0) else [acceptance]
    shares = [[float(p) for p in row] for row in rows]
    if not all(row and row == sorted(row)[::-1] and 0 <= row[-1] <= row[0] <= 1 for row in shares):
        raise ValueError(
            "acceptance must be the probabilities of the first, second, … child, falling; got "
            f"{acceptance}."
        )
    return shares


def _at(shares: list[list[float]], depth: int) -> list[float]:
    return shares[min(depth, len(shares)) - 1]


class Plan(NamedTuple):
    """What `plan` chooses.

    Attributes:
      tree: the shape; None: drafting does not pay.
      expected_accepted: E[accepted drafts] of a round.
      speedup: predicted tokens per second over plain decoding.
    """

    tree: Topology | None
    expected_accepted: float
    speedup: float


def plan(
    acceptance: Sequence[float] | Sequence[Sequence[float]],
    cost: Profile,
    *,
    chain_cost: Profile | None = None,
    max_depth: int | None = None,
) -> Plan:
    """The tree, a chain or none included, that promises most tokens per second.

    Of every size and depth `sequoia` makes the best tree; a round over it emits 1 + E[accepted]
    tokens and takes v(K) for the forward, c for each level drafted, and the overhead.

    Args:
      acceptance: as for `sequoia`; measured.
      cost: measured; `verify` up to as many nodes as may be drafted, `draft` for one level.
      chain_cost: the same of chains, which run without masks and compaction; longer ones are left
        out. None: they cost what trees of their sizes do.
      max_depth: the deepest that the drafter drafts; None: no limit.

    Returns:
      A `Plan`.

    Raises:
      ValueError: as `sequoia`.

    References:
      Chen et al., Sequoia, arXiv 2402.12374, section 4.3.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxspec import Profile
      >>> cost = Profile(jnp.array([1.0, 1.0, 1.1, 1.2, 1.6]), jnp.float32(0.1), jnp.float32(0.0))
      >>> best = plan([0.6, 0.2], cost)
      >>> best.tree.parents, round(best.speedup, 2)
      ((-1, -1, 0), 1.54)
      >>> plan([0.05], cost).tree is None
      True
    """
    shapes = [
        sequoia(acceptance, size, depth)
        for size in range(1, len(cost.verify))
        for depth in range(1, min(size, max_depth or size) + 1)
    ]
    candidates = [(cost, shapes)]
    if chain_cost is not None:
        longest = len(chain_cost.verify) - 1
        chains = [chain(length) for length in range(1, min(longest, max_depth or longest) + 1)]
        candidates = [(chain_cost, chains), (cost, [tree for tree in shapes if not tree.is_chain])]
    plain = float(cost.verify[0]) + float(cost.overhead)
    best = Plan(None, 0.0, 1.0)
    for own, its_shapes in candidates:
        verify = [float(x) for x in own.verify]
        level, overhead = float(own.draft), float(own.overhead)
        for tree in its_shapes:
            accepted = expected_accepted(tree, acceptance)
            seconds = verify[tree.num_nodes] + tree.depth * level + overhead
            speedup = (1 + accepted) * plain / seconds
            if speedup > best.speedup:
                best = Plan(tree, accepted, speedup)
    return best


# ---------------------------------------------------------------------------------------------
# What a forward needs: functions of one row's parents, data or not.


def ancestors(parents: Any) -> Array:
    """Which nodes each node sees: itself and those on the way to it.

    Args:
      parents: i32[K]; of a slot without a draft `NO_NODE`.

    Returns:
      bool[K + 1, K + 1] over nodes 0, the pending token, to K: the mask of a target forward. A
      slot without a draft sees itself alone.

    Example:
      >>> ancestors(jnp.array([-1, 0, -1])).astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    """
    parents = jnp.asarray(parents, jnp.int32)
    size = parents.shape[0] + 1
    nodes = jnp.arange(size)
    above = jnp.concatenate([jnp.full((1,), NO_NODE, jnp.int32), parents])
    sees = (nodes[None] == nodes[:, None]) | (nodes[None] == above[:, None] + 1)
    # Doubling: after n steps a node sees 2ⁿ generations.
    for _ in range(max(size - 1, 1).bit_length()):
        sees = jnp.matmul(sees.astype(jnp.float32), sees.astype(jnp.float32)) > 0
    return sees


def paths(parents: Any, tokens: Array) -> tuple[Array, Array]:
    """The tokens on the way to each node, the pending token left out.

    Args:
      parents: i32[K].
      tokens: i32[K].

    Returns:
      i32[K + 1, K], behind each node's own path garbage; and i32[K + 1], the nodes' depths.

    Example:
      >>> ways, depths = paths(jnp.array([-1, 0, -1]), jnp.array([7, 8, 9]))
      >>> [way[:depth] for way, depth in zip(ways.tolist(), depths.tolist())]
      [[], [7], [7, 8], [9]]
    """
    sees = ancestors(parents)[:, 1:]  # of the drafts
    depths = jnp.sum(sees, axis=1, dtype=jnp.int32)
    size = tokens.shape[0]

    def of_node(is_above: Array) -> Array:
        at = jnp.where(is_above, jnp.cumsum(is_above) - 1, size)  # parents stand before children
        return jnp.zeros((size,), jnp.int32).at[at].set(tokens.astype(jnp.int32), mode="drop")

    return jax.vmap(of_node)(sees), depths
