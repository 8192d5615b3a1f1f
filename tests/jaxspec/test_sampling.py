"""Sampling options against hand-computed values and an independent float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

from jaxspec import sampling
from jaxspec.sampling import cuts, processing
from jaxspec.testing import oracle

_CUTS, _MEMORY = "jaxspec.sampling.cuts", "jaxspec.sampling.memory"
_PENALTIES, _PROCESSING = "jaxspec.sampling.penalties", "jaxspec.sampling.processing"

# ---------------------------------------------------------------------------------------------
# The reference: sorts, loops, float64; HF's order of options.


def np_log_softmax(logits):
    shifted = logits - np.max(logits)
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.sum(np.exp(shifted)))


def np_penalize(logits, penalty, seen):
    out = np.array(logits, np.float64)
    for token in set(seen):
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return out


def np_top_k(logits, k):
    if k == 0 or k >= len(logits):
        return logits
    return np.where(logits >= np.sort(logits)[-k], logits, -np.inf)


def np_top_p(logits, p):
    """Returns the cut logits and the distance of p from the nearest cumulative mass."""
    if p >= 1:
        return logits, 1.0
    probs = np.exp(np_log_softmax(logits))
    # Likelier tokens first; of ties the higher id, so that the lower one is removed first.
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], -token))
    ahead = np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])
    out = np.full_like(logits, -np.inf)
    kept = [token for token, mass in zip(order, ahead, strict=True) if mass < p]
    out[kept] = logits[kept]
    return out, np.min(np.abs(ahead - p))


def np_typical(logits, p):
    """Returns the cut logits, and how far p and the last distance are from a coin flip."""
    if p >= 1:
        return logits, 1.0
    log_probs = np_log_softmax(logits)
    probs = np.exp(log_probs)
    surprise = -np.where(probs > 0, log_probs, 0.0)
    distance = np.where(probs > 0, np.abs(surprise - np.sum(probs * surprise)), np.inf)
    order = np.argsort(distance, kind="stable")
    reached = np.cumsum(probs[order])
    last = order[np.argmax(reached >= p)]
    keep = (distance <= distance[last]) | (logits == logits[last])
    others = np.abs(distance - distance[last])[logits != logits[last]]
    margin = min(np.min(np.abs(reached - p)), np.min(others, initial=1.0))
    return np.where(keep, logits, -np.inf), margin


def np_process(logits, temperature, top_k, top_p, min_p, penalty, typical_p, seen):
    """The law, the report, and how far every float32 decision is from a tie."""
    logits = np_penalize(np.asarray(logits, np.float64), penalty, seen)
    if temperature == 0:
        law = np.full_like(logits, -np.inf)
        law[np.argmax(logits)] = 0.0
        return law, np_log_softmax(logits), 1.0
    warped = np_top_k(logits / temperature, top_k)
    warped, margin = np_top_p(warped, top_p)
    if 0 < min_p < 1:
        distance = np.abs(warped - np.max(warped) - np.log(min_p))
        margin = min(margin, np.min(distance[np.isfinite(distance)]))
    if min_p > 0:
        warped = np.where(warped - np.max(warped) >= np.log(min_p), warped, -np.inf)
    warped, typical_margin = np_typical(warped, typical_p)
    margin = min(margin, typical_margin)
    law = np_log_softmax(warped)
    return law, law, margin


def random_case(rng, vocab_size):
    """One row's logits, options and history, away from float32 coin flips."""
    while True:
        # A coarse grid: many ties, and distinct values stay distinct whatever divides them.
        grid = rng.choice([1, 8])
        logits = np.round(rng.normal(0, 2, vocab_size) * grid) / grid
        if rng.random() < 0.3:
            logits[rng.random(vocab_size) < 0.4] = -np.inf
            logits[rng.integers(vocab_size)] = 0.5
        options = (
            float(np.float32(rng.choice([0.0, 1.0, 0.7, 1.9, 0.25, 1e-4, 1e4]))),
            int(rng.choice([0, 1, 2, vocab_size - 1, vocab_size, vocab_size + 7, 3])),
            float(np.float32(rng.choice([1.0, 1e-6, rng.uniform(0.02, 0.98)]))),
            float(np.float32(rng.choice([0.0, 1.0, 0.03, rng.uniform()]))),
            float(rng.choice([1.0, 1.25, 2.0, 0.5])),  # exact: no quotient is nearly a tie
            float(np.float32(rng.choice([1.0, 1.0, rng.uniform(0.02, 0.98)]))),
        )
        committed = rng.integers(vocab_size, size=rng.integers(0, 5))
        prefix = rng.integers(vocab_size, size=4)
        prefix_length = int(rng.integers(0, 5))
        seen = [*committed, *prefix[:prefix_length]]
        law, report, margin = np_process(logits, *options, seen)
        if margin > 1e-5:
            return logits, options, committed, prefix, prefix_length, law, report


