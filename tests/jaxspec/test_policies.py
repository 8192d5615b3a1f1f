"""Policies against schedules written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

import jaxspec
from jaxspec import Draft, Outcome, Verdict, policies


def outcome(*, drafted, accepted, active=None, most=6):
    """A round with these draft lengths and acceptances, i32[B]."""
    rows = len(drafted)
    draft = Draft(jnp.zeros((rows, most), jnp.int32), None, jnp.asarray(drafted, jnp.int32))
    accepted = jnp.asarray(accepted, jnp.int32)
    active = jnp.ones(rows, bool) if active is None else jnp.asarray(active)
    return Outcome(
        draft=draft,
        verdict=Verdict(jnp.full((rows, most + 1), -1, jnp.int32), accepted),
        start=jnp.zeros(rows, jnp.int32),
        num_emitted=jnp.where(active, accepted + 1, 0),
        num_accepted=accepted,
        is_active=active,
        target_log_probs=jnp.zeros((rows, most + 1, 2)),
        hidden=(),
    )


def lengths_over(policy, rounds, most=6):
    """What one row drafts, round by round, when these shares of its drafts are accepted."""
    state, lengths = policy.init(1), []
    update = jax.jit(lambda policy, state, outcome: policy.update(state, outcome))
    for is_whole in rounds:
        drafted = int(jnp.clip(policy.num_draft(state), 0, most)[0])
        lengths.append(drafted)
        accepted = drafted if is_whole else drafted - 1
        state = update(policy, state, outcome(drafted=[drafted], accepted=[accepted], most=most))
    return [*lengths, int(policy.num_draft(state)[0])]


# HF: +2 after a whole acceptance, else -1, never below 1; here never above K = 6 either.
HF = [True, False, False, False, False, False, False, True, True, True, False]
HF_LENGTHS = [4, 6, 5, 4, 3, 2, 1, 1, 3, 5, 6, 5]


def test_heuristic_is_the_schedule():
    assert lengths_over(policies.heuristic(), HF) == HF_LENGTHS


@pytest.mark.parametrize(
    "patch",
    [
        ("num_accepted >= outcome.draft.length", "num_accepted > 0"),
        ("jnp.minimum(state, most) + step", "jnp.minimum(state, most) + 0 * step"),
        ("jnp.clip(length, self.minimum, most)", "jnp.minimum(length, most)"),
        ("-jnp.asarray(self.decrease)", "-jnp.asarray(self.increase)"),
    ],
)
def test_planted_bugs_break_the_schedule(patch):
    module = mutant("jaxspec.policies.heuristic", patch)
    assert lengths_over(module.heuristic(), HF) != HF_LENGTHS


def test_heuristic_steps_and_bounds():
    policy = policies.heuristic(2, increase=3, decrease=2, minimum=1)
    assert lengths_over(policy, [True, True, False, False, False], most=7) == [2, 5, 7, 5, 3, 1]
    # A start above K is cut to K, and a failure is felt at once.
    assert lengths_over(policies.heuristic(20), [False, False], most=3) == [3, 2, 1]
    # A minimum above K cannot be kept.
    assert lengths_over(policies.heuristic(5, minimum=5), [False, True], most=3) == [3, 3, 3]
    # Values may be arrays, and one a row.
    policy = policies.heuristic(jnp.array([1, 4]), minimum=jnp.int32(2))
    state = policy.update(policy.init(2), outcome(drafted=[1, 4], accepted=[0, 4]))
    assert state.tolist() == [2, 6]


def test_heuristic_rows_learn_only_from_their_own_drafts():
    policy = policies.heuristic(3)
    state = policy.init(5)
    round_ = outcome(
        drafted=[3, 3, 3, 0, 0],
        accepted=[3, 2, 3, 0, 0],
        active=[True, True, False, True, False],
    )
    assert policy.update(state, round_).tolist() == [5, 2, 3, 3, 3]


@pytest.mark.parametrize("length", [0, 4, np.int32(4), jnp.array([1, 2])])
def test_fixed(length):
    policy = policies.fixed(length)
    state = policy.init(2)
    expected = np.broadcast_to(length, 2).tolist()
    assert state.dtype == jnp.int32
    for _ in range(2):
        assert policy.num_draft(state).tolist() == expected
        state = policy.update(state, outcome(drafted=[2, 0], accepted=[0, 0]))


@pytest.mark.parametrize("policy", [policies.fixed(2), policies.heuristic()])
def test_neither_stops_early(policy):
    signals = jaxspec.Signals(jnp.zeros(3, jnp.int32), jnp.full((3, 2), -jnp.inf))
    goes_on = policy.keep_drafting(policy.init(3), signals)
    assert (goes_on.dtype, goes_on.tolist()) == (bool, [True] * 3)


@pytest.mark.parametrize("policy", [policies.fixed(2), policies.heuristic()])
def test_policies_are_pytrees(policy):
    leaves, structure = jax.tree.flatten(policy)
    assert leaves
    assert jax.tree.unflatten(structure, leaves) == policy
    assert jax.jit(lambda p: p.num_draft(p.init(3)))(policy).tolist() == [leaves[0]] * 3


@pytest.mark.parametrize("length", [-1, -1.0, 2.5])
def test_fixed_refuses_negative_numbers(length):
    with pytest.raises(ValueError, match="length must be a whole number"):
        policies.fixed(length)


@pytest.mark.parametrize(
    "numbers",
    [
        {"initial": -1},
        {"initial": 0},  # below the default minimum
        {"initial": 3, "minimum": 4},
        {"minimum": 0},  # a row that drafts nothing learns nothing, and would never draft again
        {"initial": 2.5},
        {"increase": -1},
        {"decrease": -2},
    ],
)
def test_heuristic_refuses_numbers_out_of_order(numbers):
    with pytest.raises(ValueError, match="heuristic needs whole numbers, 1 ≤ minimum ≤ initial"):
        policies.heuristic(**numbers)
