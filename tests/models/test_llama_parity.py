"""The Llama family computes what HF transformers computes, on tiny random models.

The references are files of `tests/fixtures`; `make_llama_fixtures.py` there made them and says
what they hold. Each way to feed a text to a model is compared with the same reference, and so are
models with a planted bug, which must not pass.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

import jaxspec
from jaxspec.testing import table_model
from jaxspec_models import layers, llama

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
NAMES = ["mha", "gqa_tied", "bias_linear", "llama3", "llama3_bias_tied"]
LLAMA3_NAMES = ["llama3", "llama3_bias_tied"]
HIDDEN_NAMES = ["mha", "bias_linear"]
CAPACITY = 256
TOLERANCE = 2e-4
"""The largest admissible difference between two logits, whose standard deviation is 1 or more."""


@functools.cache
def load(name):
    with np.load(FIXTURES / f"llama_{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def hf_config(name, key="config"):
    return json.loads(str(load(name)[key]))


def make_config(name):
    return llama.LlamaConfig.from_hf(hf_config(name), dtype="float32")


def hf_weights(name):
    arrays = load(name).items()
    return {
        key.removeprefix("weight/"): value for key, value in arrays if key.startswith("weight/")
    }


def fill_params(config, weights):
    """Puts checkpoint tensors where `checkpoint_table` says; every element exactly once."""
    table = llama.checkpoint_table(config)
    assert table.keys() == weights.keys()
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), llama.abstract_params(config)
    )
    for name, target in table.items():
        leaf = params
        for key in target.path:
            leaf = leaf[key]
        assert weights[name].shape == target.shape
        rows = leaf[target.row : target.row + target.shape[0]]
        assert rows.shape == target.shape
        assert np.isnan(rows).all(), f"{name} overlaps another tensor"
        rows[...] = weights[name]
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(params))
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def jitted(config):
    return jax.jit(
        llama.language_model(config, None).apply,
        static_argnames="hidden_layers",
        donate_argnames="cache",
    )


class Runner:
    """A model, called through one jit for each config, with a cache full of stale values."""

    def __init__(self, config, weights):
        self.model = llama.language_model(config, fill_params(config, weights))
        self.apply = jitted(config)

    def cache(self, batch):
        cache = self.model.init_cache(batch, CAPACITY, CAPACITY)
        return jax.tree.map(lambda x: x + 3, cache)

    def __call__(self, tokens, cache, start, *, hidden_layers=(), **options):
        tokens, start = np.asarray(tokens, np.int32), np.asarray(start, np.int32)
        options = {key: np.asarray(value) for key, value in options.items()}
        output, cache = self.apply(
            self.model.params, tokens, cache, start=start, hidden_layers=hidden_layers, **options
        )
        assert output.logits.dtype == jnp.float32
        return jax.tree.map(np.asarray, output), cache

    def full(self, tokens, **options):
        """Feeds whole texts in one call."""
        batch = len(tokens)
        return self(tokens, self.cache(batch), np.zeros(batch), **options)


@functools.cache
def runner(name):
    return Runner(make_config(name), hf_weights(name))


def max_error(actual, expected):
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


# ---------------------------------------------------------------------------------------------
# Configs.


@pytest.mark.parametrize("name", NAMES)
def test_config_is_the_same_in_the_styles_of_transformers_4_and_5(name):
    styles = [hf_config(name), hf_config(name, "config_other")]
    assert sorted("rope_parameters" in style for style in styles) == [False, True]
    first, second = (llama.LlamaConfig.from_hf(style, dtype="float32") for style in styles)
    assert first == second
    assert first.rope_scaling.kind == {"bias_linear": "linear"}.get(
        name, "llama3" if name in LLAMA3_NAMES else "default"
    )


def test_fixtures_cover_the_variants_of_the_family():
    configs = [make_config(name) for name in NAMES]
    for field in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert {getattr(config, field) for config in configs} == {False, True}
    assert {c.num_attention_heads // c.num_key_value_heads for c in configs} == {1, 2, 3, 4}
    assert any(c.head_dim != c.hidden_size // c.num_attention_heads for c in configs)
    assert {c.eos_ids for c in configs} == {(2,), (2, 5)}
    for name in NAMES:
        assert load(name)["logits"].std() >= 1
        assert all(np.abs(w).max() > 0.1 for w in hf_weights(name).values())


@pytest.mark.parametrize("name", LLAMA3_NAMES)
def test_llama3_fixtures_reach_all_three_branches(name):
    config = make_config(name)
    scaled = llama.inverse_frequencies(config)
    plain = llama.inverse_frequencies(dataclasses.replace(config, rope_scaling=llama.RopeScaling()))
    stretch = plain / scaled
    factor = config.rope_scaling.factor
    kept, stretched = np.isclose(stretch, 1), np.isclose(stretch, factor)
    assert kept.any()
    assert stretched.any()
    assert ((stretch > 1.1) & (stretch < 0.9 * factor)).any()
    assert (kept | stretched | ((stretch > 1) & (stretch < factor))).all()


# ---------------------------------------------------------------------------------------------
# Ways to feed a text.


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_hidden_states_in_one_call(name):
    data, run = load(name), runner(name)
    layers = (0, 1, 2, -1) if name in HIDDEN_NAMES else ()
    output, _ = run.full(data["input_ids"], hidden_layers=layers)
    assert max_error(output.logits, data["logits"]) <= TOLERANCE
    assert ("hidden_states" in data) == (name in HIDDEN_NAMES)
    for layer, hidden in zip(layers, output.hidden, strict=True):
        assert max_error(hidden, data["hidden_states"][layer]) <= TOLERANCE


def feed_ragged(run, input_ids, steps, width, padding):
    """Feeds steps[i][b] tokens of row b in call i, each call `width` wide; returns all logits."""
    batch, length = input_ids.shape
    logits = np.full((batch, length, run.model.vocab_size), np.nan, np.float32)
    cache, start = run.cache(batch), np.zeros(batch, np.int32)
    for num_new in np.array(steps, np.int32):
        tokens = np.full((batch, width), padding, np.int32)
        for row, count in enumerate(num_new):
            tokens[row, :count] = input_ids[row, start[row] : start[row] + count]
        output, cache = run(tokens, cache, start, num_new=num_new)
        for row, count in enumerate(num_new):
            logits[row, start[row] : start[row] + count] = output.logits[row, :count]
        start = start + num_new
    return logits


def _in_ragged_chunks(name, plan, padding):
    """Two chunks a row of different lengths; or also with calls in which one row gets nothing."""
    data, run = load(name), runner(name)
    length = data["input_ids"].shape[1]
    wide, half = length * 6 // 10, length // 2
    steps = {
        "two": [[wide, half], [length - wide, half]],
        "idle": [[wide, half], [length - wide, 0], [0, half]],
    }[plan]
    return feed_ragged(run, data["input_ids"], steps, wide, padding=padding)


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_ragged_chunks(name):
    assert max_error(_in_ragged_chunks(name, "two", 0), load(name)["logits"]) <= TOLERANCE


@pytest.mark.optimized
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_bit(name):
    logits = _in_ragged_chunks(name, "two", 0)
    for plan, padding in (("two", 7), ("idle", 9)):
        np.testing.assert_array_equal(_in_ragged_chunks(name, plan, padding), logits)


@pytest.mark.parametrize("name", NAMES)
def test_logits_token_by_token(name):
    data, run = load(name), runner(name)
    input_ids, expected = data["input_ids"], data["logits"]
    batch, length = input_ids.shape
    ahead = np.array([length - 6, length - 4])  # rows at different lengths
    tokens = input_ids.copy()
    for row in range(batch):  # what the first call writes beyond `ahead` must be overwritten
        tokens[row, ahead[row] :] = 11
    _, cache = run.full(tokens, hidden_layers=(0, 1, 2, -1) if name in HIDDEN_NAMES else ())
    for i in range(4):
        at = ahead + i
        new = np.take_along_axis(input_ids, at[:, None], axis=1)
        output, cache = run(new, cache, at)
        reference = np.take_along_axis(expected, at[:, None, None], axis=1)
        assert max_error(output.logits, reference) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_explicit_positions_and_a_causal_mask(name):
    data, run = load(name), runner(name)
    batch, length = data["input_ids"].shape
    half, extra = length // 2, 8
    cache = run.cache(batch)
    for first, prefix in ((0, 0), (half, half - extra)):
        # Slots prefix ... prefix + half + extra, of which token i sees those up to first + i.
        mask = np.tri(half, half + extra, first - prefix, dtype=bool)
        output, cache = run(
            data["input_ids"][:, first : first + half],
            cache,
            np.full(batch, first),
            positions=np.tile(np.arange(first, first + half, dtype=np.int32), (batch, 1)),
            prefix=np.full(batch, prefix, np.int32),
            mask=mask,
        )
        assert max_error(output.logits, data["logits"][:, first : first + half]) <= TOLERANCE


@pytest.mark.parametrize("name", HIDDEN_NAMES)
def test_logits_at_picks_the_right_ones(name):
    data, run = load(name), runner(name)
    input_ids, expected = data["input_ids"], data["logits"]
    batch, length = input_ids.shape
    at = np.array([[length - 1, 0, 17], [5, 5, 60]], np.int32)
    output, cache = run.full(input_ids, logits_at=at, hidden_layers=(1, -1))
    reference = np.take_along_axis(expected, at[:, :, None], axis=1)
    assert max_error(output.logits, reference) <= TOLERANCE
    # Hidden states are those of every token all the same; so with no logits at all.
    nothing, _ = run.full(input_ids, logits_at=np.zeros((batch, 0), np.int32), hidden_layers=(-1,))
    assert nothing.logits.shape == (batch, 0, expected.shape[-1])
    assert max_error(output.hidden[0], data["hidden_states"][1]) <= TOLERANCE
    for hidden in (output.hidden[1], nothing.hidden[0]):
        assert max_error(hidden, data["hidden_states"][-1]) <= TOLERANCE
    # The cache is as complete as without it.
    last, _ = run(input_ids[:, -1:], cache, np.full(batch, length - 1))
    assert max_error(last.logits[:, 0], expected[:, -1]) <= TOLERANCE


# ---------------------------------------------------------------------------------------------
# Trees.


def ancestors(parents):
    """Whether node j is i or an ancestor of i, bool[N, N], and the depth of each node, i[N]."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask, mask.sum(axis=1) - 1


