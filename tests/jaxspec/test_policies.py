"""Policies against schedules written out by hand."""

import importlib
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

import jaxspec
from jaxspec import Draft, Outcome, Profile, Verdict, drafters, policies, pytree
from jaxspec.testing import random_logits, table_model

# The package gives factory and module one name: these are the modules.
goodput_module = importlib.import_module("jaxspec.policies.goodput")
guarded_module = importlib.import_module("jaxspec.policies.guarded")


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


def test_confidence_by_what_the_drafter_predicts():
    policy = policies.confidence(0.4)
    state = policy.init(3)
    assert policy.num_draft(state).tolist() == [2**31 - 1] * 3
    sure = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]]))
    signals = jaxspec.Signals(jnp.zeros(3, jnp.int32), sure)
    assert policy.keep_drafting(state, signals).tolist() == [True] * 3
    signals = signals._replace(acceptance=jnp.array([0.41, 0.39, 0.4]))
    assert policy.keep_drafting(state, signals).tolist() == [True, False, True]
    assert policies.confidence(0).keep_drafting(state, signals).tolist() == [True] * 3
    of_each = policies.confidence(jnp.array([0.6, 0.6, 0.8]))
    signals = signals._replace(acceptance=None)
    assert of_each.keep_drafting(state, signals).tolist() == [True, False, False]
    state = policy.update(state, outcome(drafted=[2, 0, 1], accepted=[0, 0, 1]))
    assert state.tolist() == [0] * 3


def test_a_model_predicts_its_acceptance():
    """The product of its highest probabilities, at temperature 1 where it drafts greedily."""
    table = np.zeros((5, 5), np.float32)  # each token is followed by the next, more or less surely
    table[range(5), [1, 2, 3, 4, 0]] = [4.0, 1.0, 3.0, 0.5, 2.0]
    target = table_model(table, order=1)
    best = np.asarray(jnp.max(jax.nn.softmax(table, axis=-1), axis=-1))
    follows = np.argmax(table, axis=-1)
    for threshold in (0.05, 0.15, 0.25, 0.4):
        out = jaxspec.generate(
            target, [[token] for token in range(5)], drafter=drafters.model(target),
            policy=policies.confidence(threshold), num_draft_tokens=4, max_new_tokens=5,
            sampling=jaxspec.Sampling(temperature=0),
        )  # fmt: skip
        for token in range(5):
            drafted, left, at = 0, 5, token
            while left:
                length, hope = 0, 1.0
                while length < min(4, left - 1) and hope * best[at] >= threshold:
                    hope, at, length = hope * best[at], follows[at], length + 1
                drafted, left, at = drafted + length, left - length - 1, follows[at]
            assert out.stats.num_draft_tokens[token] == drafted
        if threshold == 0.4:
            assert len(set(out.stats.num_draft_tokens.tolist())) > 1


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_confidence_refuses(threshold):
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1"):
        policies.confidence(threshold)


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


# ---------------------------------------------------------------------------------------------
# Goodput: against float64, and against the law of what it estimates.


def profile_of(verify, draft=0.0, overhead=0.0):
    return Profile(jnp.asarray(verify, jnp.float32), jnp.float32(draft), jnp.float32(overhead))


def round_costs(profile):
    """In float64, of lengths 0 … K."""
    verify, draft, overhead = (np.asarray(x, np.float64) for x in jax.tree.leaves(profile))
    return np.arange(verify.size) * draft + verify + overhead


def goodputs(costs, rates, weights):
    """Σ_b E[N_b] / cost of each length, in float64, term by term."""
    powers = np.asarray(rates)[:, None] ** np.arange(len(costs))  # [B, K + 1]
    return np.asarray(weights) @ np.cumsum(powers, axis=1) / costs


