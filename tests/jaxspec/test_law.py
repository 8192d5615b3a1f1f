"""The law of whole texts, drawn through `generate`, against exact enumeration in float64.

Each chi-square check fails a correct program with probability `FALSE_ALARM` = 1e-6 (fixed seeds:
it either always does or never). With 40,000 rows a law that is off by a total variation of 0.03
is caught with a probability above 0.99 at up to 81 texts: the noncentrality is at least
4 · 40,000 · 0.03² = 144, against a threshold of 156 + 80 at 80 degrees of freedom for the
statistic, whose mean is then 224 and more where the deviation is concentrated. Planted bugs move
the law by far more.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.laws import FALSE_ALARM, chi_square_p_value, counts_of
from support.mutants import mutant
from support.running import generate_with
from support.tables import joint_law, random_logits, table_model

import jaxspec
from jaxspec import drafters, loop, policies

_ROWS = 40_000
_VOCAB, _ORDER, _NEW = 3, 2, 4
_PROMPT = [2, 0, 2]  # token 1 is unseen: penalties have something to tell apart
_TARGET = random_logits(0, vocab_size=_VOCAB, order=_ORDER)
_OTHER = random_logits(1, vocab_size=_VOCAB, order=_ORDER)

_OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "all": {
        "temperature": 1.4,
        "top_k": 2,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.5,
    },
}


def _transform(options):
    """The sampling options in NumPy, sorted and in float64: logits, context -> law."""

    def law(logits, context):
        logits = logits.copy()
        if (penalty := options.get("repetition_penalty", 1.0)) != 1.0:
            for token in set(context):
                logits[token] *= 1 / penalty if logits[token] > 0 else penalty
        logits = logits / options.get("temperature", 1.0)
        order = np.argsort(-logits, kind="stable")
        if k := options.get("top_k", 0):
            logits[order[k:]] = -np.inf
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        ahead = np.cumsum(probs[order]) - probs[order]
        probs[order[ahead >= options.get("top_p", 1.0)]] = 0.0
        probs[probs < options.get("min_p", 0.0) * probs.max()] = 0.0
        return probs / probs.sum()

    return law


def _exact(options, prompt=None, eos_ids=()):
    return joint_law(
        _TARGET,
        _PROMPT if prompt is None else prompt,
        _NEW,
        order=_ORDER,
        transform=_transform(options),
        eos_ids=eos_ids,
    )


def _model(logits=_TARGET, eos_ids=()):
    return table_model(logits, order=_ORDER, eos_ids=eos_ids)


_DRAFTERS = {
    "none": lambda: None,
    "equal": lambda: drafters.model(_model()),
    "disagreeing": lambda: drafters.model(_model(_OTHER)),
    "lookup": lambda: drafters.prompt_lookup(max_ngram=2),
}


def _draw(drafter, options, *, module=loop, rows=_ROWS, eos_ids=(), num_draft_tokens=3, **kwargs):
    sampling = jaxspec.Sampling(**{k: np.asarray(v) for k, v in options.items()})
    return generate_with(
        module,
        _model(),
        jnp.tile(jnp.asarray([_PROMPT]), (rows, 1)),
        drafter=drafter,
        sampling=sampling,
        max_new_tokens=_NEW,
        num_draft_tokens=num_draft_tokens,
        key=jax.random.key(11),
        eos_ids=eos_ids or (_VOCAB,),  # an id that is never drawn: one shape for all
        pad_id=-1,
        **kwargs,
    )


def _p_value(generation, options, **kwargs):
    return chi_square_p_value(counts_of(generation), _exact(options, **kwargs))


@pytest.mark.parametrize("drafter", _DRAFTERS)
def test_generate_has_the_target_law(drafter):
    generation = _draw(_DRAFTERS[drafter](), {})
    assert _p_value(generation, {}) > FALSE_ALARM


@pytest.mark.parametrize("drafter", _DRAFTERS)
def test_generate_has_the_target_law_under_every_option(drafter):
    """Options are data: all of them, row by row, in one batch and one compiled program."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
               "repetition_penalty": 1.0}  # fmt: skip
    kind = np.arange(_ROWS * len(_OPTIONS)) % len(_OPTIONS)
    per_row = {
        name: np.array([options.get(name, value) for options in _OPTIONS.values()])[kind]
        for name, value in neutral.items()
    }
    generation = _draw(_DRAFTERS[drafter](), per_row, rows=kind.size)
    p_values = {}
    for i, (name, options) in enumerate(_OPTIONS.items()):
        part = jax.tree.map(lambda x, i=i: x[kind == i], generation)
        p_values[name] = _p_value(part, options)
        _check_log_probs(part, options, num_rows=100)
    assert min(p_values.values()) > FALSE_ALARM, p_values
    if drafter == "equal":  # four tokens with K = 3: one round of three drafts and a bonus
        assert (np.asarray(generation.stats.num_spec_steps) == 1).all()
        assert (np.asarray(generation.stats.num_accepted_draft_tokens) == 3).all()


