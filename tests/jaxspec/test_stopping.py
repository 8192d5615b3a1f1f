"""Where a row ends: stop sequences across block borders, and limits of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant
from support.running import generate_with

import jaxspec
from jaxspec import Sampling, drafters, loop, status, verifiers
from jaxspec.testing import check_lossless, random_logits, table_model

GREEDY = Sampling(temperature=0)
COUNT = table_model(10 * np.eye(5, dtype=np.float32)[[1, 2, 3, 4, 0]], order=1)  # 0 1 2 3 4 0 …
TARGET, OTHER = (
    table_model(random_logits(seed, vocab_size=4, order=2), order=2) for seed in (0, 1)
)


def count(stop_sequences, *, prompt=(4,), drafter="equal", num_draft_tokens=3, **kwargs):
    return jaxspec.generate(
        COUNT,
        [list(prompt)],
        drafter=drafters.model(COUNT) if drafter == "equal" else drafter,
        num_draft_tokens=num_draft_tokens,
        sampling=GREEDY,
        max_new_tokens=13,
        stop_sequences=stop_sequences,
        eos_ids=(),
        **kwargs,
    )


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stop", [[0], [3], [3, 4], [2, 3, 4, 0], [4, 0, 1, 2, 3, 4, 0]])
def test_a_row_ends_at_its_stop_sequence_wherever_blocks_end(stop, num_draft_tokens):
    out = count([stop], num_draft_tokens=num_draft_tokens)
    text = [i % 5 for i in range(13)]
    size = next(n for n in range(1, 14) if text[max(n - len(stop), 0) : n] == stop)
    assert out.lengths.tolist() == [size]
    assert out.tokens[0].tolist() == text[:size] + [0] * (13 - size)
    assert out.status.tolist() == [status.STOP]
    assert np.all(np.asarray(out.log_probs[0, size:]) == 0)
    # Nothing behind the end is counted, and what stands before it is.
    stats = out.stats
    assert int(stats.num_emitted_tokens[0]) == size
    assert size - 1 <= int(stats.num_accepted_draft_tokens[0]) + int(stats.num_spec_steps[0])
    assert int(stats.num_accepted_draft_tokens[0]) <= size


def test_what_the_prompt_ends_in_is_no_part_of_a_stop_sequence():
    out = count([[4, 0, 1]], prompt=(3, 4))
    assert out.tokens[0, : int(out.lengths[0])].tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_the_earliest_of_several_ends_the_row():
    out = count([[0, 1, 2, 3, 4], [2, 3], [9 % 5, 0]])
    assert out.tokens[0, : int(out.lengths[0])].tolist() == [0, 1, 2, 3]


def test_rows_have_stop_sequences_of_their_own():
    stops = np.array([[[-1, 2]], [[2, 3]], [[3, 3]]])
    out = jaxspec.generate(
        COUNT, [[4], [4], [4]], drafter=drafters.model(COUNT), sampling=GREEDY, eos_ids=(),
        max_new_tokens=6, stop_sequences=stops,
    )  # fmt: skip
    assert out.lengths.tolist() == [3, 4, 6]
    assert out.status.tolist() == [status.STOP, status.STOP, status.LENGTH]


def test_a_row_may_have_fewer_than_its_neighbours():
    """What fills the array is no stop sequence."""
    out = jaxspec.generate(
        COUNT, [[4], [4]], drafter=drafters.model(COUNT), sampling=GREEDY, eos_ids=(),
        max_new_tokens=6, stop_sequences=np.array([[[-1, -1], [-1, -1]], [[-1, -1], [1, 2]]]),
    )  # fmt: skip
    assert out.lengths.tolist() == [6, 3]
    assert out.status.tolist() == [status.LENGTH, status.STOP]


@pytest.mark.parametrize("temperature", [0, np.array([0.0]), 1.0])
@pytest.mark.parametrize("drafter", [None, drafters.model(TARGET), drafters.prompt_lookup()])
def test_a_row_without_a_token_left_stops(drafter, temperature):
    sampling = Sampling(temperature=temperature, no_repeat_ngram_size=1)
    out = jaxspec.generate(
        TARGET, [[0, 2, 0]], drafter=drafter, sampling=sampling, eos_ids=(), max_new_tokens=6,
        key=jax.random.key(0),
    )  # fmt: skip
    assert sorted(out.tokens[0, :2].tolist()) == [1, 3]
    assert (out.lengths.tolist(), out.status.tolist()) == ([2], [status.NONFINITE])


@pytest.mark.parametrize("temperature", [0, np.array([0.0]), 1.0])
def test_a_drafter_without_a_token_left_leaves_the_law_alone(temperature):
    """Its own bans end the draft, not the row."""
    drafter = drafters.model(TARGET, sampling=Sampling(no_repeat_ngram_size=1))
    run = functools.partial(
        jaxspec.generate, TARGET, [[0, 2, 0]], eos_ids=(), max_new_tokens=9,
        sampling=Sampling(temperature=temperature), verifier=verifiers.match(),
        key=jax.random.key(1),
    )  # fmt: skip
    out = run(drafter=drafter)
    np.testing.assert_array_equal(out.tokens, run().tokens)
    assert out.status.tolist() == [status.LENGTH]
    assert int(out.stats.num_draft_tokens[0]) <= 2 * int(out.stats.num_spec_steps[0])
    assert int(out.stats.num_impossible_draft_tokens[0]) == 0


def test_an_eos_at_the_end_of_a_stop_sequence_is_an_eos():
    run = functools.partial(
        jaxspec.generate, COUNT, [[4]], sampling=GREEDY, max_new_tokens=6,
        drafter=drafters.model(COUNT), num_draft_tokens=4,
    )  # fmt: skip
    assert run(eos_ids=3, stop_sequences=[[2, 3]]).status.tolist() == [status.EOS]
    early = run(eos_ids=3, stop_sequences=[[1, 2]])
    assert (early.status.tolist(), early.lengths.tolist()) == ([status.STOP], [3])
    late = run(eos_ids=1, stop_sequences=[[1, 2]])
    assert (late.status.tolist(), late.lengths.tolist()) == ([status.EOS], [2])


# ---------------------------------------------------------------------------------------------
# Sampled texts: those without stop sequences, cut.

_STOPS = [[1], [2, 3], [0, 0, 0], [3, 2, 2]]
_PROMPTS = [[0], [1, 2], [3, 3, 0], [2, 3], [0, 0], [1]] * 8


def _texts(module, drafter, stop_sequences):
    return generate_with(
        module, TARGET, _PROMPTS, drafter=drafter, verifier=verifiers.match(), num_draft_tokens=3,
        max_new_tokens=12, eos_ids=(), key=jax.random.key(3), stop_sequences=stop_sequences,
        pad_id=-5,
    )  # fmt: skip


@functools.cache
def _whole():
    return _texts(loop, None, None)


def _cut(text, stops):
    """The text up to the first stop sequence in it."""
    for size in range(1, len(text) + 1):
        if any(text[max(size - len(stop), 0) : size] == stop for stop in stops):
            return text[:size]
    return text


def check_cut(module, stops, drafter):
    whole = np.asarray(_whole().tokens)
    longest = max(map(len, stops))
    filled = [[-1] * (longest - len(stop)) + stop for stop in [*stops, []]]
    out = _texts(module, drafter, np.array(filled))
    for row, text in enumerate(whole.tolist()):
        wanted = _cut(text, stops)
        assert out.tokens[row].tolist() == wanted + [-5] * (12 - len(wanted))
        reported = np.asarray(out.log_probs[row])
        np.testing.assert_array_equal(
            reported[: len(wanted)], _whole().log_probs[row, : len(wanted)]
        )
        assert not reported[len(wanted) :].any()
    assert {status.STOP, status.LENGTH} >= set(out.status.tolist())


@pytest.mark.parametrize("drafter", [None, drafters.model(OTHER), drafters.prompt_lookup()])
@pytest.mark.parametrize("stops", [_STOPS[:1], _STOPS[1:], _STOPS[3:]])
def test_sampled_texts_are_cut_at_the_first_stop_sequence(stops, drafter):
    check_cut(loop, stops, drafter)


@pytest.mark.parametrize(
    "patch",
    [
        # sequences that began in the block before, or in the prompt
        ("row[jnp.maximum(at, 0)], NO_TOKEN)", "NO_TOKEN, NO_TOKEN)"),
        ("jnp.where(at >= prompt_length, row", "jnp.where(at >= 0, row"),
        # one token late, or more
        ("lax.dynamic_slice(text, (i,)", "lax.dynamic_slice(text, (jnp.maximum(i - 1, 0),)"),
        ("is_earlier, jnp.argmax(is_stop, axis=1) + 1", "is_earlier, num_emitted"),
        ("| (sequences == NO_TOKEN)[None]", ""),
        (" & is_sequence[None]", ""),
    ],
)
def test_planted_bugs_are_noticed(patch):
    module = mutant("jaxspec.loop", patch)

    def check():
        for stops in ([[1, 2], [3]], _STOPS[1:]):
            check_cut(module, stops, drafters.model(OTHER))

    with pytest.raises(AssertionError):
        check()


@pytest.mark.exactness
@pytest.mark.parametrize("rule", ["block", "rejection"])
def test_the_law_is_that_of_cut_texts(rule):
    check_lossless(
        table_model(random_logits(4, vocab_size=3, order=2), order=2),
        drafters.model(table_model(random_logits(1, vocab_size=3, order=2), order=2)),
        getattr(verifiers, rule)(),
        sampling=Sampling(frequency_penalty=np.array([0.0, 0.5])),
        prompts=[[2, 0], [1]],
        eos_ids=(2,),
        stop_sequences=[[0, 1], [1, 0, 1]],
    ).assert_passed()


# ---------------------------------------------------------------------------------------------
# Rows that the host ends.


def stop_at(*sequences):
    """The host's way to end a row: the earliest of these behind its new tokens."""
    texts = {}

    def stop(row, ids):
        text = texts.setdefault(row, [])
        for kept, token in enumerate(np.asarray(ids).tolist(), 1):
            text.append(token)
            if any(text[-len(sequence) :] == sequence for sequence in sequences):
                return kept
        return None

    return stop


