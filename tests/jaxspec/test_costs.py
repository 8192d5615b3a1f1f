"""Costs measured where they are known; model drafters that were not asked for many rounds."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from support.mutants import mutant

import jaxspec
from jaxspec import Context, drafters, policies, pytree, sampling
from jaxspec.testing import random_logits, table_model
from jaxspec_models import llama

# The package gives factory and module one name: this is the module.
model_module = importlib.import_module("jaxspec.drafters.model")
costs_module = importlib.import_module("jaxspec.costs")

GREEDY = jaxspec.Sampling(temperature=0)
TARGET = table_model(random_logits(3, vocab_size=6, order=2), order=2)
QUICK = {"context_length": 8, "num_rounds": 4, "repeats": 3}

# ---------------------------------------------------------------------------------------------
# Measuring, by a clock that only forwards move.


def check_form(profile, num_slots):
    """What holds whatever the timings were."""
    assert isinstance(profile, jaxspec.Profile)
    chex.assert_shape([profile.verify, profile.round_costs()], (num_slots + 1,))
    chex.assert_shape([profile.draft, profile.overhead], ())
    chex.assert_type(jax.tree.leaves(profile), jnp.float32)
    chex.assert_tree_all_finite(profile)
    assert np.all(profile.verify > 0)
    assert np.all(np.diff(profile.verify) >= 0)
    assert float(profile.draft) >= 0
    assert float(profile.overhead) >= 0


def test_a_profile_of_plain_decoding():
    profile = jaxspec.measure_costs(TARGET, batch=2, sampling=jaxspec.Sampling(), **QUICK)
    check_form(profile, 0)
    assert float(profile.draft) == 0


def test_a_profile_of_a_batch():
    """The shortest measurement there is."""
    least = {"context_length": 1, "num_rounds": 1, "repeats": 1}
    profile = jaxspec.measure_costs(TARGET, "auto", batch=3, num_draft_tokens=2, **least)
    check_form(profile, 2)


class Clock:
    """A clock for programs: it stands still but for what they say they cost."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def wait(self, seconds):
        self.now += float(seconds)
        return np.float32(0.0)


CLOCK = Clock()


@dataclasses.dataclass(frozen=True)
class Charged:
    """A model that takes so long for a call and so long for each token, by `CLOCK`."""

    apply: Callable[..., Any]

    def __call__(self, params, tokens, cache, *, start):
        table, per_call, per_token = params
        output, cache = self.apply(table, tokens, cache, start=start)
        seconds = per_call + per_token * tokens.shape[1]
        nothing = io_callback(CLOCK.wait, jax.ShapeDtypeStruct((), np.float32), seconds)
        return output._replace(logits=output.logits + nothing), cache


def charged(*, per_call=0.0, per_token=0.0):
    """The table model with a price, in seconds."""
    price = [np.float32(per_call), np.float32(per_token)]
    return TARGET.replace(params=(TARGET.params, *price), apply=Charged(TARGET.apply))


