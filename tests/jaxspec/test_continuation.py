"""Texts that are taken up again are those of one uninterrupted run."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant
from support.running import generate_with

import jaxspec
from jaxspec import Sampling, arguments, drafters, policies, status, verifiers
from jaxspec.testing import check_lossless, random_logits, table_model
from jaxspec_models import llama

loop_module = importlib.import_module("jaxspec.loop")


def _llama(seed, layers):
    config = llama.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, dtype="float32",
    )  # fmt: skip
    return llama.language_model(config, llama.init_params(config, seed=seed))


TARGET, OTHER = _llama(0, 2), _llama(1, 1)
PROMPTS = [[3, 1, 4], [5], [9, 2, 6, 5]]
NEXT = [[7], [8, 1, 2], [3, 3]]
DRAFTERS = {
    "none": lambda: None,
    "itself": lambda: drafters.model(TARGET),
    "model": lambda: drafters.model(OTHER),
    "lookup": lambda: drafters.prompt_lookup(max_ngram=1),
}
PENALTIES = {
    "repetition_penalty": 1.2, "presence_penalty": 0.3, "no_repeat_ngram_size": 3,
    "min_new_tokens": 7,
}  # fmt: skip
GREEDY = Sampling(temperature=0, presence_penalty=0.3, no_repeat_ngram_size=3)
WARM = Sampling(temperature=0.9, **PENALTIES)
# What is the same token for token, interrupted or not: the text does not depend on the rounds.
SETTINGS = {
    "greedy, none": ("none", None, GREEDY),
    "greedy, itself": ("itself", None, GREEDY),
    "match, lookup": ("lookup", verifiers.match(), WARM),
    "sampled, none": ("none", None, WARM),
}


def _text(*outs):
    """The rows' new tokens, one call's behind the other's."""
    return [
        [token for out in outs for token in out.tokens[row, : int(out.lengths[row])].tolist()]
        for row in range(outs[0].tokens.shape[0])
    ]


def _generate(setting, module=None):
    name, verifier, sampling = SETTINGS[setting]
    run = (
        jaxspec.generate
        if module is None
        else functools.partial(generate_with, loop_module, prefilling=module)
    )
    return functools.partial(
        run, TARGET, drafter=DRAFTERS[name](), verifier=verifier, sampling=sampling, eos_ids=(12,)
    )


def check_written_on(setting, module=None):
    run = _generate(setting, module)
    key = jax.random.key(2)
    whole = run(PROMPTS, key=key, max_new_tokens=40)
    first = run(PROMPTS, key=key, max_new_tokens=10, return_state=True)
    # A state may be taken up more than once, where it fits its buffers and where it does not.
    for size in (6, 30) if setting.endswith("none") else (30,):
        for _ in range(2):
            second = run(state=first.state, max_new_tokens=size, return_state=True)
            texts = _text(first, second)
            assert texts == [text[: 10 + size] for text in _text(whole)]
    np.testing.assert_array_equal(second.status, whole.status)
    for name in ("log_probs", "raw_log_probs"):
        for row, text in enumerate(texts):
            parts = [getattr(out, name)[row, : int(out.lengths[row])] for out in (first, second)]
            want = getattr(whole, name)[row, : len(text)]
            np.testing.assert_allclose(np.concatenate(parts), want, atol=2e-5)
    return whole


@pytest.mark.parametrize("setting", ["greedy, itself", "match, lookup", "sampled, none"])
def test_more_tokens_are_those_of_one_run(setting):
    whole = check_written_on(setting)
    assert int(whole.lengths.max()) > 20  # else little was written on
    if setting.startswith("greedy"):
        assert int(whole.lengths[0]) < 10  # …and some row was not


