"""Real models and trained drafters in trees: greedy text, and every node's law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import trained
from support.mutants import mutant
from support.trained import TARGET, V

import jaxspec
import jaxspec_models
from jaxspec import Sampling, drafters, trees
from jaxspec.types import Context
from jaxspec_models.drafters import parts, reading

pytestmark = pytest.mark.optimized

GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 6, 7, 8], [9], [4, 12, 30, 5, 5, 6], [20, 21]]
TREES = {"comb": trees.comb((3, 2, 2)), "k-ary": trees.kary((2, 2)), "chain": trees.chain(3)}
BEAMS = {"beam": trees.Beam(width=2, depth=3), "best of a beam": trees.Beam(3, 3, best=7)}


@pytest.fixture(scope="module")
def eagle(tmp_path_factory):
    learned = trained.write(tmp_path_factory.mktemp("data"))
    params = trained.train(learned, tmp_path_factory.mktemp("eagle3"), "eagle3")
    return trained.drafter(learned, params, "eagle3")


@pytest.mark.parametrize("name", TREES)
def test_greedy_text_of_a_ragged_batch_is_that_of_plain_decoding(name):
    """Float32, 200 tokens, drafted by the target itself and by others."""
    options = {"max_new_tokens": 200, "sampling": GREEDY, "eos_ids": ()}
    plain = jaxspec.generate(TARGET, PROMPTS, **options)
    drafter = drafters.model(TARGET, tree=TREES[name])
    ours = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, **options)
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    # The target's first choices, accepted to the last level, but where two laws nearly tie.
    assert (ours.stats.tokens_per_step > TREES[name].depth + 0.8).all()


@pytest.mark.parametrize("name", BEAMS)
def test_greedy_text_of_beams_is_that_of_plain_decoding(name):
    """As above, but the target's first choices need not be among the likeliest paths."""
    options = {"max_new_tokens": 200, "sampling": GREEDY, "eos_ids": ()}
    plain = jaxspec.generate(TARGET, PROMPTS, **options)
    drafter = drafters.model(TARGET, tree=BEAMS[name])
    ours = jaxspec.generate(TARGET, PROMPTS, drafter=drafter, **options)
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    assert (ours.stats.tokens_per_step > 2.5).all()


@pytest.mark.parametrize("name", [*TREES, *BEAMS])
def test_a_trained_drafter_in_trees_writes_the_same_text(eagle, name):
    options = {"max_new_tokens": 100, "sampling": GREEDY, "eos_ids": ()}
    plain = jaxspec.generate(TARGET, PROMPTS, **options)
    ours = jaxspec.generate(
        TARGET,
        PROMPTS,
        drafter=jaxspec_models.in_trees(eagle, (TREES | BEAMS)[name]),
        **options,
    )
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    chain = jaxspec.generate(TARGET, PROMPTS, drafter=eagle, num_draft_tokens=3, **options)
    steps, chain_steps = (int(out.stats.num_spec_steps.sum()) for out in (ours, chain))
    if name == "chain":
        assert steps == chain_steps
    elif name in ("comb", "beam"):  # the chain's drafts and others
        assert steps < chain_steps


def test_a_tree_that_is_a_chain_is_drafted_as_one(eagle):
    options = {"max_new_tokens": 40, "eos_ids": (), "verifier": jaxspec.verifiers.descent()}
    one, other = (
        jaxspec.generate(
            TARGET, PROMPTS, drafter=drafter, num_draft_tokens=3, key=jax.random.key(1), **options
        )
        for drafter in (eagle, jaxspec_models.in_trees(eagle, TREES["chain"]))
    )
    np.testing.assert_array_equal(one.tokens, other.tokens)


