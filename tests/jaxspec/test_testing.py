"""`jaxspec.testing`: right strategies pass, and each kind of wrong one fails for its reason."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support.matrix import Unigram

import jaxspec
from jaxspec import Draft, Sampling, Verdict, drafters, drawing, policies, pytree, verifiers
from jaxspec.testing import (
    Oracle,
    check_drafter,
    check_lossless,
    check_verifier,
    compare,
    lossless,
    num_samples_for,
    random_logits,
    table_model,
)
from jaxspec.testing.comparison import chi_square_p_value
from jaxspec.types import NO_TOKEN
from jaxspec.verifiers import ratio

V = 3
TARGET = table_model(random_logits(0, vocab_size=V, order=1), order=1)
OTHER = table_model(random_logits(1, vocab_size=V, order=1), order=1)

pytestmark = pytest.mark.exactness

# ---------------------------------------------------------------------------------------------
# The oracle.


def test_oracle_by_hand():
    lm = table_model(np.log([[0.5, 0.5], [0.25, 0.75]]).astype(np.float32), order=1)
    oracle = Oracle(lm, [0, 1], 2, Sampling(), eos_ids=(0,))
    assert oracle.law.keys() == {(0,), (1, 0), (1, 1)}
    np.testing.assert_allclose(
        [oracle.law[t] for t in [(0,), (1, 0), (1, 1)]], [0.25, 0.1875, 0.5625], atol=1e-6
    )
    np.testing.assert_allclose(oracle.log_probs((1, 0)), np.log([0.75, 0.25]), atol=1e-6)
    greedy = Oracle(lm, [1], 2, Sampling(temperature=0))
    assert greedy.law == {(1, 1): 1.0}
    # A greedy row reports the law at temperature 1.
    np.testing.assert_allclose(greedy.log_probs((1, 1)), np.log([0.75, 0.75]), atol=1e-6)


def test_oracle_feeds_the_model_s_own_context():
    """An order-2 table: every prefix has its own row."""
    logits = random_logits(0, vocab_size=2, order=2)
    oracle = Oracle(table_model(logits, order=2), [1], 3)
    for text in ((), (0,), (1, 1)):
        context = ([0, 1, *text])[-2:]
        row = np.exp(np.float64(logits[context[0] * 2 + context[1]]))
        np.testing.assert_allclose(oracle.next_token(text), row / row.sum(), rtol=1e-6)
    assert sum(oracle.law.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"min_p": 0.6}, {"min_p": 0.4}])
def test_oracle_refuses_thresholds_that_rounding_decides(options):
    """0.5 + 0.3 is 0.8 in one precision and not in the other."""
    lm = table_model(np.log(np.array([[0.5, 0.3, 0.2]] * 3)).astype(np.float32), order=1)
    with pytest.raises(ValueError, match="where rounding decides"):
        Oracle(lm, [0], 2, Sampling(**options))


def test_oracle_refuses_what_cannot_be_enumerated():
    with pytest.raises(ValueError, match="smaller vocabulary or fewer tokens"):
        Oracle(TARGET, [0], 20)


# ---------------------------------------------------------------------------------------------
# Comparing laws.


def test_chi_square_is_scipy_s():
    rng = np.random.default_rng(0)
    law = dict(zip([(i,) for i in range(10)], rng.dirichlet(np.ones(10) * 5), strict=True))
    counts = dict(zip(law, rng.multinomial(5_000, list(law.values())).tolist(), strict=True))
    ours = compare(counts, law)
    theirs = scipy.stats.chisquare(list(counts.values()), np.array(list(law.values())) * 5_000)
    assert ours.statistic == pytest.approx(theirs.statistic)
    assert ours.p_value == pytest.approx(theirs.pvalue)
    assert ours.degrees_of_freedom == 9
    freqs = np.array(list(counts.values())) / 5_000
    assert ours.total_variation == pytest.approx(0.5 * np.abs(freqs - list(law.values())).sum())
    assert ours.passed


def test_power_is_scipy_s():
    law = {(i,): 1 / 81 for i in range(81)}
    comparison = compare(dict.fromkeys(law, 500), law)  # 40,500
    threshold = scipy.stats.chi2.isf(5e-7, 80)
    expected = scipy.stats.ncx2.sf(threshold, 80, 4 * 40_500 * 0.03**2)
    assert comparison.power(0.03) == pytest.approx(expected, rel=1e-6)
    assert comparison.power(0.0) == 0.0  # nothing to see


def test_power_where_the_texts_are_tested_together():
    """Ten samples of 81 texts show nothing, and the report says so."""
    law = {(i,): 1 / 81 for i in range(81)}
    assert compare({(0,): 5, (1,): 5}, law).power(0.03) == 0.0
    # Two texts, one too rare for a chi-square: the total variation sees, at a larger n.
    law = {(0,): 1 - 1e-4, (1,): 1e-4}
    few, many = (compare({(0,): n}, law) for n in (5_000, 40_000))
    assert few.degrees_of_freedom == many.degrees_of_freedom == 0
    assert few.power(0.03) < 0.1
    assert many.power(0.03) > 0.99
    assert not compare({(0,): 38_800, (1,): 1_200}, law).passed  # off by 0.03
    # One text: every other is impossible.
    assert compare({(0,): 10}, {(0,): 1.0}).power(0.03) == pytest.approx(1 - 0.97**10)


@pytest.mark.parametrize("num_texts", [2, 27, 81])
def test_num_samples_reach_the_power(num_texts):
    law = {(i,): 1 / num_texts for i in range(num_texts)}
    size = num_samples_for(num_texts)
    enough, fewer = (
        compare(dict.fromkeys(law, n // num_texts), law).power(0.03)
        for n in (size + num_texts, size - 1_000)
    )
    assert enough >= 0.99 > fewer


def test_false_alarms_are_as_rare_as_promised():
    """2,000 correct samples at a false alarm of 1 %: at most 44 with probability 1 - 1e-6."""
    rng = np.random.default_rng(1)
    law = {(i,): p for i, p in enumerate([0.4, 0.3, 0.2, 0.09, 0.01])}
    alarms = 0
    for _ in range(2_000):
        drawn = rng.multinomial(1_000, list(law.values())).tolist()
        alarms += not compare(dict(zip(law, drawn, strict=True)), law, false_alarm=0.01).passed
    assert 0 < alarms <= scipy.stats.binom.isf(1e-6, 2_000, 0.01)


def test_the_impossible_is_seen_at_once():
    law = {(0,): 0.5, (1,): 0.5, (2,): 0.0}
    comparison = compare({(0,): 50_000, (1,): 50_000, (2,): 1}, law)
    assert comparison.p_value == 0
    assert not comparison.passed
    assert "impossible" in str(comparison)


def test_rare_texts_count_together():
    law = {(i,): 1e-5 for i in range(100)} | {(100,): 0.999}
    comparison = compare({(100,): 9_990, (0,): 10}, law)  # 100 · 1e-5 · 10,000 = 10 expected
    assert comparison.degrees_of_freedom == 1
    assert comparison.passed
    # What is hidden in them is taken off the power.
    assert comparison.power(0.001) < 1e-5
    assert compare({(100,): 9_000, (0,): 1_000}, law).p_value < 1e-100


def test_several_laws_at_once():
    observed = np.array([[50.0, 50.0, 0.0], [10.0, 80.0, 10.0]])
    expected = np.array([[50.0, 50.0, 0.0], [10.0, 80.0, 10.0]])
    assert chi_square_p_value(observed, expected) == pytest.approx(1.0)
    assert chi_square_p_value(observed + np.array([0, -1, 1]), expected) == 0  # impossible
    shifted = np.array([[80.0, 20.0, 0.0], [10.0, 80.0, 10.0]])
    assert chi_square_p_value(shifted, expected) == pytest.approx(
        scipy.stats.chi2.sf(36.0, 3), rel=1e-6
    )


def test_the_table_is_readable():
    text = str(compare({(0, 1): 300, (1,): 700}, {(0, 1): 0.5, (1,): 0.5}))
    assert text.startswith("DOES NOT FIT: n = 1000")
    assert "                     0 1    0.50000    0.30000   -0.20000" in text


def test_numbers_that_are_no_probabilities_are_refused():
    for kwargs in ({"distance": 0}, {"power": 1.5}, {"false_alarm": 0.0}, {"distance": -0.1}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            num_samples_for(8, **kwargs)
    with pytest.raises(ValueError, match="between 0 and 1"):
        compare({(0,): 1}, {(0,): 1.0}, false_alarm=0)
    with pytest.raises(ValueError, match="add up to 1"):
        compare({(0,): 1}, {(0,): 1.1})


def test_comparing_nothing_is_refused():
    with pytest.raises(ValueError, match="counts is empty"):
        compare({}, {(0,): 1.0})


# ---------------------------------------------------------------------------------------------
# check_lossless.


@pytree.dataclass
class Lenient:
    """Rejection that accepts too much."""

    guarantee = "distribution"

    def __call__(self, keys, draft, target_log_probs):
        numbers = ratio.uniforms(keys)
        numbers = numbers.at[:, 0].set(0.5 + 0.5 * numbers[:, 0])
        return verifiers.rejection().judge(numbers, draft, target_log_probs)


def test_a_wrong_rule_fails_with_a_table():
    report = check_lossless(TARGET, drafters.model(OTHER), Lenient(), max_new_tokens=3)
    assert not report.passed
    assert report.total_variation > 0.03
    with pytest.raises(AssertionError, match=r"(?s)DOES NOT FIT.*target +empirical +error"):
        report.assert_passed()


def test_each_prompt_has_its_own_options_and_law():
    report = check_lossless(
        TARGET,
        drafters.model(OTHER),
        sampling=Sampling(temperature=np.array([0.0, 0.5]), top_k=2),
        prompts=[[0], [1, 2, 2]],
        max_new_tokens=3,
        eos_ids=(1,),
    )
    report.assert_passed()
    assert len(report.rows[0].law) == 1
    assert 2 < len(report.rows[1].law) <= 2**3
    assert report.problems == ()


def test_what_is_reported_is_checked_too():
    """Laws that fit are not enough: counters, log-probabilities, padding."""

    def broken(change):
        def generate(*args, **kwargs):
            out = jaxspec.generate(*args, **kwargs)
            return dataclasses.replace(out, **change(out))

        return check_lossless(
            TARGET, drafters.model(OTHER), max_new_tokens=3, num_samples=2_000,
            eos_ids=(1,), generate=generate,
        ).problems  # fmt: skip

    def stats(name):
        return lambda out: {"stats": out.stats._replace(**{name: getattr(out.stats, name) + 1})}

    assert broken(lambda out: {}) == ()
    assert "log_probs" in broken(lambda out: {"log_probs": out.log_probs - 1e-3})[0]
    assert "behind its length" in broken(lambda out: {"tokens": out.tokens.at[:, -1].set(0)})[0]
    assert "more accepted than drafted" in broken(stats("num_accepted_draft_tokens"))[0]
    assert "corrections as drafts" in broken(stats("num_accepted_draft_tokens"))[1]
    assert "histogram" in broken(stats("acceptance_histogram"))[0]
    assert "own q" in broken(stats("num_impossible_draft_tokens"))[0]
    assert "lengths" in broken(stats("num_emitted_tokens"))[0]


def test_match_is_held_to_its_promise():
    """Lossless, but the tokens depend on the drafter: noise of the round, not of the position."""

    @pytree.dataclass
    class Forgetful:
        guarantee = "tokens"

        def __call__(self, keys, draft, target_log_probs):
            return verifiers.match()(keys, draft, target_log_probs)

    report = check_lossless(TARGET, drafters.model(OTHER), Forgetful(), max_new_tokens=3)
    assert all(row.passed for row in report.rows)
    assert "differ from plain decoding" in report.problems[0]
    assert not report.passed


def test_check_lossless_refuses():
    for prompts in ([], [0, 1], "hi", [[]], [[3]], [[0.5]]):
        with pytest.raises(ValueError, match="prompt"):
            check_lossless(TARGET, prompts=prompts)
    with pytest.raises(ValueError, match=r"must be a jaxspec\.LanguageModel"):
        check_lossless(None)
    with pytest.raises(ValueError, match=r"must be a jaxspec\.Sampling"):
        check_lossless(TARGET, sampling={})
    with pytest.raises(ValueError, match="at least 1"):
        check_lossless(TARGET, max_new_tokens=0)
    with pytest.raises(ValueError, match="whole number"):
        check_lossless(TARGET, num_samples=10.5)
    with pytest.raises(ValueError, match="top_k must be one value for all or an array"):
        check_lossless(TARGET, sampling=Sampling(top_k=np.array([1, 2])), prompts=[[0]])
    with pytest.raises(ValueError, match="smaller vocabulary or fewer tokens"):
        check_lossless(TARGET, max_new_tokens=30)


# ---------------------------------------------------------------------------------------------
# check_drafter.


@pytree.dataclass
class Base:
    """A uniform drafter to be broken: its state counts rounds."""

    hidden_layers = ()

    def init(self, batch, capacity):
        return jnp.zeros((batch,), jnp.int32)

    def prefill(self, state, tokens, hidden, start, num_new):
        return state

    def law(self, keys, context):
        del context
        return jnp.full((*keys.shape, V), -jnp.log(float(V)))

    def sample(self, keys, log_probs):
        numbers = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys)
        return jax.vmap(jax.vmap(drawing.draw))(numbers, jnp.exp(log_probs))

    def propose(self, keys, state, context, num_draft, keep_drafting):
        log_probs = self.law(keys, context)
        return Draft(self.sample(keys, log_probs), log_probs, num_draft), state

    def commit(self, state, outcome):
        return state + outcome.is_active.astype(jnp.int32)


class Skewed(Base):
    """Another q than the sampled one, by a total variation of 0.03."""

    def propose(self, keys, state, context, num_draft, keep_drafting):
        draft, state = Base.propose(self, keys, state, context, num_draft, keep_drafting)
        moved = jnp.array([0.03, 0.0, -0.03])
        q = jnp.log(jnp.exp(draft.log_probs) + moved[None, None])
        return draft._replace(log_probs=q), state


class OwnValue(Base):
    """Drops what follows the first token 2, and that token."""

    def propose(self, keys, state, context, num_draft, keep_drafting):
        draft, state = Base.propose(self, keys, state, context, num_draft, keep_drafting)
        keep = jnp.cumprod((draft.tokens != 2).astype(jnp.int32), axis=1)
        return draft._replace(length=jnp.minimum(num_draft, jnp.sum(keep, axis=1))), state


class LaterValue(Base):
    """Drops everything where the second token is a 2 and the first is a 0."""

    def propose(self, keys, state, context, num_draft, keep_drafting):
        draft, state = Base.propose(self, keys, state, context, num_draft, keep_drafting)
        drops = (draft.tokens[:, 0] == 0) & (draft.tokens[:, 1] == 2)
        return draft._replace(length=jnp.where(drops, 0, num_draft)), state


class OneKey(Base):
    """The same number for every slot."""

    def sample(self, keys, log_probs):
        first = jnp.broadcast_to(keys[:, :1], keys.shape)
        return Base.sample(self, jax.random.clone(first), log_probs)


class Recycle(Base):
    """Proposes the tail of a draft again, with its q, if nothing of it was accepted."""

    def init(self, batch, capacity):
        return jnp.full((batch, 3), -1, jnp.int32)

    def propose(self, keys, state, context, num_draft, keep_drafting):
        draft, _ = Base.propose(self, keys, state, context, num_draft, keep_drafting)
        again = jnp.concatenate([state[:, 1:], draft.tokens[:, 2:]], axis=1)
        is_known = (state[:, :1] >= 0) & (jnp.arange(3)[None] < 2)
        return draft._replace(tokens=jnp.where(is_known, again, draft.tokens)), state

    def commit(self, state, outcome):
        is_lost = (outcome.num_accepted == 0) & (outcome.draft.length == 3)
        return jnp.where(is_lost[:, None], outcome.draft.tokens, -1)


class ByPosition(Base):
    """A key of its own, folded with the position: a position tried again sees old numbers."""

    def init(self, batch, capacity):
        return jnp.zeros((batch, 2), jnp.uint32), jnp.zeros((batch,), bool)

    def propose(self, keys, state, context, num_draft, keep_drafting):
        data, is_known = state
        data = jnp.where(is_known[:, None], data, jax.random.key_data(keys[:, 0]))
        own = jax.vmap(jax.random.wrap_key_data)(data)
        at = context.lengths[:, None] + jnp.arange(keys.shape[1])[None]
        own = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(own, at)
        draft, _ = Base.propose(self, own, state, context, num_draft, keep_drafting)
        return draft, (data, is_known | True)

    def commit(self, state, outcome):
        return state


class OldKeys(Base):
    """Numbers of a key of its own, the same in every round and row."""

    def sample(self, keys, log_probs):
        own = jax.random.split(jax.random.key(0), keys.shape[1])
        return Base.sample(self, jnp.broadcast_to(own[None], keys.shape), log_probs)


class Neighbour(Base):
    """q depends on the row below."""

    def law(self, keys, context):
        last = jnp.take_along_axis(context.tokens, context.lengths[:, None] - 1, axis=1)
        below = jnp.roll(last[:, 0], 1)
        logits = jax.nn.one_hot(below, V)
        law = jax.nn.log_softmax(logits, axis=-1)
        return jnp.broadcast_to(law[:, None], (*keys.shape, V))


class Width(Base):
    """q depends on the length of the token buffer, which padding decides."""

    def law(self, keys, context):
        logits = jax.nn.one_hot(context.tokens.shape[1] % V, V)
        return jnp.broadcast_to(jax.nn.log_softmax(logits), (*keys.shape, V))


class RowNumber(Base):
    """q depends on the row's place in the batch."""

    def law(self, keys, context):
        place = jnp.arange(keys.shape[0]) % 2
        law = jax.nn.log_softmax(jax.nn.one_hot(place, V), axis=-1)
        return jnp.broadcast_to(law[:, None], (*keys.shape, V))