def streamed(*args, **kwargs):
    """The pieces by row, and the result."""
    rounds, pieces = jaxspec.stream(*args, **kwargs), {}
    while True:
        try:
            row, ids = next(rounds)
        except StopIteration as end:
            return pieces, end.value
        pieces.setdefault(row, []).extend(ids.tolist())


@pytest.mark.optimized
@pytest.mark.parametrize("drafter", ["none", "equal", "other", "lookup"])
def test_a_stream_that_is_told_to_stop_is_what_stop_sequences_make_of_it(drafter):
    """Tokens, log-probabilities, statistics and where the rows go on, bit for bit."""
    chosen = {
        "none": None,
        "equal": drafters.model(TARGET),
        "other": drafters.model(OTHER),
        "lookup": drafters.prompt_lookup(max_ngram=1),
    }[drafter]
    sequences = [[1, 2], [3, 3], [2, 0]]  # 0 is an EOS
    arguments = {
        "drafter": chosen, "max_new_tokens": 14, "num_top_log_probs": 2, "return_state": True,
        "sampling": Sampling(frequency_penalty=-0.5), "eos_ids": (0,), "num_draft_tokens": 3,
    }  # fmt: skip
    prompts, further = [[1, 2], [3], [0, 2, 1], [2], [1]], [[0, 1], [2], [3, 0], [1], [2]]
    num_cut = 0
    for seed in range(4):
        key = jax.random.key(seed)
        expected = jaxspec.generate(TARGET, prompts, stop_sequences=sequences, key=key, **arguments)
        pieces, out = streamed(TARGET, prompts, stop=stop_at(*sequences), key=key, **arguments)
        for name in ("tokens", "lengths", "status", "log_probs", "raw_log_probs", "top_log_probs",
                     "top_ids"):  # fmt: skip
            np.testing.assert_array_equal(getattr(out, name), getattr(expected, name), name)
        jax.tree.map(np.testing.assert_array_equal, out.stats, expected.stats)
        for row, length in enumerate(out.lengths.tolist()):
            assert pieces[row] == out.tokens[row, :length].tolist()
        num_cut += np.sum(np.asarray(out.status) == status.STOP)
        again, then = (
            jaxspec.generate(TARGET, further, state=from_.state, key=key, **arguments)
            for from_ in (out, expected)
        )
        np.testing.assert_array_equal(again.tokens, then.tokens)
    assert num_cut >= 5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("            now[row] = then[row]", "            pass"),
        ("counters.acceptance_histogram[row, count] += 1", "pass"),
        ("if is_cut or new_status[row] != status.EOS:", "if True:"),
        ("log_probs=jax.tree.map(behind_is_zero, state.log_probs),", ""),
        ("new = {row: ids[: kept.get(row)] for row, ids in new.items()}", "pass"),
    ],
)  # fmt: skip
def test_a_stream_that_counts_past_its_stop_is_noticed(monkeypatch, old, new):
    broken = mutant("jaxspec.stream", (old, new))
    monkeypatch.setattr(jaxspec, "stream", broken.stream)
    with pytest.raises(AssertionError):
        test_a_stream_that_is_told_to_stop_is_what_stop_sequences_make_of_it("equal")