@jax.jit
def play(policy, would_accept):
    """Rounds of a batch that accepts at most i32[T, B] drafts of each row in each round.

    Returns the lengths drafted i32[T, B], the tokens emitted i32[T, B], the state of each round.
    """
    most = 6

    def step(state, would_accept):
        drafted = jnp.clip(policy.num_draft(state), 0, most)
        accepted = jnp.minimum(would_accept, drafted)
        state = policy.update(state, outcome(drafted=drafted, accepted=accepted, most=most))
        return state, (drafted, accepted + 1, state)

    return jax.lax.scan(step, policy.init(would_accept.shape[1]), would_accept)[1]


def always(accepted, rounds):
    return jnp.full((rounds, 1), accepted, jnp.int32)


def check_choices(module, cases=150):
    """The brute-force argmax, whatever the costs and the evidence; one length for all rows."""
    rng = np.random.default_rng(0)

    def f32(x):
        return jnp.asarray(x, jnp.float32)

    for most, rows in ((0, 1), (1, 3), (4, 1), (4, 5), (10, 2)):
        steps = rng.exponential(size=(cases, most)) * 10.0 ** rng.uniform(-3, 0, (cases, 1))
        verify = 1.0 + np.concatenate([np.zeros((cases, 1)), np.cumsum(steps, axis=1)], axis=1)
        verify[: cases // 4] = rng.permuted(verify[: cases // 4], axis=1)  # in any order, too
        draft, overhead = 10.0 ** rng.uniform(-3, 0, cases), rng.uniform(0, 0.5, cases)
        accepted, rejected = rng.exponential(8.0, (2, cases, rows))
        rejected *= rng.integers(2, size=(cases, rows))
        weight = rng.integers(2, size=(cases, rows))
        weight[np.arange(cases), rng.integers(rows, size=cases)] = 1  # some row runs
        prior, drafts = rng.uniform(0.1, 0.9, cases), rng.uniform(0.5, 4.0, cases)
        policies_ = module.goodput(
            Profile(f32(verify), f32(draft), f32(overhead)),
            prior=f32(prior), prior_drafts=f32(drafts), memory=jnp.full(cases, 16.0),
        )  # fmt: skip
        states = module.GoodputState(f32(accepted), f32(rejected), f32(weight))
        choose = jax.jit(jax.vmap(lambda policy, state: policy.num_draft(state)))
        lengths = choose(policies_, states)
        chex.assert_shape(lengths, (cases, rows))
        chex.assert_type(lengths, jnp.int32)

        for i, chosen in enumerate(np.asarray(lengths)):
            assert np.all(chosen == chosen[0])
            rates = accepted[i] + prior[i] * drafts[i]
            rates = rates / (accepted[i] + rejected[i] + drafts[i])
            costs = np.arange(most + 1) * draft[i] + verify[i] + overhead[i]
            values = goodputs(costs, rates, weight[i])
            assert values[chosen[0]] >= np.max(values) * (1 - 1e-5)  # near-ties: float32
        # Else the cases would say little.
        assert {0, most} <= set(lengths[:, 0].tolist())
        assert len(set(lengths[:, 0].tolist())) > most // 2


def test_goodput_is_the_brute_force_argmax():
    check_choices(goodput_module)


def check_rows_that_stopped(module):
    """They keep what they knew, and weigh nothing."""
    policy = module.goodput(profile_of([1.0, 1.5, 2.0]), memory=16.0)
    state = policy.update(policy.init(3), outcome(drafted=[2, 2, 0], accepted=[2, 1, 0]))
    assert state.accepted.tolist() == [2, 1, 0]
    assert state.rejected.tolist() == [0, 1, 0]
    round_ = outcome(drafted=[0, 0, 2], accepted=[0, 0, 0], active=[False, True, True])
    state = policy.update(state, round_)
    kept = 15 / 16  # exact in float32
    assert state.accepted.tolist() == [2, kept, 0]
    assert state.rejected.tolist() == [0, kept, 1]
    assert state.weight.tolist() == [0, 1, 1]
    np.testing.assert_allclose(policy.acceptance(state), [3 / 4, 1 / 2, 1 / 3], rtol=1e-6)
    # Worth a draft with the first row's 3/4, not without: (1 + 5/12) / 1.5 < 1.
    assert policy.num_draft(state).tolist() == [0, 0, 0]
    assert policy.num_draft(state._replace(weight=jnp.ones(3))).tolist() == [1, 1, 1]


def test_goodput_weighs_the_rows_that_run():
    check_rows_that_stopped(goodput_module)


def check_fading(module):
    """Empty rounds bring the estimate back to the prior, at the pace of `memory`."""
    policy = module.goodput(profile_of([1.0, 9.0]), prior=0.3, memory=16.0)  # never drafts
    start = policy.update(policy.init(2), outcome(drafted=[5, 5], accepted=[5, 0]))
    assert np.all(np.abs(policy.acceptance(start) - 0.3) > 0.05)

    @jax.jit
    def rest(state, rounds):
        empty = outcome(drafted=[0, 0], accepted=[0, 0])
        return jax.lax.fori_loop(0, rounds, lambda _, s: policy.update(s, empty), state)

    # (1 - 1 / 16) ** 16 is 1 / e up to 1 / 32 of it.
    faded = rest(start, 16)
    assert faded.accepted[0] / start.accepted[0] == pytest.approx(math.exp(-1), rel=0.04)
    assert faded.rejected[1] / start.rejected[1] == pytest.approx(math.exp(-1), rel=0.04)
    np.testing.assert_allclose(policy.acceptance(rest(start, 16 * 16)), 0.3, atol=1e-5)


def test_goodput_forgets():
    check_fading(goodput_module)


def check_convergence(module, rate):
    """The mean estimate of many rows, each of which is offered drafts of changing lengths.

    A round tries N drafts, one after the other, and A of them are accepted: A - αN has mean 0 and
    variance α (1 - α) E[N] (Wald). With weights κ^i, which sum to M and whose squares sum to
    1 / (1 - κ²), the estimate (ΣA + pm) / (ΣN + m) follows.
    """
    rows, rounds, most, memory, prior, drafts = 256, 2000, 4, 200.0, 0.5, 2.0
    policy = module.goodput(profile_of([1.0, 2.0]), prior=prior, prior_drafts=drafts, memory=memory)
    rng = np.random.default_rng(int(100 * rate))
    drafted = rng.integers(most + 1, size=(rounds, rows))
    accepted = np.minimum(rng.geometric(1 - rate, (rounds, rows)) - 1, drafted)

    @jax.jit
    def learn(rounds):
        def step(state, round_):
            drafted, accepted = round_
            return policy.update(state, outcome(drafted=drafted, accepted=accepted)), None

        return policy.acceptance(jax.lax.scan(step, policy.init(rows), rounds)[0])

    estimates = np.asarray(learn((jnp.asarray(drafted), jnp.asarray(accepted))), np.float64)

    # Moments of N: a length of n tries j < n drafts if draft j is the first to fail.
    moments = np.zeros(2)
    for length in range(most + 1):
        for tried in range(1, length + 1):
            ends = rate ** (tried - 1) * (1 - rate if tried < length else 1.0)
            moments += ends * np.array([tried, tried**2]) / (most + 1)
    mean, variance = moments[0], moments[1] - moments[0] ** 2
    squares = 1 / (1 - (1 - 1 / memory) ** 2)
    evidence = memory * mean + drafts
    deviation = np.sqrt(rate * (1 - rate) * mean * squares) / evidence
    spread = np.sqrt(variance * squares) / evidence  # of ΣN, which is not independent of ΣA
    bias = drafts * (prior - rate) / evidence
    tolerance = 5 * deviation / np.sqrt(rows) + (deviation + abs(bias)) * spread
    assert tolerance < 0.01
    assert abs(np.mean(estimates) - rate - bias) < tolerance
    assert np.max(np.abs(estimates - rate - bias)) < 6 * deviation


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.95])
def test_goodput_finds_the_acceptance_rate(rate):
    check_convergence(goodput_module, rate)