class TooMany(Base):
    """Ignores num_draft."""

    def propose(self, keys, state, context, num_draft, keep_drafting):
        draft, state = Base.propose(self, keys, state, context, num_draft, keep_drafting)
        return draft._replace(length=jnp.full_like(num_draft, keys.shape[1])), state


class Unnormalised(Base):
    """exp(q) sums to 1.2."""

    def law(self, keys, context):
        return Base.law(self, keys, context) + jnp.log(1.2)


class Outside(Base):
    """An id beyond the vocabulary."""

    def sample(self, keys, log_probs):
        return Base.sample(self, keys, log_probs) + 1


class Growing(Base):
    """A state that changes its form."""

    def commit(self, state, outcome):
        return (state, state)


class Floating(Base):
    """Token ids as floats."""

    def sample(self, keys, log_probs):
        return Base.sample(self, keys, log_probs).astype(jnp.float32)


class Narrow(Base):
    """One slot fewer than asked for."""

    def propose(self, keys, state, context, num_draft, keep_drafting):
        draft, state = Base.propose(self, keys, state, context, num_draft, keep_drafting)
        return draft._replace(tokens=draft.tokens[:, 1:]), state


class ShortLaw(Base):
    """q over another vocabulary."""

    def law(self, keys, context):
        return Base.law(self, keys, context)[:, :, :2] + jnp.log(1.5)


