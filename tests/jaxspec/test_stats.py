"""Counters by hand."""

import jax.numpy as jnp
import pytest
from support.mutants import mutant

from jaxspec import Draft, Outcome, Verdict, stats


def round_(*, drafted, accepted, emitted, active):
    """accepted: by the verifier, before truncation."""
    rows = len(drafted)
    accepted, emitted = jnp.asarray(accepted), jnp.asarray(emitted)
    return Outcome(
        draft=Draft(jnp.zeros((rows, 3), jnp.int32), None, jnp.asarray(drafted)),
        verdict=Verdict(jnp.zeros((rows, 4), jnp.int32), accepted),
        start=jnp.zeros(rows, jnp.int32),
        num_emitted=emitted,
        num_accepted=jnp.minimum(accepted, emitted),
        is_active=jnp.asarray(active),
        target_log_probs=jnp.zeros((rows, 4, 2)),
        hidden=(),
    )


# Rows: all accepted; one accepted; stopped before; plain step; EOS is the second of three
# accepted drafts; EOS is the first of three accepted.
ROUND = {
    "drafted": [3, 3, 0, 0, 3, 3],
    "accepted": [3, 1, 0, 0, 3, 3],
    "emitted": [4, 2, 0, 1, 2, 1],
    "active": [True, True, False, True, True, True],
}


def check_counts(module):
    total = add(module, module.init(6, 3), round_(**ROUND))
    assert total.num_spec_steps.tolist() == [1, 1, 0, 1, 1, 1]
    assert total.num_emitted_tokens.tolist() == [4, 2, 0, 1, 2, 1]
    assert total.num_draft_tokens.tolist() == [3, 3, 0, 0, 2, 1]
    assert total.num_accepted_draft_tokens.tolist() == [3, 1, 0, 0, 2, 1]
    assert total.acceptance_histogram.tolist() == [
        [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]
    ]  # fmt: skip


def test_one_round():
    check_counts(stats)


def add(module, total, outcome):
    zeros = module.zero_probabilities(outcome.draft, outcome.target_log_probs)
    return module.update(total, outcome, zeros)


@pytest.mark.parametrize(
    "patch",
    [
        ("jnp.minimum(outcome.draft.length, outcome.num_emitted)", "outcome.draft.length"),
        ("+ outcome.num_accepted * took_part", "+ outcome.num_emitted"),  # corrections counted
        ("+ outcome.num_accepted * took_part", "+ outcome.verdict.num_accepted"),  # past EOS
        ("hit * took_part[:, None]", "hit"),  # stopped rows counted
        ("stats.num_spec_steps + took_part", "stats.num_spec_steps + 1"),
    ],
)
def test_planted_bugs_are_seen(patch):
    with pytest.raises(AssertionError):
        check_counts(mutant("jaxspec.stats", patch))


def test_rounds_add_up():
    total = stats.init(6, 3)
    for _ in range(3):
        total = add(stats, total, round_(**ROUND))
    assert total.num_emitted_tokens.tolist() == [12, 6, 0, 3, 6, 3]
    assert total.acceptance_histogram.sum(axis=1).tolist() == total.num_spec_steps.tolist()
    bins = jnp.arange(4)[None]
    accepted = (total.acceptance_histogram * bins).sum(axis=1)
    assert accepted.tolist() == total.num_accepted_draft_tokens.tolist()


def test_rates():
    total = stats.init(2, 4)._replace(
        num_spec_steps=jnp.array([4, 0]),
        num_emitted_tokens=jnp.array([10, 0]),
        num_draft_tokens=jnp.array([16, 0]),
        num_accepted_draft_tokens=jnp.array([7, 0]),
    )
    assert total.draft_acceptance_rate.tolist() == [7 / 16, 0.0]
    assert total.mean_acceptance_length.tolist() == [2.75, 1.0]
    assert total.tokens_per_step.tolist() == [2.5, 0.0]
