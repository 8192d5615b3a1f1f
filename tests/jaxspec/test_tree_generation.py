"""Trees through `generate`: greedy text, what is refused, and that chains pay nothing."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant
from support.running import generate_with

import jaxspec
from jaxspec import Sampling, drafters, loop, trees, verifiers
from jaxspec.drafters import branching
from jaxspec.testing import random_logits, table_model
from jaxspec.types import Context

drafters_lookup = importlib.import_module("jaxspec.drafters.prompt_lookup")
recycling = importlib.import_module("jaxspec.drafters.token_recycling")

VOCAB = 6
_LOGITS = random_logits(0, vocab_size=VOCAB, order=2)
TARGET = table_model(_LOGITS, order=2)
DRAFT = table_model(random_logits(1, vocab_size=VOCAB, order=2) * 0.5 + _LOGITS, order=2)
PROMPTS = [[1, 2, 3], [4], [0, 5, 5, 2, 1], [3, 3]]
GREEDY = Sampling(temperature=0)
TREES = {
    "k-ary": trees.kary((2, 2)),
    "comb": trees.comb((3, 2, 2, 1)),
    "Sequoia": trees.sequoia([0.6, 0.2, 0.1], 12),
    "chain": trees.chain(4),
    "one level": trees.kary((3,)),
    "more children than tokens": trees.kary((VOCAB + 2, 1)),
    "beam": trees.Beam(width=2, depth=3),
    "best of a beam": trees.Beam(width=3, depth=4, best=8),
    "a deep beam of which little is kept": trees.Beam(width=2, depth=6, best=2),
    "a beam wider than the vocabulary": trees.Beam(width=VOCAB + 2, depth=2),
}


@pytest.mark.parametrize("name", TREES)
def test_greedy_text_is_that_of_plain_decoding(name):
    options = {"max_new_tokens": 60, "sampling": GREEDY, "eos_ids": ()}
    plain = jaxspec.generate(TARGET, PROMPTS, **options)
    drafter = drafters.model(DRAFT, tree=TREES[name])
    ours = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, **options)
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    np.testing.assert_allclose(ours.log_probs, plain.log_probs, atol=1e-6)
    np.testing.assert_allclose(ours.raw_log_probs, plain.raw_log_probs, atol=1e-6)
    assert (ours.stats.mean_acceptance_length <= TREES[name].depth + 1).all()
    assert (ours.stats.tokens_per_step > 1.5).all()


@pytest.mark.parametrize("name", ["k-ary", "comb", "Sequoia", "chain"])
@pytest.mark.parametrize("kind", ["prompt_lookup", "token_recycling"])
def test_greedy_text_with_drafters_that_need_no_model(kind, name):
    options = {"max_new_tokens": 60, "sampling": GREEDY, "eos_ids": ()}
    plain = jaxspec.generate(TARGET, PROMPTS, **options)
    drafter = {
        "prompt_lookup": drafters.prompt_lookup(tree=TREES[name]),
        "token_recycling": drafters.token_recycling(VOCAB, tree=TREES[name], num_successors=6),
    }[kind]
    ours = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, **options)
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    assert (ours.stats.tokens_per_step > 1.2).all()


def test_several_matches_are_drafted_side_by_side():
    text = jnp.array([1, 2, 3, 9, 1, 2, 4, 8, 1, 2, 3, 7, 1, 2, 0, 0])
    tree = trees.from_paths([(0, 1), (1, 1), (2,)])
    tokens, found = drafters_lookup.lookup_tree(text, jnp.int32(14), tree, max_ngram=2, min_ngram=1)
    # Behind 1 2: first 3 7, as last time, or 3 9; else 4 8, and there is no third way.
    assert np.where(found, tokens, -1).tolist() == [3, 4, -1, 7, 9, 8, -1]


def test_a_chain_of_matches_is_the_lookup_of_chains():
    for seed in range(20):
        text = jax.random.randint(jax.random.key(seed), (24,), 0, 4)
        length = jnp.int32(6 + seed % 18)
        sizes = {"max_ngram": 3, "min_ngram": 1}
        chain, has_match = drafters_lookup.lookup(text, length, num_tokens=5, **sizes)
        tokens, found = drafters_lookup.lookup_tree(text, length, trees.chain(5), **sizes)
        assert found.tolist() == [bool(has_match)] * 5
        if has_match:
            assert tokens.tolist() == chain.tolist()


def test_recycling_remembers_in_four_megabytes_at_most():
    """A row, of 49,152 tokens."""
    drafter = drafters.token_recycling(49_152)
    state = jax.eval_shape(lambda: drafter.init(1, 512))
    assert 1e6 < sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) < 4e6


def test_recycling_remembers_what_the_target_found_likely():
    drafter = drafters.token_recycling(VOCAB, tree=trees.kary((2, 2)), num_successors=3)
    options = {"sampling": GREEDY, "eos_ids": (), "max_new_tokens": 40}
    order_one = table_model(random_logits(5, vocab_size=VOCAB, order=1), order=1)
    first = jaxspec.generate(order_one, [[1]], drafter=drafter, return_state=True, **options)
    table = np.asarray(first.state.state.drafter.table[0])
    logits = np.asarray(order_one.params)
    fed = [t for t in range(VOCAB) if (table[t] >= 0).all()]
    assert len(fed) >= 2
    for token in fed:
        assert table[token].tolist() == np.argsort(-logits[token], kind="stable")[:3].tolist()
    again = drafters.token_recycling(VOCAB, tree=trees.kary((2, 2)), table=jnp.asarray(table))
    second = jaxspec.generate(order_one, [[1]], drafter=again, **options)
    np.testing.assert_array_equal(second.tokens, first.tokens)
    assert second.stats.num_spec_steps[0] < first.stats.num_spec_steps[0]


def test_a_token_fed_twice_in_a_round_keeps_what_came_last():
    table = jnp.full((1, 4, 1), -1)
    tokens, new = jnp.array([[2, 1, 2, 3]]), jnp.array([[[0], [1], [2], [3]]])
    where = jnp.array([[True, True, True, False]])
    kept = recycling._set_last(table, tokens, new, where)
    assert kept[0, :, 0].tolist() == [-1, 1, 2, -1]


def test_a_wider_tree_accepts_more_and_a_chain_is_a_chain():
    options = {"max_new_tokens": 100, "sampling": GREEDY, "eos_ids": ()}

    def steps(drafter):
        out = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, num_draft_tokens=4, **options)
        return out.stats.num_spec_steps

    chain = steps(drafters.model(DRAFT))
    np.testing.assert_array_equal(chain, steps(drafters.model(DRAFT, tree=trees.chain(4))))
    assert (steps(drafters.model(DRAFT, tree=TREES["Sequoia"])) <= chain).all()
    assert steps(drafters.model(DRAFT, tree=trees.comb((3, 3, 3, 3)))).sum() < chain.sum()


def test_rows_of_a_batch_do_not_know_of_each_other():
    options = {"max_new_tokens": 30, "drafter": drafters.model(DRAFT, tree=TREES["Sequoia"])}
    keys = jax.random.split(jax.random.key(3), 4)
    together = jaxspec.generate(TARGET, PROMPTS, key=keys, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = jaxspec.generate(
            TARGET, [prompt], key=jax.random.clone(keys[row : row + 1]), **options
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_a_text_is_taken_up_again_and_streamed():
    drafter = drafters.model(DRAFT, tree=TREES["comb"])
    options = {"drafter": drafter, "sampling": GREEDY, "eos_ids": ()}
    whole = jaxspec.generate(TARGET, PROMPTS, max_new_tokens=40, **options)
    first = jaxspec.generate(TARGET, PROMPTS, max_new_tokens=13, return_state=True, **options)
    rest = jaxspec.generate(TARGET, None, state=first.state, max_new_tokens=27, **options)
    joined = np.concatenate([first.tokens, rest.tokens], axis=1)
    np.testing.assert_array_equal(joined, whole.tokens)
    streamed = [[] for _ in PROMPTS]
    for row, ids in jaxspec.stream(TARGET, PROMPTS, max_new_tokens=40, **options):
        streamed[row] += np.asarray(ids).tolist()
    np.testing.assert_array_equal(np.array(streamed), whole.tokens)


def test_the_bonus_of_a_tree_whose_draft_is_the_target():
    """Independent children of q = p: the first child always stands, to the deepest level."""
    drafter = drafters.model(TARGET, tree=trees.kary((2, 1, 1)), children="independent")
    out = jaxspec.generate(
        TARGET, PROMPTS, drafter=drafter, max_new_tokens=40, key=jax.random.key(0), eos_ids=()
    )
    np.testing.assert_array_equal(out.stats.num_spec_steps, 10)


def _needs(name):
    class Apply:
        """The table's, without one of the arguments that trees need."""

        def __init__(self):
            self.apply = TARGET.apply

        def __eq__(self, other):
            return type(other) is type(self)

        def __hash__(self):
            return 0

        def __call__(self, params, tokens, cache, *, start):
            return self.apply(params, tokens, cache, start=start)

    if name == "compact":
        return TARGET.replace(compact=None)
    return TARGET.replace(apply=Apply())