class Adaptive(Base):
    """Right, and stateful: its law moves with every round, its length with its law."""

    def propose(self, keys, state, context, num_draft, keep_drafting):
        tilt = state.astype(jnp.float32)[:, None] * jnp.array([[0.5, 0.0, -0.5]])
        law = jax.nn.log_softmax(tilt, axis=-1)
        log_probs = jnp.broadcast_to(law[:, None], (*keys.shape, V))
        most = jnp.where(jnp.max(law, axis=-1) > jnp.log(0.5), 1, num_draft)
        length = jnp.minimum(num_draft, most)
        return Draft(self.sample(keys, log_probs), log_probs, length), state


class AfterValue(Base):
    """Right: stops *after* keeping a token 2."""

    def propose(self, keys, state, context, num_draft, keep_drafting):
        draft, state = Base.propose(self, keys, state, context, num_draft, keep_drafting)
        is_two = (draft.tokens == 2).astype(jnp.int32)
        before = jnp.cumsum(is_two, axis=1) - is_two
        keep = jnp.cumprod((before == 0).astype(jnp.int32), axis=1)
        return draft._replace(length=jnp.minimum(num_draft, jnp.sum(keep, axis=1))), state


def _new(cls):
    return pytree.dataclass(type(cls.__name__, (cls,), {}))()  # a class is registered only once


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (Skewed, "do not have the q that is reported"),
        (OwnValue, "do not have the q that is reported"),
        (LaterValue, "do not have the q that is reported"),
        (OneKey, r"\(round 0: slot 1, 2; round 1: slot 1, 2; .*one key for several slots"),
        (OldKeys, "do not have the q that is reported"),
        (Recycle, r"\(round 1: slot 0, 1.*numbers kept from an earlier round"),
        (ByPosition, r"\(round 1: slot 0, 1.*numbers kept from an earlier round"),
        (Neighbour, "a row alone has"),
        (RowNumber, "a row alone has"),
        (Width, "a row alone has"),
        (TooMany, "more drafts than num_draft"),
        (Unnormalised, "does not sum to 1"),
        (Outside, "ids outside 0 … 2"),
        (Growing, "commit changes the form"),
        (Floating, r"Draft\.tokens must be i32"),
        (Narrow, r"Draft\.tokens must be i32"),
        (ShortLaw, "not 3 tokens wide"),
    ],
)
def test_wrong_drafters_fail_for_their_reason(wrong, problem):
    with jax.debug_key_reuse(False):
        report = check_drafter(_new(wrong), TARGET)
    with pytest.raises(AssertionError, match=problem):
        report.assert_passed()