def measured(*args, module=costs_module, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", CLOCK)
        profile = module.measure_costs(*args, **QUICK, **options)
    check_form(profile, options.get("num_draft_tokens", 4))
    return profile


@functools.cache
def lookup_profile(**price):
    return measured(charged(**price), drafters.prompt_lookup(), num_draft_tokens=9)


def test_a_target_that_pays_for_each_token():
    """Forwards are 1, 3 and 10 tokens wide; a lookup and the rest cost nothing."""
    profile = lookup_profile(per_token=1.0)
    np.testing.assert_allclose(profile.verify, [1, 3, 3, 10, 10, 10, 10, 10, 10, 10], rtol=1e-6)
    np.testing.assert_allclose([profile.draft, profile.overhead], 0, atol=1e-6)


def test_a_target_that_pays_for_the_call():
    profile = lookup_profile(per_call=2.0)
    np.testing.assert_allclose(profile.verify, 2, rtol=1e-6)
    np.testing.assert_allclose([profile.draft, profile.overhead], 0, atol=1e-6)


def check_a_drafter_that_costs(module):
    """Each draft costs a forward of the drafter, and verification is not charged it."""
    target, draft_model = charged(per_call=3.0), charged(per_call=0.5)
    profile = measured(target, drafters.model(draft_model), module=module)
    np.testing.assert_allclose(profile.verify, 3, rtol=1e-6)
    np.testing.assert_allclose(profile.draft, 0.5, rtol=1e-6)
    # A round without drafts may keep the drafter up to date.
    assert float(profile.overhead) < 0.5 + 1e-6


def test_a_drafter_that_costs():
    check_a_drafter_that_costs(costs_module)


def test_a_slow_turn_slows_all_of_its_parts():
    """Ratios within a turn count: 1 to 2, although the medians are 2 and 2."""
    turns = {
        "one": iter([9.0, 1.0, 2.0, 3.0, 2.0, 1.0]),
        "two": iter([9.0, 2.0, 4.0, 2.0, 4.0, 2.0]),
    }
    parts = {name: functools.partial(next, values) for name, values in turns.items()}
    assert costs_module.typical_times(parts, 5, reference="two") == {"one": 1.0, "two": 2.0}


@pytest.mark.parametrize(
    "patch",
    [
        ("seconds[width] - (width - 1) * draft", "seconds[width]"),  # drafting counts twice
        ("drafting - idling) / num_slots", "drafting - idling)"),  # of all drafts, not of one
        ('seconds[1] - seconds["forward"])', "seconds[1])"),  # a forward is overhead, too
    ],
)
def test_planted_bugs_in_the_measure(patch):
    module = mutant("jaxspec.costs", patch)
    module._Insistent = costs_module._Insistent  # else it is compiled again
    with pytest.raises(AssertionError):
        check_a_drafter_that_costs(module)


def test_a_profile_decides_in_generate():
    """Where tokens cost, goodput drafts nothing; where calls cost, it drafts. One text for all."""
    options = {"sampling": GREEDY, "max_new_tokens": 40, "num_draft_tokens": 9}
    prompts = [[1, 2, 3], [5]]
    plain = jaxspec.generate(TARGET, prompts, **options)
    for units, pays in (({"per_token": 1.0}, False), ({"per_call": 2.0}, True)):
        policy = policies.guarded(policies.goodput(lookup_profile(**units)))
        out = jaxspec.generate(
            TARGET, prompts, drafter=drafters.model(TARGET), policy=policy, **options
        )
        np.testing.assert_array_equal(out.tokens, plain.tokens)
        assert np.all((out.stats.num_draft_tokens > 0) == pays)
        if pays:
            assert np.all(out.stats.num_spec_steps < 20)


@pytest.mark.parametrize(
    "name", ["batch", "context_length", "num_rounds", "repeats", "num_draft_tokens"]
)
@pytest.mark.parametrize("count", [0, -1, 1.5])
@pytest.mark.parametrize("drafter", [None, drafters.prompt_lookup()])
def test_counts_below_one_are_refused(name, count, drafter):
    with pytest.raises(ValueError, match=r"must be a .* at least 1"):
        jaxspec.measure_costs(TARGET, drafter, **{name: count})


def test_refuses_as_generate_does():
    with pytest.raises(ValueError, match=r"the target must be a jaxspec\.LanguageModel"):
        jaxspec.measure_costs(3)
    with pytest.raises(ValueError, match=r"drafter must come from jaxspec\.drafters"):
        jaxspec.measure_costs(TARGET, "lookup")
    with pytest.raises(ValueError, match="the target is made for 64 tokens"):
        jaxspec.measure_costs(TARGET.replace(max_length=64), context_length=60)


# ---------------------------------------------------------------------------------------------
# Model drafters that lag behind their text. The models have key/value caches: a slot that is
# wrong, or is not there, changes what attention sees.

CONFIG = llama.LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    dtype="float32",
)  # fmt: skip


@functools.cache
def random_llama(seed):
    return llama.language_model(CONFIG, llama.init_params(CONFIG, seed))


@pytree.dataclass
class Scheduled:
    """Drafts i32[B, R] tokens in rounds 0 … R - 1, then as in the last."""

    lengths: jax.Array

    def init(self, batch):
        return jnp.zeros((batch,), jnp.int32)

    def num_draft(self, state):
        at = jnp.minimum(state, self.lengths.shape[1] - 1)
        return jnp.take_along_axis(self.lengths, at[:, None], axis=1)[:, 0]

    def keep_drafting(self, state, signals):
        return jnp.ones_like(state, dtype=bool)

    def update(self, state, outcome):
        return state + outcome.is_active.astype(jnp.int32)


WIDTH, NEW, K = 24, 64, 2
PROMPT_LENGTHS = np.array([24, 3, 17, 1])
PROMPTS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(4, WIDTH))


def after(*naps):
    """Rows that draft K tokens in each round, after so many rounds without drafts."""
    return np.array([[0] * nap + [K] * (NEW - nap) for nap in naps])


