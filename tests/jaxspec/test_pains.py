"""What people leave speculation for, one test each: options that stop working inside a draft.

The drafter proposes four tokens a round, so each pain lies inside a block.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec
from jaxspec import Sampling, drafters, status
from jaxspec.testing import random_logits, table_model

VOCAB, EOS = 6, 5


def _favours(*chain):
    """A bigram model that all but always writes the next token of a chain."""
    table = np.zeros((VOCAB, VOCAB), np.float32)
    for token, following in zip(chain, [*chain[1:], chain[0]], strict=True):
        table[token, following] = 9.0
    return table


def _write(table, drafted, prompt=(0,), *, size=12, eos_ids=(), **arguments):
    """Text behind a prompt, drafted by another table's argmax."""
    drafter = drafters.model(table_model(drafted, order=1), sampling=Sampling(temperature=0))
    out = jaxspec.generate(
        table_model(table, order=1), [list(prompt)], drafter=drafter, num_draft_tokens=4,
        max_new_tokens=size, eos_ids=eos_ids, **arguments,
    )  # fmt: skip
    return out.tokens[0, : int(out.lengths[0])].tolist(), out


def test_a_penalty_counts_the_drafted_prefix():
    """0 0 0 … is drafted; from its second 0 on the target wants 1, and says so inside the block."""
    table = np.tile(np.array([3.0, 2.0, 0, 0, 0, 0], np.float32), (VOCAB, 1))
    drafted = np.tile(np.array([9.0, 0, 0, 0, 0, 0], np.float32), (VOCAB, 1))
    text, out = _write(
        table, drafted, prompt=(4,), sampling=Sampling(temperature=0, frequency_penalty=1.5)
    )
    expected, counts = [], np.zeros(VOCAB)
    for _ in range(12):
        expected.append(int(np.argmax(table[0] - 1.5 * counts)))
        counts[expected[-1]] += 1
    assert text == expected
    assert expected[:4] == [0, 1, 0, 1]
    assert 1 <= int(out.stats.num_accepted_draft_tokens[0]) < 12


@pytest.mark.parametrize("least", [1, 2, 3, 5, 9])
def test_an_early_end_is_not_written_though_it_is_drafted(least):
    """1 2 3 and the end, over and over; the draft ends after three tokens in every block."""
    table = _favours(0, 1, 2, 3, EOS)
    text, out = _write(
        table, table, eos_ids=[EOS], sampling=Sampling(temperature=0, min_new_tokens=least)
    )
    assert out.status.tolist() == [status.EOS]
    assert text[-1] == EOS
    assert EOS not in text[:-1]
    assert len(text) >= max(least + 1, 4) or (least <= 3 and len(text) == 4)
    if least <= 3:
        assert text == [1, 2, 3, EOS]


def test_a_stop_sequence_ends_the_row_across_a_block_border():
    """Blocks of five tokens: the fifth and the sixth lie in two of them."""
    table = _favours(0, 1, 2, 3, 4)
    text, out = _write(table, table, stop_sequences=[[0, 1]], sampling=Sampling(temperature=0))
    assert text == [1, 2, 3, 4, 0, 1]
    assert out.status.tolist() == [status.STOP]
    assert out.stats.num_emitted_tokens.tolist() == [6]


def test_a_bias_against_a_token_that_the_drafter_loves():
    """A ban holds where every draft breaks it, and the others keep their shares."""
    table = np.tile(np.array([1.0, 0.5, 2.0, 0.8, 0.3, 0.1], np.float32), (VOCAB, 1))
    loved = np.tile(np.array([0, 0, 9.0, 0, 0, 0], np.float32), (VOCAB, 1))
    bias = {2: -np.inf, 1: 1.0}
    text, out = _write(
        table, loved, size=400, key=jax.random.key(0), sampling=Sampling(logit_bias=bias)
    )
    assert len(text) == 400
    assert 2 not in text
    assert out.stats.num_accepted_draft_tokens.tolist() == [0]
    assert np.all(np.isfinite(np.asarray(out.log_probs)))
    logits = table[0] + np.array([0, 1.0, -np.inf, 0, 0, 0])
    law = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(text, minlength=VOCAB)
    # Each count is expected to be 37 or more: five standard deviations of it.
    assert np.all(np.abs(counts - 400 * law) <= 5 * np.sqrt(400 * law * (1 - law)))


def test_a_greedy_row_beside_a_sampled_one_with_other_options():
    """Each row is what it is alone, under its own options."""
    target = table_model(random_logits(5, vocab_size=VOCAB, order=1), order=1)
    drafter = drafters.model(table_model(random_logits(6, vocab_size=VOCAB, order=1), order=1))
    keys = jax.random.split(jax.random.key(1), 2)
    own = [
        {"temperature": 0.0, "repetition_penalty": 1.0, "presence_penalty": 2.0, "top_p": 1.0},
        {"temperature": 1.3, "repetition_penalty": 1.4, "presence_penalty": 0.0, "top_p": 0.8},
    ]

    def write(rows):
        options = {name: jnp.array([own[row][name] for row in rows]) for name in own[0]}
        out = jaxspec.generate(
            target, [[[1, 2], [3]][row] for row in rows], drafter=drafter, num_draft_tokens=4,
            max_new_tokens=24, eos_ids=(), sampling=Sampling(**options),
            key=keys[jnp.array(rows)],
        )  # fmt: skip
        return out.tokens.tolist()

    both = write([0, 1])
    assert both == [write([0])[0], write([1])[0]]
    greedy = jaxspec.generate(
        target, [[1, 2]], max_new_tokens=24, eos_ids=(),
        sampling=Sampling(temperature=0, presence_penalty=2.0),
    )  # fmt: skip
    assert both[0] == greedy.tokens[0].tolist()


def test_log_probs_are_those_of_the_target_fed_the_text():
    """Within 1e-4, though the drafter is another model and most drafts are rejected."""
    table = random_logits(7, vocab_size=VOCAB, order=1)
    text, out = _write(
        table, random_logits(8, vocab_size=VOCAB, order=1), size=40, key=jax.random.key(2),
        sampling=Sampling(temperature=0.7),
    )  # fmt: skip
    logits = table[[0, *text[:-1]]].astype(np.float64)
    for scaled, reported in (
        (logits / np.float32(0.7), out.log_probs),
        (logits, out.raw_log_probs),
    ):
        law = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        expected = law[np.arange(40), text]
        np.testing.assert_allclose(np.asarray(reported[0]), expected, atol=1e-4, rtol=0)
