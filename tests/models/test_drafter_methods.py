"""Drafters of every method: they learn, and what they draft keeps every promise of a drafter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import trained
from support.mutants import mutant
from support.trained import CONFIG, LAYERS, PARAMS, SHAPES, TARGET, K, V

import jaxspec
from jaxspec.testing import check_drafter
from jaxspec_models import drafter_training
from jaxspec_models.drafters import (
    block,
    drafting,
    eagle3,
    learning,
    methods,
    parts,
    reading,
    student,
)

ALL = sorted(SHAPES)
READERS = ["block", "eagle3"]  # of the target's features
DRAWING = ("jaxspec_models.drafters.reading", "jaxspec_models.drafters.drafting")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return trained.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def params(learned, tmp_path_factory):
    """Trained weights by method; each is trained when it is first asked for."""
    found = {}

    def of(method):
        if method not in found:
            directory = tmp_path_factory.mktemp(method)
            found[method] = trained.train(learned, directory, method)
            found[method, "log"] = drafter_training.last_line(directory / "log.csv")
        return found[method]

    of.found = found
    return of


@pytest.mark.parametrize("method", ALL)
def test_training_makes_drafts_better(learned, params, method):
    before = trained.first_params(learned, method)
    for temperature in (0, 1.0):
        old = trained.tokens_per_step(trained.drafter(learned, before, method), temperature)
        new = trained.drafter(learned, params(method), method)
        assert trained.tokens_per_step(new, temperature) > old + 0.1


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Sampled answers to prompts that nothing was learned from, as whole stretches."""
    settings = trained.with_settings(anchors_a_text=128)
    found = trained.write(
        tmp_path_factory.mktemp("others"),
        range(1000, 1512),
        settings,
        temperatures=(1.0,),
        batch=128,
    )
    for texts in found.texts.values():
        texts.held_out = [*texts.held_out, *texts.learned]
    return found


@pytest.mark.parametrize("method", ALL)
def test_a_round_emits_what_an_evaluation_promises(learned, params, others, method):
    """Tokens a round at temperature 1.

    Texts differ in it by 0.6 (standard deviation): the means of 512 of them and of other answers to
    the same prompts differ by at most 0.12 (three deviations). Evaluation leaves out the first and
    the last K tokens; in `generate` a row's last round, one of fifteen to twenty, is cut short by
    up to K tokens, and its first ones are among the hardest: 0.13 in 1,024 texts.
    """
    evaluate = drafter_training._make_evaluation(
        drafter_training._loss(SHAPES[method], learning.Objective())
    )
    promised = evaluate(params(method), others.texts[method], learned.frozen)
    prompts = np.stack([answer.tokens[:6] for answer in others.texts[method]._found])
    out = jaxspec.generate(
        TARGET, jnp.asarray(prompts), drafter=trained.drafter(learned, params(method), method),
        num_draft_tokens=K, max_new_tokens=40, key=jax.random.key(0),
    )  # fmt: skip
    emitted, rounds = out.stats.num_emitted_tokens, out.stats.num_spec_steps
    assert abs(emitted.sum() / rounds.sum() - promised["tokens_per_step_sampled"]) < 0.12 + 0.13


@pytest.mark.parametrize("method", READERS)
def test_more_drafts_than_it_was_trained_for(learned, method):
    drafter = trained.drafter(learned, trained.first_params(learned, method), method)
    with pytest.raises(ValueError, match=f"num_draft_tokens is {K + 1}, .* at most {K}"):
        jaxspec.generate(
            TARGET, [[1, 2]], drafter=drafter, num_draft_tokens=K + 1,
            sampling=jaxspec.Sampling(temperature=0),
        )  # fmt: skip


def test_a_student_begins_with_layers_that_fit():
    for change, what in (
        ({"source_layers": (3,)}, "numbered 0 to 2; got .3."),
        ({"intermediate_size": 32}, "must be 24, got 32"),
        ({"target": dataclasses.replace(CONFIG, attention_bias=True)}, "has no biases"),
    ):
        shape = dataclasses.replace(SHAPES["student"], **change)
        with pytest.raises(ValueError, match=what):
            student.init_params(shape, TARGET, None, 0)


@pytest.mark.parametrize("method", READERS)
def test_a_round_in_which_no_row_drafts_computes_nothing(learned, method):
    """Seen by what it leaves in the cache."""
    ours = trained.drafter(learned, trained.first_params(learned, method), method)
    options = jaxspec.sampling.resolve(jaxspec.Sampling(), 2, V)
    text, lengths = jnp.ones((2, 16), jnp.int32), jnp.array([5, 7])
    history = jaxspec.sampling.recall(options, text, lengths, vocab_size=V, prompt_lengths=lengths)
    context = jaxspec.types.Context(text, lengths, options, history)
    keys, state = jax.random.split(jax.random.key(0), (2, K)), ours.init(2, 16)

    def written(num_draft):
        propose = jax.jit(ours.propose, static_argnums=4)
        _, after = propose(jax.random.clone(keys), state, context, jnp.array(num_draft), _always)
        return bool((after.cache.keys[0] != state.cache.keys[0]).any())

    assert not written([0, 0])
    assert written([0, 1])


