"""SmolLM2-135M-Instruct through `jaxspec.generate`: golden tokens, equalities, memory, speed.

The golden tokens were made with torch and transformers in float32.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.real import load, noisy
from support.running import compiled_parts

import jaxspec
import jaxspec_models
from jaxspec import drafters, status
from jaxspec_models import drafter_making, loading
from jaxspec_models.drafters import directory, eagle3, methods

pytestmark = pytest.mark.real_model

_GREEDY = jaxspec.Sampling(temperature=0)
_FUTURE = [788, 253, 9931, 1774, 28]
_FUTURE_TEXT = [260, 905, 553, 1438, 4634, 10851, 30, 1929, 260, 4095, 282, 5798, 284, 22396,
                4174, 28, 701, 416, 1209, 2330]  # fmt: skip
_CHAT = [{"role": "user", "content": "What is the capital of France?"}]
_CHAT_TEXT = [504, 3575, 282, 4649, 314, 7042, 30, 2]


@pytest.fixture(scope="module")
def tokenizer():
    return jaxspec_models.load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    chat = tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(chat, add_special_tokens=False)
    assert 2 in ids  # <|im_end|> ends the turns before: an EOS inside the prompt
    return [_FUTURE, ids]


def _drafter(name):
    return {
        "none": lambda: None,
        "itself": lambda: drafters.model(load("float32")),
        "noisy": lambda: drafters.model(noisy("float32")),
        "lookup": drafters.prompt_lookup,
    }[name]()


@pytest.fixture(scope="module")
def greedy(prompts):
    """The golden batch under each drafter; every program is compiled once."""

    @functools.cache
    def run(drafter):
        return jaxspec.generate(
            load("float32"), prompts, drafter=_drafter(drafter), sampling=_GREEDY,
            max_new_tokens=20,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("drafter", ["none", "itself", "noisy", "lookup"])
def test_golden_tokens(greedy, drafter):
    generation = greedy(drafter)
    assert generation.tokens[0].tolist() == _FUTURE_TEXT
    assert generation.tokens[1].tolist() == _CHAT_TEXT + [0] * 12
    assert generation.lengths.tolist() == [20, 8]
    assert generation.status.tolist() == [status.LENGTH, status.EOS]


@pytest.mark.parametrize("drafter", ["itself", "noisy", "lookup"])
def test_speculative_text_is_bit_identical_to_plain_text(greedy, drafter):
    """Not only the tokens: invariant 8 makes the log-probabilities equal to the last bit."""
    np.testing.assert_array_equal(greedy(drafter).tokens, greedy("none").tokens)
    np.testing.assert_array_equal(greedy(drafter).log_probs, greedy("none").log_probs)


def test_int8_text_is_bit_identical_with_and_without_drafts(prompts):
    """An embedding fused into a sum, rounded once here and twice there, changed one text of two."""
    plain, looked_up = (
        jaxspec.generate(
            load("int8"), prompts, drafter=_drafter(name), num_draft_tokens=3, sampling=_GREEDY,
            max_new_tokens=12,
        )
        for name in ("none", "lookup")
    )  # fmt: skip
    assert np.all(looked_up.stats.num_draft_tokens[1] > 0)
    np.testing.assert_array_equal(looked_up.tokens, plain.tokens)
    np.testing.assert_array_equal(looked_up.raw_log_probs, plain.raw_log_probs)


def test_golden_tokens_alone():
    """A row alone, in another bucket, is the row of the batch."""
    generation = jaxspec.generate(load("float32"), [_FUTURE], sampling=_GREEDY, max_new_tokens=20)
    assert generation.tokens[0].tolist() == _FUTURE_TEXT


def test_the_model_accepts_all_of_its_own_drafts(greedy):
    stats = greedy("itself").stats
    assert stats.draft_acceptance_rate.tolist() == [1.0, 1.0]
    assert stats.num_spec_steps.tolist() == [4, 2]  # 20 = 4 · 5; 8 = 5 + 3 of 5


def _teacher_forced(prompt, text):
    """The log-probabilities of a text in one pass of the model, f32[len(text)]."""
    model = load("float32")
    tokens = jnp.asarray([prompt + text])
    size = tokens.shape[1]
    output, _ = jax.jit(model.apply)(
        model.params, tokens, model.init_cache(1, 128, size), start=jnp.zeros((1,), jnp.int32)
    )
    log_probs = np.asarray(jax.nn.log_softmax(output.logits[0, len(prompt) - 1 : -1]))
    return log_probs[np.arange(len(text)), text]


def test_log_probs_are_those_of_a_teacher_forced_pass(greedy):
    expected = _teacher_forced(_FUTURE, _FUTURE_TEXT)
    np.testing.assert_allclose(greedy("noisy").log_probs[0], expected, atol=1e-4)


def test_a_disagreeing_pair_at_temperature_one(prompts):
    """Acceptance between 0.2 and 0.8, possible tokens, and equal texts for equal keys."""
    run = functools.partial(
        jaxspec.generate, load("float32"), prompts, drafter=_drafter("noisy"), eos_ids=(),
        max_new_tokens=30,
    )  # fmt: skip
    generation = run(key=jax.random.key(0))
    rate = (
        np.asarray(generation.stats.num_accepted_draft_tokens).sum()
        / np.asarray(generation.stats.num_draft_tokens).sum()
    )
    assert 0.2 < rate < 0.8, rate
    expected = _teacher_forced(_FUTURE, np.asarray(generation.tokens[0]).tolist())
    np.testing.assert_allclose(generation.log_probs[0], expected, atol=1e-4)
    again = run(key=jax.random.key(0))
    np.testing.assert_array_equal(again.tokens, generation.tokens)


def test_prompt_lookup_pays_where_text_is_repeated(tokenizer):
    text = (
        "The lighthouse keeper climbed the stairs each evening, lit the lamp, and wrote one line "
        "about the weather in a book that nobody had ever asked to read."
    )
    chat = [{"role": "user", "content": f"Repeat this text exactly:\n\n{text}"}]
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        add_special_tokens=False,
    )
    run = functools.partial(
        jaxspec.generate, load("float32"), [prompt], sampling=_GREEDY, max_new_tokens=48
    )
    generation = run(drafter=drafters.prompt_lookup())
    assert float(generation.stats.tokens_per_step[0]) >= 1.5
    np.testing.assert_array_equal(generation.tokens, run().tokens)


# ---------------------------------------------------------------------------------------------
# Invariant 8: arithmetic does not depend on the width or the batch.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_logits_are_bit_equal_at_any_width_and_batch(dtype):
    model = load(dtype)
    texts = np.random.default_rng(0).integers(0, model.vocab_size, (4, 24)).astype(np.int32)
    apply = jax.jit(model.apply, donate_argnums=2)

    def logits(width, batch):
        cache, rows = model.init_cache(batch, 64, width), []
        for first in range(0, 24 - width + 1, width):
            output, cache = apply(
                model.params,
                jnp.asarray(texts[:batch, first : first + width]),
                cache,
                start=jnp.full((batch,), first, jnp.int32),
            )
            rows.append(np.asarray(output.logits))
        return np.concatenate(rows, axis=1)

    reference = logits(8, 4)
    assert reference.std() > 1
    for width, batch in ((1, 1), (2, 1), (5, 1), (8, 1), (11, 1), (24, 1), (1, 4), (2, 4), (5, 4)):
        ours = logits(width, batch)
        np.testing.assert_array_equal(
            ours, reference[:batch, : ours.shape[1]], err_msg=f"width {width}, batch {batch}"
        )


# ---------------------------------------------------------------------------------------------
# Invariant 7: the cache is never copied.


def _bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_loop_holds_no_second_cache(dtype):
    """At a capacity of 4,096: temporary memory < 1.2 × one cache, and the state is donated."""
    state, _, run = compiled_parts(
        load(dtype), np.full((1, 3900), 5, np.int32), drafter=drafters.prompt_lookup(),
        sampling=_GREEDY, max_new_tokens=186,
    )  # fmt: skip
    cache = _bytes(state.cache)
    slots = state.cache.values[0].shape[2]
    assert 4096 <= slots <= 4352
    memory = run.memory_analysis()
    assert memory.temp_size_in_bytes < 1.2 * cache
    # Far below: what is temporary is logits and activations, not a part of the cache.
    assert memory.temp_size_in_bytes < 0.1 * cache
    assert memory.alias_size_in_bytes >= cache


def test_prefill_memory_does_not_grow_with_the_prompt():
    """4,000 tokens take at most 1.5 × the temporary memory of 1,000."""

    def temporary(num_tokens):
        _, prefill, _ = compiled_parts(
            load("float32"), np.full((1, num_tokens), 5, np.int32),
            drafter=drafters.prompt_lookup(), sampling=_GREEDY, max_new_tokens=64,
        )  # fmt: skip
        return prefill.memory_analysis().temp_size_in_bytes

    assert temporary(4000) <= 1.5 * temporary(1000)


def test_a_step_costs_the_same_at_any_capacity():
    """At a fixed length, medians of alternating runs; attention over the capacity cost 2.7 ×."""
    model = load("float32")
    apply = jax.jit(model.apply, donate_argnums=2)
    tokens, start = jnp.ones((1, 5), jnp.int32), jnp.array([100])
    caches = {capacity: model.init_cache(1, capacity, 5) for capacity in (256, 4096)}
    seconds = {capacity: [] for capacity in caches}
    for _ in range(12):
        for capacity in caches:
            began = time.perf_counter()
            output, caches[capacity] = apply(model.params, tokens, caches[capacity], start=start)
            jax.block_until_ready(output)
            seconds[capacity].append(time.perf_counter() - began)
    assert np.median(seconds[4096][2:]) < 1.3 * np.median(seconds[256][2:])


# ---------------------------------------------------------------------------------------------
# One program.


def test_two_loads_share_every_trace(prompts, monkeypatch):
    def write(model):
        return jaxspec.generate(
            model, prompts, drafter=drafters.prompt_lookup(), sampling=_GREEDY, max_new_tokens=20
        )

    before = write(load("float32"))  # here: traces of earlier tests may have been let go of
    again = jaxspec_models.load_model("smollm2-135m", dtype="float32")
    assert jax.tree.structure(again) == jax.tree.structure(load("float32"))

    def retraced(*args, **kwargs):
        raise AssertionError("the model was traced again")

    monkeypatch.setattr(type(again.apply), "__call__", retraced)
    np.testing.assert_array_equal(write(again).tokens, before.tokens)


def test_the_whole_generate_is_one_program_without_host_round_trips():
    model = load("float32")

    @jax.jit
    def program(model, prompts):
        return jaxspec.generate(
            model, prompts, drafter=drafters.prompt_lookup(), sampling=_GREEDY, max_new_tokens=20
        )

    prompts = jnp.asarray([_FUTURE])
    compiled = program.lower(model, prompts).compile()
    text = compiled.as_text()
    assert "while(" in text
    for host in ("infeed", "outfeed", "send(", "recv(", "callback"):
        assert host not in text, host
    with jax.transfer_guard("disallow"):
        generation = compiled(model, prompts)
    assert generation.tokens[0].tolist() == _FUTURE_TEXT


def test_stream_yields_the_text_of_generate(greedy, prompts):
    parts = {0: [], 1: []}
    for row, ids in jaxspec.stream(
        load("float32"), prompts, drafter=drafters.prompt_lookup(), sampling=_GREEDY,
        max_new_tokens=20,
    ):  # fmt: skip
        parts[row].extend(ids.tolist())
    assert parts == {0: _FUTURE_TEXT, 1: _CHAT_TEXT}
    assert greedy("lookup").tokens[0].tolist() == parts[0]


def test_generate_text(tokenizer):
    texts = jaxspec_models.generate_text(
        load("float32"), tokenizer, ["In a distant future,", _CHAT], sampling=_GREEDY,
        max_new_tokens=20, drafter=drafters.prompt_lookup(),
    )  # fmt: skip
    assert texts[1] == "The capital of France is Paris."
    assert texts[0] == tokenizer.decode(_FUTURE_TEXT)


def test_a_shipped_drafter_comes_with_its_model(greedy, prompts, tmp_path, monkeypatch):
    """Loading the model by its name loads what lies under that name beside the package."""
    target = load("float32")
    shape = drafter_making.shape(target, "eagle3", num_draft_tokens=3, draft_vocab_size=512)
    _, weights = nnx.split(eagle3.EagleModel(shape, rngs=nnx.Rngs(0)))
    shape, weights = methods.quantize(shape, nnx.to_pure_dict(weights))
    directory.save_drafter(
        tmp_path / "smollm2-135m", target, shape, weights, np.arange(512), target_name="it"
    )
    monkeypatch.setattr(loading, "_SHIPPED", tmp_path)
    model = jaxspec_models.load_model("smollm2-135m", dtype="float32")
    lookup, trained = model.default_drafter.drafters
    assert lookup == drafters.prompt_lookup(max_ngram=5, min_ngram=4)
    assert trained.config == shape
    out = jaxspec.generate(
        model, prompts, drafter="auto", num_draft_tokens=3, sampling=_GREEDY, max_new_tokens=12
    )
    assert np.all(out.stats.num_draft_tokens > 0)
    np.testing.assert_array_equal(out.tokens, greedy("none").tokens[:, :12])