def _check_log_probs(generation, options, *, num_rows):
    """`Generation.log_probs` are those of the exact law."""
    law = _transform(options)
    rows = zip(np.asarray(generation.tokens), np.asarray(generation.log_probs), strict=True)
    for text, log_probs in itertools.islice(rows, num_rows):
        context = list(_PROMPT)
        for token, log_prob in zip(text, log_probs, strict=True):
            last = ([0, 0, *context])[-2:]
            logits = np.asarray(_TARGET[last[0] * _VOCAB + last[1]], np.float64)
            assert log_prob == pytest.approx(np.log(law(logits, context)[token]), abs=1e-5)
            context.append(int(token))


@pytest.mark.parametrize("options", [name for name in _OPTIONS if name != "plain"])
def test_every_option_moves_the_law(options):
    """Else the test above could not see it missing."""
    plain, moved = _exact({}), _exact(_OPTIONS[options])
    distance = 0.5 * sum(abs(plain.get(t, 0) - moved.get(t, 0)) for t in set(plain) | set(moved))
    assert distance > 0.05


@pytest.mark.parametrize("drafter", ["disagreeing", "lookup"])
def test_law_with_eos_inside_blocks(drafter):
    """Texts that end early have their own probability, and nothing stands behind an EOS."""
    generation = _draw(_DRAFTERS[drafter](), {}, eos_ids=(1,))
    assert _p_value(generation, {}, eos_ids=(1,)) > FALSE_ALARM
    tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
    is_new = np.arange(_NEW)[None] < lengths[:, None]
    assert (tokens[~is_new] == -1).all()
    ended = np.asarray(generation.status) == jaxspec.status.EOS
    assert (tokens[np.arange(_ROWS), lengths - 1][ended] == 1).all()
    assert 0.2 < ended.mean() < 0.99


@pytest.mark.parametrize("policy", [policies.heuristic(1), policies.fixed(2)])
def test_law_under_policies(policy):
    generation = _draw(_DRAFTERS["disagreeing"](), {}, policy=policy)
    assert _p_value(generation, {}) > FALSE_ALARM