@pytest.mark.parametrize("name", ["compact", "mask"])
def test_a_model_that_cannot_be_fed_trees_is_refused(name):
    broken = _needs(name)
    drafter = drafters.model(DRAFT, tree=TREES["k-ary"])
    with pytest.raises(ValueError, match=rf"this drafter drafts trees.*{name}"):
        jaxspec.generate(broken, [[1]], drafter=drafter, sampling=GREEDY)
    with pytest.raises(ValueError, match=rf"drafters\.model with a tree.*{name}"):
        drafters.model(broken, tree=TREES["k-ary"])
    jaxspec.generate(broken, [[1]], drafter=drafters.model(broken), sampling=GREEDY)  # chains


@pytest.mark.parametrize(
    ("children", "rule"),
    [
        ("without_replacement", verifiers.k_seq()),
        ("without_replacement", verifiers.traversal(with_replacement=True)),
        ("independent", verifiers.recursive_rejection()),
        ("independent", verifiers.traversal()),
        ("top_k", verifiers.k_seq()),
        ("top_k", verifiers.block()),
        ("without_replacement", verifiers.rejection()),
        ("without_replacement", verifiers.match()),
    ],
)
def test_a_rule_that_would_change_the_law_of_a_tree_is_refused(children, rule):
    drafter = drafters.model(DRAFT, tree=TREES["k-ary"], children=children)
    with pytest.raises(ValueError, match="leave verifier=None"):
        jaxspec.generate(TARGET, [[1]], drafter=drafter, verifier=rule, key=jax.random.key(0))


