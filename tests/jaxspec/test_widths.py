"""Verification widths: what a round pays for, and that nothing else depends on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant
from support.running import generate_with

import jaxspec
from jaxspec import drafters, loop, policies, verifiers
from jaxspec.testing import random_logits, table_model

pytestmark = pytest.mark.optimized

_VOCAB, _ORDER, _DRAFTS = 6, 2, 9
_LOGITS = random_logits(3, vocab_size=_VOCAB, order=_ORDER)
_TARGET = table_model(_LOGITS, order=_ORDER)
_OTHER = table_model(
    _LOGITS + random_logits(4, vocab_size=_VOCAB, order=_ORDER, scale=1.0), order=_ORDER
)
_PROMPTS = [[1, 2, 3], [5], [0, 1, 0, 1, 0, 1, 0], [4, 4, 2, 0]]
_WIDTHS = "widths = (1, 3) if num_draft_tokens > 4 else (1,)"


def test_widths_rise_to_the_full_one():
    for num_draft_tokens in range(20):
        widths = loop.verification_widths(num_draft_tokens)
        assert widths[-1] == num_draft_tokens + 1
        assert sorted(set(widths)) == list(widths)
        assert widths[0] == 1  # who drafts nothing pays for nothing


def _strategies():
    model = drafters.model(_OTHER)
    lookup = drafters.prompt_lookup()
    growing = policies.heuristic(1)
    return {
        "block": (model, verifiers.block(), growing),
        "rejection": (model, verifiers.rejection(), policies.fixed(jnp.array([0, 3, 4, 9]))),
        "match": (model, verifiers.match(), growing),
        "lookup": (lookup, None, growing),
        "nothing": (model, None, policies.fixed(0)),
    }


def _run(module, name, prompts=_PROMPTS):
    drafter, verifier, policy = _strategies()[name]
    return generate_with(
        module, _TARGET, prompts, drafter=drafter, verifier=verifier, policy=policy,
        sampling=jaxspec.Sampling(temperature=np.array([1.0, 0.7, 0.0, 1.3])),
        max_new_tokens=40, num_draft_tokens=_DRAFTS, key=jax.random.key(5),
    )  # fmt: skip


def _differs(a, b):
    return not all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@functools.cache
def _single():
    """The loop with the full width alone."""
    return mutant("jaxspec.loop", (_WIDTHS, "widths = ()"))


@pytest.mark.parametrize("name", list(_strategies()))
def test_tokens_log_probs_and_stats_are_those_of_the_full_width(name):
    assert not _differs(_run(loop, name), _run(_single(), name))


@pytest.mark.parametrize(
    "patch",
    [
        ("needed = 1 + jnp.max(", "needed = jnp.max("),  # no room for the pending token
        ("jnp.where(is_active, draft.length, 0))\n", "draft.length[:1])\n"),  # the first row's
        ("_keys(request.keys, state.num_rounds, _VERIFY, width)",
         "_keys(request.keys, state.num_rounds + width, _VERIFY, width)"),
    ],
)  # fmt: skip
def test_planted_bugs_show(patch):
    assert _differs(_run(mutant("jaxspec.loop", patch), "block"), _run(_single(), "block"))


def test_a_round_runs_at_the_narrowest_width_that_holds_its_drafts():
    """Seen from the model: the numbers of tokens it is fed."""
    seen = []

    def apply(params, tokens, cache, *, start):
        jax.debug.callback(lambda: seen.append(tokens.shape[1]))
        return jaxspec.ModelOutput(params[tokens]), cache

    table = jax.random.normal(jax.random.key(0), (_VOCAB, _VOCAB))
    target = jaxspec.LanguageModel(table, apply, lambda *_: (), vocab_size=_VOCAB)
    widths = {}
    for length in (0, 1, 2, 3, 9):
        seen.clear()
        generation = jaxspec.generate(
            target, [[1]], drafter=drafters.model(_OTHER), policy=policies.fixed(length),
            num_draft_tokens=_DRAFTS, max_new_tokens=12, key=jax.random.key(0),
        )  # fmt: skip
        jax.effects_barrier()
        assert len(seen) == int(generation.stats.num_spec_steps[0])
        widths[length] = max(seen)
    assert widths == {0: 1, 1: 3, 2: 3, 3: 10, 9: 10}