def test_law_of_a_mixed_batch():
    """Greedy rows beside rows of other options and other prompt lengths: each has its own law."""
    kinds = [{"temperature": 0.0}, {"temperature": 0.6}, {"repetition_penalty": 2.0, "top_k": 2}]
    prompts = [[2, 0, 1], [1], [0, 2]]
    rows = 3 * _ROWS // 2
    kind = np.arange(rows) % 3
    tokens = np.zeros((rows, 3), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[kind == i, : len(prompt)] = prompt

    def per_row(name, neutral):
        return np.array([k.get(name, neutral) for k in kinds])[kind]

    generation = jaxspec.generate(
        _model(),
        tokens,
        prompt_lengths=np.array([len(p) for p in prompts])[kind],
        drafter=_DRAFTERS["disagreeing"](),
        sampling=jaxspec.Sampling(
            temperature=per_row("temperature", 1.0),
            top_k=per_row("top_k", 0),
            repetition_penalty=per_row("repetition_penalty", 1.0),
        ),
        max_new_tokens=_NEW,
        num_draft_tokens=3,
        key=jax.random.key(5),
        pad_id=9,
    )
    for i, options in enumerate(kinds):
        part = jax.tree.map(lambda x, i=i: x[kind == i], generation)
        if options.get("temperature") == 0.0:
            text, probs = list(prompts[i]), []
            for _ in range(_NEW):
                last = ([0, 0, *text])[-2:]
                logits = np.asarray(_TARGET[last[0] * _VOCAB + last[1]], np.float64)
                text.append(int(np.argmax(logits)))
                probs.append(np.log(np.exp(logits)[text[-1]] / np.exp(logits).sum()))
            assert counts_of(part) == {tuple(text[len(prompts[i]) :]): rows // 3}
            np.testing.assert_allclose(part.log_probs[0], probs, atol=1e-5)
        else:
            assert _p_value(part, options, prompt=prompts[i]) > FALSE_ALARM


# ---------------------------------------------------------------------------------------------
# Planted bugs. (Those in `sampling` are caught in test_sampling.py, without drawing texts.)

_LOOP_MUTANTS = {
    "noise of the drafts used again to verify": (
        [
            ("_PROPOSE, _VERIFY = 0, 1", "_PROPOSE, _VERIFY = 0, 0"),
            (
                "verdict = jax.vmap(engine.verifier)(keys, draft, scores.log_probs)",
                "verdict = jax.vmap(_reusing(engine.verifier))(keys, draft, scores.log_probs)",
            ),
            (
                "def _cut_at_nonfinite",
                """def _reusing(verifier):
    from jaxspec.verifiers import rejection as module
    import sys
    module = sys.modules["jaxspec.verifiers.rejection"]

    def verify(keys, draft, log_probs):
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
        return module.verify_with_uniforms(
            jnp.concatenate([drawn[:, 1:], drawn], axis=1), draft, log_probs)
    return verify


def _cut_at_nonfinite""",
            ),
        ],
        {},
    ),
    "penalties frozen at the block's start": (
        [
            (
                "logits, request.options, state.history, draft.tokens, offsets",
                "logits, request.options, state.history, draft.tokens, 0 * offsets",
            )
        ],
        {"repetition_penalty": 2.0},
    ),
    "bonus token skips the options": (
        [
            (
                "keys = _keys(request.keys, state.num_rounds, _VERIFY",
                "scores = scores._replace(log_probs=jnp.concatenate([scores.log_probs[:, :-1], "
                "jax.nn.log_softmax(logits)[:, -1:]], axis=1))\n    "
                "keys = _keys(request.keys, state.num_rounds, _VERIFY",
            )
        ],
        {"top_k": 2},
    ),
    "history forgets the emitted tokens": (
        [
            (
                "history=sampling.update_history(state.history, verdict.tokens, num_emitted)",
                "history=state.history",
            )
        ],
        {"repetition_penalty": 2.0},
    ),
    "history keeps rejected drafts": (
        [
            (
                "history=sampling.update_history(state.history, verdict.tokens, num_emitted)",
                "history=sampling.update_history(state.history, draft.tokens, draft.length)",
            )
        ],
        {"repetition_penalty": 2.0},
    ),
    "pending token not fed": (
        [("    start = state.lengths - 1\n", "    start = state.lengths\n")],
        {},
    ),
    "every row at the pace of the slowest": (
        [
            (
                "    num_emitted = jnp.where(is_active, num_emitted, 0)\n",
                "    slowest = jnp.min(num_emitted) + 0 * num_emitted\n"
                "    num_emitted = jnp.where(is_active, slowest, 0)\n"
                "    verdict = verdict._replace(tokens=jnp.roll(verdict.tokens, 1, axis=1))\n",
            )
        ],
        {},
    ),
    "one round's randomness for all rounds": (
        [
            (
                "key = jax.random.fold_in(jax.random.fold_in(key, number), purpose)",
                "key = jax.random.fold_in(jax.random.fold_in(key, 0 * number), purpose)",
            )
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", _LOOP_MUTANTS)
def test_planted_bug_in_the_loop_is_caught(name):
    patches, options = _LOOP_MUTANTS[name]
    broken = mutant("jaxspec.loop", *patches)
    with jax.debug_key_reuse(False):
        generation = _draw(_DRAFTERS["disagreeing"](), options, module=broken)
    assert _p_value(generation, options) < FALSE_ALARM


def test_planted_bug_acceptance_beyond_eos_is_caught():
    broken = mutant(
        "jaxspec.loop",
        ("num_emitted = jnp.where(has_eos, jnp.argmax(is_eos, axis=1) + 1, num_emitted)", ""),
    )
    generation = _draw(_DRAFTERS["disagreeing"](), {}, module=broken, eos_ids=(1,))
    assert _p_value(generation, {}, eos_ids=(1,)) < FALSE_ALARM


_DRAFTER_MUTANTS = {
    "q of the raw logits, drafts of the processed ones": (
        ("progress.log_probs.at[rows, at].set(scores, mode=\"drop\")",
         "progress.log_probs.at[rows, at].set("
         "jax.nn.log_softmax(output.logits[:, 0]), mode=\"drop\")"),
        {"temperature": 0.6},
    ),
    "drafts trimmed by their own probability": (
        ("is_open = progress.is_open & (goes_on | ~has_next)",
         "is_open = progress.is_open & (goes_on | ~has_next)\n"
         "            peek = jax.vmap(lambda numbers, at, weights: sampling.draw("
         "numbers[at], weights))(uniforms, jnp.minimum(slot, num_slots - 1), jnp.exp(scores))\n"
         "            peek = jnp.take_along_axis(scores, peek[:, None], axis=1)[:, 0]\n"
         "            is_open = is_open & (peek > jnp.log(0.5))"),
        {},
    ),
    "q one slot late": (
        ("at = jnp.where(draws, slot, num_slots)  # out of range: dropped",
         "at = jnp.where(draws, jnp.maximum(slot - 1, 0), num_slots)"),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _DRAFTER_MUTANTS)
def test_planted_bug_in_the_model_drafter_is_caught(name):
    patch, options = _DRAFTER_MUTANTS[name]
    broken = mutant("jaxspec.drafters.model", patch)
    generation = _draw(broken.model(_model(_OTHER)), options)
    assert _p_value(generation, options) < FALSE_ALARM


def test_planted_bug_lagging_draft_cache_is_caught():
    """The law survives a drafter that misses a token; acceptance of an equal draft does not."""
    broken = mutant(
        "jaxspec.drafters.model",
        ("num_cached = jnp.minimum(state.num_cached, standing)", "num_cached = standing"),
    )
    equal = _draw(broken.model(_model()), {}, num_draft_tokens=1)
    assert _p_value(equal, {}) > FALSE_ALARM
    right = _draw(_DRAFTERS["equal"](), {}, num_draft_tokens=1)
    assert (np.asarray(right.stats.num_spec_steps) == 2).all()
    assert np.asarray(equal.stats.num_spec_steps).mean() > 2.02  # 2 exactly where nothing lags