def history_of(options, committed, vocab_size, *, room=4, **kwargs):
    """The history of texts given as lists."""
    lengths = np.array([len(ids) for ids in committed], np.int32)
    tokens = np.full((len(committed), lengths.max(initial=0) + room), 0, np.int32)
    for row, ids in zip(tokens, committed, strict=True):
        row[: len(ids)] = ids
    return sampling.recall(
        options, jnp.asarray(tokens), jnp.asarray(lengths), vocab_size=vocab_size, **kwargs
    )


def check_process(processing, *, vocab_size, rows, seed, dtype=jnp.float32):
    """`process` against the reference: the same support, and values to float32 rounding."""
    rng = np.random.default_rng(seed)
    cases = [random_case(rng, vocab_size) for _ in range(rows)]
    logits, options, committed, prefix, prefix_length, laws, reports = zip(*cases, strict=True)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "typical_p")
    columns = zip(*options, strict=True)
    given = sampling.Sampling(**{n: np.array(c) for n, c in zip(names, columns, strict=True)})
    resolved = sampling.resolve(given, rows, vocab_size)
    scores = jax.jit(processing.process_rows)(
        jnp.asarray(np.array(logits), dtype),
        resolved,
        history_of(resolved, committed, vocab_size),
        jnp.asarray(np.array(prefix), jnp.int32),
        jnp.asarray(prefix_length, jnp.int32),
    )
    assert scores.log_probs.dtype == scores.report.dtype == jnp.float32
    for got, want in ((scores.log_probs, laws), (scores.report, reports)):
        got, want = np.asarray(got), np.array(want)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        finite = np.where(np.isfinite(want), want, 0.0)
        # Logits and their quotient carry a relative error of 2⁻²³ each.
        tolerance = 1e-5 + 1e-6 * np.abs(finite)
        assert np.all(np.abs(np.where(np.isfinite(got), got, 0.0) - finite) <= tolerance)


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 7, 65, 1000])
def test_process_is_the_reference(vocab_size):
    rows = 400 if vocab_size < 1000 else 40
    check_process(processing, vocab_size=vocab_size, rows=rows, seed=vocab_size)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_lose_nothing(dtype):
    """The grid's values are exact in either format, so the result may not differ."""
    check_process(processing, vocab_size=9, rows=300, seed=5, dtype=dtype)