def test_batch_independence_is_tested_with_one_prompt():
    report = check_drafter(_new(RowNumber), TARGET, prompts=[[0]])
    with pytest.raises(AssertionError, match="a row alone has"):
        report.assert_passed()


class RowNumberOfOne(Base):
    """q depends on the row's place, for one text in eight."""

    def law(self, keys, context):
        place = jnp.where(context.lengths == 8, 1 + jnp.arange(keys.shape[0]) % 2, 0)
        law = jax.nn.log_softmax(jax.nn.one_hot(place, V), axis=-1)
        return jnp.broadcast_to(law[:, None], (*keys.shape, V))


def test_batch_independence_is_tested_for_every_prompt():
    """Eight prompts: that every eighth row drafts less must not fall on one of them."""
    prompts = [[0] * size for size in range(1, 9)]
    report = check_drafter(_new(RowNumberOfOne), TARGET, prompts=prompts, num_samples=500)
    with pytest.raises(AssertionError, match="round 0: a row alone has"):
        report.assert_passed()


class Lagging(Base):
    """Right, until a draft was accepted whole; then q is of another text, over many tokens."""

    size = 16

    def propose(self, keys, state, context, num_draft, keep_drafting):
        law = jax.nn.log_softmax(jnp.sin(jnp.arange(16.0) * 2.0))
        law = jnp.broadcast_to(law, (*keys.shape, 16))
        is_late = (state > 1)[:, None, None] & (jnp.arange(keys.shape[1]) > 0)[None, :, None]
        reported = jnp.where(is_late, jnp.roll(law, 1, axis=2), law)
        return Draft(self.sample(keys, law), reported, num_draft), state


