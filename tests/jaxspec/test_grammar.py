"""Grammars: packed as the table says, walked along drafts, kept by every drafter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant
from support.running import generate_with

import jaxspec
from jaxspec import Sampling, drafters, sampling, status, verifiers
from jaxspec.sampling import grammar as grammars
from jaxspec.testing import random_logits, table_model

VOCAB = 40  # two words of bits, the second half empty
TARGET = table_model(random_logits(3, vocab_size=VOCAB, order=1), order=1)
OTHER = table_model(random_logits(4, vocab_size=VOCAB, order=1), order=1)
DRAFTERS = {
    "none": lambda: None,
    "model": lambda: drafters.model(OTHER),
    "own grammar": lambda: drafters.model(OTHER, sampling=Sampling(grammar=MACHINE)),
    "lookup": lambda: drafters.prompt_lookup(max_ngram=1),
}
PROMPTS = [[1, 2, 3, 1], [7], [9, 9, 30]]


def _table(num_states, seed, share=0.3):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, num_states, (num_states, VOCAB))
    return np.where(rng.random(table.shape) < share, table, -1)


TABLE = _table(5, 0)
MACHINE = sampling.grammar_of(TABLE)


def _walk(table, state, tokens):
    for token in tokens:
        if state >= 0:
            state = table[state, token]
    return state


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, VOCAB])
def test_what_is_packed_is_the_table(vocab):
    table = TABLE[:, :vocab]
    machine = sampling.grammar_of(table, 3)
    assert machine.vocab_size == vocab
    np.testing.assert_array_equal(machine.next_states[:, machine.classes], table)
    logits = jnp.arange(vocab, dtype=jnp.float32)
    for state in range(5):
        kept = grammars.keep_allowed(logits, machine, jnp.int32(state))
        np.testing.assert_array_equal(kept, np.where(table[state] >= 0, logits, -np.inf))
    assert not np.any(np.isfinite(grammars.keep_allowed(logits, machine, jnp.int32(-1))))


def test_equal_tokens_share_a_class():
    table = np.repeat([[0, 1, -1], [1, 1, 0]], 10, axis=1)
    assert sampling.grammar_of(table).next_states.shape == (2, 3)


def test_states_are_those_of_the_table():
    rng = np.random.default_rng(1)
    allowed = [np.flatnonzero(row >= 0) for row in TABLE]
    for trial in range(40):
        tokens, state = [], trial % 5
        for _ in range(6):
            choice = rng.choice(allowed[state]) if trial % 4 else rng.integers(VOCAB)
            tokens.append(int(choice))
            state = max(TABLE[state, tokens[-1]], 0)
        start, count = trial % 5, trial % 7
        machine = dataclasses.replace(MACHINE, start=jnp.int32(start))
        expected = _walk(TABLE, start, tokens[:count])
        text = jnp.array(tokens, jnp.int32)
        assert grammars.advance(machine, machine.start, text, jnp.int32(count)) == expected
        padded = jnp.concatenate([jnp.array([5, 5], jnp.int32), text])
        assert grammars.read(machine, padded, jnp.int32(2), jnp.int32(2 + count)) == expected


def _check_obeys(out, table, starts, *, eos_ids=()):
    for tokens, length, start in zip(out.tokens, out.lengths, starts, strict=True):
        assert _walk(table, start, np.asarray(tokens[: int(length)]).tolist()) >= 0
    assert np.all(np.asarray(out.lengths) > 0)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_text_obeys(drafter, temperature):
    starts = [0, 3, 1]
    machine = dataclasses.replace(MACHINE, start=jnp.array(starts))
    out = jaxspec.generate(
        TARGET, PROMPTS, drafter=DRAFTERS[drafter](), max_new_tokens=30, eos_ids=(),
        sampling=Sampling(temperature=temperature, grammar=machine), key=jax.random.key(0),
    )  # fmt: skip
    _check_obeys(out, TABLE, starts)
    assert out.lengths.tolist() == [30, 30, 30]
    if drafter == "own grammar":
        assert jnp.sum(out.stats.num_accepted_draft_tokens) > 0
    if temperature == 0:  # the greedy text of the machine, step by step
        for row, (prompt, state) in enumerate(zip(PROMPTS, starts, strict=True)):
            last = prompt[-1]
            for token in np.asarray(out.tokens[row]).tolist():
                scores = np.where(TABLE[state] >= 0, _logits(last), -np.inf)
                assert token == np.argmax(scores)
                state, last = TABLE[state, token], token


@functools.cache
def _logits(token):
    start, one = jnp.zeros((1,), jnp.int32), jnp.ones((1,), jnp.int32)
    cache = TARGET.init_cache(1, 4, 1)
    fed = jnp.array([[token]], jnp.int32)
    return np.asarray(TARGET.forward(fed, cache, start=start, num_new=one)[0].logits[0, 0])


def test_rows_have_their_own_grammar_or_none():
    tables = [_table(3, 5), None, _table(4, 6)]
    each = [None if table is None else sampling.grammar_of(table, 2) for table in tables]
    joined = sampling.join_grammars(each)
    arguments = {
        "drafter": drafters.model(OTHER), "max_new_tokens": 20, "eos_ids": (),
        "key": jax.random.split(jax.random.key(1), 3),
    }  # fmt: skip
    out = jaxspec.generate(TARGET, PROMPTS, sampling=Sampling(grammar=joined), **arguments)
    free = jaxspec.generate(TARGET, PROMPTS, **arguments)
    assert out.tokens[1].tolist() == free.tokens[1].tolist()
    for row in (0, 2):
        assert _walk(tables[row], 2, out.tokens[row].tolist()) >= 0
        assert _walk(tables[row], 2, free.tokens[row].tolist()) < 0
        alone = jaxspec.generate(
            TARGET, PROMPTS[row : row + 1], sampling=Sampling(grammar=each[row]),
            **arguments | {"key": arguments["key"][row : row + 1]},
        )  # fmt: skip
        assert alone.tokens[0].tolist() == out.tokens[row].tolist()


def test_one_grammar_in_several_rows_has_one_table():
    joined = sampling.join_grammars([MACHINE, None, MACHINE, None])
    assert joined.next_states.shape[0] == 6
    assert joined.start.tolist() == [0, 5, 0, 5]


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_it_goes_on_where_a_text_was_left(drafter):
    arguments = {
        "drafter": DRAFTERS[drafter](), "eos_ids": (), "verifier": verifiers.match(),
        "sampling": Sampling(grammar=MACHINE), "key": jax.random.key(2),
    }  # fmt: skip
    whole = jaxspec.generate(TARGET, PROMPTS, max_new_tokens=16, **arguments)
    first = jaxspec.generate(TARGET, PROMPTS, max_new_tokens=7, return_state=True, **arguments)
    more = jaxspec.generate(TARGET, state=first.state, max_new_tokens=9, **arguments)
    for row in range(3):
        text = first.tokens[row].tolist() + more.tokens[row].tolist()
        assert text == whole.tokens[row].tolist()
    # Behind new prompt tokens the output, and so the grammar, begins anew.
    turn = jaxspec.generate(
        TARGET, [[4], [5, 6], [7]], state=first.state, max_new_tokens=9, **arguments
    )
    _check_obeys(turn, TABLE, [0, 0, 0])


def test_what_is_given_for_a_prompt_holds_for_its_texts():
    machine = dataclasses.replace(MACHINE, start=jnp.array([0, 2, 4]))
    out = jaxspec.generate(
        TARGET, PROMPTS, num_return_sequences=2, max_new_tokens=12, eos_ids=(),
        sampling=Sampling(grammar=machine), key=jax.random.key(3),
    )  # fmt: skip
    _check_obeys(out, TABLE, [0, 0, 2, 2, 4, 4])


def test_a_machine_is_data():
    """Another machine of the same size is no new program; inside jit it may be an argument."""
    traces = []

    @jax.jit
    def run(machine):
        traces.append(1)
        return jaxspec.generate(
            TARGET, jnp.array([[1, 2]]), max_new_tokens=8, eos_ids=(), key=jax.random.key(0),
            drafter=drafters.model(OTHER), sampling=Sampling(grammar=machine),
        )  # fmt: skip

    rolled = np.where(TABLE >= 0, TABLE, -1)[:, ::-1]
    for table in (TABLE, rolled):
        _check_obeys(run(sampling.grammar_of(table, 1)), table, [1])
    assert len(traces) == 1


def test_a_state_that_allows_nothing_stops_its_row():
    table = np.full((3, VOCAB), -1)
    table[0], table[1, 5] = 1, 2  # two tokens, then nothing
    out = jaxspec.generate(
        TARGET, PROMPTS[:1], sampling=Sampling(grammar=sampling.grammar_of(table)), eos_ids=(),
        drafter=drafters.model(OTHER), max_new_tokens=9, key=jax.random.key(0),
    )  # fmt: skip
    assert (out.lengths.tolist(), out.status.tolist()) == ([2], [status.NONFINITE])
    assert out.tokens[0, 1] == 5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # the state inside a draft one token late
        ("memory.with_drafts(options, history.memory, prefix, prefix_length)",
         "memory.with_drafts(options, history.memory, prefix, jnp.maximum(prefix_length - 1, 0))"),
        # the mask is left out where a processor comes
        ("logits = grammar.keep_allowed(logits, options.grammar, state)", "pass"),
    ],
)  # fmt: skip
def test_a_grammar_that_leaks_is_seen(old, new):
    broken = mutant("jaxspec.loop", (old, new), within="jaxspec.sampling.processing")
    out = generate_with(
        broken, TARGET, PROMPTS, drafter=drafters.model(OTHER), max_new_tokens=30, eos_ids=(),
        sampling=Sampling(grammar=MACHINE), key=jax.random.key(0),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        _check_obeys(out, TABLE, [0, 0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampling.grammar_of([0, 1]), r"integers \[S, V\]"),
        (lambda: sampling.grammar_of([[0.5]]), r"integers \[S, V\]"),
        (lambda: sampling.grammar_of([[0, 1]]), "must hold 0 … 0, or -1"),
        (lambda: sampling.grammar_of([[0, -2]]), "must hold 0 … 0, or -1"),
        (lambda: sampling.grammar_of([[0]], 1), "start must be one of its states"),
        (lambda: sampling.grammar_of([[0]], -1), "start must be one of its states"),
        (lambda: sampling.join_grammars([None]), "no grammar"),
        (lambda: sampling.join_grammars([MACHINE, sampling.grammar_of([[0]])]), "one vocabulary"),
    ],
)
def test_wrong_machines_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (TABLE, "grammar must be a jaxspec.sampling.Grammar"),
        (sampling.grammar_of([[0, 0]]), "over 2 tokens and the model has 40"),
        (dataclasses.replace(MACHINE, start=np.array([0, 1])), r"shape \(3,\)"),
        (dataclasses.replace(MACHINE, start=np.array(9)), "start must be one of its states"),
    ],
)
def test_wrong_grammars_are_refused(machine, message):
    with pytest.raises(ValueError, match=message):
        jaxspec.generate(TARGET, PROMPTS, sampling=Sampling(grammar=machine), key=jax.random.key(0))