def check_second_turn(setting, module=None):
    run = _generate(setting, module)
    first = run(PROMPTS, key=jax.random.key(2), max_new_tokens=40, return_state=True)
    # The second turn's penalties and limits see the first as prompt, as a new call would.
    turn = run(
        NEXT, state=first.state, key=jax.random.key(3), max_new_tokens=20, prompt_log_probs=True,
        return_state=True,
    )  # fmt: skip
    texts = [
        [*prompt, *new, *behind]
        for prompt, new, behind in zip(PROMPTS, _text(first), NEXT, strict=True)
    ]
    fresh = run(texts, key=jax.random.key(3), max_new_tokens=20, prompt_log_probs=True)
    assert _text(turn) == _text(fresh)
    np.testing.assert_array_equal(turn.status, fresh.status)
    for row, text in enumerate(texts):
        size = len(NEXT[row])
        np.testing.assert_allclose(
            turn.prompt_log_probs[row, :size],
            fresh.prompt_log_probs[row, len(text) - size : len(text)],
            atol=1e-4,
        )
        assert np.all(turn.prompt_log_probs[row, size:] == 0)
    return turn


@pytest.mark.parametrize("setting", ["greedy, itself", "match, lookup"])
def test_a_second_turn_is_what_it_would_be_behind_the_whole_text(setting):
    check_second_turn(setting)