def _always(signals):
    return signals.slot >= 0


def quantized(method, weights, is_quantized):
    shape = SHAPES[method]
    return methods.quantize(shape, weights) if is_quantized else (shape, weights)


# Roundings to int8 may fall otherwise where sums are rounded otherwise.
TOLERANCES = [(False, 1e-4), (True, 0.05)]


@pytest.mark.parametrize(("is_quantized", "tolerance"), TOLERANCES)
def test_block_training_and_drafting_compute_the_same(learned, params, is_quantized, tolerance):
    """The logits of a block in a whole text are those of the block behind the text so far."""
    part = jax.tree.map(lambda x: jnp.asarray(x[0]), learned.texts["block"].step(1))
    shape, weights = quantized("block", params("block"), is_quantized)
    ours = trained.drafter(learned, weights, shape=shape)
    model = ours.model()
    rows, text = jnp.arange(part.tokens.shape[0]), part.tokens
    hidden = tuple(part.hidden[:, :, i] for i in range(len(LAYERS)))
    for number in range(2):
        anchors = jnp.minimum(part.anchors[:, number], text.shape[1] - K - 1)
        part = part._replace(anchors=part.anchors.at[:, number].set(anchors))
        logits, predicted = block.forward(model, part, learned.frozen)
        none = jnp.zeros_like(anchors)
        state = ours.prefill(ours.init(len(rows), 160), text, hidden, none, anchors)
        x = model.block(ours.embed(text[rows, anchors]), state.last, K)
        h = model.norm(reading.forward(model, state.cache, x, anchors)[0])
        before = jnp.stack([text[rows, anchors + k] for k in range(K)], axis=1)
        known, bias = model.bias(ours.positions[before])
        np.testing.assert_allclose(
            parts.logits(ours.head, h) + bias, logits[:, number], atol=tolerance
        )
        np.testing.assert_allclose(model.predicted(h, known), predicted[:, number], atol=tolerance)


class Forced:
    """Drafts a given text and keeps what the drafter made of it."""

    def __init__(self, drafter, text, lengths):
        self.drafter, self.text, self.lengths = drafter, text, lengths
        self.seen = []

    def logits(self, state, monkeypatch):
        """f32[B, K, V]: the drafter's laws behind the text's own tokens."""
        rows = jnp.arange(len(self.text))
        monkeypatch.setattr(
            drafting, "chooser",
            lambda keys, context: lambda slot, scores: self.text[rows, self.lengths + slot],
        )  # fmt: skip
        batch = len(self.text)
        options = jaxspec.sampling.resolve(jaxspec.Sampling(), batch, V)
        history = jaxspec.sampling.recall(
            options, self.text, self.lengths, vocab_size=V, prompt_lengths=self.lengths
        )
        context = jaxspec.types.Context(self.text, self.lengths, options, history)
        keys = jax.random.split(jax.random.key(0), (batch, K))
        draft, _ = self.drafter.propose(
            keys, state, context, jnp.full((batch,), K), lambda signals: signals.slot < K
        )
        return draft.log_probs


@pytest.mark.parametrize(("is_quantized", "tolerance"), TOLERANCES)
def test_eagle_training_and_drafting_compute_the_same(
    learned, params, monkeypatch, is_quantized, tolerance
):
    part = jax.tree.map(lambda x: jnp.asarray(x[0]), learned.texts["eagle3"].step(1))
    shape, weights = quantized("eagle3", params("eagle3"), is_quantized)
    ours = trained.drafter(learned, weights, "eagle3", shape=shape)
    anchors = jnp.minimum(part.anchors[:, 0], part.tokens.shape[1] - K - 1)
    part = part._replace(anchors=part.anchors.at[:, 0].set(anchors))
    laws = jax.nn.log_softmax(eagle3.forward(ours.model(), part, learned.frozen)[:, 0])
    hidden = tuple(part.hidden[:, :, i] for i in range(len(LAYERS)))
    none = jnp.zeros_like(anchors)
    state = ours.prefill(ours.init(len(anchors), 160), part.tokens, hidden, none, anchors)
    drafted = Forced(ours, part.tokens, anchors + 1).logits(state, monkeypatch)
    np.testing.assert_allclose(drafted[:, :, learned.ids], laws, atol=tolerance)


