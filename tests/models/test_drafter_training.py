"""A drafter is trained end to end on a tiny target, killed and gone on with, and drafts."""

import csv
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import mutant

import jaxspec
from jaxspec.testing import check_drafter
from jaxspec_models import answers, drafter_training, features, llama
from jaxspec_models.drafters import block, parts

V, K = 32, 3
CONFIG = llama.LlamaConfig(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, dtype="float32", eos_ids=(3,),
)  # fmt: skip
PARAMS = llama.init_params(CONFIG, seed=0)
PARAMS["head"]["weight"] *= 2  # surer of itself
TARGET = llama.language_model(CONFIG, PARAMS)
LAYERS = (1, 2, -1)
SHAPE = block.BlockConfig(
    CONFIG, LAYERS, num_draft_tokens=K, draft_vocab_size=24, num_hidden_layers=2,
    intermediate_size=24, markov_rank=8,
)  # fmt: skip
SETTINGS = drafter_training.Settings(
    num_steps=40, tokens_a_part=1024, parts_a_step=2, anchors_a_text=24, learning_rate=1e-2
)


class Tokenizer:
    """As many tokens as characters."""

    def encode(self, text, add_special_tokens=True):
        del add_special_tokens
        return [ord(letter) % V for letter in text]

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        del tokenize, add_generation_prompt
        return messages[0]["content"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(texts, draft ids, what is frozen), of a target's answers."""
    root = tmp_path_factory.mktemp("data")
    prompts = ["".join(map(chr, np.random.default_rng(i).integers(97, 122, 6))) for i in range(64)]
    answers.write_answers(
        TARGET, Tokenizer(), prompts, root / "answers", target="tiny", max_new_tokens=40, batch=32
    )
    features.write_features(
        TARGET, root / "answers", root / "features", layers=LAYERS, weights="float32"
    )
    found, read = features.read_features(root / "answers", root / "features", layers=(*LAYERS, -1))
    ids = parts.draft_vocabulary(
        [a.tokens[a.prompt_length :] for a in found], 24, vocab_size=V, always=(3,)
    )
    texts = drafter_training.Texts(found, read, SETTINGS, K)
    return texts, ids, block.frozen_part(TARGET, SHAPE, jnp.asarray(ids))


def train(learned, directory, settings=SETTINGS, **options):
    texts, _, frozen = learned
    options = {"steps_an_evaluation": 10, "seconds_a_checkpoint": 0.0, **options}
    return drafter_training.train(SHAPE, frozen, texts, settings, directory, **options)


def log(directory):
    with (directory / "log.csv").open() as file:
        return [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(learned, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return train(learned, directory), directory


def drafter(learned, params, shape=SHAPE, **options):
    return block.block(TARGET, shape, params, learned[1], **options)


def tokens_per_step(drafter, temperature):
    prompts = np.random.default_rng(9).integers(4, V, (8, 6))
    out = jaxspec.generate(
        TARGET, jnp.asarray(prompts, jnp.int32), drafter=drafter, num_draft_tokens=K,
        max_new_tokens=32, eos_ids=(), key=jax.random.key(0),
        sampling=jaxspec.Sampling(temperature=temperature),
    )  # fmt: skip
    return float(np.sum(out.stats.num_emitted_tokens) / np.sum(out.stats.num_spec_steps))


def test_training_makes_drafts_better(learned, whole):
    params, directory = whole
    lines = log(directory)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]
    assert lines[-1]["acceptance_1"] > lines[0]["acceptance_1"]
    before = block.init_params(SHAPE, learned[2], SETTINGS.seed)
    for temperature in (0, 1.0):
        old = tokens_per_step(drafter(learned, before), temperature)
        assert tokens_per_step(drafter(learned, params), temperature) > old + 0.1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [7, 25])
def test_a_killed_training_goes_on_bit_for_bit(learned, whole, tmp_path, after):
    def kill(step, metrics):
        del metrics
        if step == after:
            raise Killed

    with pytest.raises(Killed):
        train(learned, tmp_path, on_step=kill)
    seen = []
    params = train(learned, tmp_path, on_step=lambda step, metrics: seen.append(step))
    assert seen == list(
        range(after, SETTINGS.num_steps + 1)
    )  # the step that was lost is done again
    chex.assert_trees_all_equal(params, whole[0])
    for ours, other in zip(log(tmp_path), log(whole[1]), strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {
            k: v for k, v in other.items() if k != "seconds"
        }


def test_a_finished_training_is_not_done_again(learned, whole):
    seen = []
    params = train(learned, whole[1], on_step=lambda step, metrics: seen.append(step))
    assert seen == []
    chex.assert_trees_all_equal(params, whole[0])


@pytest.mark.parametrize(
    "change",
    [
        {"settings": dataclasses.replace(SETTINGS, learning_rate=2e-2)},
        {"settings": dataclasses.replace(SETTINGS, num_steps=80)},
        {"shape": dataclasses.replace(SHAPE, intermediate_size=32)},
    ],
)
def test_another_training_does_not_go_on_with_it(learned, whole, change):
    before = (whole[1] / "log.csv").read_bytes()
    with pytest.raises(ValueError, match=f"was begun with other {next(iter(change))}"):
        drafter_training.train(
            change.get("shape", SHAPE), learned[2], learned[0], change.get("settings", SETTINGS),
            whole[1],
        )  # fmt: skip
    assert (whole[1] / "log.csv").read_bytes() == before


def test_more_drafts_than_it_was_trained_for(learned, whole):
    with pytest.raises(ValueError, match=f"num_draft_tokens is {K + 1}, .* at most {K}"):
        jaxspec.generate(
            TARGET, [[1, 2]], drafter=drafter(learned, whole[0]), num_draft_tokens=K + 1,
            sampling=jaxspec.Sampling(temperature=0),
        )  # fmt: skip


def test_a_loss_that_is_not_finite_ends_it(learned, tmp_path):
    texts, ids, frozen = learned
    broken = (texts, ids, frozen._replace(head=frozen.head.at[0, 0].set(jnp.nan)))
    with pytest.raises(FloatingPointError, match="step 1 is not finite"):
        train(broken, tmp_path)
    assert not (tmp_path / "log.csv").exists()


def test_nothing_held_out_is_learned(learned):
    texts = learned[0]
    assert texts.held_out
    assert not set(texts.held_out) & set(texts.learned)
    prompts = {texts._found[i].prompt for i in texts.held_out}
    assert not prompts & {texts._found[i].prompt for i in texts.learned}
    seen = []
    for number in range(texts.steps_an_epoch):
        part = texts.step(number)
        assert part.tokens.shape[0] == SETTINGS.parts_a_step
        seen += [row[row > 0].tobytes() for row in part.tokens.reshape(-1, part.tokens.shape[-1])]
    expected = [texts._found[i].tokens for i in texts.learned]
    assert sorted(x for x in seen if x) == sorted(row[row > 0].tobytes() for row in expected)


def test_weights_are_of_answer_tokens_only(learned):
    texts = learned[0]
    part = texts.step(0)
    for tokens, anchors, weights in zip(
        part.tokens.reshape(-1, 128),
        part.anchors.reshape(-1, part.anchors.shape[-1]),
        part.weights.reshape(-1, *part.weights.shape[-2:]),
        strict=True,
    ):
        length = int(np.max(np.nonzero(tokens)[0], initial=0)) + 1
        for anchor, row in zip(anchors, weights, strict=True):
            for slot, weight in enumerate(row):
                if weight:
                    assert anchor >= 5  # the last token of the prompt, at the earliest
                    assert anchor + slot + 1 < length
                    np.testing.assert_allclose(weight, SETTINGS.slot_decay**slot, rtol=1e-6)


@pytest.mark.parametrize("quantized", [False, True])
def test_training_and_drafting_compute_the_same(learned, whole, quantized):
    """The logits of a block in a whole text are those of the block behind the text so far."""
    texts, _, frozen = learned
    part = jax.tree.map(lambda x: jnp.asarray(x[0]), texts.step(1))
    shape, params = SHAPE, whole[0]
    if quantized:
        shape, params = block.quantize(shape, params)
    ours = drafter(learned, params, shape)
    model = ours._model()
    logits, predicted = block.forward(model, part, frozen)
    batch = part.tokens.shape[0]
    rows, none = jnp.arange(batch), jnp.zeros((batch,), jnp.int32)
    hidden = tuple(part.hidden[:, :, i] for i in range(len(LAYERS)))
    state = ours.prefill(ours.init(batch, 160), part.tokens, hidden, none, none)
    for number in range(2):
        anchors = part.anchors[:, number]
        pending = part.tokens[rows, anchors]
        h, _ = ours._forward(model, state, pending, anchors, K)
        before = jnp.stack([part.tokens[rows, anchors + k] for k in range(K)], axis=1)
        known, bias = model.bias(ours.positions[before])
        # Roundings to int8 may fall otherwise where sums are rounded otherwise.
        tolerance = 0.05 if quantized else 1e-4
        np.testing.assert_allclose(model.head(h) + bias, logits[:, number], atol=tolerance)
        np.testing.assert_allclose(model.predicted(h, known), predicted[:, number], atol=tolerance)


def test_quantisation_costs_little_and_nothing_of_exactness(learned, whole):
    shape, params = block.quantize(SHAPE, whole[0])
    eight_bit = drafter(learned, params, shape)
    assert tokens_per_step(eight_bit, 0) > tokens_per_step(drafter(learned, whole[0]), 0) - 0.15


def check_features_are_the_target_s(module, learned, params):
    """Behind generation, the drafter's cache is what prefill makes of the text that stands.

    Of rejected drafts it would hold the features of another text.
    """
    ours = module.block(TARGET, SHAPE, params, learned[1])
    prompts = jnp.asarray(np.random.default_rng(4).integers(4, V, (4, 6)), jnp.int32)
    out = jaxspec.generate(
        TARGET, prompts, drafter=ours, num_draft_tokens=K, max_new_tokens=24, eos_ids=(),
        key=jax.random.key(1), return_state=True,
    )  # fmt: skip
    text = jnp.concatenate([prompts, out.tokens], axis=1)
    batch, length = text.shape
    none = jnp.zeros((batch,), jnp.int32)
    output, _ = TARGET.apply(
        PARAMS, text, TARGET.init_cache(batch, length, length), start=none, hidden_layers=LAYERS
    )
    drafter = block.block(TARGET, SHAPE, params, learned[1])
    expected = drafter.prefill(drafter.init(batch, 256), text, output.hidden, none, none)
    for ours, wanted in zip(out.state.state.drafter.keys, expected.keys, strict=True):
        np.testing.assert_allclose(ours[..., : length - 1], wanted[..., : length - 1], atol=2e-4)
    return out.stats


def test_features_of_rejected_drafts_are_replaced(learned, whole):
    stats = check_features_are_the_target_s(block, learned, whole[0])
    assert np.all(stats.num_draft_tokens - stats.num_accepted_draft_tokens >= 3)
    assert np.all(stats.num_accepted_draft_tokens >= 3)


@pytest.mark.parametrize(
    "patch",
    [
        ("outcome.hidden, outcome.start)", "outcome.hidden, outcome.start + 1)"),
        ("return self._take_in(state, outcome.hidden, outcome.start)", "return state"),
        (  # only behind what was accepted
            "outcome.hidden, outcome.start)",
            "outcome.hidden, outcome.start + outcome.num_accepted)",
        ),
    ],
)
def test_planted_bugs_in_commit(learned, whole, patch):
    module = mutant("jaxspec_models.drafters.block", patch)
    with pytest.raises(AssertionError):
        check_features_are_the_target_s(module, learned, whole[0])


def check_it_is_a_drafter(module, learned, params, temperature):
    """Rows, padding and pauses change nothing, and q is what was drawn from.

    Of so many rows, since each has a cache.
    """
    report = check_drafter(
        module.block(TARGET, SHAPE, params, learned[1]), TARGET, num_draft_tokens=K,
        sampling=jaxspec.Sampling(temperature=temperature), num_samples=4_000,
    )  # fmt: skip
    report.assert_passed()
    return report


@pytest.mark.exactness
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_it_is_a_drafter(learned, whole, temperature):
    report = check_it_is_a_drafter(block, learned, whole[0], temperature)
    assert report.is_deterministic == (temperature == 0)
    assert 2.5 < report.mean_length <= K  # less where a text ends


@pytest.mark.exactness
@pytest.mark.parametrize(
    "patch",
    [
        ("choose(slots, scores)", "choose(slots, 1.3 * scores)"),  # q is not what is drawn from
        ("choose(slots, scores)", "choose(slots * 0, scores)"),  # the drafts share their numbers
    ],
)
def test_planted_bugs_in_drawing(learned, whole, patch):
    module = mutant("jaxspec_models.drafters.block", patch)
    with pytest.raises(AssertionError):
        check_it_is_a_drafter(module, learned, whole[0], 1.0)


def test_confidence_stops_drafts(learned, whole):
    free = drafter(learned, whole[0])
    shy = dataclasses.replace(free, stop_below=jnp.float32(0.3))
    prompts = jnp.asarray(np.random.default_rng(3).integers(4, V, (8, 6)), jnp.int32)

    def write(drafter):
        return jaxspec.generate(
            TARGET, prompts, drafter=drafter, num_draft_tokens=K, max_new_tokens=32, eos_ids=(),
            sampling=jaxspec.Sampling(temperature=0),
        )  # fmt: skip

    one, other = write(free), write(shy)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    drafted = np.sum(one.stats.num_draft_tokens), np.sum(other.stats.num_draft_tokens)
    assert 0 < drafted[1] < drafted[0]
    rates = [
        np.sum(x.stats.num_accepted_draft_tokens) / np.sum(x.stats.num_draft_tokens)
        for x in (one, other)
    ]
    assert rates[1] > rates[0] + 0.05