def schedule(profile, would_accept, *, prior=0.5, prior_drafts=2.0, memory=16.0):
    """What one row drafts, in float64."""
    costs, accepted, rejected, lengths = round_costs(profile), 0.0, 0.0, []
    for most in would_accept:
        rate = (accepted + prior * prior_drafts) / (accepted + rejected + prior_drafts)
        values = goodputs(costs, [rate], [1.0])
        second, first = np.sort(values)[-2:]
        assert first - second > 1e-5, "a near-tie: choose other numbers"
        lengths.append(int(np.argmax(values)))
        num_accepted = min(most, lengths[-1])
        accepted = accepted * (1 - 1 / memory) + num_accepted
        rejected = rejected * (1 - 1 / memory) + (num_accepted < lengths[-1])
    return lengths


def check_schedule(module):
    """It gives up where nothing is accepted, tries again, and finds what has become worth it."""
    profile = profile_of([1.0, 1.11, 1.23, 1.34, 1.45], draft=0.103)
    would_accept = [0] * 150 + [6] * 60 + [1] * 40
    lengths = play(module.goodput(profile), jnp.asarray(would_accept)[:, None])[0][:, 0].tolist()
    assert lengths == schedule(profile, would_accept)
    hopeless = lengths[:150]
    first_zero = hopeless.index(0)
    assert all(hopeless[:first_zero])
    trials = np.flatnonzero(hopeless[first_zero:])
    assert 3 <= trials.size <= 0.25 * 150
    assert max(hopeless[first_zero:]) == 1  # a trial is short
    assert np.all(np.diff(trials) > 3)
    assert lengths[180:210] == [4] * 30