@pytest.mark.parametrize(("is_quantized", "tolerance"), TOLERANCES)
def test_student_training_and_drafting_compute_the_same(learned, params, is_quantized, tolerance):
    part = jax.tree.map(lambda x: jnp.asarray(x[0]), learned.texts["student"].step(1))
    shape, weights = quantized("student", params("student"), is_quantized)
    lm = trained.drafter(learned, weights, "student", shape=shape).lm
    graphdef, _ = student.abstract(shape)
    model = nnx.merge(graphdef, nnx.State(weights))
    expected = student.forward(model, part, learned.frozen)
    batch, width = part.tokens.shape
    output, _ = lm.apply(
        lm.params,
        part.tokens,
        lm.init_cache(batch, width, width),
        start=jnp.zeros((batch,), jnp.int32),
    )
    np.testing.assert_allclose(output.logits[:, :, learned.ids], expected, atol=tolerance)
    others = np.setdiff1d(np.arange(V), learned.ids)
    assert np.all(np.asarray(output.logits)[:, :, others] == -np.inf)


@pytest.mark.parametrize("method", ALL)
def test_quantisation_costs_little_and_nothing_of_exactness(learned, params, method):
    shape, weights = quantized(method, params(method), is_quantized=True)
    eight_bit = trained.drafter(learned, weights, method, shape=shape)
    whole = trained.drafter(learned, params(method), method)
    assert trained.tokens_per_step(eight_bit, 0) > trained.tokens_per_step(whole, 0) - 0.15


def check_features_are_the_target_s(module, learned, weights, method):
    """Behind generation, the drafter's cache is what prefill makes of the text that stands.

    Of rejected drafts it would hold the features of another text.
    """
    ours = trained.drafter(learned, weights, method, module=module)
    prompts = jnp.asarray(np.random.default_rng(4).integers(4, V, (4, 6)), jnp.int32)
    out = jaxspec.generate(
        TARGET, prompts, drafter=ours, num_draft_tokens=K, max_new_tokens=24, eos_ids=(),
        key=jax.random.key(1), return_state=True,
    )  # fmt: skip
    text = jnp.concatenate([prompts, out.tokens], axis=1)
    batch, length = text.shape
    none, fed = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), length - 1)
    output, _ = TARGET.apply(
        PARAMS, text, TARGET.init_cache(batch, length, length), start=none, hidden_layers=LAYERS
    )
    sound = trained.drafter(learned, weights, method)
    expected = sound.prefill(sound.init(batch, 256), text, output.hidden, none, fed)
    found = out.state.state.drafter
    for ours, wanted in zip(found.cache.keys, expected.cache.keys, strict=True):
        np.testing.assert_allclose(ours[..., : length - 1], wanted[..., : length - 1], atol=2e-4)
    np.testing.assert_allclose(found.last, expected.last, atol=2e-4)
    return out.stats


@pytest.mark.parametrize("method", READERS)
def test_features_of_rejected_drafts_are_replaced(learned, params, method):
    module = methods.of(method).module
    stats = check_features_are_the_target_s(module, learned, params(method), method)
    assert np.all(stats.num_draft_tokens - stats.num_accepted_draft_tokens >= 3)
    assert np.all(stats.num_accepted_draft_tokens >= 3)


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize(
    "patch",
    [
        ("hidden, outcome.start, ", "hidden, outcome.start + 1, "),
        (
            "return take_in(model, state, hidden, outcome.start, outcome.num_emitted)",
            "return state",
        ),
        # only behind what was accepted
        ("hidden, outcome.start, ", "hidden, outcome.start + outcome.num_accepted, "),
        ("outcome.start, outcome.num_emitted)", "outcome.start, outcome.num_accepted)"),
    ],
)
def test_planted_bugs_in_commit(learned, params, method, patch):
    module = mutant(
        f"jaxspec_models.drafters.{method}", patch, within="jaxspec_models.drafters.reading"
    )
    with pytest.raises(AssertionError):
        check_features_are_the_target_s(module, learned, params(method), method)


def check_it_is_a_drafter(drafter, temperature):
    """Rows, padding and pauses change nothing, and q is what was drawn from.

    Of so many rows, since each has a cache.
    """
    report = check_drafter(
        drafter, TARGET, num_draft_tokens=K,
        sampling=jaxspec.Sampling(temperature=temperature), num_samples=4_000,
    )  # fmt: skip
    report.assert_passed()
    return report


@pytest.mark.exactness
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_it_is_a_drafter(learned, params, method, temperature):
    drafter = trained.drafter(learned, params(method), method)
    report = check_it_is_a_drafter(drafter, temperature)
    assert report.is_deterministic == (temperature == 0)
    assert 2.5 < report.mean_length <= K  # less where a text ends