def feed_tree(run, data, *, tree_mask=True, tree_positions=True):
    """Feeds each row's prefix, then its tree in one call: f32[B, N, V] of the nodes."""
    tokens, parents, prefix = (data[f"tree/{key}"] for key in ("tokens", "parents", "prefix"))
    batch, nodes = tokens.shape
    masks, depths = (np.stack(x) for x in zip(*map(ancestors, parents), strict=True))
    if not tree_mask:
        masks = np.broadcast_to(np.tri(nodes, dtype=bool), masks.shape)
    if not tree_positions:
        depths = np.tile(np.arange(nodes), (batch, 1))
    # Behind its prefix each row of the cache holds the rest of the text, as stale values.
    _, cache = run.full(data["input_ids"])
    output, _ = run(
        tokens, cache, prefix, positions=(prefix[:, None] + depths).astype(np.int32), mask=masks
    )
    return output.logits


def leaves_of(parents):
    return [node for node in range(len(parents)) if node not in parents]


@pytest.mark.parametrize("name", LLAMA3_NAMES)
def test_every_path_of_a_tree_has_the_logits_of_its_chain(name):
    data, run = load(name), runner(name)
    logits = feed_tree(run, data)
    # Chains that HF was fed, one for each node.
    assert max_error(logits, data["tree/logits"]) <= TOLERANCE
    # Chains that the model itself is fed, one for each leaf.
    for chosen in zip(*map(leaves_of, data["tree/parents"]), strict=True):
        texts, paths = data["input_ids"].copy(), []
        for row, leaf in enumerate(chosen):
            path = np.flatnonzero(ancestors(data["tree/parents"][row])[0][leaf])
            first = data["tree/prefix"][row]
            texts[row, first : first + len(path)] = data["tree/tokens"][row, path]
            paths.append(path)
        chains, _ = run.full(texts)
        for row, path in enumerate(paths):
            first = data["tree/prefix"][row]
            chain = chains.logits[row, first : first + len(path)]
            assert max_error(logits[row, path], chain) <= TOLERANCE


