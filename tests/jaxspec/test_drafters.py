"""Prompt lookup against plain Python; the model drafter against a model that logs its calls."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

import jaxspec
from jaxspec import Context, Draft, Outcome, Verdict, drafters, sampling
from jaxspec.testing import random_logits, table_model

# The package gives factory and module one name: these are the modules.
fallback_module = importlib.import_module("jaxspec.drafters.fallback")
lookup_module = importlib.import_module("jaxspec.drafters.prompt_lookup")
model_module = importlib.import_module("jaxspec.drafters.model")

K = 4


def always(signals):
    return jnp.ones_like(signals.slot, dtype=bool)


def split_keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), (rows, K))


# ---------------------------------------------------------------------------------------------
# Prompt lookup.


def reference(text, num_tokens, max_ngram, min_ngram):
    """Longest n-gram first, the last earlier occurrence; the drafts themselves are text."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for at in range(len(text) - n - 1, -1, -1):
            if text[at : at + n] == text[len(text) - n :]:
                out = list(text)
                for i in range(num_tokens):
                    out.append(out[at + n + i])
                return out[len(text) :]
    return None


def adversarial(rng, texts, size):
    """Rows whose garbage would match: copies of the text's end and of its own continuation."""
    rows = rng.integers(0, 3, size=(len(texts), size))
    for row, text in zip(rows, texts, strict=True):
        rest = size - len(text)
        row[: len(text)] = text
        kind = rng.integers(3)
        if kind == 0:
            row[len(text) :] = np.resize(text, rest)
        elif kind == 1:
            row[len(text) :] = text[-1]
    return rows


def check_lookup(module, *, max_ngram, min_ngram, texts=400, size=24, seed=0):
    rng = np.random.default_rng([seed, max_ngram, min_ngram])
    lists = [
        rng.integers(0, rng.integers(2, 5), size=rng.integers(1, size - K)).tolist()
        for _ in range(texts)
    ]
    drafter = module.prompt_lookup(max_ngram, min_ngram)
    num_draft = rng.integers(0, K + 1, size=texts)
    lengths = jnp.asarray([len(text) for text in lists])

    @jax.jit
    def propose(tokens):
        context = Context(tokens, lengths, None, None)
        return drafter.propose(split_keys(texts), (), context, jnp.asarray(num_draft), always)[0]

    drafts = [propose(jnp.asarray(adversarial(rng, lists, size))) for _ in range(2)]
    for draft in drafts:
        assert draft.log_probs is None
        assert draft.tokens.shape == (texts, K)
        for row, text in enumerate(lists):
            want = reference(text, K, max_ngram, min_ngram)
            assert draft.length[row] == (0 if want is None else num_draft[row])
            if want is not None:
                assert draft.tokens[row].tolist() == want


@pytest.mark.parametrize(("max_ngram", "min_ngram"), [(1, 1), (2, 1), (3, 1), (3, 2), (5, 5)])
def test_lookup_is_the_reference(max_ngram, min_ngram):
    check_lookup(lookup_module, max_ngram=max_ngram, min_ngram=min_ngram)


@pytest.mark.parametrize(
    "patch",
    [
        ("num_matching * size + ends", "num_matching * size - ends"),  # the first occurrence
        ("num_matching * size + ends", "ends"),  # the last of any length
        ("(ends < last) & ", ""),  # the end matches itself, and garbage matches
        ("jnp.arange(num_tokens) % period", "jnp.arange(num_tokens)"),  # runs into garbage
        ("(ends >= n) & ", ""),  # wraps around the buffer
        ("best + 1 + jnp", "best + jnp"),
        (">= min_ngram", ">= 1"),
    ],
)
def test_planted_bugs_break_the_lookup(patch):
    module = mutant("jaxspec.drafters.prompt_lookup", patch)
    with pytest.raises(AssertionError):
        check_lookup(module, max_ngram=3, min_ngram=2)


@pytest.mark.parametrize("bad", [(0, 0), (3, 0), (1, 2), (-1, -1), (1.5, 1)])
def test_lookup_refuses(bad):
    with pytest.raises(
        ValueError, match="prompt_lookup needs whole numbers 1 ≤ min_ngram ≤ max_ngram"
    ):
        drafters.prompt_lookup(*bad)


