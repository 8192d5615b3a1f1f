"""Settings, and what finds them: acceptance by rank and depth, costs, and the choice."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrix import Unigram

import jaxspec
from jaxspec import Sampling, Settings, costs, drafters, settings, trees, tuning
from jaxspec.testing import random_logits, table_model

VOCAB = 6
TARGET = table_model(random_logits(0, vocab_size=VOCAB, order=1), order=1)
DRAFT = table_model(random_logits(1, vocab_size=VOCAB, order=1), order=1)
PROMPTS = [[1, 2], [3]]
GREEDY = Sampling(temperature=0)
TREE = trees.comb((2, 2))
OPTIONS = {"sampling": GREEDY, "max_new_tokens": 12, "eos_ids": ()}


# ---------------------------------------------------------------------------------------------
# Settings.


@pytest.mark.parametrize("found", [Settings(0), Settings(3), Settings(4, TREE, {"seconds": 1.5})])
def test_settings_come_back_as_they_were_written(found, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(found.to_json())
    again = settings.read(path)
    assert again == found
    assert again.measured == found.measured
    assert settings.read(str(path)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "no settings of format 1"),
        ('{"format": 2}', "no settings of format 1"),
        ('{"format": 1, "num_draft_tokens": 1, "speed": 3}', "unknown settings: speed"),
        ('{"format": 1}', "whole number of at least 0"),
        ('{"format": 1, "num_draft_tokens": true}', "whole number of at least 0"),
        ('{"format": 1, "num_draft_tokens": 2, "tree": [-1]}', "number of nodes, 1"),
        ('{"format": 1, "num_draft_tokens": 1, "tree": [0]}', "name an earlier node"),
        ('{"format": 1, "num_draft_tokens": 1, "tree": 3}', "a list of parents"),
        ('{"format": 1, "num_draft_tokens": 1, "measured": 3}', "must be an object"),
    ],
)
def test_files_that_hold_something_else_are_refused(text, message, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        settings.read(path)
    assert "settings.json" in str(error.value)


def test_files_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        jaxspec.generate(TARGET, PROMPTS, drafter="auto", settings=tmp_path / "absent.json")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read"):
        settings.read(tmp_path / "bytes")


@pytest.mark.parametrize(
    "drafter",
    [
        drafters.model(DRAFT),
        drafters.prompt_lookup(),
        drafters.token_recycling(VOCAB),
        drafters.fallback(drafters.prompt_lookup(), drafters.model(DRAFT)),
    ],
    ids=["model", "lookup", "recycling", "fallback"],
)
def test_generate_drafts_as_settings_say(drafter):
    out = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, settings=Settings(4, TREE), **OPTIONS)
    same = jaxspec.generate(TARGET, PROMPTS, drafter=drafter.in_tree(TREE), **OPTIONS)
    np.testing.assert_array_equal(out.tokens, same.tokens)
    np.testing.assert_array_equal(out.stats.num_draft_tokens, same.stats.num_draft_tokens)
    assert out.stats.acceptance_histogram.shape == (2, TREE.num_nodes + 1)


def test_generate_drafts_chains_or_nothing_as_settings_say(tmp_path):
    drafter = drafters.model(TARGET)
    path = tmp_path / "settings.json"
    path.write_text(Settings(3).to_json())
    chain = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, settings=str(path), **OPTIONS)
    assert chain.stats.num_spec_steps.tolist() == [3, 3]
    plain = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, settings=Settings(0), **OPTIONS)
    assert plain.stats.num_spec_steps.tolist() == [12, 12]
    pieces = jaxspec.stream(TARGET, PROMPTS, drafter=drafter, settings=Settings(3), **OPTIONS)
    assert [len(ids) for _, ids in pieces] == [4] * 6


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="pass a drafter"):
        jaxspec.generate(TARGET, PROMPTS, settings=Settings(3), **OPTIONS)
    with pytest.raises(ValueError, match=r"must be a jaxspec\.Settings or a file"):
        jaxspec.generate(TARGET, PROMPTS, drafter="auto", settings=3, **OPTIONS)
    tree = drafters.model(DRAFT, tree=TREE)
    with pytest.raises(ValueError, match=r"no in_tree\(topology\)"):
        jaxspec.generate(TARGET, PROMPTS, drafter=tree, settings=Settings(4, TREE), **OPTIONS)


def test_fallback_and_trees():
    with pytest.raises(ValueError, match="fallback takes drafters of chains"):
        drafters.fallback(drafters.prompt_lookup(), drafters.model(DRAFT, tree=TREE))
    chains = drafters.fallback(drafters.prompt_lookup(), Unigram(VOCAB))
    with pytest.raises(ValueError, match=r"Unigram.* drafts chains only"):
        chains.in_tree(TREE)


# ---------------------------------------------------------------------------------------------
# Measuring.


def test_acceptance_of_a_draft_that_is_the_target():
    found = tuning.measure_acceptance(TARGET, drafters.model(TARGET), PROMPTS, eos_ids=())
    assert len(found) == 6  # the depth of the probe
    for shares in found:
        assert shares[0] == pytest.approx(1.0)
        assert sum(shares[1:]) == 0.0


def test_acceptance_by_rank_is_the_target_s_probability():
    """Of a law that is the same behind every token, the likeliest tokens not drawn."""
    weights = np.array([0.1, 0.45, 0.05, 0.25, 0.15], np.float32)
    lm = table_model(jnp.log(jnp.tile(weights, (5, 1))), order=1)

    class Likeliest:
        def in_tree(self, tree):
            return drafters.model(lm, tree=tree, children="top_k")

    found = tuning.measure_acceptance(
        lm,
        Likeliest(),
        [[1]] * 64,
        probe=trees.kary((3, 2)),
        sampling=Sampling(),
        max_new_tokens=60,
        key=jax.random.key(0),
        eos_ids=(),
    )
    # At least 64 * 60 / 3 rounds, of which 0.85 get to the second level: four deviations.
    bound = 4 * np.sqrt(0.25 / (0.85 * 64 * 60 / 3))
    np.testing.assert_allclose(found[0], [0.45, 0.25, 0.15], atol=bound)
    np.testing.assert_allclose(found[1], [0.45, 0.25], atol=bound)


def test_shares_lean_on_the_level_above_where_little_was_seen():
    probe = trees.kary((2, 1))
    #  10 rounds; the first child accepted 6 times, the second 2; behind the first 1 of 6.
    found = tuning._shares(probe, np.array([6, 2, 1, 0]), 10)
    np.testing.assert_allclose(found[0], [0.6, 0.2])
    np.testing.assert_allclose(found[1], [(1 + 8 * 0.6) / (8 + 8)])
    # Noise may not make a later child likelier than an earlier one.
    assert tuning._shares(trees.kary((2,)), np.array([1, 3]), 10) == [[0.1, 0.1]]
    assert tuning._shares(trees.chain(2), np.array([0, 0]), 0) == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("depths", "seconds", "found"),
    [
        ([1, 2, 4], [0.5, 0.7, 1.1], 0.2),  # beside 0.3 once
        ([3, 3], [0.6, 0.9], 0.25),  # one depth
        ([1, 2], [0.1, 0.4], 0.18),  # not below zero at no level
        ([1, 2], [0.4, 0.2], 0.0),  # nor a level
        ([1, 2], [-0.4, -0.2], 0.0),
    ],
)
def test_what_drafting_costs_for_each_level(depths, seconds, found):
    assert costs._level_cost(depths, seconds) == pytest.approx(found, abs=1e-12)


def test_costs_are_of_rounds_and_levels(monkeypatch):
    """Timings that are known: a plain round 1, a node 0.1 more, drafts 0.5, a level 0.25 more, and
    drafts of the largest tree another 0.3; a draft of a chain 0.2."""
    topologies = [trees.chain(1), trees.comb((2, 2)), trees.kary((2, 2))]
    drafting = [0.75, 1.0, 1.3]

    def typical_times(parts, repeats, reference):
        assert reference == "plain"
        assert all(part() > 0 for part in parts.values())  # they run
        times = {"plain": 1.0, ("chain", 1): 1.2, ("chain", 3): 1.6}
        for tree, own in zip(topologies, drafting, strict=True):
            times["idle", tree] = 1 + 0.1 * tree.num_nodes
            times["drafted", tree] = times["idle", tree] + own
        assert times.keys() == parts.keys()
        return times

    monkeypatch.setattr(costs, "typical_times", typical_times)
    cost = costs.measure_tree_costs(
        TARGET, drafters.model(DRAFT), topologies, chains=[1, 3], num_rounds=2
    )
    # The line through (1, 0.75), (2, 1.0), (2, 1.3) rises by 0.4; what was timed is met exactly.
    np.testing.assert_allclose(cost.trees.verify, [1.0, 1.45, 1.5, 1.55, 1.6, 1.85, 2.1], rtol=1e-6)
    assert float(cost.trees.draft) == pytest.approx(0.4)
    np.testing.assert_allclose(cost.chains.verify, [1.0, 1.2, 1.4, 1.6], rtol=1e-6)
    assert [float(x) for x in (cost.chains.draft, *(c.overhead for c in cost))] == [0.0] * 3


def test_chains_draft_as_many_as_are_timed(monkeypatch):
    """Also where the drafter found nothing: the prompts of the timing are all alike."""
    seen = []

    def run(engine, request, state, num_rounds):
        before = int(state.stats.num_draft_tokens[0])
        state = own_run(engine, request, state, num_rounds)
        seen.append(int(state.stats.num_draft_tokens[0]) - before)
        return state

    own_run = costs.run
    monkeypatch.setattr(costs, "run", run)
    costs.measure_tree_costs(
        TARGET, drafters.prompt_lookup(), [trees.chain(1)], chains=[2, 3], num_rounds=5, repeats=1
    )
    assert seen[-2:] == [10, 15]


def test_the_choice_is_that_of_the_plan():
    drafter = drafters.model(DRAFT)
    found = tuning.tune_tree(
        TARGET, drafter, PROMPTS, sizes=(1, 3), repeats=1, key=jax.random.key(0)
    )
    measured = json.loads(found.to_json())["measured"]
    cost, chain_cost = (
        jaxspec.Profile(jnp.array(measured[name]), jnp.float32(level), jnp.float32(0.0))
        for name, level in (
            ("seconds_of_a_round_by_nodes", measured["seconds_of_a_drafted_level"]),
            ("seconds_of_a_round_by_length_of_chain", 0.0),
        )
    )
    best = trees.plan(measured["acceptance_by_depth"], cost, chain_cost=chain_cost)
    nodes = 0 if best.tree is None else best.tree.num_nodes
    assert found.num_draft_tokens == nodes
    assert (found.tree is None) == (best.tree is None or best.tree.is_chain)
    assert measured["predicted_speedup"] == pytest.approx(best.speedup, rel=0.02)
    with pytest.raises(ValueError, match="rising numbers"):
        tuning.tune_tree(TARGET, drafter, PROMPTS, sizes=(3, 1))


def test_where_no_draft_is_accepted_plain_decoding_is_chosen():
    """The draft never says what the target says."""
    logits = 20.0 * jnp.eye(VOCAB)[(jnp.arange(VOCAB) + 1) % VOCAB]
    target, wrong = table_model(logits, order=1), table_model(-logits, order=1)
    found = tuning.tune_tree(target, drafters.model(wrong), PROMPTS, sizes=(1,), repeats=1)
    assert max(map(max, found.measured["acceptance_by_depth"])) == 0.0
    assert found.num_draft_tokens == 0
    assert found.tree is None
