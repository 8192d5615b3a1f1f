"""Through `generate`: low precision, masked logits, two tokens, laws that are equal or one-hot.

Each law fails a correct program with probability 1e-6; the seeds are fixed.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxspec
from jaxspec import Draft, Sampling, drafters, drawing, pytree, status, verifiers
from jaxspec.testing import check_lossless, random_logits, table_model

pytestmark = pytest.mark.exactness

_RULES = ["block", "rejection", "match"]


def _masked(seed):
    """Every row has one -inf; draft and target mask other tokens."""
    logits = random_logits(seed, vocab_size=3, order=1)
    logits[np.arange(3), (np.arange(3) + seed) % 3] = -np.inf
    return logits


_TABLES = {
    "bfloat16": lambda seed: random_logits(seed, vocab_size=3, order=1).astype(ml_dtypes.bfloat16),
    "float16": lambda seed: random_logits(seed, vocab_size=3, order=1).astype(np.float16),
    "masked": _masked,
    # A token so rare that float32 holds its log-probability, but not its probability.
    "underflow": lambda seed: (
        random_logits(seed, vocab_size=3, order=1) + np.array([0, 0, -300], np.float32) * seed
    ),
    "one-hot draft": lambda seed: (
        random_logits(seed, vocab_size=3, order=1) + 500 * np.eye(3, dtype=np.float32) * seed
    ),
    "one-hot target": lambda seed: (
        random_logits(seed, vocab_size=3, order=1) + 500 * np.eye(3, dtype=np.float32) * (1 - seed)
    ),
    "two tokens": lambda seed: random_logits(seed, vocab_size=2, order=1),
}


_GROUPS = {  # those of a group share their compiled programs
    "low precision": ["bfloat16", "float16"],
    "float32": ["masked", "underflow", "one-hot draft", "one-hot target"],
    "two tokens": ["two tokens"],
}


@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.parametrize("group", _GROUPS)
def test_law(group, rule):
    for table in _GROUPS[group]:
        target, draft = (table_model(_TABLES[table](seed), order=1) for seed in (0, 1))
        for lm in (draft, target):  # disagreeing, and p = q
            report = check_lossless(
                target,
                drafters.model(lm),
                getattr(verifiers, rule)(),
                prompts=[[0], [1, 0]],
                max_new_tokens=3,
                num_draft_tokens=2,
                num_samples=27_000,
            )
            report.assert_passed()
        assert report.acceptance_rate == 1.0


@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_with_broken_logits_stops_and_keeps_its_text(rule, value):
    """Token 2 leads to broken logits. The other row is as it is alone."""
    logits = np.full((3, 3), -50.0, np.float32)
    logits[0, 1] = logits[1, 2] = 0.0  # 0 -> 1 -> 2 -> broken
    logits[2] = value
    broken = table_model(logits, order=1)
    other = np.full((3, 3), -50.0, np.float32)
    other[:, 0] = 0.0
    out = jaxspec.generate(
        broken,
        [[0], [1, 1, 0]],
        drafter=drafters.model(table_model(other + np.eye(3, dtype=np.float32), order=1)),
        verifier=getattr(verifiers, rule)(),
        max_new_tokens=6,
        key=jax.random.key(0),
    )
    assert out.status.tolist() == [status.NONFINITE] * 2
    assert out.lengths.tolist() == [2, 2]
    assert out.tokens[:, :2].tolist() == [[1, 2]] * 2
    assert np.isfinite(out.log_probs).all()
    assert out.tokens[:, 2:].max() == 0


# ---------------------------------------------------------------------------------------------
# Counters.

_FLAT = table_model(np.zeros((3, 3), np.float32), order=1)


def _counters(out):
    return {
        name: int(np.asarray(getattr(out.stats, name)).sum())
        for name in (
            "num_zero_probability_rejections", "num_impossible_draft_tokens", "num_fallbacks",
            "num_draft_tokens", "num_spec_steps",
        )
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["block", "rejection"])
def test_rejections_at_probability_zero_are_counted(rule):
    """The target cuts two of three tokens off: two drafts of three are hopeless."""
    out = jaxspec.generate(
        table_model(np.array([[2.0, 1.0, 0.0]] * 3, np.float32), order=1),
        [[0]] * 64,
        drafter=drafters.model(_FLAT, sampling=Sampling(temperature=2.0)),
        verifier=getattr(verifiers, rule)(),
        sampling=Sampling(top_k=1, top_p=0.999),
        max_new_tokens=2,
        num_draft_tokens=1,
        key=jax.random.key(0),
    )
    counters = _counters(out)
    # Two tokens a row: a round with a draft, and after a rejection one without.
    rejected = counters["num_spec_steps"] - 64
    assert counters["num_zero_probability_rejections"] == rejected
    assert 30 < rejected < 55  # 64 · 2/3, within four standard errors
    assert counters["num_impossible_draft_tokens"] == counters["num_fallbacks"] == 0


@pytree.dataclass
class Liar:
    """Drafts token 2 and reports a q that cannot draw it."""

    hidden_layers = ()

    def init(self, batch, capacity):
        return ()

    def prefill(self, state, tokens, hidden, start, num_new):
        return state

    def propose(self, keys, state, context, num_draft, keep_drafting):
        q = jnp.log(jnp.array([0.5, 0.5, 0.0]))
        tokens = jnp.full(keys.shape, 2, jnp.int32)
        return Draft(tokens, jnp.broadcast_to(q, (*keys.shape, 3)), num_draft), state

    def commit(self, state, outcome):
        return state


@pytest.mark.parametrize("rule", ["block", "rejection"])
def test_impossible_drafts_are_rejected_and_counted(rule):
    out = jaxspec.generate(
        _FLAT, [[0]] * 8, drafter=Liar(), verifier=getattr(verifiers, rule)(),
        max_new_tokens=5, num_draft_tokens=2, key=jax.random.key(0),
    )  # fmt: skip
    counters = _counters(out)
    assert counters["num_impossible_draft_tokens"] == counters["num_draft_tokens"] == 8 * 7
    assert int(np.asarray(out.stats.num_accepted_draft_tokens).sum()) == 0
    assert counters["num_zero_probability_rejections"] == 0


@pytree.dataclass
class Outside:
    """Drafts an id that is no token, with and without a q."""

    token: int = pytree.static()
    has_law: bool = pytree.static()

    hidden_layers = ()

    init, prefill, commit = Liar.init, Liar.prefill, Liar.commit

    def propose(self, keys, state, context, num_draft, keep_drafting):
        tokens = jnp.full(keys.shape, self.token, jnp.int32)
        law = jnp.log(jnp.full((*keys.shape, 3), 1 / 3)) if self.has_law else None
        return Draft(tokens, law, num_draft), state


@pytest.mark.parametrize("rule", ["block", "rejection", "match"])
@pytest.mark.parametrize(("token", "has_law"), [(-1, True), (3, True), (100, False)])
def test_ids_outside_the_vocabulary_are_rejected_and_counted(rule, token, has_law):
    out = jaxspec.generate(
        _FLAT, [[0]] * 64, drafter=Outside(token, has_law), verifier=getattr(verifiers, rule)(),
        max_new_tokens=5, num_draft_tokens=2, key=jax.random.key(0),
    )  # fmt: skip
    counters = _counters(out)
    assert counters["num_impossible_draft_tokens"] == counters["num_draft_tokens"] > 0
    assert int(np.asarray(out.stats.num_accepted_draft_tokens).sum()) == 0
    assert ((np.asarray(out.tokens) >= 0) & (np.asarray(out.tokens) < 3)).all()


@pytree.dataclass
class Rounding:
    """Draws from a uniform p and reports q = 1 for every token: no residual is left."""

    hidden_layers = ()

    init, prefill, commit = Liar.init, Liar.prefill, Liar.commit

    def propose(self, keys, state, context, num_draft, keep_drafting):
        p = jnp.full((3,), 1 / 3, jnp.float32)
        numbers = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys)
        tokens = jax.vmap(jax.vmap(lambda u: drawing.draw(u, p)))(numbers)
        return Draft(tokens, jnp.zeros((*keys.shape, 3)), num_draft), state


@pytest.mark.parametrize("rule", ["block", "rejection"])
def test_fallbacks_are_counted_and_draw_from_the_target(rule):
    out = jaxspec.generate(
        _FLAT, [[0]] * 3_000, drafter=Rounding(), verifier=getattr(verifiers, rule)(),
        max_new_tokens=2, num_draft_tokens=1, key=jax.random.key(0),
    )  # fmt: skip
    counters = _counters(out)
    rejected = counters["num_spec_steps"] - 3_000
    assert counters["num_fallbacks"] == rejected > 1_500
    shares = np.bincount(np.asarray(out.tokens[:, 0]), minlength=3) / 3_000
    assert np.abs(shares - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 3_000)  # five standard errors