def test_a_wrong_law_is_seen_over_a_larger_vocabulary():
    """Groups of one text are too small for a test of their own; all rows together are not."""
    target = table_model(random_logits(0, vocab_size=16, order=1), order=1)
    (problem,) = check_drafter(_new(Lagging), target).problems
    assert "(round 2: slot 1, 2)" in problem


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"drafter": None}, "no drafter to check"),
        ({"drafter": drafters.model}, "called"),
        ({"drafter": "auto"}, "must come from"),
        ({"num_samples": 10}, "at least 100"),
        ({"num_samples": 10**8}, "4 GB"),
        ({"drafter": drafters.model(table_model(np.zeros((2, 2)), order=1))}, "one vocabulary"),
    ],
)
def test_check_drafter_refuses(kwargs, message):
    arguments = {"drafter": drafters.prompt_lookup(), "target": TARGET} | kwargs
    with pytest.raises(ValueError, match=message):
        check_drafter(**arguments)


@pytest.mark.parametrize(
    "drafter",
    [
        drafters.model(OTHER),
        drafters.model(OTHER, sampling=Sampling(temperature=0.5, repetition_penalty=1.5)),
        drafters.model(OTHER, sampling=Sampling(temperature=0)),
        drafters.prompt_lookup(),
        Unigram(V),
        _new(Adaptive),
        _new(AfterValue),
    ],
    ids=lambda drafter: type(drafter).__name__,
)
def test_right_drafters_pass(drafter):
    report = check_drafter(
        drafter, TARGET, Sampling(top_p=np.array([1.0, 0.8])), prompts=[[0], [1, 0, 1]]
    )
    report.assert_passed()
    assert report.mean_length > 1
    assert report.is_deterministic == (report.p_values == {})