def go_on_behind_paths(data, run, compact):
    """Feeds each row's tree and a token behind its last leaf: f32[B, V], and its chain's."""
    tokens, parents, prefix = (data[f"tree/{key}"] for key in ("tokens", "parents", "prefix"))
    batch, nodes = tokens.shape
    masks, depths = (np.stack(x) for x in zip(*map(ancestors, parents), strict=True))
    _, cache = run.full(data["input_ids"])
    _, cache = run(
        tokens, cache, prefix, positions=(prefix[:, None] + depths).astype(np.int32), mask=masks
    )
    paths = np.tile(np.arange(nodes, dtype=np.int32), (batch, 1))
    texts, lengths = data["input_ids"].copy(), np.zeros(batch, np.int32)
    for row in range(batch):
        path = np.flatnonzero(masks[row, leaves_of(parents[row])[-1]])
        paths[row, : len(path)] = path
        lengths[row] = prefix[row] + len(path)
        texts[row, prefix[row] : lengths[row]] = tokens[row, path]
    assert (paths != np.arange(nodes)).any(axis=1).all()  # there is something to move
    cache = compact(cache, jnp.asarray(prefix, jnp.int32), jnp.asarray(paths))
    new = np.full((batch, 1), 7, np.int32)
    output, _ = run(new, cache, lengths)
    _, chain_cache = run.full(texts)
    return output.logits, run(new, chain_cache, lengths)[0].logits