@pytest.mark.parametrize(
    ("module", "patch"),
    [
        # the token that crosses top_p is dropped
        (_CUTS, ("(keys >= low) & (~is_tie |", "(keys >= interval.high) & (~is_tie |")),
        # of ties, one too many
        (_CUTS, ("(ids >= first_to_stay)", "(ids + 1 >= first_to_stay)")),
        # ties of the k-th token are lost
        (
            _CUTS,
            (
                "k > 0, lambda _: jnp.uint32(2))\n    return weighed.where(keys >= interval.low)",
                "k > 0, lambda _: jnp.uint32(2))\n    return weighed.where("
                "jnp.where(jnp.sum(keys >= interval.low) > jnp.maximum(k, 1), "
                "keys > interval.low, keys >= interval.low))",
            ),
        ),
        # min-p is not relative to the likeliest token
        (_CUTS, ("jnp.max(logits) + jnp.log(p)", "jax.nn.logsumexp(logits) + jnp.log(p)")),
        # a search that ends while two tokens are left
        (_CUTS, ("lambda _: jnp.uint32(2)", "lambda _: jnp.uint32(3)")),
        (_CUTS, ("_UNIT * (2 - 1e-4)", "_UNIT * 8.0")),
        # typical-p keeps the likeliest tokens
        (_CUTS, ("-jnp.abs(-log_probs - entropy)", "log_probs")),
        # typical-p is of what was there before the other cuts
        (
            _PROCESSING,
            (
                "weighed = cuts.keep_typical(weighed, options.typical_p)",
                "weighed = weighed.where(cuts.keep_typical(whole, options.typical_p).weights > 0)",
            ),
        ),
        # top-p looks at the logits before temperature
        (
            _PROCESSING,
            (
                "weighed = cuts.keep_top_p(weighed, options.top_p)",
                "weighed = weighed.where("
                "cuts.keep_top_p(cuts.weigh(logits), options.top_p).weights > 0)",
            ),
        ),
        # the drafted prefix is not penalised; one token too many is
        (_MEMORY, ("(prefix.shape[0]) < prefix_length", "(prefix.shape[0]) < 0 * prefix_length")),
        (_MEMORY, ("(prefix.shape[0]) < prefix_length", "(prefix.shape[0]) < prefix_length + 1")),
        # greedy rows by a sentinel temperature
        (
            _PROCESSING,
            ("jnp.where(is_greedy_row, _point_mass(logits)", "jnp.where(is_greedy_row, log_probs"),
        ),
        # greedy rows report their point mass
        (
            _PROCESSING,
            (
                "jnp.where(is_greedy_row, whole.log_probs()",
                "jnp.where(is_greedy_row, log_probs",
            ),
        ),
    ],
)
def test_planted_bugs_are_seen(module, patch):
    with pytest.raises(AssertionError):
        check_process(mutant_of(module, patch), vocab_size=7, rows=400, seed=7)


def mutant_of(module, patch):
    """`processing`, or the shipped one with a mutant of a module that it uses."""
    return mutant(_PROCESSING, patch, within=None if module == _PROCESSING else module)


# ---------------------------------------------------------------------------------------------
# What looks back.


def check_penalties(processing, *, rows=600, vocab_size=5, seed=0):
    """Every option that changes logits, alone and together, against the oracle's."""
    rng = np.random.default_rng(seed)
    sometimes = lambda value: value * (rng.random(rows) < 0.5)  # noqa: E731
    given = {
        "repetition_penalty": rng.choice([1.0, 1.5, 0.7], rows),
        "presence_penalty": sometimes(rng.choice([0.5, -1.25], rows)),
        "frequency_penalty": sometimes(rng.choice([0.75, -0.5], rows)),
        "no_repeat_ngram_size": rng.integers(0, 5, rows),
        "min_new_tokens": rng.integers(0, 6, rows),
        "logit_bias": rng.choice([0.0, 0.0, 1.5, -2.0, -np.inf], (rows, vocab_size)),
        "bad_words": rng.integers(-1, vocab_size, (rows, 2, 3)),
        "suppress_tokens": np.where(
            rng.random((rows, 2)) < 0.8, -1, rng.integers(5, size=(rows, 2))
        ),
    }
    given["bad_words"][:, :, 1] = np.where(
        given["bad_words"][:, :, 2] < 0, -1, given["bad_words"][:, :, 1]
    )
    given["bad_words"][:, :, 0] = np.where(
        given["bad_words"][:, :, 1] < 0, -1, given["bad_words"][:, :, 0]
    )
    committed = [rng.integers(vocab_size, size=rng.integers(1, 9)) for _ in range(rows)]
    prompt_lengths = np.array([rng.integers(0, len(ids)) + 1 for ids in committed])
    prefix = rng.integers(vocab_size, size=(rows, 4))
    prefix_length = rng.integers(0, 5, size=rows)
    for row in range(20):  # a text of one token, and a bad word that begins with it twice
        token = row % vocab_size
        committed[row], prompt_lengths[row], prefix_length[row] = np.array([token]), 1, 0
        given["bad_words"][row, 0] = [token, token, (token + 1) % vocab_size]
    eos_ids = np.array([0, 3])
    logits = rng.normal(0, 2, (rows, vocab_size)).astype(np.float32)
    resolved = sampling.resolve(sampling.Sampling(**given), rows, vocab_size)
    history = history_of(
        resolved, committed, vocab_size,
        prompt_lengths=jnp.asarray(prompt_lengths, jnp.int32), eos_ids=jnp.asarray(eos_ids),
    )  # fmt: skip
    scores = jax.jit(processing.process_rows)(
        jnp.asarray(logits), resolved, history, jnp.asarray(prefix, jnp.int32), prefix_length
    )
    for row in range(rows):
        law = oracle.next_token_law(
            logits[row],
            [*committed[row], *prefix[row, : prefix_length[row]]],
            prompt_length=prompt_lengths[row],
            eos_ids=eos_ids.tolist(),
            **{name: value[row] for name, value in given.items()},
        )
        got = np.exp(np.asarray(scores.log_probs[row], np.float64))
        if not law.any():
            assert np.isnan(got).all()  # the loop stops such a row
            continue
        np.testing.assert_array_equal(got > 0, law > 0)
        np.testing.assert_allclose(got, law, rtol=1e-4, atol=1e-6)