def test_goodput_gives_up_and_tries_again():
    check_schedule(goodput_module)


GOODPUT_BUGS = [
    # stopped rows count
    ("expected * state.weight", "expected", check_choices),
    # E[N] without its powers
    ("expected + power * rate)", "expected + rate)", check_choices),
    # gain less cost, not gain by cost
    ("jnp.argmax(tokens / costs)", "jnp.argmax(tokens - costs)", check_choices),
    # the prior weighs nothing
    ("self.prior * self.prior_drafts", "self.prior", check_choices),
    # a row that has stopped goes on weighing, or goes on forgetting
    ("weight=took_part.astype(jnp.float32)", "weight=state.weight", check_rows_that_stopped),
    (
        "accepted=jnp.where(took_part, accepted, state.accepted)",
        "accepted=accepted",
        check_rows_that_stopped,
    ),
    # what was seen stays
    ("state.accepted * kept", "state.accepted", check_fading),
    ("state.rejected * kept", "state.rejected", check_schedule),
    # a whole acceptance counts as a rejection, or every draft behind a rejection as one
    ("is_rejected = num_accepted < outcome", "is_rejected = num_accepted <= outcome", None),
    ("+ is_rejected.astype", "+ (outcome.draft.length - num_accepted).astype", None),
]


@pytest.mark.parametrize(("old", "new", "check"), GOODPUT_BUGS)
def test_planted_bugs_in_goodput(old, new, check):
    module = mutant("jaxspec.policies.goodput", (old, new))
    with pytest.raises(AssertionError):
        check_convergence(module, 0.8) if check is None else check(module)