def test_compaction_leaves_the_cache_of_the_accepted_chain():
    ours, chain = go_on_behind_paths(load("llama3"), runner("llama3"), jax.jit(layers.compact))
    assert max_error(ours, chain) <= TOLERANCE


@pytest.mark.parametrize(("start", "path"), [(1, 0), (0, 1), (0, -1)])
def test_compaction_that_is_off_by_one_is_noticed(start, path):
    def broken(cache, starts, paths):
        return layers.compact(cache, starts + start, jnp.maximum(paths + path, 0))

    ours, chain = go_on_behind_paths(load("llama3"), runner("llama3"), broken)
    assert max_error(ours, chain) > 100 * TOLERANCE


@pytest.mark.parametrize("planted", ["tree_mask", "tree_positions"])
def test_a_tree_fed_as_a_chain_is_noticed(planted):
    data = load("llama3")
    logits = feed_tree(runner("llama3"), data, **{planted: False})
    assert max_error(logits, data["tree/logits"]) > 100 * TOLERANCE


# ---------------------------------------------------------------------------------------------
# Planted bugs: the comparison above must notice each of them.


def error_of(name, config, weights):
    data = load(name)
    layers = (0, 1, 2, -1) if name in HIDDEN_NAMES else ()  # the trace of the first test
    output, _ = Runner(config, weights).full(data["input_ids"], hidden_layers=layers)
    return max_error(output.logits, data["logits"])


SCALING_BUGS = [
    ("bias_linear", "kind", "default"),
    ("bias_linear", "factor", 2.0),
    ("llama3", "kind", "default"),
    ("llama3", "kind", "linear"),
    ("llama3", "low_freq_factor", 0.5),
    ("llama3", "high_freq_factor", 5.0),
]


@pytest.mark.parametrize(("name", "field", "value"), SCALING_BUGS)
def test_a_wrong_rope_scaling_is_noticed(name, field, value):
    config = make_config(name)
    scaling = dataclasses.replace(config.rope_scaling, **{field: value})
    config = dataclasses.replace(config, rope_scaling=scaling)
    assert error_of(name, config, hf_weights(name)) > TOLERANCE


@pytest.mark.parametrize(("field", "value"), [("rope_theta", 10000.0), ("rms_norm_eps", 1e-6)])
def test_a_wrong_constant_is_noticed(field, value):
    config = dataclasses.replace(make_config("gqa_tied"), **{field: value})
    assert error_of("gqa_tied", config, hf_weights("gqa_tied")) > TOLERANCE