@pytest.mark.parametrize(
    "rule",
    [verifiers.descent(), verifiers.recursive_rejection(), verifiers.traversal()],
    ids=["descent", "recursive_rejection", "traversal"],
)
def test_rules_for_trees_judge_chains_too(rule):
    options = {"key": jax.random.key(1), "max_new_tokens": 20, "num_draft_tokens": 3}
    drafter = drafters.model(TARGET)
    out = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, verifier=rule, **options)
    if not isinstance(rule, type(verifiers.descent())):
        assert (out.stats.draft_acceptance_rate == 1).all()  # q = p
    assert (out.lengths == 20).all()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"jaxspec\.trees\.kary"):
        drafters.model(DRAFT, tree=(-1, 0))
    with pytest.raises(ValueError, match=r"a jaxspec\.trees\.Topology"):
        drafters.prompt_lookup(tree=4)
    with pytest.raises(ValueError, match=r"a jaxspec\.trees\.Topology"):
        drafters.token_recycling(VOCAB, tree=4)
    with pytest.raises(ValueError, match="raise num_successors"):
        drafters.token_recycling(VOCAB, tree=trees.kary((3,)), num_successors=2)
    with pytest.raises(ValueError, match=r"table must be i32\[6, n\]"):
        drafters.token_recycling(VOCAB, table=jnp.zeros((5, 8), jnp.int32))
    with pytest.raises(ValueError, match="at least 1"):
        drafters.token_recycling(0)
    with pytest.raises(ValueError, match="children must be one of"):
        drafters.model(DRAFT, tree=TREES["k-ary"], children="greedy")
    with pytest.raises(ValueError, match="whole numbers of at least 1"):
        trees.Beam(width=0, depth=2)
    with pytest.raises(ValueError, match=r"best must be 1 … 6"):
        trees.Beam(width=2, depth=2, best=7)
    for children in ("without_replacement", "independent"):
        with pytest.raises(ValueError, match=r"drops drafted nodes .* pass children='top_k'"):
            drafters.model(DRAFT, tree=trees.Beam(2, 2, best=4), children=children)