def test_new_costs_are_data():
    """A profile measured again compiles nothing, and the text stays that of plain decoding."""
    chex.clear_trace_counter()
    target = table_model(random_logits(3, vocab_size=6, order=2), order=2)
    other = table_model(random_logits(4, vocab_size=6, order=2), order=2)
    options = {"sampling": jaxspec.Sampling(temperature=0), "max_new_tokens": 24}
    prompts = jnp.array([[1, 2, 3], [5, 0, 1]])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def program(policy):
        drafter = drafters.model(other)
        return jaxspec.generate(target, prompts, drafter=drafter, policy=policy, **options)

    plain = jaxspec.generate(target, prompts, **options)
    num_drafts = []
    for step, prior in ((0.01, 0.5), (0.2, 0.6), (3.0, 0.7)):
        profile = profile_of(1.0 + step * np.arange(5), draft=step)
        out = program(policies.guarded(policies.goodput(profile, prior=prior)))
        np.testing.assert_array_equal(out.tokens, plain.tokens)
        num_drafts.append(int(jnp.sum(out.stats.num_draft_tokens)))
    assert num_drafts[0] > num_drafts[1] > num_drafts[2] == 0


@pytest.mark.parametrize("profile", [None, 1.0, (1.0, 0.1, 0.0), policies.fixed(2)])
def test_goodput_needs_a_profile(profile):
    with pytest.raises(ValueError, match=r"goodput needs a jaxspec\.Profile, got .*measure_costs"):
        policies.goodput(profile)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prior", 0), ("prior", 1.0), ("prior", -0.5), ("prior", math.nan), ("prior_drafts", 0.0),
        ("prior_drafts", math.inf), ("memory", 1), ("memory", 0.5),
    ],
)  # fmt: skip
def test_goodput_refuses_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must lie between"):
        policies.goodput(profile_of([1.0, 1.1]), **{name: value})


# ---------------------------------------------------------------------------------------------
# Guarded: what it can lose, and that it keeps out of the way of what pays.

ALLOWANCE, PAUSE, LONGEST = 1.5, 32, 256  # the defaults


def runs_of_zeros(lengths):
    """The lengths of the pauses, the last one as far as it goes."""
    pauses, current = [], 0
    for length in [*lengths, 1]:
        if length == 0:
            current += 1
        elif current:
            pauses.append(current)
            current = 0
    return pauses


def worst_loss(rounds, worst_round):
    """What the docstring allows where nothing is accepted, in plain rounds.

    The allowance at the beginning and half of it in each trial, each overshot by less than the
    round that ends it; a trial begins when a pause is over, and takes a round at least.
    """
    loss, at, pause = ALLOWANCE + worst_round, 1, PAUSE
    while (at := at + pause) < rounds:
        loss += 0.5 * ALLOWANCE + worst_round
        at, pause = at + 1, min(2 * pause, LONGEST)
    return loss


def check_bounded_loss(module, rounds=1000):
    """Nothing is ever accepted."""
    for cost in (1.05, 1.3, 2.0, 4.0):
        policy = module.guarded(policies.fixed(4), break_even=cost)
        lengths = play(policy, always(0, rounds))[0][:, 0]
        assert set(lengths.tolist()) == {0, 4}
        num_drafting = int(jnp.sum(lengths > 0))
        loss = (cost - 1) * num_drafting
        assert loss <= worst_loss(rounds, cost - 1)
        if cost == 1.3:  # "a few percent"
            assert loss <= 0.01 * rounds
        # Each pause is twice as long, and the longest one is not passed.
        pauses = runs_of_zeros(lengths.tolist())
        expected = [PAUSE, 2 * PAUSE, 4 * PAUSE, LONGEST, LONGEST, LONGEST]
        assert pauses[:-1] == expected[: len(pauses) - 1]
        assert len(pauses) >= 5
        # It is given its allowance, not less.
        first = lengths.tolist().index(0)
        assert first in (math.ceil(1.5 / (cost - 1)), math.ceil(1.5 / (cost - 1)) + 1)


def test_guarded_loses_little():
    check_bounded_loss(guarded_module)