# ---------------------------------------------------------------------------------------------
# The model drafter. The model is a bigram table whose cache logs what it is fed.

V, ROWS, CAPACITY, EVENTS = 6, 3, 96, 512
TABLE = np.random.default_rng(0).normal(size=(V, V)).astype(np.float32)


def logging_init(batch, capacity, max_step):
    del capacity, max_step
    return {
        "calls": jnp.zeros((), jnp.int32),
        "count": jnp.zeros((batch,), jnp.int32),
        "events": jnp.full((batch, EVENTS, 2), -1, jnp.int32),  # (slot, token)
    }


def logging_apply(params, tokens, cache, *, start, num_new, logits_at):
    width = jnp.arange(tokens.shape[1])[None]
    rows = jnp.arange(tokens.shape[0])[:, None]
    at = jnp.where(width < num_new[:, None], cache["count"][:, None] + width, EVENTS)
    events = jnp.stack([start[:, None] + width, tokens], axis=-1)
    cache = {
        "calls": cache["calls"] + 1,
        "count": cache["count"] + num_new,
        "events": cache["events"].at[rows, at].set(events, mode="drop"),
    }
    fed = jnp.take_along_axis(tokens, logits_at, axis=1)
    return jaxspec.ModelOutput(params[fed]), cache


LM = jaxspec.LanguageModel(jnp.asarray(TABLE), logging_apply, logging_init, vocab_size=V)


def outcome_of(draft, lengths, accepted, active):
    accepted = jnp.asarray(accepted, jnp.int32)
    return Outcome(
        draft=draft,
        verdict=Verdict(jnp.zeros((ROWS, K + 1), jnp.int32), accepted),
        start=lengths - 1,
        num_emitted=jnp.where(active, accepted + 1, 0),
        num_accepted=accepted,
        is_active=jnp.asarray(active),
        target_log_probs=jnp.zeros((ROWS, K + 1, V)),
        hidden=(),
    )


