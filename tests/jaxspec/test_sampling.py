"""Sampling options against hand-computed values and an independent float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

from jaxspec import sampling

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


def np_process(logits, temperature, top_k, top_p, min_p, penalty, seen):
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
        )
        committed = rng.integers(vocab_size, size=rng.integers(0, 5))
        prefix = rng.integers(vocab_size, size=4)
        prefix_length = int(rng.integers(0, 5))
        seen = [*committed, *prefix[:prefix_length]]
        law, report, margin = np_process(logits, *options, seen)
        if margin > 1e-5:
            return logits, options, committed, prefix, prefix_length, law, report


def check_process(module, *, vocab_size, rows, seed, dtype=jnp.float32):
    """`process` against the reference: the same support, and values to float32 rounding."""
    rng = np.random.default_rng(seed)
    cases = [random_case(rng, vocab_size) for _ in range(rows)]
    logits, options, committed, prefix, prefix_length, laws, reports = zip(*cases, strict=True)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    columns = zip(*options, strict=True)
    resolved = module.resolve(
        module.Sampling(**{n: np.array(c) for n, c in zip(names, columns, strict=True)}), rows
    )
    seen = np.zeros((rows, vocab_size), bool)
    for row, ids in enumerate(committed):
        seen[row, ids] = True
    scores = jax.jit(jax.vmap(module.process))(
        jnp.asarray(np.array(logits), dtype),
        resolved,
        module.History(jnp.asarray(seen)),
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
    check_process(sampling, vocab_size=vocab_size, rows=rows, seed=vocab_size)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_lose_nothing(dtype):
    """The grid's values are exact in either format, so the result may not differ."""
    check_process(sampling, vocab_size=9, rows=300, seed=5, dtype=dtype)


@pytest.mark.parametrize(
    "patch",
    [
        # the token that crosses top_p is dropped
        ("(keys > threshold) | (is_tie & stays)", "(keys > threshold)"),
        # of ties, one too many
        ("ids > last_left_out", "ids >= last_left_out"),
        # top-p looks at the logits before temperature
        (
            "warped = keep_top_p(warped, options.top_p)",
            "warped = jnp.where(jnp.isfinite(keep_top_p(logits, options.top_p)), warped, -jnp.inf)",
        ),
        # ties of the k-th token are lost
        ("(keys >= threshold) | (k == 0)", "(keys > threshold) | (k == 0)"),
        # min-p is not relative to the likeliest token
        (
            "jnp.max(warped) + jnp.log(options.min_p)",
            "jax.nn.logsumexp(warped) + jnp.log(options.min_p)",
        ),
        # the drafted prefix is not penalised; one token too many is; twice is not once
        ("< prefix_length", "< 0"),
        ("< prefix_length", "<= prefix_length"),
        ("raw = logits[", "raw = out["),
        # greedy rows by a sentinel temperature
        ("jnp.where(is_greedy_row, _point_mass(logits)", "jnp.where(is_greedy_row, log_probs"),
        # greedy rows report their point mass
        ("jnp.where(is_greedy_row, log_softmax(logits)", "jnp.where(is_greedy_row, log_probs"),
    ],
)
def test_planted_bugs_are_seen(patch):
    with pytest.raises(AssertionError):
        check_process(mutant("jaxspec.sampling", patch), vocab_size=7, rows=400, seed=7)


# ---------------------------------------------------------------------------------------------
# Hand-computed values and extremes.


PROCESS = jax.jit(sampling.process)


def law(logits, *, prefix=(), prefix_length=0, seen=None, **options):
    """The probabilities of one row."""
    resolved = jax.tree.map(lambda x: x[0], sampling.resolve(sampling.Sampling(**options), 1))
    scores = PROCESS(
        jnp.asarray(logits, jnp.float32),
        resolved,
        sampling.History(seen),
        jnp.asarray(prefix, jnp.int32).reshape(-1),
        prefix_length,
    )
    return np.exp(np.asarray(scores.log_probs))


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
    seen = jnp.array([True, False, False, False])
    out = law([2.0, -1.0, 1.0, 0.0], repetition_penalty=2.0, seen=seen, prefix=[1, 1, 0, 2],
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
        sampling.Sampling(temperature=np.ones(2), top_k=2, top_p=0.5, min_p=0.1), 2
    )
    run = jax.jit(jax.vmap(sampling.process, in_axes=(0, 0, None, None, None)))
    nothing = (sampling.History(None), jnp.zeros(0, jnp.int32), 0)
    good = np.array([0.1, 3.0, 0.2], np.float32)
    one = run(jnp.asarray([good, [0.0, bad, 1.0]], jnp.float32), options, *nothing)
    two = run(jnp.asarray([good, good]), options, *nothing)
    np.testing.assert_array_equal(one.log_probs[0], two.log_probs[0])


def test_options_that_are_off_leave_no_trace():
    def lowered(**options):
        resolved = jax.tree.map(lambda x: x[0], sampling.resolve(sampling.Sampling(**options), 1))
        nothing = (sampling.History(None), jnp.zeros(3, jnp.int32))
        return (
            jax.jit(lambda x, o, n: sampling.process(x, o, *nothing, n))
            .lower(jnp.zeros(300), resolved, jnp.int32(1))
            .as_text()
        )

    # Data may be any temperature: still nothing that looks for a threshold.
    for text in (lowered(), lowered(temperature=0.7), lowered(temperature=0, top_k=5, top_p=0.5)):
        assert not [word for word in ("while", "sort", "top_k", "scatter") if word in text]
    assert "while" in lowered(top_k=5)
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
    kept = np.asarray(jax.jit(jax.vmap(sampling.keep_top_k))(jnp.asarray(x), jnp.asarray(k)))
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
        return jnp.isfinite(sampling.keep_top_k(x, k)), by_sort

    kept, by_sort = run(jnp.asarray(x), jnp.asarray(k))
    np.testing.assert_array_equal(kept, by_sort)


# ---------------------------------------------------------------------------------------------
# resolve and history.


def test_resolve():
    options = sampling.resolve(sampling.Sampling(), 3)
    assert jax.tree.leaves(options) == []
    options = sampling.resolve(sampling.Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.1), 3)
    assert options.is_greedy
    assert jax.tree.leaves(options) == []
    options = sampling.resolve(
        sampling.Sampling(0.5, np.array([1, 2, 3]), jnp.float32(1.0), np.float32(0), 1.5), 3
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


def test_history():
    options = sampling.resolve(sampling.Sampling(repetition_penalty=1.2), 2)
    prompts = jnp.array([[1, 1, 4], [2, 3, 0]])
    history = sampling.init_history(options, prompts, jnp.array([3, 1]), 6)
    assert [np.flatnonzero(row).tolist() for row in history.seen] == [[1, 4], [2]]
    emitted = jnp.array([[5, 0, -1], [-1, -1, -1]])
    history = sampling.update_history(history, emitted, jnp.array([1, 0]))
    assert [np.flatnonzero(row).tolist() for row in history.seen] == [[1, 4, 5], [2]]
    off = sampling.init_history(sampling.resolve(sampling.Sampling(), 2), prompts, None, 6)
    assert off.seen is None
    assert sampling.update_history(off, emitted, jnp.array([1, 0])).seen is None
