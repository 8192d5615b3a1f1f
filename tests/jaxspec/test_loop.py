"""The loop on table models: rows at their own pace, ends, feeding, and broken logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec
from jaxspec import arguments, drafters, loop, policies, prefilling, pytree, status
from jaxspec.policies.fixed import Fixed
from jaxspec.testing import random_logits, table_model

_VOCAB, _ORDER = 6, 2
_TARGET = random_logits(3, vocab_size=_VOCAB, order=_ORDER)
_OTHER = _TARGET + random_logits(4, vocab_size=_VOCAB, order=_ORDER, scale=1.0)
_GREEDY = jaxspec.Sampling(temperature=0)
_PROMPTS = [[1, 2, 3], [5], [0, 1, 0, 1, 0, 1, 0], [4, 4, 2, 0]]


def _model(logits=_TARGET, eos_ids=()):
    return table_model(logits, order=_ORDER, eos_ids=eos_ids)


def _drafter(name):
    return {
        "none": lambda: None,
        "equal": lambda: drafters.model(_model()),
        "disagreeing": lambda: drafters.model(_model(_OTHER)),
        "lookup": drafters.prompt_lookup,
    }[name]()


def _texts(generation):
    return [
        row[:length].tolist()
        for row, length in zip(
            np.asarray(generation.tokens), np.asarray(generation.lengths), strict=True
        )
    ]


def _greedy_text(prompt, num_tokens, eos_ids=()):
    """Plain decoding in NumPy."""
    text = list(prompt)
    for _ in range(num_tokens):
        last = [0, 0, *text][-2:]
        text.append(int(np.argmax(_TARGET[last[0] * _VOCAB + last[1]])))
        if text[-1] in eos_ids:
            break
    return text[len(prompt) :]


_DRAFTERS = ["none", "equal", "disagreeing", "lookup"]


@pytest.mark.parametrize("drafter", _DRAFTERS)
@pytest.mark.parametrize("num_new", [1, 13])
def test_greedy_is_plain_decoding(drafter, num_new):
    """Also for limits that are a multiple of nothing, and for K larger than what remains."""
    generation = jaxspec.generate(
        _model(),
        _PROMPTS,
        drafter=_drafter(drafter),
        sampling=_GREEDY,
        max_new_tokens=num_new,
        num_draft_tokens=5,
    )
    assert _texts(generation) == [_greedy_text(prompt, num_new) for prompt in _PROMPTS]
    assert generation.status.tolist() == [status.LENGTH] * 4


def test_disagreeing_drafts_are_partly_accepted():
    """Else the equalities here would say little."""
    generation = jaxspec.generate(
        _model(), _PROMPTS, drafter=_drafter("disagreeing"), max_new_tokens=64,
        key=jax.random.key(0),
    )  # fmt: skip
    rate = np.asarray(generation.stats.draft_acceptance_rate)
    assert ((rate > 0.2) & (rate < 0.95)).all()


# ---------------------------------------------------------------------------------------------
# Batches.

_ROW_OPTIONS = {
    "temperature": np.array([1.0, 0.0, 0.7, 1.3]),
    "top_k": np.array([0, 0, 3, 2]),
    "repetition_penalty": np.array([1.0, 1.2, 1.0, 1.5]),
}


@pytest.mark.optimized
@pytest.mark.parametrize("drafter", _DRAFTERS)
def test_a_row_is_the_same_alone_and_in_a_batch(drafter):
    keys = jax.random.split(jax.random.key(8), 4)
    run = functools.partial(
        jaxspec.generate,
        _model(eos_ids=(5,)),
        drafter=_drafter(drafter),
        policy=policies.heuristic(2),
        max_new_tokens=23,
        num_draft_tokens=4,
    )
    batch = run(_PROMPTS, key=keys, sampling=jaxspec.Sampling(**_ROW_OPTIONS))
    for row, prompt in enumerate(_PROMPTS):
        options = {name: values[row : row + 1] for name, values in _ROW_OPTIONS.items()}
        alone = run(
            [prompt], key=jax.random.clone(keys[row : row + 1]),
            sampling=jaxspec.Sampling(**options),
        )  # fmt: skip
        for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(batch), strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])


@pytest.mark.optimized
@pytest.mark.parametrize("drafter", ["disagreeing", "lookup"])
def test_padding_changes_nothing(drafter):
    """Neither its amount nor what it holds, ids outside the vocabulary included."""
    keys = jax.random.split(jax.random.key(9), 4)
    results = []
    for width, filler in ((7, 3), (7, -100), (300, 10**6)):
        tokens = np.full((4, width), filler, np.int32)
        for row, prompt in enumerate(_PROMPTS):
            tokens[row, : len(prompt)] = prompt
        results.append(
            jaxspec.generate(
                _model(),
                tokens,
                prompt_lengths=np.array([len(p) for p in _PROMPTS]),
                drafter=_drafter(drafter),
                max_new_tokens=15,
                key=jax.random.clone(keys),
                pad_id=77,
            )
        )
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])


def test_one_key_is_folded_with_the_row():
    key = jax.random.key(3)
    rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(4))
    by_row = jaxspec.generate(_model(), _PROMPTS, max_new_tokens=9, key=rows)
    folded = jaxspec.generate(_model(), _PROMPTS, max_new_tokens=9, key=jax.random.clone(key))
    np.testing.assert_array_equal(by_row.tokens, folded.tokens)
    same_prompt = jaxspec.generate(
        _model(), [[1], [1]], max_new_tokens=30, key=jax.random.clone(key)
    )
    assert same_prompt.tokens[0].tolist() != same_prompt.tokens[1].tolist()


# ---------------------------------------------------------------------------------------------
# Ends.


@pytest.mark.parametrize("drafter", _DRAFTERS)
def test_eos_inside_a_block_ends_the_row(drafter):
    plain = [_greedy_text(prompt, 20) for prompt in _PROMPTS]
    eos_ids = (plain[0][2], plain[1][5])
    generation = jaxspec.generate(
        _model(eos_ids=(99,)), _PROMPTS, drafter=_drafter(drafter), sampling=_GREEDY,
        max_new_tokens=20, num_draft_tokens=8, eos_ids=eos_ids, pad_id=-7,
    )  # fmt: skip
    expected = [_greedy_text(prompt, 20, eos_ids) for prompt in _PROMPTS]
    assert _texts(generation) == expected
    for row, text in enumerate(expected):
        assert (np.asarray(generation.tokens[row, len(text) :]) == -7).all()
        assert (np.asarray(generation.log_probs[row, len(text) :]) == 0).all()
        ended = text[-1] in eos_ids
        assert int(generation.status[row]) == (status.EOS if ended else status.LENGTH)


def test_eos_in_the_prompt_does_not_end_a_row():
    prompt = [2, 5, 5, 1]
    generation = jaxspec.generate(
        _model(eos_ids=(5,)), [prompt], drafter=drafters.prompt_lookup(), sampling=_GREEDY,
        max_new_tokens=8, pad_id=5,
    )  # fmt: skip
    assert _texts(generation) == [_greedy_text(prompt, 8, (5,))]
    assert generation.lengths[0] >= 1


def test_no_eos_ids_never_stops():
    generation = jaxspec.generate(
        _model(eos_ids=tuple(range(_VOCAB))), _PROMPTS, sampling=_GREEDY, max_new_tokens=6,
        eos_ids=(),
    )  # fmt: skip
    assert generation.lengths.tolist() == [6] * 4


def test_stats_count_to_eos_and_not_past_it():
    plain = _greedy_text([1, 2, 3], 20)
    eos = plain[2]
    stop = plain.index(eos) + 1  # inside the first block of eight drafts
    stats = jaxspec.generate(
        _model(), [[1, 2, 3]], drafter=_drafter("equal"), sampling=_GREEDY, max_new_tokens=20,
        num_draft_tokens=8, eos_ids=eos,
    ).stats  # fmt: skip
    assert stats.num_spec_steps.tolist() == [1]
    assert stats.num_emitted_tokens.tolist() == [stop]
    assert stats.num_accepted_draft_tokens.tolist() == [stop]
    assert stats.num_draft_tokens.tolist() == [stop]
    assert stats.draft_acceptance_rate.tolist() == [1.0]
    histogram = [0] * 9
    histogram[stop] = 1
    assert stats.acceptance_histogram.tolist() == [histogram]


# ---------------------------------------------------------------------------------------------
# Each forward is fed only what is new.


@dataclasses.dataclass(frozen=True)
class _CountingApply:
    apply: object

    def __call__(self, params, tokens, cache, *, start, num_new=None, logits_at=None):
        inner, fed, calls = cache
        output, inner = self.apply(params, tokens, inner, start=start, logits_at=logits_at)
        return output, (inner, fed + num_new, calls + 1)


@dataclasses.dataclass(frozen=True)
class _CountingInit:
    init_cache: object

    def __call__(self, batch, capacity, max_step):
        inner = self.init_cache(batch, capacity, max_step)
        return inner, jnp.zeros((batch,), jnp.int32), jnp.int32(0)


def _counting(lm):
    """The model with a cache that counts the tokens it was fed, and its calls."""
    return lm.replace(apply=_CountingApply(lm.apply), init_cache=_CountingInit(lm.init_cache))


def _final_state(target, prompts, **kwargs):
    prepared = arguments.prepare(target, prompts, **kwargs)
    state = prefilling.prefill(
        prepared.engine, prepared.request, prepared.prompts,
        max_new_tokens=prepared.max_new_tokens,
    )  # fmt: skip
    return jax.jit(loop.run)(prepared.engine, prepared.request, state, -1)


@pytest.mark.parametrize("drafter", ["equal", "disagreeing"])
def test_neither_model_reads_the_prefix_again(drafter):
    draft_model = _counting(_drafter(drafter).lm)
    prompts = [list(np.arange(600) % _VOCAB), [3, 1]]  # three prefill chunks, and none
    state = _final_state(
        _counting(_model()), prompts, drafter=drafters.model(draft_model), max_new_tokens=40,
        num_draft_tokens=3, key=jax.random.key(2),
    )  # fmt: skip
    fed_target, fed_draft = np.asarray(state.cache[1]), np.asarray(state.drafter.cache[1])
    stats = jax.tree.map(np.asarray, state.stats)
    prompt_lengths = np.array([600, 2])
    # The target: the prompt once, then each round the pending token and its drafts.
    assert (
        fed_target.tolist()
        == (prompt_lengths - 1 + stats.num_spec_steps + stats.num_draft_tokens).tolist()
    )
    # The drafter: every token it still holds, and the drafts that were rejected after feeding.
    rejected = stats.num_draft_tokens - stats.num_accepted_draft_tokens
    held = np.asarray(state.drafter.num_cached)
    assert (fed_draft >= held).all()
    assert (fed_draft <= held + rejected).all()
    if drafter == "equal":
        assert rejected.tolist() == [0, 0]
        assert stats.num_spec_steps.tolist() == [10, 10]


def test_prefill_chunks_that_no_row_needs_are_skipped():
    tokens = np.ones((2, 1024), np.int32)
    prepared = arguments.prepare(
        _counting(_model()), tokens, prompt_lengths=np.array([257, 20]), sampling=_GREEDY,
        max_new_tokens=4,
    )  # fmt: skip
    state = prefilling.prefill(
        prepared.engine, prepared.request, prepared.prompts, max_new_tokens=4
    )
    _, fed, calls = state.cache
    assert fed.tolist() == [256, 19]
    assert int(calls) == 1


# ---------------------------------------------------------------------------------------------
# Drafters that fall behind.


@pytree.dataclass
class _Resting(Fixed):
    """Drafts nothing in two rounds of three."""

    def init(self, batch):
        return jnp.zeros((batch,), jnp.int32)

    def num_draft(self, state):
        return jnp.where(state % 3 == 2, self.length, 0)

    def update(self, state, outcome):
        return state + outcome.is_active.astype(jnp.int32)


def test_a_drafter_catches_up_after_rounds_without_drafts():
    generation = jaxspec.generate(
        _model(), _PROMPTS, drafter=_drafter("equal"), policy=_Resting(3), max_new_tokens=29,
        key=jax.random.key(4),
    )  # fmt: skip
    stats = generation.stats
    # Rounds of 1, 1 and 3 + 1 tokens; whatever is drafted is accepted: the cache is right.
    assert stats.draft_acceptance_rate.tolist() == [1.0] * 4
    assert stats.num_emitted_tokens.tolist() == [29] * 4
    assert stats.num_spec_steps.tolist() == [15] * 4


def test_no_drafts_is_plain_decoding():
    run = functools.partial(jaxspec.generate, _model(), _PROMPTS, max_new_tokens=17)
    resting = run(drafter=_drafter("disagreeing"), policy=policies.fixed(0), key=jax.random.key(6))
    plain = run(key=jax.random.key(6))
    assert _texts(resting) == _texts(plain)
    assert resting.stats.num_draft_tokens.tolist() == [0] * 4


# ---------------------------------------------------------------------------------------------
# Logits that are not finite.


@pytest.mark.parametrize("drafter", _DRAFTERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_stop_their_row_and_keep_what_was_emitted(drafter, bad):
    plain = [_greedy_text(prompt, 16) for prompt in _PROMPTS]
    broken = _TARGET.copy()
    context = [*_PROMPTS[0], *plain[0]][4:6]  # what row 0's fourth token looks back on
    where = context[0] * _VOCAB + context[1]
    if bad == -np.inf:
        broken[where] = bad  # nothing can be drawn
    else:
        broken[where, 2] = bad
    generation = jaxspec.generate(
        _model(broken), _PROMPTS, drafter=_drafter(drafter), sampling=_GREEDY, max_new_tokens=16
    )
    for row, prompt in enumerate(_PROMPTS):
        expected, failed = [], False
        text = list(prompt)
        for _ in range(16):
            last = [0, 0, *text][-2:]
            failed = last == context
            if failed:
                break
            text.append(int(np.argmax(_TARGET[last[0] * _VOCAB + last[1]])))
        expected = text[len(prompt) :]
        assert _texts(generation)[row] == expected
        assert int(generation.status[row]) == (status.NONFINITE if failed else status.LENGTH)
    assert int(generation.status[0]) == status.NONFINITE
    assert np.isfinite(np.asarray(generation.log_probs)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_drafter_costs_acceptance_and_nothing_else(bad):
    """NaN in q: rejected, then drawn from the target; the rows run to their end."""
    broken = _OTHER.copy()
    broken[::2, 1] = bad
    generation = jaxspec.generate(
        _model(), _PROMPTS, drafter=drafters.model(_model(broken)), max_new_tokens=16,
        key=jax.random.key(0),
    )  # fmt: skip
    assert generation.status.tolist() == [status.LENGTH] * 4
    assert np.isfinite(np.asarray(generation.log_probs)).all()
    tokens = np.asarray(generation.tokens)
    assert ((tokens >= 0) & (tokens < _VOCAB)).all()