SCHEDULES = {
    "never paused": after(0, 0, 0, 0),
    "all at once": after(20, 20, 20, 20),
    "each at its own time": after(0, 20, 9, 31),
    "late": after(55, 60, 61, 20),  # near the end of the text
    "now and then": np.resize([2, 1] + [0] * 11 + [2] + [0] * 8, (4, NEW)),
    "at random": np.repeat(np.random.default_rng(1).integers(3, size=(4, NEW // 8)), 8, axis=1),
}


def write(drafter, schedule):
    return jaxspec.generate(
        random_llama(0),
        jnp.asarray(PROMPTS),
        prompt_lengths=PROMPT_LENGTHS,
        drafter=drafter,
        policy=None if schedule is None else Scheduled(jnp.asarray(schedule, jnp.int32)),
        sampling=GREEDY,
        max_new_tokens=NEW,
        num_draft_tokens=K,
    )


@functools.cache
def plain():
    return write(None, None)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_paused_drafter_catches_up(name):
    """The text is that of plain decoding; a draft equal to the target is right every time."""
    schedule = SCHEDULES[name]
    out = write(drafters.model(random_llama(0)), schedule)
    np.testing.assert_array_equal(out.tokens, plain().tokens)
    np.testing.assert_array_equal(out.status, plain().status)
    stats = out.stats
    assert np.all(stats.num_draft_tokens > 0)
    np.testing.assert_array_equal(stats.num_accepted_draft_tokens, stats.num_draft_tokens)
    # Each row drafted in its own rounds, all it was asked for up to the end of its text.
    for row, lengths in enumerate(schedule):
        left, rounds = NEW, 0
        while left:
            left -= 1 + min(lengths[rounds], left - 1)
            rounds += 1
        assert int(stats.num_spec_steps[row]) == rounds


def test_a_paused_drafter_that_is_often_wrong():
    other = drafters.model(random_llama(1))
    for schedule in SCHEDULES.values():
        out = write(other, schedule)
        np.testing.assert_array_equal(out.tokens, plain().tokens)
        rejected = out.stats.num_draft_tokens - out.stats.num_accepted_draft_tokens
        assert np.all(rejected > 0)


def test_a_row_at_the_end_of_the_buffer_while_another_catches_up():
    """The longest row goes on drafting, at every distance from the end of the buffer.

    It writes three tokens in a round, after 0 … 2 single ones, and ends in round 22 … 24.
    """
    drafter = drafters.model(random_llama(0))
    for single in range(3):
        for nap in range(16, 24):
            out = write(drafter, after(single, nap, nap, 0))
            np.testing.assert_array_equal(out.tokens, plain().tokens)
            stats = out.stats
            np.testing.assert_array_equal(stats.num_accepted_draft_tokens, stats.num_draft_tokens)
            assert stats.num_spec_steps[0] == single + -(-(NEW - single) // 3)


@functools.partial(jax.jit, static_argnames="capacity")
def fill(drafter, tokens, num_tokens, *, capacity):
    """The state after `num_tokens` i32[B] tokens of each row."""
    batch, width = tokens.shape[0], 20

    def feed(i, state):
        start = jnp.full((batch,), i * width, jnp.int32)
        chunk = jax.lax.dynamic_slice(tokens, (0, i * width), (batch, width))
        return drafter.prefill(state, chunk, (), start, jnp.clip(num_tokens - start, 0, width))

    assert tokens.shape[1] % width == 0
    return jax.lax.fori_loop(0, tokens.shape[1] // width, feed, drafter.init(batch, capacity))


@functools.partial(jax.jit, static_argnames="num_slots")
def propose(drafter, state, tokens, lengths, num_draft, *, num_slots):
    batch = tokens.shape[0]
    options = sampling.resolve(GREEDY, batch, 32)
    context = Context(tokens, lengths, options, sampling.recall(options, tokens, lengths))
    keys = jax.random.split(jax.random.key(0), (batch, num_slots))
    return drafter.propose(
        keys, state, context, num_draft, lambda signals: signals.slot < num_slots
    )


@pytest.mark.parametrize("size", [40, 300])
def test_catching_up_leaves_valid_slots_alone(size):
    """The slots of a text hold what they should after some rows caught up, beside others.

    Row 0 stands near the end of the buffer. One of 300 slots has more blocks of attention than
    the rows that catch up need.
    """
    drafter = drafters.model(random_llama(0))
    tokens = jnp.asarray(np.random.default_rng(2).integers(32, size=(5, size)), jnp.int32)
    # Row 1 lags by three chunks and a bit, row 4 by one chunk, row 2 by too little for one; row 3
    # lags, but is not asked.
    lengths = jnp.array([size - 4, 30, 20, 30, 17])
    cached = jnp.array([size - 5, 4, 12, 2, 8])
    num_draft = jnp.array([1, 1, 1, 0, 1])
    state = fill(drafter, tokens, cached, capacity=size + 1)
    right = fill(drafter, tokens, lengths - 1, capacity=size + 1)
    draft, new = propose(drafter, state, tokens, lengths, num_draft, num_slots=1)
    # Of the text, all is cached that was needed.
    assert new.num_cached.tolist() == [
        length if asked else before
        for length, asked, before in zip(
            lengths.tolist(), num_draft.tolist(), cached.tolist(), strict=True
        )
    ]
    assert draft.length.tolist() == num_draft.tolist()
    count = jnp.minimum(new.num_cached, lengths - 1).tolist()
    for layer in range(CONFIG.num_hidden_layers):
        for name, axis in (("keys", 3), ("values", 2)):
            buffers = [np.moveaxis(getattr(x.cache, name)[layer], axis, 1) for x in (new, right)]
            for row, (held, expected) in enumerate(zip(*buffers, strict=True)):
                np.testing.assert_allclose(
                    held[: count[row]], expected[: count[row]], atol=1e-4,
                    err_msg=f"{name} of layer {layer}, row {row}",
                )  # fmt: skip
    # And the drafts are what a drafter that never lagged would say.
    again, _ = propose(drafter, right, tokens, lengths, num_draft, num_slots=1)
    asked = np.asarray(num_draft) > 0
    np.testing.assert_array_equal(draft.tokens[asked], again.tokens[asked])


@dataclasses.dataclass(frozen=True)
class Counted:
    """A model whose cache counts the calls."""

    apply: Callable[..., Any]

    def __call__(self, params, tokens, cache, *, start, num_new, logits_at):
        output, slots = self.apply(
            params, tokens, cache[0], start=start, num_new=num_new, logits_at=logits_at
        )
        return output, (slots, cache[1] + 1)


@dataclasses.dataclass(frozen=True)
class CountedCache:
    init_cache: Callable[..., Any]

    def __call__(self, batch, capacity, max_step):
        return self.init_cache(batch, capacity, max_step), jnp.int32(0)


def check_forwards(module):
    """Eight tokens a forward until fewer are left, then two, then one for each further draft.

    Row 1 does not lag, and the buffer ends behind its drafts: the cache, one slot later.
    """
    lm = TARGET.replace(apply=Counted(TARGET.apply), init_cache=CountedCache(TARGET.init_cache))
    drafter = module.model(lm)
    tokens = jnp.asarray(np.random.default_rng(4).integers(6, size=(2, 64)), jnp.int32)
    for length, cached, num_draft, calls in (
        (50, 1, [4, 4], 6 + 1 + 3),  # 49 behind: 6 · 8 and the pending token
        (50, 8, [4, 4], 5 + 1 + 3),  # 5 · 8 and 2
        (50, 4, [4, 4], 5 + 3 + 3),  # 5 · 8 and 6
        (50, 42, [4, 4], 4 + 3),  # 8 with the pending token: no chunk
        (50, 41, [4, 0], 1 + 1 + 3),
        (50, 1, [0, 4], 1 + 3),  # row 0 waits: nothing is done for it
        (50, 1, [0, 0], 0),
        (55, 1, [1, 1], 6 + 3),  # 6 · 8 and 6
    ):
        lengths = jnp.array([length, 60])
        num_cached = jnp.array([cached, 59])
        state = drafter.init(2, 65)
        slots = jnp.pad(tokens, ((0, 0), (0, 1)))
        slots = jnp.where(jnp.arange(65)[None] < num_cached[:, None], slots, 0)
        state = state._replace(cache=(slots, jnp.int32(0)), num_cached=num_cached)
        draft, new = propose(drafter, state, tokens, lengths, jnp.array(num_draft), num_slots=4)
        assert int(new.cache[1]) == calls
        assert draft.length.tolist() == num_draft
        for row, (before, asked) in enumerate(zip([cached, 59], num_draft, strict=True)):
            # All but the last draft.
            count = int(lengths[row]) + asked - 1 if asked else before
            assert int(new.num_cached[row]) == count
            known = [*tokens[row, : lengths[row]].tolist(), *draft.tokens[row].tolist()]
            assert new.cache[0][row, :count].tolist() == known[:count]


def test_catching_up_takes_few_forwards():
    check_forwards(model_module)


@pytest.mark.parametrize(
    "patch",
    [
        # rows that do not lag move on, too
        ("jnp.where(lags(num_cached), _CATCH_UP, 0)", "jnp.full_like(num_cached, _CATCH_UP)"),
        # the pending token is taken for a cached one, and nothing is left to draft from
        ("context.lengths - 1 - num_cached >= _CATCH", "context.lengths - num_cached >= _CATCH"),
        # what was fed is not noted right, or is another place's
        ("return cache, num_cached + num_new", "return cache, num_cached + num_new + 1"),
        ("(at,), (_CATCH_UP,)", "(at + 1,), (_CATCH_UP,)"),
        # rows that are not asked catch up all the same, or nobody does
        ("is_open & (context.lengths - 1", "(context.lengths - 1"),
        ("_CATCH_UP = 8", "_CATCH_UP = 1024"),
    ],
)
def test_planted_bugs_in_catching_up(patch):
    module = mutant("jaxspec.drafters.model", patch)
    with pytest.raises(AssertionError):
        check_forwards(module)