def test_penalties_are_the_oracles():
    check_penalties(processing)


@pytest.mark.parametrize(
    ("module", "patch"),
    [
        (_PENALTIES, ("jnp.where(logits > 0, logits / penalty, logits * penalty)",
                      "logits / penalty")),
        (_PENALTIES, ("counts.astype(jnp.float32)", "(counts > 0).astype(jnp.float32)")),
        (_PENALTIES, ("jnp.where(counts > 0, penalty, 0.0)",
                      "penalty * counts.astype(jnp.float32)")),
        # an n-gram's ban comes one token late, or looks at one token too few
        (_PENALTIES, ("text.tokens[text.length - back]", "text.tokens[text.length - back - 1]")),
        (_PENALTIES, ("jnp.minimum(size, text.length)", "jnp.minimum(size - 1, text.length)")),
        (_PENALTIES, ("(slots < text.length) & (size > 0)", "(size > 0)")),
        # a bad word is one beginning at the start of the text, too
        (_PENALTIES, ("jnp.where(at >= 0, text.tokens[jnp.maximum(at, 0)], NO_ID)",
                      "text.tokens[jnp.maximum(at, 0)]")),
        (_PENALTIES, ("| (beginnings == NO_ID)", "")),
        (_PENALTIES, ("history.length + num_more - history", "history.length - history")),
        (_PENALTIES, ("num_new < min_new_tokens", "num_new <= min_new_tokens")),
        # output penalties count the prompt; drafts are not counted
        (_MEMORY, ("at = jnp.where(offsets < prefix_length", "at = jnp.where(offsets < 0")),
        (_MEMORY, ("prefix[None], prefix_length[None])", "prefix[None], 0 * prefix_length[None])")),
        (_PROCESSING, ("logits = logits + options.logit_bias", "pass")),
        (_PROCESSING, ("logits = penalties.ban(logits, options.suppress_tokens)", "pass")),
    ],
)  # fmt: skip
def test_planted_bugs_in_penalties_are_seen(module, patch):
    with pytest.raises(AssertionError):
        check_penalties(mutant_of(module, patch))


def test_output_penalties_do_not_count_the_prompt():
    logits = jnp.zeros((1, 4))
    options = sampling.resolve(sampling.Sampling(presence_penalty=1.0), 1, 4)
    history = history_of(options, [[0, 0, 1]], 4, prompt_lengths=jnp.array([2]))
    law = np.exp(processing.process_rows(logits, options, history).log_probs[0])
    np.testing.assert_allclose(law, np.exp([0, -1, 0, 0]) / (3 + np.exp(-1)), rtol=1e-6)


def _favour_the_last(parameters, text, logits):
    """A user's processor: pushes towards the token that stands before, and away from the first."""
    last = text.tokens[text.length - 1]
    return logits.at[last].add(parameters["push"]).at[text.tokens[0]].set(-jnp.inf)