# ---------------------------------------------------------------------------------------------
# check_verifier.


def test_a_wrong_rule_is_named_with_its_distance():
    report = check_verifier(Lenient(), num_samples=20_000)
    assert not report.passed
    problems = {case.name: case.problem for case in report.cases}
    assert problems["disagreeing"] == "another law than the target's"
    assert problems["equal"] == ""
    with pytest.raises(AssertionError, match="another law"):
        report.assert_passed()


def test_a_slightly_wrong_rule_is_enumerated():
    """A bias of one percent, far below what samples would show."""

    @pytree.dataclass
    class Slightly:
        guarantee = "distribution"

        def __call__(self, keys, draft, target_log_probs):
            return self.judge(ratio.uniforms(keys), draft, target_log_probs)

        def judge(self, numbers, draft, target_log_probs):
            numbers = numbers.at[:, 0].set(jnp.minimum(numbers[:, 0] * 1.01, 1 - 2.0**-23))
            return verifiers.rejection().judge(numbers, draft, target_log_probs)

    report = check_verifier(Slightly())
    assert not report.passed
    assert 1e-4 < report.total_variation < 0.02


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v, d: v._replace(num_accepted=v.num_accepted + 1), "num_accepted must lie"),
        (lambda v, d: v._replace(tokens=v.tokens[1:]), r"tokens \[K \+ 1\]"),
        (lambda v, d: v._replace(tokens=jnp.where(v.tokens < 0, 0, v.tokens)), "must hold -1"),
        (lambda v, d: v._replace(tokens=jnp.full_like(v.tokens, NO_TOKEN)), "accepted drafts"),
        (lambda v, d: v._replace(tokens=v.tokens.astype(jnp.float32)), "holds integers"),
        (lambda v, d: v._replace(tokens=v.tokens.at[v.num_accepted].set(7)), "must lie below 3"),
        (lambda v, d: tuple(v), r"returns a jaxspec\.Verdict"),
        (lambda v, d: v._replace(tokens=v.tokens.at[d.tokens[0]].set(1)), "K = 0"),
    ],
)
def test_malformed_verdicts_are_named(change, problem):
    @pytree.dataclass
    class Malformed:
        guarantee = "distribution"

        def __call__(self, keys, draft, target_log_probs):
            verdict = verifiers.rejection()(keys, draft, target_log_probs)
            return change(verdict, draft)

    with pytest.raises(AssertionError, match=problem):
        check_verifier(Malformed(), num_samples=1_000).assert_passed()