def test_a_stop_that_keeps_what_there_is_not_is_refused():
    rounds = jaxspec.stream(COUNT, [[0]], sampling=GREEDY, eos_ids=(), stop=lambda row, ids: 0)
    with pytest.raises(ValueError, match="stop must return None or 1 … 1"):
        next(rounds)


# ---------------------------------------------------------------------------------------------
# Limits of each row.


def test_rows_have_limits_of_their_own():
    limits = [3, 9, 1, 6]
    run = functools.partial(
        jaxspec.generate, TARGET, drafter=drafters.model(OTHER), eos_ids=(), num_draft_tokens=4
    )
    keys = jax.random.split(jax.random.key(0), 4)
    out = run([[0], [1, 2], [3], [2, 2, 2]], max_new_tokens=limits, key=keys)
    assert out.tokens.shape == (4, 9)
    assert out.lengths.tolist() == limits
    assert out.status.tolist() == [status.LENGTH] * 4
    for row, (prompt, limit) in enumerate(zip([[0], [1, 2], [3], [2, 2, 2]], limits, strict=True)):
        alone = run([prompt], max_new_tokens=limit, key=keys[row : row + 1])
        np.testing.assert_array_equal(out.tokens[row, :limit], alone.tokens[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": [1, 2, 3]}, r"max_new_tokens must be one number or 2.*\(3,\)"),
        ({"max_new_tokens": [1, 0]}, "max_new_tokens must be integers of at least 1"),
        ({"max_new_tokens": [1.0, 2.0]}, "max_new_tokens must be integers of at least 1"),
        ({"stop_sequences": [1, 2]}, "stop_sequences must be a list of token-id lists"),
        ({"stop_sequences": [[9]]}, "stop_sequences holds the token id 9"),
        ({"stop_sequences": np.zeros((3, 1, 1), int)}, "one set for each of 2 rows"),
    ],
)
def test_bad_ends_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxspec.generate(TARGET, [[0], [1]], sampling=GREEDY, **arguments)


def test_a_traced_limit_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens decides about the output's shape"):
        jax.jit(
            lambda size: (
                jaxspec.generate(TARGET, [[0]], sampling=GREEDY, max_new_tokens=size).tokens
            )
        )(jnp.int32(3))