def test_a_users_processor_sees_the_drafts():
    processor = jax.tree_util.Partial(_favour_the_last, {"push": jnp.float32(2.0)})
    options = sampling.resolve(sampling.Sampling(processor=processor), 2, 4)
    history = history_of(options, [[3, 1], [2]], 4)
    run = jax.jit(processing.process_rows)
    scores = run(
        jnp.zeros((2, 4)), options, history, jnp.array([[2, 0], [0, 1]]), jnp.array([1, 2])
    )
    expected = np.exp([[0.0, 0, 2, -np.inf], [0, 2, -np.inf, 0]])
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(scores.log_probs), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"typical_p": 0.0}, r"typical_p must be in \(0, 1\]"),
        ({"presence_penalty": np.inf}, "presence_penalty must be a finite number"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size must be a whole number"),
        ({"min_new_tokens": -1}, "min_new_tokens must be a whole number"),
        ({"logit_bias": {9: 1.0}}, "logit_bias holds the token id 9; the target's ids are 0 … 3"),
        ({"logit_bias": np.zeros(3)}, r"logit_bias must be .* with V = 4; got shape \(3,\)"),
        ({"logit_bias": np.full(4, np.inf)}, "logit_bias must hold numbers, or -inf"),
        ({"logit_bias": np.zeros((3, 4))}, r"logit_bias must be one value .* shape \(2, 4\)"),
        ({"bad_words": [[]]}, "bad_words must be a list of token-id lists"),
        ({"bad_words": [1, 2]}, "bad_words must be a list of token-id lists"),
        ({"bad_words": [[1], [2, 4]]}, "bad_words holds the token id 4"),
        ({"bad_words": [[0.5]]}, "bad_words must be token ids"),
        ({"suppress_tokens": [-2]}, "suppress_tokens holds the token id -2"),
        ({"suppress_tokens": 3}, "suppress_tokens must be token ids"),
        ({"processor": 3}, "processor must be a function"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampling.resolve(sampling.Sampling(**options), 2, 4)


def test_empty_lists_switch_an_option_off():
    given = sampling.Sampling(logit_bias={}, bad_words=[], suppress_tokens=())
    assert jax.tree.leaves(sampling.resolve(given, 2, 4)) == []


def test_options_pass_through_jit():
    """Lists and dictionaries may be traced, too: their values are data."""
    given = sampling.Sampling(logit_bias={1: 2.0}, bad_words=[[0, 1], [2]], suppress_tokens=[3])
    inside = jax.jit(lambda given: sampling.resolve(given, 2, 4))(given)
    outside = sampling.resolve(given, 2, 4)
    for name in ("logit_bias", "bad_words", "suppress_tokens"):
        np.testing.assert_array_equal(getattr(inside, name), getattr(outside, name))


# ---------------------------------------------------------------------------------------------
# Hand-computed values and extremes.


PROCESS = jax.jit(processing.process_rows)


def law(logits, *, prefix=(), prefix_length=0, seen=(), **options):
    """The probabilities of one row."""
    resolved = sampling.resolve(sampling.Sampling(**options), 1, len(logits))
    scores = PROCESS(
        jnp.asarray(logits, jnp.float32)[None],
        resolved,
        history_of(resolved, [seen], len(logits)),
        jnp.asarray(prefix, jnp.int32).reshape(1, -1),
        prefix_length,
    )
    return np.exp(np.asarray(scores.log_probs[0]))


PROBS = [0.4, 0.3, 0.2, 0.1]
LOGITS = np.log(PROBS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBS),
        ({"temperature": None, "top_k": None, "top_p": None, "min_p": None}, PROBS),
        ({"temperature": 0.5}, np.square(PROBS) / 0.30),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": np.array(0)}, PROBS),
        ({"top_k": 100}, PROBS),
        ({"top_p": 0.39}, [1, 0, 0, 0]),
        ({"top_p": 0.41}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 1e-30}, [1, 0, 0, 0]),
        ({"top_p": np.array(1.0)}, PROBS),
        ({"min_p": 1}, [1, 0, 0, 0]),
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": np.array(0.0)}, PROBS),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": np.array(0.0), "top_p": 0.9}, [1, 0, 0, 0]),
        ({"temperature": 1e-4}, [1, 0, 0, 0]),
        # top-k first, so that the nucleus is of what is left
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),
        # temperature first: [16, 9, 4, 1] / 30, and the nucleus of 0.8 is two tokens, not three
        ({"temperature": 0.5, "top_p": 0.8}, [16 / 25, 9 / 25, 0, 0]),
    ],
)
def test_by_hand(options, expected):
    np.testing.assert_allclose(law(LOGITS, **options), expected, atol=1e-6)