def test_a_judge_that_cannot_be_enumerated_is_refused():
    """A test that passes inside an interval has two borders; a number that should be idle acts."""

    @pytree.dataclass
    class Interval:
        guarantee = "distribution"

        def __call__(self, keys, draft, target_log_probs):
            return self.judge(ratio.uniforms(keys), draft, target_log_probs)

        def judge(self, numbers, draft, target_log_probs):
            numbers = numbers.at[:, 0].set((numbers[:, 0] + 0.4) % 1.0)
            return verifiers.rejection().judge(numbers, draft, target_log_probs)

    @pytree.dataclass
    class Idle:
        guarantee = "distribution"

        def __call__(self, keys, draft, target_log_probs):
            return self.judge(ratio.uniforms(keys), draft, target_log_probs)

        def judge(self, numbers, draft, target_log_probs):
            verdict = verifiers.rejection().judge(numbers, draft, target_log_probs)
            acts = (numbers[verdict.num_accepted, 1] > 0.7) & (verdict.num_accepted == 0)
            first = jnp.where(acts, 0, verdict.tokens[0])
            return verdict._replace(tokens=verdict.tokens.at[0].set(first))

    for rule in (Interval(), Idle()):
        with pytest.raises(ValueError, match="cannot be enumerated"):
            check_verifier(rule)