def proposal(drafter, temperature=1.0):
    """A draft of a tree behind prompts, with the state before it: (Draft, state, pending)."""
    chain = drafter.chain
    tokens = jnp.array([[5, 6, 7, 8, 9, 11] + [0] * 40, [4, 12, 30, 5, 6, 13] + [0] * 40])
    lengths = jnp.array([6, 6])
    output, _ = TARGET.forward(
        tokens[:, :5],
        TARGET.init_cache(2, 64, 8),
        start=jnp.zeros(2, jnp.int32),
        num_new=jnp.full(2, 5),
        hidden_layers=chain.hidden_layers,
    )
    state = drafter.init(2, 64)
    zeros, five = jnp.zeros(2, jnp.int32), jnp.full(2, 5)
    state = drafter.prefill(state, tokens[:, :5], output.hidden, zeros, five)
    options = jaxspec.sampling.resolve(Sampling(temperature=temperature), 2, V)
    history = jaxspec.sampling.recall(options, tokens, lengths, vocab_size=V)
    keys = jax.random.split(jax.random.key(0), (2, drafter.num_nodes))
    draft, _ = drafter.propose(
        keys,
        state,
        Context(tokens, lengths, options, history),
        jnp.full(2, drafter.num_nodes),
        lambda signals: True,
    )
    return draft, state, tokens[:, 5]


def law_behind(chain, state, pending, path):
    """Log q behind the pending tokens i32[2] and a path i32[2, D], cell by cell: f32[2, V]."""
    model, cache, last = chain.model(), state.cache, state.last
    start = jnp.full(2, 5)
    for slot, token in enumerate([pending, *jnp.asarray(path).T]):
        x = model.guess(chain.embed(token), last)[:, None]
        x, cache = reading.forward(model, cache, x, start + slot)
        last = x[:, 0]
    logits = parts.logits(chain.head, model.norm(x))[:, 0]
    return jax.nn.log_softmax(parts.spread(logits, chain.draft_ids, V))


def law_error(drafter):
    """How far any node's q is from that of its own path, drafted as a chain."""
    draft, state, pending = proposal(drafter)
    error = 0.0
    for node in range(drafter.num_nodes):
        for row, parents in enumerate(draft.parents.tolist()):  # of a beam, each row's own
            way, parent = [], parents[node]
            while parent >= 0:
                way, parent = [parent, *way], parents[parent]
            path = np.tile(draft.tokens[row, jnp.array(way, int)], (2, 1))
            law = np.exp(law_behind(drafter.chain, state, pending, path)[row])
            error = max(error, np.abs(np.exp(draft.log_probs[row, node]) - law).max())
    return error


@pytest.mark.parametrize("name", [*TREES, "beam"])
def test_every_node_has_the_law_of_its_own_path(eagle, name):
    assert law_error(jaxspec_models.in_trees(eagle, (TREES | BEAMS)[name])) < 1e-5


@pytest.mark.parametrize(
    "patch",
    [
        ("jnp.pad(level.sees, (", "jnp.pad(jnp.ones_like(level.sees), ("),
        ("jnp.broadcast_to(level.above,", "jnp.broadcast_to(0 * level.above,"),
        ("jnp.tile((start + level.depth)[:, None]", "jnp.tile((start + 0 * level.depth)[:, None]"),
    ],
    ids=["a sibling is seen", "goes on from another parent", "positions without depth"],
)  # fmt: skip
def test_planted_bugs_in_the_cells_are_caught(eagle, patch):
    broken = mutant("jaxspec_models.drafters.tree", patch)
    assert law_error(broken.in_trees(eagle, trees.kary((2, 2, 1)))) > 1e-3
    assert law_error(broken.in_trees(eagle, BEAMS["beam"])) > 1e-3


def test_what_cannot_draft_trees_is_refused(eagle):
    with pytest.raises(ValueError, match="'eagle3'"):
        jaxspec_models.in_trees(drafters.model(TARGET), TREES["comb"])
    with pytest.raises(ValueError, match="trained for at most 3"):
        jaxspec_models.in_trees(eagle, trees.chain(4))
    with pytest.raises(ValueError, match="children must be one of"):
        jaxspec_models.in_trees(eagle, TREES["comb"], children="all")
    with pytest.raises(ValueError, match="drops drafted nodes"):
        jaxspec_models.in_trees(eagle, BEAMS["best of a beam"], children="independent")