def test_high_temperature_flattens():
    np.testing.assert_allclose(law(LOGITS, temperature=1e4), np.full(4, 0.25), atol=1e-4)


def test_ties():
    """Top-k keeps every tie of its threshold; in top-p the lower id goes first."""
    flat = np.zeros(5)
    np.testing.assert_allclose(law(flat, top_k=1), np.full(5, 0.2), atol=1e-6)
    np.testing.assert_allclose(law(flat, top_p=0.3), [0, 0, 0, 0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(law(flat, top_p=0.01), [0, 0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(law(flat, min_p=1), np.full(5, 0.2), atol=1e-6)
    np.testing.assert_allclose(law([0, 0, -9], temperature=0), [1, 0, 0], atol=0)


def test_repetition_penalty_by_hand():
    """Positive logits are divided, negative ones multiplied, each token once."""
    out = law([2.0, -1.0, 1.0, 0.0], repetition_penalty=2.0, seen=[0], prefix=[1, 1, 0, 2],
              prefix_length=3)  # fmt: skip
    np.testing.assert_allclose(out, np.exp(np_log_softmax(np.array([1.0, -2.0, 1.0, 0.0]))), 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1e-4, 1e4, np.array([0.0])])
def test_huge_logits(temperature):
    """±1e30 neither overflow nor lose the normalisation."""
    for logits in ([1e30, -1e30, 5.0], [-1e30, -1e30, -1e30 / 2], [-1e-30, -5e29, -np.inf]):
        probs = law(logits, temperature=temperature, top_k=5, top_p=0.9, min_p=0.01)
        np.testing.assert_array_equal(probs, np.eye(3)[np.argmax(logits)])


def test_tiny_temperatures_go_to_the_argmax():
    """Any temperature that `resolve` lets pass gives a law: no overflow of logits / T."""
    for temperature in (1e-20, 1e-30, 1e-36, 1e-37, 2e-38, 1e-38, 1e-40, 1e-60):
        probs = law([100.0, 50.0, -3.0], temperature=temperature)
        np.testing.assert_array_equal(probs, [1, 0, 0], err_msg=f"temperature {temperature}")


def test_tiny_top_p_keeps_the_likeliest_token():
    """At least one token stays, however small top_p, also below float32's smallest number."""
    for top_p in (1e-20, 1.2e-38, 1e-39, 1e-45, 1e-60):
        probs = law([1.0, 3.0, 2.0], top_p=top_p)
        np.testing.assert_array_equal(probs, [0, 1, 0], err_msg=f"top_p {top_p}")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_rows_disturb_no_other(bad):
    options = sampling.resolve(
        sampling.Sampling(temperature=np.ones(2), top_k=2, top_p=0.5, min_p=0.1, typical_p=0.9),
        2,
        3,
    )
    run = jax.jit(processing.process_rows)
    nothing = (history_of(options, [[], []], 3),)
    good = np.array([0.1, 3.0, 0.2], np.float32)
    one = run(jnp.asarray([good, [0.0, bad, 1.0]], jnp.float32), options, *nothing)
    two = run(jnp.asarray([good, good]), options, *nothing)
    np.testing.assert_array_equal(one.log_probs[0], two.log_probs[0])


def test_options_that_are_off_leave_no_trace():
    def lowered(**options):
        resolved = sampling.resolve(sampling.Sampling(**options), 1, 300)
        drafts = jnp.zeros((1, 3), jnp.int32)
        return (
            jax.jit(processing.process_positions)
            .lower(jnp.zeros((1, 4, 300)), resolved, history_of(resolved, [[1]], 300), drafts)
            .as_text()
        )

    # Data may be any temperature: still nothing that looks for a threshold or back.
    neutral = {"logit_bias": {}, "bad_words": [], "suppress_tokens": (), "typical_p": 1}
    for text in (
        lowered(),
        lowered(temperature=0.7, **neutral),
        lowered(temperature=0, top_k=5, top_p=0.5, typical_p=0.5),
    ):
        assert not [word for word in ("while", ".sort", "top_k", "scatter") if word in text]
    assert "while" in lowered(top_k=5)
    assert "scatter" in lowered(frequency_penalty=0.5)
    assert "divide" not in lowered()


# ---------------------------------------------------------------------------------------------
# Bisection is a sort.


def test_top_k_keeps_what_a_sort_would():
    """Exactly: 200 vectors of any bit pattern that is not denormal, signed zeros, many ties."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, size=(200, 33), dtype=np.uint32).view(np.float32)
    x[~np.isfinite(x) | (np.abs(x) < np.finfo(np.float32).tiny)] = -1.5
    x[rng.random(x.shape) < 0.1] = 0.0
    x[rng.random(x.shape) < 0.1] = -0.0
    x[rng.random(x.shape) < 0.1] = -np.inf
    x[100:] = np.sign(x[100:]) * np.round(np.log2(1 + np.abs(x[100:])) / 16)
    k = rng.integers(0, 40, size=200)
    run = jax.jit(jax.vmap(lambda x, k: cuts.keep_top_k(cuts.weigh(x), k).logits))
    kept = np.asarray(run(jnp.asarray(x), jnp.asarray(k)))
    np.testing.assert_array_equal(kept, np.array(list(map(np_top_k, x, k))))


def test_top_k_orders_denormals_as_the_backend_does():
    """Where a backend flushes denormals they tie with zero, in its sort as in the bisection."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**24, size=(200, 20), dtype=np.uint32)
    x = (x | (rng.integers(0, 2, size=x.shape, dtype=np.uint32) << np.uint32(31))).view(np.float32)
    k = rng.integers(1, 20, size=200)

    @jax.jit
    @jax.vmap
    def run(x, k):
        by_sort = x >= jnp.sort(x)[x.shape[0] - k]
        return jnp.isfinite(cuts.keep_top_k(cuts.weigh(x), k).logits), by_sort

    kept, by_sort = run(jnp.asarray(x), jnp.asarray(k))
    np.testing.assert_array_equal(kept, by_sort)


# ---------------------------------------------------------------------------------------------
# resolve and history.


def test_resolve():
    options = sampling.resolve(sampling.Sampling(), 3, 6)
    assert jax.tree.leaves(options) == []
    options = sampling.resolve(
        sampling.Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.1), 3, 6
    )
    assert options.is_greedy
    assert jax.tree.leaves(options) == []
    options = sampling.resolve(
        sampling.Sampling(0.5, np.array([1, 2, 3]), jnp.float32(1.0), np.float32(0), 1.5), 3, 6
    )
    assert [x.dtype for x in jax.tree.leaves(options)] == [
        jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32
    ]  # fmt: skip
    assert all(x.shape == (3,) for x in jax.tree.leaves(options))
    assert not options.is_greedy
    assert options.top_k.tolist() == [1, 2, 3]
    assert not sampling.Sampling(temperature=np.zeros(2)).is_greedy
    assert not sampling.Sampling(temperature=None).is_greedy
    assert sampling.Sampling(temperature=0.0).is_greedy


def test_memory():
    given = sampling.Sampling(repetition_penalty=1.2, presence_penalty=0.5)
    options = sampling.resolve(given, 2, 6)
    texts = [[1, 1, 4, 4], [2]]
    memory = history_of(options, texts, 6, prompt_lengths=jnp.array([2, 1])).memory
    assert [np.flatnonzero(row).tolist() for row in memory.seen] == [[1, 4], [2]]
    assert memory.counts.tolist() == [[0, 0, 0, 0, 2, 0], [0] * 6]
    emitted = jnp.array([[5, 4, -1], [-1, -1, -1]])
    memory = sampling.remember(options, memory, emitted, jnp.array([2, 0]))
    assert [np.flatnonzero(row).tolist() for row in memory.seen] == [[1, 4, 5], [2]]
    assert memory.counts.tolist() == [[0, 0, 0, 0, 3, 1], [0] * 6]
    none = sampling.resolve(sampling.Sampling(), 2, 6)
    off = history_of(none, texts, 6).memory
    after = sampling.remember(none, off, emitted, jnp.array([1, 0]))
    assert jax.tree.leaves(off) == jax.tree.leaves(after) == []
