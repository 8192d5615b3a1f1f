"""The exact law of one block under each shipped rule, by enumeration; planted bugs are caught.

Tolerance: the rules work in float32. Each of the at most (K + 1) · (V + 1) borders of a piece is
rounded by at most a few units of 2⁻²³, so that the total variation of the whole law stays below
16 · 2⁻²³ · 25 < 5e-5, the bound of `check_verifier`. The planted bugs move it by more than a
hundred times that, unless they say otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

from jaxspec import Draft, verifiers
from jaxspec.testing import check_verifier
from jaxspec.testing.enumeration import Block, emitted_laws
from jaxspec.testing.verifier import random_laws
from jaxspec.verifiers import ratio

pytestmark = pytest.mark.law

_CAUGHT = 5e-3
_RATIO = "jaxspec.verifiers.ratio"
_RATIO_RULES = ["rejection", "block"]


def accepted(report):
    return {case.name: case.expected_accepted for case in report.cases}


@pytest.mark.parametrize("rule", _RATIO_RULES)
@pytest.mark.parametrize(("vocab_size", "num_draft"), [(2, 1), (3, 1), (3, 2), (2, 3), (3, 3)])
def test_the_law_is_the_target_s(rule, vocab_size, num_draft):
    report = check_verifier(
        getattr(verifiers, rule)(), vocab_size=vocab_size, num_draft=num_draft, seed=num_draft
    )
    report.assert_passed()
    assert all(case.is_exact for case in report.cases)
    rates = accepted(report)
    # Ratios of two equal float32 numbers are exactly one: no tolerance.
    assert rates["equal"] == pytest.approx(num_draft, abs=1e-12)
    assert rates["greedy, right drafts"] == num_draft
    assert rates["greedy, wrong drafts"] == 0


@pytest.mark.parametrize(("vocab_size", "num_draft"), [(2, 1), (3, 2), (2, 3)])
def test_the_law_of_match(vocab_size, num_draft):
    """Fails a correct program with probability 1e-6 a case; the seeds are fixed."""
    report = check_verifier(verifiers.match(), vocab_size=vocab_size, num_draft=num_draft)
    report.assert_passed()
    rates = accepted(report)
    assert rates["greedy, right drafts"] == num_draft
    assert rates["greedy, wrong drafts"] == 0


def test_the_law_of_greedy():
    report = check_verifier(verifiers.greedy(), num_draft=3)
    report.assert_passed()
    assert len(report.cases) == 3  # those at temperature 0
    assert report.total_variation == 0
    assert accepted(report)["greedy, right drafts"] == 3


@pytest.mark.parametrize("rule", _RATIO_RULES)
@pytest.mark.parametrize("seed", range(3))
def test_acceptance_of_one_draft_is_one_minus_total_variation(rule, seed):
    sizes = {"vocab_size": 3, "num_draft": 1}
    target, drafted = random_laws(seed, **sizes), random_laws(seed + 100, **sizes)
    (law,) = emitted_laws(getattr(verifiers, rule)(), [Block(target, drafted)])
    rate = sum(mass for text, mass in law.items() if len(text) == 2)
    assert rate == pytest.approx(1 - 0.5 * np.abs(target[()] - drafted[()]).sum(), abs=5e-5)


@pytest.mark.parametrize("rule", _RATIO_RULES)
def test_one_hot_acceptance_is_the_target_probability(rule):
    target = random_laws(0, vocab_size=3, num_draft=2)
    tokens = {text: int(np.argmax(law)) for text, law in target.items()}
    (law,) = emitted_laws(getattr(verifiers, rule)(), [Block(target, tokens_of=tokens)])
    first = tokens[()]
    second = target[()][first] * target[(first,)][tokens[(first,)]]
    expected = target[()][first] + second
    assert sum(mass * (len(t) - 1) for t, mass in law.items()) == pytest.approx(expected, abs=5e-5)


@pytest.mark.exactness
@pytest.mark.parametrize(("vocab_size", "num_draft"), [(3, 2), (2, 3), (3, 3)])
def test_block_never_accepts_fewer_than_rejection(vocab_size, num_draft):
    """Exactly, by enumeration: sixteen random pairs of laws, and the cases of check_verifier."""
    sizes = {"vocab_size": vocab_size, "num_draft": num_draft}
    most = vocab_size - 2  # with one token left, both rules are one
    pairs = [
        Block(
            random_laws([seed, 0], **sizes, zeros=min(seed % 2, most)),
            random_laws([seed, 1], **sizes, zeros=min(seed // 2 % 2, most)),
        )
        for seed in range(16)
    ]
    expected = {}
    for rule in _RATIO_RULES:
        verifier = getattr(verifiers, rule)()
        laws = emitted_laws(verifier, pairs)
        rates = [sum(mass * (len(text) - 1) for text, mass in law.items()) for law in laws]
        expected[rule] = np.array(
            rates + list(accepted(check_verifier(verifier, **sizes)).values())
        )
    gain = expected["block"] - expected["rejection"]
    assert (gain > -1e-6).all()  # the borders' rounding
    assert (gain > 1e-3).sum() >= 8  # and it is not the same rule
    # The theorem's own formula: P(tau >= i) = E_q[p_i].
    block = pairs[0]
    weights = np.zeros(num_draft)
    for text, mass in block.texts():
        weight = 1.0
        for i, token in enumerate(text):
            drafted = block.drafted[text[:i]][token]
            weight = min(1.0, weight * block.target[text[:i]][token] / max(drafted, 1e-300))
            weights[i] += mass * weight
    assert expected["block"][0] == pytest.approx(weights.sum(), abs=5e-5)


@pytest.mark.parametrize("rule", _RATIO_RULES)
def test_the_keyed_rule_is_the_enumerated_one(rule):
    """Calling a rule on keys equals its `judge` on the uniforms of those keys."""
    verifier = getattr(verifiers, rule)()
    keys = jax.random.split(jax.random.key(7), (200, 4))
    target = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (200, 4, 5)))
    drafted = jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (200, 3, 5)))
    tokens = jax.random.randint(jax.random.key(3), (200, 3), 0, 5)
    draft = Draft(tokens, drafted, jnp.full((200,), 3))
    ours = jax.jit(jax.vmap(verifier))(keys, draft, target)
    numbers = np.asarray(jax.jit(jax.vmap(ratio.uniforms))(jax.random.clone(keys)))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    explicit = jax.jit(jax.vmap(verifier.judge))(jnp.asarray(numbers), draft, target)
    np.testing.assert_array_equal(ours.tokens, explicit.tokens)
    # Tests and draws are independent: no two columns of the uniforms are alike.
    correlations = np.corrcoef(numbers.reshape(200, -1), rowvar=False) - np.eye(12)
    assert np.abs(correlations).max() < 6 / np.sqrt(200)  # six standard errors


# ---------------------------------------------------------------------------------------------
# Planted bugs: (module that is patched, old, new).

_SHARED_MUTANTS = {
    "correction drawn from the target, not from the residual": (
        "return jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)",
        "return target",
    ),
    "residual |p - q|": (
        "return jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)",
        "return jnp.abs(target - jnp.exp(draft.log_probs[slot]))",
    ),
    "residual with p and q swapped": (
        "jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)",
        "jnp.maximum(jnp.exp(draft.log_probs[slot]) - target, 0.0)",
    ),
    "residual clamped from below and not renormalised": (
        "jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)",
        "jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 1e-2)",
    ),
    "residual against the draft one position early": (
        "slot = jnp.minimum(num_accepted, num_slots - 1)",
        "slot = jnp.maximum(num_accepted - 1, 0)",
    ),
    "bonus drawn from a residual": (
        "is_rejected = num_accepted < draft.length",
        "is_rejected = num_accepted < num_slots + 1",
    ),
    "correction of the last draft drawn as a bonus": (
        "is_rejected = num_accepted < draft.length",
        "is_rejected = num_accepted < draft.length - 1",
    ),
    "target read one position late in the test": (
        "target = target_log_probs[slots, draft.tokens]",
        "target = target_log_probs[slots + 1, draft.tokens]",
    ),
    "correction from the position before": (
        "weights = jnp.exp(target_log_probs[num_accepted])",
        "weights = jnp.exp(target_log_probs[jnp.maximum(num_accepted - 1, 0)])",
    ),
    "ratio upside down": ("ratios = target - drafted", "ratios = drafted - target"),
    "draft probabilities rounded to bfloat16 in the test": (
        "drafted = draft.log_probs[slots, draft.tokens]",
        "drafted = draft.log_probs[slots, draft.tokens].astype(jnp.bfloat16).astype(jnp.float32)",
    ),
    "one-hot draft: the rejected token is drawn again": (
        "return jnp.where(is_drafted, 0.0, target)",
        "return target",
    ),
    "one-hot draft: accepted with 1": (
        "return jnp.where(can_pass, ratios, -jnp.inf)",
        "return jnp.where(can_pass, ratios if draft.log_probs is not None else 0.0, -jnp.inf)",
    ),
}

_OWN_MUTANTS = {
    "rejection": {
        "drafts behind a rejection still accepted": (
            "jnp.cumprod(passes.astype(jnp.int32))",
            "passes.astype(jnp.int32)",
        ),
        "threshold log(u) + 0.1": ("log1p(-numbers[:-1, 0])", "log1p(-numbers[:-1, 0]) + 0.1"),
        "drafts beyond the length": (
            "passes = passes & (jnp.arange(passes.shape[0]) < draft.length)",
            "",
        ),
    },
    "block": {
        "product of the ratios, clipped at the end": (
            "jnp.minimum(log_weight + log_ratio, 0.0)\n        return log_weight, log_weight",
            "log_weight + log_ratio\n        return log_weight, jnp.minimum(log_weight, 0.0)",
        ),
        "stops at the first failure": (
            "num_accepted = jnp.max(jnp.where(passes, lengths, 0)).astype(jnp.int32)",
            "num_accepted = jnp.sum(jnp.cumprod(passes.astype(jnp.int32)), dtype=jnp.int32)",
        ),
        "residual without the weight": (
            "log_weight = jnp.concatenate([jnp.zeros((1,)), log_weights])[num_accepted]",
            "log_weight = 0.0",
        ),
        "the weight of the prefix before": (
            "jnp.concatenate([jnp.zeros((1,)), log_weights])[num_accepted]",
            "jnp.concatenate([jnp.zeros((2,)), log_weights])[num_accepted]",
        ),
        "whole draft passes as if it went on": (
            "excess = jnp.where(is_whole, jnp.exp(log_weights), jnp.sum(left, axis=1))",
            "excess = jnp.sum(left, axis=1)",
        ),
        "the longest of K slots is whole, however short the draft": (
            "== draft.length\n    excess", "== num_slots\n    excess",
        ),
        "h = S": ("* (excess + lack) <= excess", "<= excess"),
        "excess against the draft of the same slot": (
            "behind = jnp.minimum(jnp.arange(1, num_slots + 1), num_slots - 1)",
            "behind = jnp.arange(num_slots)",
        ),
        "drafts beyond the length": ("passes = passes & (lengths <= draft.length)", ""),
    },
}  # fmt: skip


@pytest.mark.exactness
@pytest.mark.parametrize("rule", _RATIO_RULES)
@pytest.mark.parametrize("name", _SHARED_MUTANTS)
def test_planted_bug_in_what_the_rules_share_is_caught(name, rule):
    broken = mutant(f"jaxspec.verifiers.{rule}", _SHARED_MUTANTS[name], within=_RATIO)
    if rule == "block":  # its one-hot rule is that of rejection
        through = mutant("jaxspec.verifiers.rejection", _SHARED_MUTANTS[name], within=_RATIO)
        broken.rejection = through.rejection
    report = check_verifier(getattr(broken, rule)())
    assert not report.passed
    assert report.total_variation > (1e-4 if "bfloat16" in name else _CAUGHT)


@pytest.mark.exactness
@pytest.mark.parametrize(
    ("rule", "name"), [(rule, name) for rule, names in _OWN_MUTANTS.items() for name in names]
)
def test_planted_bug_in_a_rule_is_caught(rule, name):
    broken = mutant(f"jaxspec.verifiers.{rule}", _OWN_MUTANTS[rule][name])
    report = check_verifier(getattr(broken, rule)(), num_draft=3)
    assert not report.passed, report
    # A verdict that is malformed is caught before its law.
    assert report.total_variation > _CAUGHT or "beyond" in name


@pytest.mark.exactness
@pytest.mark.parametrize(
    ("rule", "patch"),
    [
        ("greedy", ("best[:-1]) &", "best[1:]) &")),
        ("match", ("drawn[:-1]) &", "drawn[1:]) &")),
        ("match", ("& (slots[:-1] < draft.length)", "")),
        ("match", ("jnp.cumprod(matches.astype(jnp.int32))", "matches.astype(jnp.int32)")),
        ("match", ("vmap(lambda key: drawing.gumbel_noise(key, size))(keys)",
                   "vmap(lambda key: drawing.gumbel_noise(key, size))(keys) * 1.2")),
    ],
)  # fmt: skip
def test_planted_bug_in_a_matching_rule_is_caught(rule, patch):
    broken = mutant(f"jaxspec.verifiers.{rule}", patch)
    assert not check_verifier(getattr(broken, rule)(), num_draft=3).passed