def test_a_drafter_that_was_paused_catches_up():
    """Its cache ends long before the text, and the new tokens stand behind the gap."""
    run = _generate("greedy, itself")
    first = run(PROMPTS, max_new_tokens=40, policy=policies.fixed(0), return_state=True)
    assert int(jnp.sum(first.stats.num_draft_tokens)) == 0
    turn = run(NEXT, state=first.state, max_new_tokens=20, policy=policies.fixed(4))
    assert _text(turn) == _text(check_second_turn("greedy, none"))
    # All drafts are accepted, so its cache is right.
    steps = -(-np.asarray(turn.lengths) // 5)
    np.testing.assert_array_equal(turn.stats.num_spec_steps, steps)


@pytest.mark.exactness
def test_the_law_of_what_is_written_on():
    """Rounds are numbered on: randomness that came twice would show in the law."""
    target = table_model(random_logits(4, vocab_size=3, order=2), order=2)
    other = table_model(random_logits(1, vocab_size=3, order=2), order=2)

    def in_two_parts(*args, max_new_tokens, drafter=None, key=None, **kwargs):
        half, lengths = max_new_tokens // 2, kwargs.pop("prompt_lengths")
        run = functools.partial(jaxspec.generate, args[0], drafter=drafter, **kwargs)
        first = run(
            args[1], prompt_lengths=lengths, max_new_tokens=half, key=key, return_state=True
        )
        return _joined(first, run(state=first.state, max_new_tokens=max_new_tokens - half))

    report = check_lossless(
        target, drafters.model(other), prompts=[(2, 0, 2), (0, 1), (2,)], max_new_tokens=4,
        generate=in_two_parts, eos_ids=(1,),
    )  # fmt: skip
    report.assert_passed()


def _joined(first, second):
    """One `Generation` of two."""
    size = first.tokens.shape[1]
    columns = jnp.arange(size + second.tokens.shape[1])[None]

    def join(one, two, fill):
        shifted = jnp.pad(two, ((0, 0), (size, 0)))
        of_two = jnp.take_along_axis(
            shifted, jnp.minimum(columns - first.lengths[:, None] + size, shifted.shape[1] - 1), 1
        )
        padded = jnp.pad(one, ((0, 0), (0, two.shape[1])), constant_values=fill)
        joined = jnp.where(columns < first.lengths[:, None], padded, of_two)
        return jnp.where(columns < (first.lengths + second.lengths)[:, None], joined, fill)

    return dataclasses.replace(
        second,
        tokens=join(first.tokens, second.tokens, 1),
        log_probs=join(first.log_probs, second.log_probs, 0),
        lengths=first.lengths + second.lengths,
        stats=jax.tree.map(jnp.add, first.stats, second.stats),
    )


_PLAIN = "greedy, none"


@pytest.mark.parametrize(
    ("check", "setting", "patch"),
    [
        # the pending token is not fed
        (check_second_turn, _PLAIN, ("before.lengths - 1, num_new + 1", "before.lengths, num_new")),
        # the caches are forgotten
        (check_second_turn, _PLAIN, (
            "        (before.cache, before.drafter),",
            "        jax.tree.map(jnp.zeros_like, (before.cache, before.drafter)),")),
        # rows that had stopped go on
        (check_written_on, _PLAIN, ("before.status == status.LENGTH", "before.status >= 0")),
        # penalties forget what was written
        (check_written_on, _PLAIN, ("        prompt_lengths=request.prompt_lengths,\n", "")),
        # randomness comes again
        (check_written_on, "sampled, none", (
            "num_rounds=before.num_rounds", "num_rounds=0 * before.num_rounds")),
    ],
)  # fmt: skip
def test_planted_bugs_are_noticed(check, setting, patch):
    module = mutant("jaxspec.prefilling", patch)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(setting, module)


def test_room_is_made_in_powers_of_two():
    """A chat compiles seldom: buffers stay while the text fits."""
    first = _generate(_PLAIN)(PROMPTS, max_new_tokens=4, return_state=True).state
    num_slots, capacity, sizes = first.state.tokens.shape[1], first.capacity, set()
    for longest in range(8, 500, 4):
        grown = dataclasses.replace(
            first,
            state=first.state._replace(
                lengths=jnp.array([longest, 5, longest - 3]),
                tokens=jax.ShapeDtypeStruct((3, num_slots), jnp.int32),
            ),
            capacity=capacity,
        )
        prepared = arguments.prepare(TARGET, NEXT, state=grown, sampling=GREEDY, max_new_tokens=4)
        _, num_slots, capacity = prepared.resumption
        # The new tokens, those to write, and whole chunks of both fit behind the longest text.
        assert num_slots >= longest + 32 + 4 + 1
        assert capacity > num_slots
        sizes.add((num_slots, capacity))
    assert len(sizes) == 5  # behind 32, 64, … 512 tokens


def test_under_a_users_jit():
    run = _generate(_PLAIN)
    first = run(PROMPTS, max_new_tokens=9, return_state=True)
    program = jax.jit(lambda state: run(state=state, max_new_tokens=20).tokens)
    want = run(state=first.state, max_new_tokens=20)
    np.testing.assert_array_equal(program(first.state), want.tokens)


def test_a_stream_goes_on():
    run = _generate("match, lookup")
    first = run(PROMPTS, max_new_tokens=9, key=jax.random.key(2), return_state=True)
    want = run(state=first.state, max_new_tokens=20)
    rows = [[], [], []]
    for row, ids in jaxspec.stream(
        TARGET, state=first.state, max_new_tokens=20, sampling=WARM, eos_ids=(12,),
        drafter=DRAFTERS["lookup"](), verifier=verifiers.match(),
    ):  # fmt: skip
        rows[row] += ids.tolist()
    assert rows == _text(want)


def test_nothing_is_written_where_every_row_has_stopped():
    run = functools.partial(_generate("greedy, none"), eos_ids=tuple(range(24)))
    first = run(PROMPTS, max_new_tokens=9, return_state=True)
    out = run(state=first.state, max_new_tokens=5)
    assert out.lengths.tolist() == [0, 0, 0]
    assert out.status.tolist() == [status.EOS] * 3


def _state(**kwargs):
    return _generate("greedy, none")(PROMPTS, max_new_tokens=2, return_state=True, **kwargs).state


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": None}, "pass prompts"),
        ({"state": 3}, "the `Generation.state` of a call with return_state=True, got int"),
        ({"state": _state, "prompts": [[1]]}, "the state has 3 rows: pass as many prompts"),
        ({"state": _state, "num_return_sequences": 2}, "a state has its rows already"),
        ({"state": _state, "drafter": drafters.model(OTHER)}, "another kind of drafter"),
        ({"state": _state, "drafter": drafters.prompt_lookup(),
          "policy": policies.heuristic()}, "another kind of"),
        ({"state": _state, "target": TARGET.replace(max_length=6)}, "made for 6 tokens"),
    ],
)  # fmt: skip
def test_wrong_states_are_refused(given, message):
    given = {"target": TARGET, "prompts": None, "sampling": GREEDY} | given
    if callable(given.get("state")):
        given["state"] = given["state"]()
    with pytest.raises(ValueError, match=message):
        jaxspec.generate(given.pop("target"), given.pop("prompts"), **given)