def check_any_text(module, rounds=1500):
    """At no time has any row lost more than the pauses so far allow, whatever is accepted when.

    A pause begins at a balance of -allowance or, by one round, below, and ends at half of that;
    gains that are forgotten only make the account poorer than the truth.
    """
    profile = profile_of([1.0, 1.4, 1.7, 1.9, 2.0], draft=0.2, overhead=0.1)
    policy = module.guarded(policies.fixed(4), profile)
    costs = round_costs(profile) / round_costs(profile)[0]
    rng = np.random.default_rng(3)
    num_pauses = []
    for _ in range(6):
        # Regimes of random length, each with its own acceptance; three rows of a text.
        rates = np.repeat(rng.uniform(0, 0.9, rounds), rng.integers(1, 80, rounds))[:rounds]
        would_accept = rng.geometric(1 - rates[:, None], (rounds, 3)) - 1
        lengths, emitted, _ = play(policy, jnp.asarray(would_accept, jnp.int32))
        lengths, emitted = np.asarray(lengths), np.asarray(emitted)
        longest = np.max(lengths, axis=1)
        lead = np.cumsum(emitted - costs[longest][:, None], axis=0)  # over plain decoding
        begins = (longest == 0) & (np.append(1, longest[:-1]) > 0)
        worst_round = costs[4] - 1
        allowed = ALLOWANCE + worst_round
        # A pause that begins in this round has nothing to do with this round's loss.
        allowed += (0.5 * ALLOWANCE + worst_round) * np.cumsum(begins)
        assert np.all(lead >= -allowed[:, None] - 1e-4)
        pauses = runs_of_zeros(longest.tolist())
        assert set(pauses[:-1]) <= {32, 64, 128, 256}
        num_pauses.append(len(pauses))
    assert sum(num_pauses) > 20


def test_guarded_bounds_the_loss_on_any_text():
    check_any_text(guarded_module)


@pytest.mark.parametrize(
    ("kwargs", "pattern"),
    [
        ({}, [0, 0, 0, 2]),  # 5 tokens in 4 rounds of 1.3: loses for three rounds, gains in sum
        ({}, [1]),
        ({"break_even": 1.9}, [0, 2]),
        ({"profile": profile_of([1.0, 1.1, 1.2, 1.3, 1.4])}, [0, 0, 2, 0, 1, 1]),
        ({"profile": profile_of([2.0, 3.0, 4.0, 5.0, 6.0])}, [2, 3]),
    ],
)
def test_a_drafter_that_pays_is_never_paused(kwargs, pattern):
    """No stretch of these loses the allowance, and each gains in sum."""
    profile = kwargs.get("profile")
    cost = kwargs.get("break_even", 1.3)
    if profile is not None:
        cost = round_costs(profile)[4] / round_costs(profile)[0]
    assert sum(pattern) + len(pattern) > (cost - 1e-6) * len(pattern)
    would_accept = jnp.asarray(np.resize(pattern, 1000), jnp.int32)[:, None]
    lengths = play(policies.guarded(policies.fixed(4), **kwargs), would_accept)[0]
    assert np.all(lengths == 4)


def check_later(module):
    """A text that becomes predictable is found again; the past is then forgotten, good and bad."""
    bad, good = 400, 400
    would_accept = jnp.concatenate([always(0, bad), always(4, good), always(0, 200)])
    lengths, _, states = play(module.guarded(policies.fixed(4), break_even=1.3), would_accept)
    lengths = lengths[:, 0].tolist()
    assert 4 in lengths[bad : bad + LONGEST + 1]
    resumed = lengths.index(4, bad)
    assert lengths[resumed : bad + good] == [4] * (bad + good - resumed)
    assert int(states.next_pause[bad - 1]) > PAUSE
    assert int(states.next_pause[bad + good - 1]) == PAUSE
    # Of 400 good rounds no more than the allowance is remembered.
    assert float(jnp.max(states.balance)) == ALLOWANCE
    again = lengths.index(0, bad + good) - bad - good
    assert again in (math.ceil(2 * ALLOWANCE / 0.3), math.ceil(2 * ALLOWANCE / 0.3) + 1)
    pauses = runs_of_zeros(lengths[bad + good :])
    assert pauses[:2] == [PAUSE, 2 * PAUSE]