def interleave(config, weight):
    """Reorders the rows of q or k for rotary pairs (2i, 2i + 1), as in Meta's checkpoints."""
    halves = weight.reshape(-1, 2, config.head_dim // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def change(weights, part, function):
    """Applies a function to every tensor whose name contains `part`."""
    assert any(part in key for key in weights)
    return {key: function(value) if part in key else value for key, value in weights.items()}


def swap(weights, one, other):
    """Exchanges the tensors of two names."""
    renamed = {
        key.replace(one, "\0").replace(other, one).replace("\0", other): key for key in weights
    }
    return {key: weights[renamed[key]] for key in weights}


PLANTED = {
    "rotary pairs interleaved": lambda c, w: change(
        change(w, "q_proj", lambda x: interleave(c, x)), "k_proj", lambda x: interleave(c, x)
    ),
    "key heads in another order": lambda c, w: change(
        w, "k_proj", lambda x: np.roll(x, c.head_dim, 0)
    ),
    "query heads in another order": lambda c, w: change(
        w, "q_proj", lambda x: np.roll(x, c.head_dim, 0)
    ),
    "gate and up swapped": lambda c, w: swap(w, "gate_proj", "up_proj"),
    "norms swapped": lambda c, w: swap(w, "input_layernorm", "post_attention_layernorm"),
    "layers swapped": lambda c, w: swap(w, "layers.0.", "layers.1."),
    "final norm without weights": lambda c, w: change(w, "model.norm", np.ones_like),
    **{
        f"{key} bias dropped": lambda c, w, key=key: change(w, f"{key}_proj.bias", np.zeros_like)
        for key in ("q", "k", "v", "o", "gate", "up", "down")
    },
}


@pytest.mark.parametrize("planted", PLANTED)
def test_wrong_weights_are_noticed(planted):
    config, weights = make_config("bias_linear"), hf_weights("bias_linear")
    assert error_of("bias_linear", config, PLANTED[planted](config, weights)) > 10 * TOLERANCE


def test_the_unchanged_model_passes_the_check_for_planted_bugs():
    assert (
        error_of("bias_linear", make_config("bias_linear"), hf_weights("bias_linear")) <= TOLERANCE
    )


def test_a_broken_token_harms_none_that_cannot_see_it():
    """A rejected draft whose embedding is NaN leaves greedy text as it is: 0 · NaN is NaN."""
    config = llama.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, dtype="float32",
    )  # fmt: skip
    params = llama.init_params(config, seed=0)
    greedy = jaxspec.Sampling(temperature=0)
    plain = jaxspec.generate(
        llama.language_model(config, params), [[1, 2, 3]], sampling=greedy, max_new_tokens=8
    )
    unused = next(i for i in range(4, 32) if i not in plain.tokens[0].tolist())
    params["embed"]["weight"] = params["embed"]["weight"].at[unused].set(jnp.nan)
    always = np.full((32, 32), -10.0, np.float32)
    always[:, unused] = 10.0
    drafter = jaxspec.drafters.model(table_model(always, order=1))
    drafted = jaxspec.generate(
        llama.language_model(config, params), [[1, 2, 3]], drafter=drafter, sampling=greedy,
        max_new_tokens=8,
    )  # fmt: skip
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    assert drafted.stats.num_accepted_draft_tokens.tolist() == [0]
    # Whoever sees the token does get NaN.
    broken = jaxspec.generate(
        llama.language_model(config, params), [[1, unused, 3]], sampling=greedy, max_new_tokens=8
    )
    assert broken.status.tolist() == [jaxspec.status.NONFINITE]


@pytest.mark.optimized
def test_a_step_of_ragged_rows_copies_no_cache():
    config = make_config("gqa_tied")
    lm = llama.language_model(config, llama.init_params(config, seed=0))
    cache = lm.init_cache(8, 8192, 1)
    step = jax.jit(lm.apply, donate_argnums=2)
    start = jnp.zeros(8, jnp.int32)
    compiled = step.lower(lm.params, jnp.ones((8, 1), jnp.int32), cache, start=start).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * size


def _cosines(module):
    """How many operations of a compiled forward compute cosines; one computation has one."""
    config = make_config("gqa_tied")
    lm = module.language_model(config, module.init_params(config, seed=0))
    cache = lm.init_cache(1, CAPACITY, 8)

    @jax.jit
    def forward(params, cache, tokens):
        model = lm.replace(params=params)
        start, num_new = jnp.zeros(1, jnp.int32), jnp.full(1, 8, jnp.int32)
        return model.forward(tokens, cache, start=start, num_new=num_new)

    tokens = jnp.ones((1, 8), jnp.int32)
    return forward.lower(lm.params, cache, tokens).compile().as_text().count(" cosine(")


@pytest.mark.optimized
def test_rotary_tables_are_computed_once():
    """Not by each layer, for each of its heads: that cost a quarter of a step of 11 tokens."""
    assert _cosines(llama) == 1
    again = "return [f(angles).reshape(cos.shape) for f in (jnp.cos, jnp.sin)]"
    assert _cosines(mutant("jaxspec_models.llama", ("return cos, sin", again))) >= 2