@pytest.mark.exactness
@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize(
    "patch",
    [
        ("choose(slots, scores)", "choose(slots, 1.3 * scores)"),  # q is not what is drawn from
        ("choose(slots, scores)", "choose(slots * 0, scores)"),  # the drafts share their numbers
    ],
)
def test_planted_bugs_in_drawing(learned, params, method, patch):
    module = mutant(f"jaxspec_models.drafters.{method}", patch, within=DRAWING)
    drafter = trained.drafter(learned, params(method), method, module=module)
    with pytest.raises(AssertionError):
        check_it_is_a_drafter(drafter, 1.0)


@pytest.mark.parametrize("method", ALL)
def test_confidence_stops_drafts(learned, params, method):
    drafter = trained.drafter(learned, params(method), method)
    prompts = jnp.asarray(np.random.default_rng(3).integers(4, V, (8, 6)), jnp.int32)

    def write(policy):
        return jaxspec.generate(
            TARGET, prompts, drafter=drafter, num_draft_tokens=K, max_new_tokens=32, eos_ids=(),
            sampling=jaxspec.Sampling(temperature=0), policy=policy,
        )  # fmt: skip

    one, other = write(None), write(jaxspec.policies.confidence(0.3))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    drafted = np.sum(one.stats.num_draft_tokens), np.sum(other.stats.num_draft_tokens)
    assert 0 < drafted[1] < drafted[0]
    rates = [
        np.sum(x.stats.num_accepted_draft_tokens) / np.sum(x.stats.num_draft_tokens)
        for x in (one, other)
    ]
    assert rates[1] > rates[0] + 0.05


def test_a_student_begins_as_the_layers_it_is_given():
    shape = dataclasses.replace(SHAPES["student"], num_hidden_layers=2, source_layers=(2, 0))
    found = student.init_params(shape, TARGET, None, 0)
    for ours, source in enumerate((2, 0)):
        theirs = PARAMS["layers"][source]["mlp"]["down"]["weight"]
        np.testing.assert_array_equal(found["layers"][ours]["mlp"]["down"]["weight"], theirs)
    for change, told in (
        ({"source_layers": (0,)}, "takes 2 of the target's, numbered 0 to 2; got"),
        ({"source_layers": (0, 3)}, "numbered 0 to 2"),
        ({"intermediate_size": 32}, "intermediate_size must be 24"),
    ):
        with pytest.raises(ValueError, match=told):
            student.init_params(dataclasses.replace(shape, **change), TARGET, None, 0)


@pytest.mark.parametrize("method", READERS)
def test_a_drafter_begins_as_its_target_s_last_layers(learned, method):
    """Its keys and values of the text are the target's own, where it reads what the layer reads."""
    shape = dataclasses.replace(SHAPES[method], num_hidden_layers=1, tapped_layers=(1, 2))
    part = jax.tree.map(lambda x: x[:, :, :2] if x.ndim == 4 else x, learned.texts[method].sample())
    module = methods.of(method).module
    weights = module.init_params(shape, TARGET, part, 0)
    model = nnx.merge(module.abstract(shape)[0], nnx.State(weights))
    tokens = jnp.asarray(part.tokens[:2, :9])
    start = jnp.zeros((2,), jnp.int32)
    output, cache = TARGET.apply(
        PARAMS, tokens, TARGET.init_cache(2, 9, 9), start=start, hidden_layers=(1, 2)
    )
    state = reading.take_in(model, reading.init(shape, 2, 9), output.hidden, start, start + 9)
    np.testing.assert_allclose(state.cache.keys[0][..., :9], cache.keys[2][..., :9], atol=1e-3)
    np.testing.assert_allclose(
        state.cache.values[0][:, :, :9], cache.values[2][:, :, :9], atol=1e-3
    )
    with pytest.raises(ValueError, match="has 4 layers, more than its target"):
        module.init_params(dataclasses.replace(shape, num_hidden_layers=4), TARGET, part, 0)


def test_least_squares():
    rng = np.random.default_rng(0)
    matrix, inputs = rng.normal(size=(3, 5)), rng.normal(size=(400, 5))
    noise = 0.01 * rng.normal(size=(400, 3))
    found = learning.least_squares(jnp.asarray(inputs), jnp.asarray(inputs @ matrix.T + noise))
    np.testing.assert_allclose(found, matrix, atol=0.01)


def test_a_whole_student_is_its_target():
    """All of the target's layers and its whole vocabulary: the target itself."""
    shape = dataclasses.replace(
        SHAPES["student"], num_hidden_layers=CONFIG.num_hidden_layers, draft_vocab_size=V
    )
    weights = student.init_params(shape, TARGET, None, 0)
    lm = student.drafter(TARGET, shape, weights, np.arange(V)).lm
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, 9)), jnp.int32)
    start = jnp.zeros((2,), jnp.int32)
    ours, _ = lm.apply(lm.params, tokens, lm.init_cache(2, 16, 9), start=start)
    theirs, _ = TARGET.apply(PARAMS, tokens, TARGET.init_cache(2, 16, 9), start=start)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