class Rounds:
    """Rounds of a drafter, with the text and its cache kept in Python beside it."""

    def __init__(self, module, options, stop_at=None):
        self.rng = np.random.default_rng(7)
        self.drafter = module.model(LM)
        self.options = sampling.resolve(options, ROWS, V)
        self.texts = [self.rng.integers(V, size=n).tolist() for n in (1, 4, 9)]
        self.stop_at = jnp.asarray([K] * ROWS if stop_at is None else stop_at)
        self.state = self.drafter.init(ROWS, CAPACITY)
        tokens, lengths = self.context()
        num_new = lengths - 1
        self.state = self.drafter.prefill(
            self.state, tokens[:, :8], (), jnp.zeros(ROWS, jnp.int32), num_new
        )
        self.cached = np.asarray(num_new).copy()
        self.seen = self.log()
        self.propose = jax.jit(self._propose)

    def _propose(self, keys, state, context, num_draft):
        return self.drafter.propose(
            keys, state, context, num_draft, lambda signals: signals.slot < self.stop_at
        )

    def context(self):
        tokens = self.rng.integers(V, size=(ROWS, CAPACITY))  # garbage behind the text
        for row, text in enumerate(self.texts):
            tokens[row, : len(text)] = text
        return jnp.asarray(tokens), jnp.asarray([len(text) for text in self.texts])

    def log(self):
        cache = self.state.cache
        return int(cache["calls"]), np.asarray(cache["count"]), np.asarray(cache["events"])

    def round(self, num_draft, accept, active=(True,) * ROWS, seed=0):
        """One round; asserts every token fed, the forwards, the length and the law."""
        tokens, lengths = self.context()
        history = sampling.recall(self.options, tokens, lengths)
        context = Context(tokens, lengths, self.options, history)
        draft, self.state = self.propose(
            split_keys(ROWS, seed), self.state, context, jnp.asarray(num_draft)
        )
        (old_calls, old_count, _), (calls, count, events) = self.seen, self.log()
        forwards = 0
        for row, text in enumerate(self.texts):
            drafted = min(num_draft[row], int(self.stop_at[row]))
            assert int(draft.length[row]) == drafted
            known = text + np.asarray(draft.tokens)[row, :drafted].tolist()
            # Cached afterwards: all but the last draft; all, where the policy stopped the row.
            last = len(known) if drafted < num_draft[row] else len(known) - 1
            if num_draft[row] == 0:
                last = self.cached[row]
            fed = [[slot, known[slot]] for slot in range(self.cached[row], last)]
            assert events[row, old_count[row] : count[row]].tolist() == fed
            lag = len(text) - self.cached[row]
            if num_draft[row]:
                stopped = drafted < num_draft[row]
                forwards = max(forwards, -(-lag // 2) + drafted - 1 + stopped)
            self.check_law(draft, row, known, len(text))
            self.cached[row] = last
        assert calls - old_calls == forwards
        self.seen = (calls, count, events)

        accepted = np.minimum(accept, np.asarray(draft.length))
        self.state = self.drafter.commit(
            self.state, outcome_of(draft, lengths, accepted, jnp.asarray(active))
        )
        for row, text in enumerate(self.texts):
            if active[row]:
                self.cached[row] = min(self.cached[row], len(text) + accepted[row])
                text += np.asarray(draft.tokens)[row, : accepted[row]].tolist()
                text.append(int(self.rng.integers(V)))
        np.testing.assert_array_equal(self.state.num_cached, self.cached)

    def check_law(self, draft, row, known, length):
        for slot in range(len(known) - length):
            logits = TABLE[known[length + slot - 1]]
            if draft.log_probs is None:
                assert known[length + slot] == np.argmax(logits)
            else:
                want = logits - np.log(np.sum(np.exp(logits)))
                np.testing.assert_allclose(draft.log_probs[row, slot], want, atol=1e-6)


def play(module, options, stop_at=None):
    rounds = Rounds(module, options, stop_at)
    rounds.round([4, 4, 4], [4, 2, 0])  # full acceptance: the cache lags by one
    rounds.round([4, 3, 1], [4, 3, 1], seed=1)
    for seed in range(2, 7):  # the middle row is not drafted for: it lags by five and more
        rounds.round([2, 0, 4], [1, 0, 2], seed=seed)
    rounds.round([0, 0, 0], [0, 0, 0], seed=7)  # nobody drafts: no forward at all
    rounds.round([3, 4, 0], [3, 4, 0], seed=8)  # it catches up while the first drafts
    rounds.round([3, 0, 4], [1, 0, 2], active=(True, False, True), seed=9)
    rounds.round([1, 4, 4], [0, 4, 4], seed=10)


GREEDY, SAMPLED = jaxspec.Sampling(temperature=0), jaxspec.Sampling()


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_each_token_is_fed_once_and_rows_catch_up(options):
    play(model_module, options)


def test_stopping_early_saves_forwards():
    play(model_module, SAMPLED, stop_at=[2, 0, 1])


@pytest.mark.parametrize(
    "patch",
    [
        # the cache believes a rejected draft, or forgets an accepted one
        ("outcome.start + 1 + outcome.num_accepted", "outcome.start + 2 + outcome.num_accepted"),
        ("outcome.start + 1 + outcome.num_accepted", "outcome.start + outcome.num_accepted"),
        # a row drafts before it has caught up
        ("progress.is_open & (num_cached == progress.num_known)", "progress.is_open"),
        # rows that do not draft are fed all the same
        ("jnp.where(progress.is_open, jnp.minimum(lag, _STEP), 0)", "jnp.minimum(lag, _STEP)"),
        # the policy is asked too late to save anything
        ("is_open = progress.is_open & (goes_on | ~has_next)", "is_open = progress.is_open"),
        # the last draft is fed although nothing follows it
        ("num_known - context.lengths < num_draft", "num_known - context.lengths <= num_draft"),
    ],
)
def test_planted_bugs_feed_something_else(patch):
    module = mutant("jaxspec.drafters.model", patch)
    with pytest.raises(AssertionError):
        play(module, SAMPLED, stop_at=[4, 2, 4])


def minimal_apply(params, tokens, cache, *, start):
    del start
    return jaxspec.ModelOutput(params[tokens]), cache


def minimal_init(batch, capacity, max_step):
    del batch, capacity, max_step
    return ()


def test_a_minimal_model_drafts_the_same():
    """Without num_new and logits_at."""
    minimal = jaxspec.LanguageModel(jnp.asarray(TABLE), minimal_apply, minimal_init, vocab_size=V)
    tokens = jnp.asarray(np.random.default_rng(1).integers(V, size=(ROWS, 20)))
    lengths = jnp.array([2, 5, 9])
    drafts = []
    for lm in (LM, minimal):
        drafter = drafters.model(lm)
        state = drafter.init(ROWS, 20)
        state = drafter.prefill(state, tokens[:, :8], (), jnp.zeros(ROWS, jnp.int32), lengths - 3)
        options = sampling.resolve(SAMPLED, ROWS, V)
        history = sampling.recall(options, tokens, lengths)
        context = Context(tokens, lengths, options, history)
        num_draft = jnp.array([4, 0, 2])
        propose = jax.jit(lambda *args, drafter=drafter: drafter.propose(*args, always)[0])
        drafts.append(propose(split_keys(ROWS), state, context, num_draft))
    one, two = drafts
    np.testing.assert_array_equal(one.length, two.length)
    for row, length in enumerate(one.length):
        np.testing.assert_array_equal(one.tokens[row, :length], two.tokens[row, :length])
    np.testing.assert_array_equal(one.log_probs, two.log_probs)


@pytest.mark.parametrize("bad", [3, None, minimal_apply])
def test_model_refuses(bad):
    with pytest.raises(ValueError, match=r"drafters\.model takes a jaxspec.LanguageModel"):
        drafters.model(bad)


def test_the_laws_of_a_draft_are_normalised():
    """Slots beyond `length` hold no law; those below hold one that sums to one."""
    rounds = Rounds(model_module, SAMPLED)
    tokens, lengths = rounds.context()
    history = sampling.recall(rounds.options, tokens, lengths)
    context = Context(tokens, lengths, rounds.options, history)
    draft, _ = rounds.propose(split_keys(ROWS), rounds.state, context, jnp.array([4, 1, 0]))
    assert isinstance(draft, Draft)
    sums = jnp.sum(jnp.exp(draft.log_probs), axis=-1)
    np.testing.assert_allclose(sums, [[1] * 4, [1, 0, 0, 0], [0] * 4], atol=1e-6)


def test_options_of_its_own_see_what_the_targets_see():
    """Given twice, they make the same law: penalties on the output, an end that is banned."""
    options = jaxspec.Sampling(
        temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.4,
        min_new_tokens=6, no_repeat_ngram_size=4,
    )  # fmt: skip
    target = table_model(random_logits(0, vocab_size=5, order=2), order=2)
    out = jaxspec.generate(
        target, [[1, 1, 4], [2]] * 8, drafter=drafters.model(target, sampling=options),
        sampling=options, eos_ids=(2, 4), max_new_tokens=12, key=jax.random.key(0),
    )  # fmt: skip
    # All drafts are accepted: every step writes five tokens, but the last.
    lengths = np.asarray(out.lengths)
    assert lengths.min() >= 6
    np.testing.assert_array_equal(out.stats.num_spec_steps, -(-lengths // (K + 1)))


# ---------------------------------------------------------------------------------------------
# Fallback.


def check_fallback(module):
    """Row by row what the first one drafts, else what the other would draft by itself."""
    rng = np.random.default_rng(0)
    rows, size = 40, 24
    tokens = jnp.asarray(rng.integers(0, V, size=(rows, size)), jnp.int32)
    lengths = jnp.asarray(rng.integers(4, size - K, size=rows))
    num_draft = jnp.asarray(rng.integers(0, K + 1, size=rows))
    options = sampling.resolve(jaxspec.Sampling(temperature=0.7), rows, V)
    context = Context(tokens, lengths, options, sampling.recall(options, tokens, lengths))
    lookup, model = drafters.prompt_lookup(2, 2), drafters.model(LM)
    both = module.fallback(lookup, model)
    zeros = jnp.zeros(rows, jnp.int32)

    def drafted(drafter):
        state = drafter.init(rows, size)
        state = drafter.prefill(state, tokens[:, :8], (), zeros, jnp.minimum(lengths - 1, 8))
        return jax.jit(lambda: drafter.propose(split_keys(rows), state, context, num_draft, always))

    (copied, _), (drawn, _), (found, _) = (drafted(each)() for each in (lookup, model, both))
    is_copied = np.asarray(copied.length) > 0
    assert 5 < is_copied.sum() < np.sum(np.asarray(num_draft) > 0) - 5
    np.testing.assert_array_equal(found.length, np.where(is_copied, copied.length, drawn.length))
    for row, length in enumerate(found.length):
        if is_copied[row]:
            assert found.tokens[row, :length].tolist() == copied.tokens[row, :length].tolist()
            law = jax.nn.one_hot(copied.tokens[row, :length], V)
            np.testing.assert_array_equal(jnp.exp(found.log_probs[row, :length]), law)
        else:
            assert found.tokens[row, :length].tolist() == drawn.tokens[row, :length].tolist()
            np.testing.assert_array_equal(
                found.log_probs[row, :length], drawn.log_probs[row, :length]
            )
    check_no_forwards_are_wasted(module)


def test_fallback_is_the_first_that_drafts():
    check_fallback(fallback_module)


@pytest.mark.parametrize(
    "patch",
    [
        ("jnp.where(found.length > 0, 0, num_draft)", "num_draft"),  # only slower
        ("jnp.where(is_first, first.tokens, second.tokens)", "second.tokens"),
        ("_laws_of(first, second.log_probs.shape[2])", "second.log_probs"),
        ("is_first[:, 0], first.length, second.length", "is_first[:, 0], first.length, 0"),
    ],
)
def test_planted_bugs_in_fallback(patch):
    module = mutant("jaxspec.drafters.fallback", patch)
    with pytest.raises(AssertionError):
        check_fallback(module)


def check_no_forwards_are_wasted(module):
    """A model is not asked for rows that have a draft."""
    texts = jnp.asarray([[1, 2, 3, 1, 2, 0, 0, 0, 0, 0], [4, 5, 4, 5, 4, 0, 0, 0, 0, 0]])
    lengths = jnp.array([5, 5])
    options = sampling.resolve(jaxspec.Sampling(temperature=0), 2, V)
    context = Context(texts, lengths, options, sampling.recall(options, texts, lengths))
    both = module.fallback(drafters.prompt_lookup(), drafters.model(LM))
    draft, state = both.propose(split_keys(2), both.init(2, 16), context, jnp.array([3, 4]), always)
    assert draft.length.tolist() == [3, 4]
    assert int(state[1].cache["calls"]) == 0


def test_hidden_states_go_to_who_asked_for_them():
    class Asking:
        def __init__(self, *layers):
            self.hidden_layers = layers

        def init(self, batch, capacity):
            return "nothing"

        def prefill(self, state, tokens, hidden, start, num_new):
            return hidden

        def propose(self, keys, state, context, num_draft, keep_drafting):
            raise NotImplementedError

        def commit(self, state, outcome):
            return outcome.hidden

    both = drafters.fallback(Asking(3, 1), drafters.prompt_lookup(), Asking(2))
    assert both.hidden_layers == (3, 1, 2)
    assert both.init(1, 8) == ("nothing", (), "nothing")
    hidden = ("three", "one", "two")
    seen = both.prefill(both.init(1, 8), None, hidden, None, None)
    assert seen == (("three", "one"), (), ("two",))
    outcome = Outcome(None, None, None, None, None, None, None, hidden)
    assert both.commit(seen, outcome) == (("three", "one"), (), ("two",))


def test_fallback_has_the_limits_of_all():
    short = LM.replace(max_length=20)
    both = drafters.fallback(drafters.prompt_lookup(), drafters.model(LM), drafters.model(short))
    assert (both.vocab_size, both.max_length, both.max_draft_tokens) == (V, 20, None)
    assert not both.is_anticipating
    copying = drafters.fallback(drafters.prompt_lookup(4, 4), drafters.prompt_lookup())
    assert (copying.vocab_size, copying.max_length) == (None, None)
    target = table_model(random_logits(0, vocab_size=5, order=1), order=1)
    out = jaxspec.generate(
        target, [[1, 2, 1, 2]], drafter=copying, max_new_tokens=4, key=jax.random.key(0)
    )
    assert out.lengths.tolist() == [4]


@pytest.mark.parametrize("bad", [(), (drafters.prompt_lookup(),)])
def test_fallback_takes_two_or_more(bad):
    with pytest.raises(ValueError, match="takes two drafters or more"):
        drafters.fallback(*bad)


@pytest.mark.parametrize("bad", [None, LM, drafters.prompt_lookup])
def test_fallback_takes_drafters(bad):
    with pytest.raises(ValueError, match="fallback takes drafters"):
        drafters.fallback(drafters.prompt_lookup(), bad)