def test_guarded_finds_a_text_that_becomes_predictable():
    check_later(guarded_module)


@pytree.dataclass
class Listening:
    """Stops before the slot `last`, and counts the rounds."""

    last: int

    def init(self, batch):
        return jnp.zeros((batch,), jnp.int32)

    def num_draft(self, state):
        return jnp.full_like(state, 4)

    def keep_drafting(self, state, signals):
        return (signals.slot < self.last) & (state < 2)

    def update(self, state, outcome):
        return state + outcome.is_active.astype(jnp.int32)


def check_inner_policy(module):
    """It is asked before each slot, learns in every round, and is overruled in pauses alone."""
    policy = module.guarded(Listening(2), allowance=0.1, break_even=2.0, pause=3, longest_pause=3)
    state = policy.init(3)
    signals = jaxspec.Signals(jnp.array([0, 1, 2]), jnp.zeros((3, 2)))
    inner, lengths = [0, 0, 0], []
    for _ in range(6):
        goes_on = [slot < 2 and count < 2 for slot, count in enumerate(inner)]
        assert policy.keep_drafting(state, signals).tolist() == goes_on
        drafted = policy.num_draft(state).tolist()
        lengths.append(drafted)
        active = [True, True, False]
        state = policy.update(state, outcome(drafted=drafted, accepted=[0] * 3, active=active))
        inner = [count + is_active for count, is_active in zip(inner, active, strict=True)]
        assert state.inner.tolist() == inner
    assert lengths == [[4] * 3, [0] * 3, [0] * 3, [0] * 3, [4] * 3, [0] * 3]


def test_guarded_asks_and_teaches_the_policy():
    check_inner_policy(guarded_module)


def check_account(module):
    """The slowest row's tokens less the cost, by goodput's own profile: 10.5, 12.5, 14.5."""
    own = profile_of([10.0, 11.0, 12.0], draft=1.0, overhead=0.5)
    policy = module.guarded(policies.goodput(own))
    balance, state = 0.0, policy.init(3)
    for drafted, accepted, active, saved in (
        ([2, 0, 1], [1, 0, 1], [True, True, True], 1 - 14.5 / 10.5),  # 2, 1, 2
        ([1, 1, 0], [0, 1, 0], [True, True, False], 2 - 12.5 / 10.5),  # 3, 3: rows that run
        ([1, 0, 2], [0, 0, 2], [True, True, False], 1 - 12.5 / 10.5),  # …their drafts, too
        ([0, 0, 0], [0, 0, 0], [True, True, True], 0.0),  # an empty round is a plain one
        ([6, 6, 6], [0, 0, 0], [True, True, True], 1 - 14.5 / 10.5),  # beyond the profile
        ([0, 0, 0], [0, 0, 0], [False, False, False], 0.0),
    ):
        state = policy.update(state, outcome(drafted=drafted, accepted=accepted, active=active))
        balance += saved
        assert float(state.balance) == pytest.approx(balance, abs=1e-6)
    chex.assert_shape(state.num_emitted, (3,))
    chex.assert_type(state.num_emitted, jnp.int32)
    types = {"balance": jnp.float32, "pause": jnp.int32, "next_pause": jnp.int32}
    for name, dtype in types.items():
        chex.assert_shape(getattr(state, name), ())
        chex.assert_type(getattr(state, name), dtype)


def test_guarded_takes_goodputs_own_profile():
    check_account(guarded_module)
    own, other = profile_of([1.0, 2.0]), profile_of([1.0, 4.0])
    assert policies.guarded(policies.goodput(own)).profile is own
    assert policies.guarded(policies.goodput(own), other).profile is other
    assert policies.guarded(policies.fixed(1)).profile is None
    round_ = outcome(drafted=[1], accepted=[0])
    for policy, loss in (
        (policies.guarded(policies.goodput(own), allowance=9.0), 1.0),
        (policies.guarded(policies.goodput(own), other, allowance=9.0), 3.0),
        (policies.guarded(policies.fixed(1), other, allowance=9.0), 3.0),
        (policies.guarded(policies.fixed(1), break_even=3.5, allowance=9.0), 2.5),
    ):
        assert float(policy.update(policy.init(1), round_).balance) == pytest.approx(-loss)


