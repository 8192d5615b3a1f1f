"""Rules for trees: their laws, exactly, against the target's, and against each other.

Laws are enumerated, no numbers are drawn: what is left is the borders' rounding (see
test_exactness.py). The planted bugs move the law by more than _CAUGHT.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import Draft, verifiers
from jaxspec.testing import check_verifier, optimal_acceptance
from jaxspec.testing.enumeration import Block, TreeBlock, emitted_laws
from jaxspec.testing.verifier import random_laws
from jaxspec.types import NO_NODE
from tests.support.mutants import mutant

_CAUGHT = 1e-3
_SIZES = {"vocab_size": 3, "num_draft": 2}

_TREES = {
    "two children": (-1, -1),
    "3 children": (-1, -1, -1),
    "comb": (-1, 0, -1),
    "chains side by side": (-1, -1, 0, 1),
    "a wide end": (-1, 0, 0, -1),
    "a binary beginning": (-1, -1, 0, 0),
}

_RULES = {
    "recursive_rejection": verifiers.recursive_rejection(),
    "traversal": verifiers.traversal(),
    "recursive_rejection, independent": verifiers.recursive_rejection(with_replacement=True),
    "traversal, independent": verifiers.traversal(with_replacement=True),
    "k_seq": verifiers.k_seq(),
}


def expected_accepted(rule, blocks):
    return np.array(
        [
            sum(mass * (len(text) - 1) for text, mass in law.items())
            for law in emitted_laws(rule, blocks)
        ]
    )


def trees(parents, children, seeds):
    depths = [0]
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    sizes = {"vocab_size": 3, "num_draft": max(depths)}
    return [
        TreeBlock(
            random_laws([seed, 0], **sizes),
            random_laws([seed, 1], **sizes),
            parents=parents,
            children=children,
        )
        for seed in seeds
    ]


@pytest.mark.parametrize("name", _RULES)
def test_a_pair_of_children_is_judged_exactly(name):
    check_verifier(_RULES[name], parents=_TREES["two children"]).assert_passed()


@pytest.mark.exactness
@pytest.mark.parametrize("name", _RULES)
def test_a_branch_and_a_leaf_are_judged_exactly(name):
    check_verifier(_RULES[name], parents=_TREES["comb"]).assert_passed()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", _RULES)
@pytest.mark.parametrize("tree", [t for t in _TREES if t not in ("comb", "two children")])
def test_any_tree_is_judged_exactly(tree, name):
    check_verifier(_RULES[name], parents=_TREES[tree]).assert_passed()


@pytest.mark.law
@pytest.mark.parametrize("tree", ["two children", "a binary beginning"])
@pytest.mark.parametrize(
    "rule", [verifiers.descent(), verifiers.greedy()], ids=["descent", "greedy"]
)
def test_a_walk_down_is_exact(rule, tree):
    check_verifier(rule, parents=_TREES[tree], num_samples=20_000).assert_passed()


@pytest.mark.parametrize(
    ("rule", "chain_rule"),
    [
        (verifiers.recursive_rejection(), verifiers.rejection()),
        (verifiers.traversal(), verifiers.block()),
        (verifiers.k_seq(), verifiers.rejection()),
    ],
    ids=["recursive_rejection", "traversal", "k_seq"],
)
def test_on_a_chain_it_is_the_rule_for_chains(rule, chain_rule):
    pairs = [
        Block(random_laws([seed, 0], **_SIZES), random_laws([seed, 1], **_SIZES))
        for seed in range(3)
    ]
    laws = zip(emitted_laws(rule, pairs), emitted_laws(chain_rule, pairs), strict=True)
    for ours, theirs in laws:
        for text in set(ours) | set(theirs):
            assert ours.get(text, 0.0) == pytest.approx(theirs.get(text, 0.0), abs=1e-6)


def test_what_is_accepted_at_a_node_stays_below_the_bound_and_stronger_rules_accept_more():
    """One node, two and three children, by enumeration: α of each rule beside α*."""
    for parents in (_TREES["two children"], _TREES["3 children"]):
        for seed in range(4):
            (drawn,), (free,), (fixed,) = (
                trees(parents, children, [seed])
                for children in ("without_replacement", "independent", "top_k")
            )

            def bound(block):
                return optimal_acceptance(
                    block.target[()], [(set(text) - {3}, mass) for text, mass in block.texts()]
                )

            without = expected_accepted(verifiers.recursive_rejection(), [drawn])[0]
            independent = expected_accepted(_RULES["recursive_rejection, independent"], [free])[0]
            k_seq = expected_accepted(verifiers.k_seq(), [free])[0]
            deterministic = expected_accepted(verifiers.recursive_rejection(), [fixed])[0]
            assert independent <= bound(free) + 1e-6
            assert k_seq <= bound(free) + 1e-6
            assert (1 - np.exp(-1)) * bound(free) <= k_seq  # SpecTr's theorem
            assert independent <= without + 1e-6
            assert without <= bound(drawn) + 1e-6
            assert deterministic == pytest.approx(bound(fixed), abs=1e-6)  # it is optimal


@pytest.mark.law
@pytest.mark.parametrize("name", ["rejection", "block", *_RULES, "descent"])
def test_reports_tell_the_optimum_beside_what_is_accepted(name):
    rule = _RULES[name] if name in _RULES else getattr(verifiers, name)()
    parents = None if name in ("rejection", "block") else _TREES["two children"]
    report = check_verifier(rule, parents=parents)
    slack = 1e-6 if hasattr(rule, "judge") else 5 * 0.5 / np.sqrt(100_000)  # of the samples
    for case in report.cases:
        assert case.acceptance_rate <= case.optimal_acceptance_rate + slack, case
        if name == "rejection" or "top_k" in case.name:  # one draft, or a fixed set of them
            assert case.acceptance_rate == pytest.approx(case.optimal_acceptance_rate, abs=slack)
    assert "optimal" in str(report)


@pytest.mark.exactness
@pytest.mark.parametrize("children", ["without_replacement", "independent"])
def test_traversal_never_accepts_fewer_than_recursive_rejection(children):
    options = {"with_replacement": children == "independent"}
    gains = []
    for parents in (_TREES["comb"], _TREES["chains side by side"], _TREES["a binary beginning"]):
        blocks = trees(parents, children, range(4))
        more = expected_accepted(verifiers.traversal(**options), blocks)
        gains.extend(more - expected_accepted(verifiers.recursive_rejection(**options), blocks))
    assert min(gains) > -1e-6
    assert max(gains) > 1e-2  # and it is not the same rule


def test_without_replacement_accepts_no_fewer_than_independent_children_do():
    for parents in (_TREES["two children"], _TREES["comb"]):
        ours = expected_accepted(
            verifiers.recursive_rejection(), trees(parents, "without_replacement", range(4))
        )
        theirs = expected_accepted(
            verifiers.recursive_rejection(with_replacement=True),
            trees(parents, "independent", range(4)),
        )
        assert (ours > theirs - 1e-6).all()
        assert (ours > theirs + 1e-3).any()


@pytest.mark.parametrize("name", ["recursive_rejection", "traversal", "k_seq", "descent", "greedy"])
@pytest.mark.parametrize("why", ["beyond the length", "no node", "no token"])
def test_what_is_no_draft_is_never_accepted(name, why):
    """The target wants token 2 everywhere, and slot 1 would offer it."""
    target = jnp.log(jnp.tile(jnp.array([0.0, 0.0, 1.0]), (3, 1)))
    draft = Draft(
        tokens=jnp.array([0, 5 if why == "no token" else 2]),
        log_probs=jnp.log(jnp.full((2, 3), 1 / 3)),
        length=jnp.int32(1 if why == "beyond the length" else 2),
        parents=jnp.array([-1, NO_NODE if why == "no node" else -1]),
    )
    verdict = getattr(verifiers, name)()(jax.random.split(jax.random.key(0), 3), draft, target)
    assert verdict.num_accepted == 0
    assert verdict.tokens.tolist() == [2, -1, -1]
    assert verdict.path.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["recursive_rejection", "traversal", "k_seq"])
def test_siblings_drawn_otherwise_than_the_rule_believes_change_the_law(name):
    """What `takes_children` guards: every wrong pairing of drawn siblings is seen."""
    rule = _RULES[name]
    wrong = {"independent", "without_replacement"} - set(rule.takes_children)
    assert len(wrong) == 1
    blocks = trees(_TREES["two children"], wrong.pop(), range(4))
    distances = []
    for block, law in zip(blocks, emitted_laws(rule, blocks), strict=True):
        ours, exact = block.completed(law), block.target_law()
        distances.append(0.5 * sum(abs(ours.get(t, 0.0) - exact[t]) for t in exact))
    assert max(distances) > _CAUGHT


_WALKING = "jaxspec.verifiers.walking"
_MUTANTS = {
    "q not renormalised after a rejection": (
        ["recursive_rejection", "traversal"], _WALKING,
        ("return law / jnp.maximum(jnp.sum(law), jnp.finfo(jnp.float32).tiny)", "return law"),
    ),
    "siblings with replacement": (
        ["recursive_rejection", "traversal"], _WALKING,
        ("law = law.at[gone].set(0.0, mode=\"drop\")", "gone"),
    ),
    "p not reduced after a rejection": (
        ["recursive_rejection"], None,
        ("rest = remainder(left, drafted)", "rest = left"),
    ),
    "p not renormalised after a rejection": (
        ["recursive_rejection"], None,
        ("return left / jnp.maximum(jnp.sum(left), jnp.finfo(jnp.float32).tiny)", "return left"),
    ),
    "p of the parent behind an accepted child": (
        ["recursive_rejection"], None,
        ("left = jnp.where(passes, tree.target(walk.node), rest)",
         "left = jnp.where(passes, left, rest)"),
    ),
    "the residual without the share": (
        ["k_seq"], None,
        ("* (some / jnp.where(beta > 0, beta, 1.0))", ""),
    ),
    "one child more than there are": (
        ["k_seq"], None, ("jnp.sum(is_child))", "jnp.sum(is_child) + 1)"),
    ),
    "the weight of a parent stays": (
        ["traversal"], None,
        ("jnp.where(is_up, less, tour.weights[at])", "tour.weights[at]"),
    ),
    "a child entered as if its siblings had not failed": (
        ["traversal"], None,
        ("left, weight = tour.lefts[parent], tour.weights[parent]",
         "left, weight = jnp.where(is_down, tree.target(parent), tour.lefts[parent]), "
         "tour.weights[parent]"),
    ),
    "the weight of a node ignored in its residual": (
        ["traversal"], None,
        ("rest = jnp.maximum(weight * left - drafted, 0.0)",
         "rest = jnp.maximum(left - drafted, 0.0)"),
    ),
}  # fmt: skip


@pytest.mark.exactness
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, rule) for name, (rules, _, _) in _MUTANTS.items() for rule in rules],
)
def test_planted_bug_in_a_rule_for_trees_is_caught(name, rule):
    _, within, patch = _MUTANTS[name]
    broken = mutant(f"jaxspec.verifiers.{rule}", patch, within=within)
    report = check_verifier(getattr(broken, rule)(), parents=_TREES["comb"])
    assert not report.passed, report
    assert report.total_variation > _CAUGHT


def test_the_bound_is_that_of_the_linear_program():
    """α* of two independent draws, against transport solved by hand for V = 2."""
    p, q = np.array([0.9, 0.1]), np.array([0.4, 0.6])
    drafts = [({x, y}, float(q[x] * q[y])) for x, y in itertools.product(range(2), repeat=2)]
    # Only both drafts on token 1 (0.36) waste mass: token 1 can take 0.1 of it.
    assert optimal_acceptance(p, drafts) == pytest.approx(1 - (0.36 - 0.1))
    with pytest.raises(ValueError, match="add up to 1"):
        optimal_acceptance(p, drafts[:2])
    with pytest.raises(ValueError, match="V ≤ 16"):
        optimal_acceptance(np.full(17, 1 / 17), drafts)


def test_a_rule_for_chains_and_a_wrong_tree_are_refused():
    with pytest.raises(ValueError, match="takes_children"):
        check_verifier(verifiers.rejection(), parents=(-1, -1))
    with pytest.raises(ValueError, match="earlier node"):
        check_verifier(verifiers.descent(), parents=(-1, 1))
