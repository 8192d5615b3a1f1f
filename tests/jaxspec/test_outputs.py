"""What a call reports beside the tokens, against a teacher-forced pass of the target."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant
from support.running import generate_with

import jaxspec
from jaxspec import Sampling, drafters
from jaxspec.testing import random_logits, table_model
from jaxspec_models import llama

prefilling_module = importlib.import_module("jaxspec.prefilling")

_VOCAB = 24


def _llama(seed, layers):
    config = llama.LlamaConfig(
        vocab_size=_VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, dtype="float32",
    )  # fmt: skip
    return llama.language_model(config, llama.init_params(config, seed=seed))


TARGET, OTHER = _llama(0, 2), _llama(1, 1)
# The third is longer than a prefill chunk.
PROMPTS = [[3, 1, 4], [5], (np.arange(300) * 7 % _VOCAB).tolist()]
# Row by row: as it is, everything at once, greedy.
OPTIONS = Sampling(
    temperature=np.array([1.0, 0.8, 0.0]), top_k=np.array([0, 9, 0]),
    repetition_penalty=np.array([1.0, 1.4, 1.2]), frequency_penalty=np.array([0.0, 0.5, 0.0]),
)  # fmt: skip
DRAFTERS = {
    "none": lambda: None,
    "model": lambda: drafters.model(OTHER),
    "lookup": lambda: drafters.prompt_lookup(max_ngram=1),
}


@functools.cache
def _forced(text):
    """Log-probabilities of each next token before any option, f64[len(text), V]."""
    tokens = jnp.asarray(text, jnp.int32)[None]
    cache = TARGET.init_cache(1, len(text), len(text))
    output, _ = TARGET.apply(TARGET.params, tokens, cache, start=jnp.zeros((1,), jnp.int32))
    logits = np.asarray(output.logits[0], np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def _run(module=None, **kwargs):
    run = jaxspec.generate if module is None else functools.partial(generate_with, module)
    return run(
        TARGET, PROMPTS, key=jax.random.key(3), max_new_tokens=12, eos_ids=(0,), pad_id=-7,
        **{"sampling": OPTIONS} | kwargs,
    )  # fmt: skip


def _rows(out):
    for row, prompt in enumerate(PROMPTS):
        new = out.tokens[row, : int(out.lengths[row])].tolist()
        yield row, len(prompt), new, _forced((*prompt, *new))


@pytest.mark.parametrize("drafter", ["none", "model"])
def test_log_probs_are_those_of_a_teacher_forced_pass(drafter):
    out = _run(drafter=DRAFTERS[drafter](), num_top_log_probs=4)
    for row, at, new, forced in _rows(out):
        laws = forced[at - 1 : -1]
        raw = laws[np.arange(len(new)), new]
        np.testing.assert_allclose(out.raw_log_probs[row, : len(new)], raw, atol=1e-4)
        assert np.all(out.raw_log_probs[row, len(new) :] == 0)
        if row == 0:  # no option
            np.testing.assert_array_equal(out.log_probs[row], out.raw_log_probs[row])
        if row == 1:
            assert np.max(np.abs(out.log_probs[row] - out.raw_log_probs[row])) > 0.1
        top, ids = out.top_log_probs[row], out.top_ids[row]
        assert np.all(np.diff(top) <= 0)
        assert np.all(top[len(new) :] == 0)
        assert np.all(ids[len(new) :] == -7)
        if row == 0:
            largest = np.sort(laws)[:, ::-1][:, :4]
            np.testing.assert_allclose(top[: len(new)], largest, atol=1e-4)
            taken = np.take_along_axis(laws, np.asarray(ids[: len(new)]), axis=1)
            np.testing.assert_allclose(taken, largest, atol=1e-4)
        # They are of the law that `log_probs` is of.
        for i, token in enumerate(new):
            for value, other in zip(top[i], ids[i], strict=True):
                if other == token:
                    assert value == out.log_probs[row, i]


def test_greedy_rows_report_the_law_at_temperature_one():
    out = _run(drafter=drafters.model(OTHER), sampling=Sampling(temperature=0))
    for row, at, new, forced in _rows(out):
        raw = forced[at - 1 : -1][np.arange(len(new)), new]
        np.testing.assert_allclose(out.log_probs[row, : len(new)], raw, atol=1e-4)
        np.testing.assert_array_equal(out.log_probs[row], out.raw_log_probs[row])


def test_what_is_not_asked_for_is_not_there():
    out = _run()
    assert out.top_log_probs is out.top_ids is out.prompt_log_probs is out.state is None


def check_prompt_log_probs(module=None):
    prefill = {} if module is None else {"prefilling": module}
    run = functools.partial(generate_with, importlib.import_module("jaxspec.loop"), **prefill)
    out = run(
        TARGET, PROMPTS, prompt_log_probs=True, sampling=OPTIONS, key=jax.random.key(3),
        max_new_tokens=2, drafter=drafters.model(OTHER),
    )  # fmt: skip
    for row, prompt in enumerate(PROMPTS):
        want = _forced(tuple(prompt))[np.arange(len(prompt) - 1), prompt[1:]]
        got = np.asarray(out.prompt_log_probs[row])
        np.testing.assert_allclose(got[1 : len(prompt)], want, atol=1e-4)
        assert got[0] == 0
        assert np.all(got[len(prompt) :] == 0)


def test_prompt_log_probs_are_those_of_a_teacher_forced_pass():
    check_prompt_log_probs()


@pytest.mark.parametrize(
    "patch",
    [
        ("(0 if is_behind_text else 1)", "0"),
        ("jnp.minimum(columns + 1, num_slots - 1)", "columns"),
        ("offsets[None] < num_to_feed[:, None], column", "offsets[None] < size, column"),
    ],
)
def test_planted_bugs_in_prompt_log_probs(patch):
    with pytest.raises(AssertionError):
        check_prompt_log_probs(mutant("jaxspec.prefilling", patch))


@pytest.mark.parametrize(
    ("drafter", "key"), [("none", "one a prompt"), ("model", "one"), ("lookup", "one")]
)
def test_several_texts_for_a_prompt(drafter, key):
    """The texts of as many copies of the prompt, which is fed once."""
    one = jax.random.key(3)
    keys, of_copies = one, one
    if key == "one a prompt":
        keys = jax.random.split(one, 3)
        of_copies = jnp.stack([jax.random.fold_in(key, copy) for key in keys for copy in range(4)])
    shared = {
        "drafter": DRAFTERS[drafter](), "max_new_tokens": 9, "num_top_log_probs": 2,
        "eos_ids": (0,),
    }  # fmt: skip
    limits, stops = np.array([9, 5, 7]), np.array([[[1, 2]], [[-1, 3]], [[4, 4]]])
    out = jaxspec.generate(
        TARGET, PROMPTS, num_return_sequences=4, key=keys, sampling=OPTIONS,
        stop_sequences=stops, prompt_log_probs=True, **shared | {"max_new_tokens": limits},
    )  # fmt: skip
    each = {
        name: np.repeat(getattr(OPTIONS, name), 4)
        for name in ("temperature", "top_k", "repetition_penalty", "frequency_penalty")
    }
    want = jaxspec.generate(
        TARGET, [p for p in PROMPTS for _ in range(4)], key=of_copies, sampling=Sampling(**each),
        stop_sequences=np.repeat(stops, 4, axis=0),
        **shared | {"max_new_tokens": np.repeat(limits, 4)},
    )  # fmt: skip
    assert out.prompt_log_probs.shape[0] == 3  # one a prompt
    for name in ("tokens", "lengths", "status", "top_ids"):
        np.testing.assert_array_equal(getattr(out, name), getattr(want, name), err_msg=name)
    # Prefill of three rows and of twelve may round differently.
    for name in ("log_probs", "raw_log_probs"):
        np.testing.assert_allclose(getattr(out, name), getattr(want, name), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, out.stats, want.stats)
    assert len({tuple(row) for row in out.tokens[:4].tolist()}) > 2


def test_a_prompt_with_several_texts_is_fed_once():
    """The rows of prefill are the prompts."""
    rows = set()

    def apply(params, tokens, cache, *, start, num_new=None):
        rows.add(tokens.shape)
        return jaxspec.ModelOutput(params[tokens]), cache

    model = jaxspec.LanguageModel(
        jnp.zeros((4, 4)), apply, lambda batch, capacity, most: jnp.zeros((batch, 1)), 4
    )
    out = jaxspec.generate(
        model, np.ones((2, 9), np.int32), num_return_sequences=3, max_new_tokens=2,
        key=jax.random.key(0),
    )  # fmt: skip
    assert out.tokens.shape == (6, 2)
    assert rows == {(2, 9), (6, 1)}


def test_copies_need_one_axis_of_rows():
    def init_cache(batch, capacity, most):
        return jnp.zeros((batch * 2, capacity))  # heads and rows in one axis

    model = jaxspec.LanguageModel(
        random_logits(0, vocab_size=4, order=1),
        lambda params, tokens, cache, *, start: (jaxspec.ModelOutput(params[tokens]), cache),
        init_cache, vocab_size=4,
    )  # fmt: skip
    arguments = {"max_new_tokens": 2, "key": jax.random.key(0)}
    assert jaxspec.generate(model, [[1]], **arguments).tokens.shape == (1, 2)
    with pytest.raises(ValueError, match=r"one axis of rows in each array.*Repeat the prompts"):
        jaxspec.generate(model, [[1]], num_return_sequences=2, **arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_top_log_probs": -1}, r"num_top_log_probs must be a Python integer in 0 … 24"),
        ({"num_top_log_probs": 25}, "in 0 … 24, got 25"),
        ({"num_top_log_probs": True}, "got True"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a Python integer of at least"),
        ({"num_return_sequences": 2.0}, "got 2.0"),
        ({"num_return_sequences": 2, "key": jax.random.split(jax.random.key(0), 6)},
         "one key or 3 keys"),
        ({"num_return_sequences": 2, "max_new_tokens": [1] * 6}, "one number or 3, one a row"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        jaxspec.generate(TARGET, PROMPTS, **{"key": jax.random.key(0)} | given)


def test_everything_inside_a_users_jit():
    target = table_model(random_logits(3, vocab_size=6, order=2), order=2)

    @jax.jit
    def program(key):
        return jaxspec.generate(
            target, np.array([[1, 2], [3, 4]]), key=key, max_new_tokens=5, num_return_sequences=2,
            num_top_log_probs=2, prompt_log_probs=True, drafter=drafters.model(target),
            return_state=True,
        )  # fmt: skip

    out = program(jax.random.key(0))
    again = jaxspec.generate(
        target, np.array([[1, 2], [3, 4]]), key=jax.random.key(0), max_new_tokens=5,
        num_return_sequences=2, drafter=drafters.model(target),
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens, again.tokens)
    assert out.top_ids.shape == (4, 5, 2)