def test_a_cache_has_room_for_all_that_a_beam_drafts():
    """A write beyond the end would be shifted over the text; the last round goes furthest."""
    tree = trees.Beam(width=4, depth=5, best=2)  # 16 nodes are fed, 2 verified
    drafter = drafters.model(DRAFT, tree=tree)
    text = jnp.array([[1, 2, 3, 4, 5, 0, 1, 2, 3, 4] + [0] * 2])
    length, before = jnp.array([10]), jnp.array([9])
    options = jaxspec.sampling.resolve(GREEDY, 1, VOCAB)
    history = jaxspec.sampling.recall(options, text, length, vocab_size=VOCAB)

    def draft(capacity):
        state = drafter.init(1, capacity)
        state = drafter.prefill(state, text[:, :9], (), jnp.array([0]), before)
        context = Context(text, length, options, history)
        keys = jax.random.split(jax.random.key(0), (1, 2))
        return drafter.propose(keys, state, context, jnp.array([2]), lambda signals: True)

    tight, (wide, _) = draft(10 + tree.num_nodes + 1), draft(64)
    np.testing.assert_array_equal(tight[0].tokens, wide.tokens)
    cached = jax.tree.leaves(tight[1].text.cache)[0]
    assert cached.shape[1] >= 10 + 16


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_beam_keeps_the_likeliest_nodes(temperature):
    """Against all nodes of a search in NumPy, of a draft model with a table of one token."""
    beam = trees.Beam(width=3, depth=4, best=9)
    table = random_logits(3, vocab_size=VOCAB, order=1)
    options = jaxspec.sampling.resolve(Sampling(temperature=temperature), 1, VOCAB)
    text = jnp.array([[2, 4]])
    history = jaxspec.sampling.recall(options, text, jnp.array([2]), vocab_size=VOCAB)
    keys = jax.random.split(jax.random.key(0), (1, beam.num_nodes))
    given = branching.Given("top_k", keys, options, history, jnp.array([beam.num_nodes]))
    draft, places, fed = branching.grow(
        beam,
        given,
        table[text[:, -1:]],
        lambda tokens, level, state: (table[tokens], [*state, *np.asarray(tokens[0])]),
        [],
    )

    log_q = np.asarray(jax.nn.log_softmax(table))
    level, nodes = {(): 0.0}, {}  # path: worth
    for _ in range(beam.depth):
        widest = sorted(level, key=lambda path: -level[path])[: beam.width]
        level = {
            (*path, int(token)): level[path] + log_q[[4, *path][-1], token]
            for path in widest
            for token in np.argsort(-log_q[[4, *path][-1]])[: beam.num_children]
        }
        nodes |= level
    wanted = sorted(nodes, key=lambda path: -nodes[path])[: beam.best]

    paths, depths = trees.paths(draft.parents[0], draft.tokens[0])
    found = [tuple(path[:depth]) for path, depth in zip(paths.tolist(), depths, strict=True)]
    assert sorted(found[1:]) == sorted(wanted)
    assert draft.log_probs is None
    fed_at = {int(place): path[-1] for place, path in zip(places[0], found[1:], strict=True)}
    assert all(fed[place] == token for place, token in fed_at.items() if place >= 0)
    assert len(fed_at) > 3


def test_the_default_rule_follows_the_children():
    for children in ("without_replacement", "independent", "top_k"):
        drafter = drafters.model(DRAFT, tree=TREES["k-ary"], children=children)
        out = jaxspec.generate(TARGET, [[1]], drafter=drafter, key=jax.random.key(0))
        assert out.guarantee == "distribution"


_BUGS = {
    "a mask that shows a sibling": ("mask = jax.vmap(trees.ancestors)(draft.parents)",
                                    "mask = jnp.ones((fed.shape[0], width, width), bool)"),
    "positions by slot": ("start[:, None] + depths)",
                          "start[:, None] + jnp.arange(width, dtype=jnp.int32)[None])"),
    "compaction off by one": ("compact(cache, start + 1, verdict.path)",
                              "compact(cache, start, verdict.path)"),
    "no compaction": ("cache = engine.target.compact(cache, start + 1, verdict.path)", "pass"),
}  # fmt: skip


@pytest.mark.exactness
@pytest.mark.parametrize("name", _BUGS)
def test_planted_bug_in_the_forward_over_a_tree_is_caught(name):
    broken = mutant("jaxspec.loop", _BUGS[name])
    assert _differs(broken)


def test_the_comparison_that_catches_bugs_finds_none():
    assert not _differs(loop)


def _differs(module):
    """Whether greedy text through a loop differs from plain decoding's."""
    options = {"max_new_tokens": 60, "sampling": GREEDY, "eos_ids": ()}
    plain = jaxspec.generate(TARGET, PROMPTS, **options)
    drafter = drafters.model(DRAFT, tree=TREES["Sequoia"])
    ours = generate_with(module, TARGET, PROMPTS, drafter=drafter, **options)
    return bool(jnp.any(ours.tokens != plain.tokens))