GUARDED_BUGS = [
    # a round of drafts costs nothing
    ("gained - self._cost(longest)", "gained - 1.0", check_bounded_loss),
    # every pause is as long as the first, or there is no longest one
    ("jnp.minimum(2 * state.next_pause, ", "jnp.minimum(state.next_pause, ", check_bounded_loss),
    ("jnp.asarray(self.longest_pause, jnp.int32)", "jnp.int32(10**6)", check_bounded_loss),
    # a pause of no end
    ("jnp.maximum(state.pause - 1, 0)", "state.pause", check_later),
    # a trial may lose as much as the beginning, or begins with a gain
    ("-0.5 * jnp.asarray(self.allowance", "0.0 * jnp.asarray(self.allowance", check_bounded_loss),
    ("-0.5 * jnp.asarray(self", "0.5 * jnp.asarray(self", check_any_text),
    # the fastest row's account, a stopped row's, or that of each round's slowest
    (
        "least = jnp.min(jnp.where(is_active, counts, jnp.iinfo(jnp.int32).max))",
        "least = jnp.max(jnp.where(is_active, counts, 0))",
        check_any_text,
    ),
    ("jnp.where(is_active, counts, jnp.iinfo(jnp.int32).max)", "counts", check_account),
    (
        "state.num_emitted + jnp.where(is_active, outcome.num_emitted, 0)",
        "jnp.where(is_active, outcome.num_emitted, 0)",
        check_account,
    ),
    # old gains, or old pauses, count for ever
    ("jnp.minimum(state.balance + saved, self.allowance)", "state.balance + saved", check_later),
    ("jnp.where(balance > 0, jnp", "jnp.where(balance > 99, jnp", check_later),
    # the policy learns nothing, or is not asked
    ("self.policy.update(state.inner, outcome)", "state.inner", check_inner_policy),
    (
        "self.policy.keep_drafting(state.inner, signals)",
        "jnp.ones_like(signals.slot, dtype=bool)",
        check_inner_policy,
    ),
    # drafts of rows that have stopped are paid for
    (
        "jnp.where(is_active, outcome.draft.length, 0)",
        "outcome.draft.length",
        check_account,
    ),
    # seconds in place of plain rounds
    (" / costs[0]", "", check_account),
]


@pytest.mark.parametrize(("old", "new", "check"), GUARDED_BUGS)
def test_planted_bugs_in_guarded(old, new, check):
    module = mutant("jaxspec.policies.guarded", (old, new))
    with pytest.raises(AssertionError):
        check(module)


@pytest.mark.parametrize("policy", [None, 3, "goodput", profile_of([1.0])])
def test_guarded_needs_a_policy(policy):
    with pytest.raises(ValueError, match="guarded needs a policy, got"):
        policies.guarded(policy)


@pytest.mark.parametrize("profile", [1.3, (1.0, 0.1, 0.0), policies.fixed(2)])
def test_guarded_refuses_what_is_no_profile(profile):
    with pytest.raises(ValueError, match=r"profile must be a jaxspec\.Profile, got"):
        policies.guarded(policies.fixed(2), profile)


@pytest.mark.parametrize(
    "numbers",
    [
        {"break_even": 0.0}, {"break_even": math.nan}, {"allowance": 0}, {"allowance": -1.0},
        {"pause": 0}, {"pause": 300}, {"longest_pause": 31}, {"longest_pause": 2**30},
    ],
)  # fmt: skip
def test_guarded_refuses_numbers_out_of_range(numbers):
    with pytest.raises(ValueError, match="guarded needs break_even > 0, allowance > 0 and whole"):
        policies.guarded(policies.fixed(2), **numbers)
