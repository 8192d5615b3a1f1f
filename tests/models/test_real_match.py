"""SmolLM2-135M-Instruct at temperature 1: `match` writes plain text, `block` accepts more."""

import functools

import jax
import numpy as np
import pytest
from support.real import benchmark, load, noisy

import jaxspec
from jaxspec import Sampling, drafters, policies, verifiers

pytestmark = [pytest.mark.real_model, pytest.mark.exactness]

_PROMPTS = [[788, 253, 9931, 1774, 28], [504, 3575, 282]]
_NEW = 200


@functools.cache
def _write(name):
    """200 tokens in float32, at temperature 1."""
    drafter, policy, num_draft_tokens = {
        "none": lambda: (None, None, 4),
        "itself": lambda: (drafters.model(load("float32")), None, 6),
        "disagreeing": lambda: (drafters.model(noisy("float32")), None, 4),
        "own sampling": lambda: (
            drafters.model(noisy("float32"), sampling=Sampling(temperature=0.7, top_k=50)),
            policies.heuristic(2),
            4,
        ),
        "greedy drafts": lambda: (
            drafters.model(noisy("float32"), sampling=Sampling(temperature=0)),
            None,
            3,
        ),
        "prompt lookup": lambda: (drafters.prompt_lookup(), policies.fixed(2), 5),
    }[name]()
    return jaxspec.generate(
        load("float32"),
        _PROMPTS[:1],
        drafter=drafter,
        policy=policy,
        verifier=verifiers.match(),
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=_NEW,
        eos_ids=(),
        key=jax.random.key(3),
    )


@pytest.mark.parametrize(
    "drafter", ["itself", "disagreeing", "own sampling", "greedy drafts", "prompt lookup"]
)
def test_match_writes_the_tokens_of_plain_decoding(drafter):
    """The same key, another drafter, draft length and policy: the same 200 tokens."""
    plain, drafted = _write("none"), _write(drafter)
    assert plain.lengths.tolist() == [_NEW]
    assert len(set(np.asarray(plain.tokens[0]).tolist())) > 60  # a text, not a loop
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    np.testing.assert_array_equal(drafted.log_probs, plain.log_probs)
    assert drafted.guarantee == plain.guarantee == "tokens"
    steps = np.asarray(drafted.stats.num_spec_steps)
    assert (steps < _NEW).all()
    if drafter == "itself":  # the noise is shared: it draws what the target draws
        assert np.asarray(drafted.stats.draft_acceptance_rate).tolist() == [1.0]


def test_block_and_rejection_on_the_same_blocks(record_property):
    """Both rules' expected acceptance on each block of one run, logged; block is not behind.

    Given the drafts at hand either rule may be ahead; the theorem orders the means over drafts. A
    rule that is ahead falls five standard errors behind with a probability of 3e-7.
    """
    row = benchmark("verifiers").measure(
        load("bfloat16"),
        noisy("bfloat16"),
        _PROMPTS,
        verifier=verifiers.block(),
        max_new_tokens=150,
        num_draft_tokens=4,
        key=jax.random.key(0),
    )
    print({name: round(value, 3) for name, value in row.items()})
    record_property("accepted_by_rejection", row["rejection"])
    record_property("accepted_by_block", row["block"])
    gain, surprise = row["block"] - row["rejection"], row["accepted"] - row["block"]
    error_of_gain = np.sqrt((row["gain_squared"] - gain**2) / row["blocks"])
    assert gain > -5 * error_of_gain
    assert 0.2 < row["rejection"] / row["drafted"] < 0.8
    # What was accepted is what was expected.
    error_of_surprise = np.sqrt(row["surprise_squared"] / row["blocks"])
    assert abs(surprise) < 5 * error_of_surprise < 1.0