def test_calling_a_rule_must_be_its_judge():
    @pytree.dataclass
    class OneKeyForAll:
        guarantee = "distribution"

        def __call__(self, keys, draft, target_log_probs):
            numbers = ratio.uniforms(jnp.broadcast_to(keys[:1], keys.shape))
            return self.judge(numbers, draft, target_log_probs)

        def judge(self, numbers, draft, target_log_probs):
            return verifiers.rejection().judge(numbers, draft, target_log_probs)

    with jax.debug_key_reuse(False):
        report = check_verifier(OneKeyForAll())
    assert "calling it is not its judge" in str(report)
    assert not report.passed


def test_check_verifier_refuses():
    for kwargs in ({"vocab_size": 300, "num_draft": 1}, {"vocab_size": 1}, {"num_draft": 0}):
        with pytest.raises(ValueError, match="enumerates every draft"):
            check_verifier(verifiers.rejection(), **kwargs)

    class Unregistered(Lenient):
        pass

    with pytest.raises(ValueError, match="is no pytree"):
        check_verifier(Unregistered())
    with pytest.raises(ValueError, match="called"):
        check_verifier(verifiers.block)


def test_policies_that_a_check_cannot_see_through_are_seen_in_the_law():
    """A user's policy beside the checks: lossless with what ships."""
    report = check_lossless(
        TARGET, drafters.model(OTHER), policy=policies.heuristic(1), max_new_tokens=3
    )
    report.assert_passed()
    assert isinstance(verifiers.block()(
        jax.random.split(jax.random.key(0), 2),
        Draft(jnp.array([0]), jnp.zeros((1, V)), jnp.int32(1)), jnp.zeros((2, V)),
    ), Verdict)  # fmt: skip


def test_many_rows_are_written_in_batches(monkeypatch):
    """The same texts whatever the size of a batch, and the last one is filled up."""
    sizes = []

    def generate(target, prompts, **arguments):
        sizes.append(len(prompts))
        return jaxspec.generate(target, prompts, **arguments)

    def report():
        return check_lossless(
            TARGET, drafters.model(OTHER), prompts=[[0], [1, 2]], max_new_tokens=2,
            num_samples=500, verifier=jaxspec.verifiers.match(), generate=generate,
        )  # fmt: skip

    whole = report()
    assert sizes == [1000, 1000]  # and plainly
    monkeypatch.setattr(lossless, "_MOST_ROWS", 300)
    assert report() == whole
    assert sizes[2:] == [250] * 8
    monkeypatch.setattr(lossless, "_MOST_ROWS", 333)
    assert report() == whole
    assert sizes[10:] == [250] * 8
    monkeypatch.setattr(lossless, "_MOST_ROWS", 350)
    assert report() == whole
    assert sizes[18:] == [334] * 6
