"""Training goes on bit for bit where it was killed, learns answers only, and tells how it went."""

import csv
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import trained

from jaxspec_models import drafter_training
from jaxspec_models.drafters import parts

K, SHAPE, SETTINGS = trained.K, trained.SHAPES["block"], trained.SETTINGS


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return trained.write(tmp_path_factory.mktemp("data"))


def log(directory):
    with (directory / "log.csv").open() as file:
        return [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(learned, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return trained.train(learned, directory), directory


def test_the_log_tells_how_it_went(whole):
    lines = log(whole[1])
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]
    for kind in ("acceptance", "agreement"):
        rates = [lines[-1][f"{kind}_{k + 1}"] for k in range(K)]
        expected = 1 + rates[0] + rates[0] * rates[1] + rates[0] * rates[1] * rates[2]
        np.testing.assert_allclose(lines[-1][f"{kind}_tokens_per_step"], expected, rtol=1e-4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [7, 25])
def test_a_killed_training_goes_on_bit_for_bit(learned, whole, tmp_path, after):
    def kill(step, metrics):
        del metrics
        if step == after:
            raise Killed

    with pytest.raises(Killed):
        trained.train(learned, tmp_path, on_step=kill)
    seen = []
    params = trained.train(learned, tmp_path, on_step=lambda step, metrics: seen.append(step))
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
    params = trained.train(learned, whole[1], on_step=lambda step, metrics: seen.append(step))
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
            change.get("shape", SHAPE), whole[0], learned.frozen, learned.texts["block"],
            change.get("settings", SETTINGS), whole[1],
        )  # fmt: skip
    assert (whole[1] / "log.csv").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_it(learned, tmp_path):
    frozen = learned.frozen
    broken = learned._replace(frozen=frozen._replace(head=frozen.head.at[0, 0].set(jnp.nan)))
    with pytest.raises(FloatingPointError, match="step 1 is not finite"):
        trained.train(broken, tmp_path)
    assert not (tmp_path / "log.csv").exists()


def test_nothing_held_out_is_learned(learned):
    texts = learned.texts["block"]
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


def test_answer_tokens_only_are_learned(learned):
    texts = learned.texts["block"]
    part = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), texts.step(0))
    slots, exists = parts.slots_of(part, K)
    for row in range(len(part.tokens)):
        length = int(np.max(np.nonzero(part.tokens[row])[0], initial=-1)) + 1
        assert part.length[row] == length
        anchors = part.anchors[row][part.anchors[row] < length]
        assert len(set(anchors)) == len(anchors) == min(24, max(length - 6, 0))
        for block_slots, block_exists in zip(slots[row], exists[row], strict=True):
            for slot, is_there in zip(block_slots, block_exists, strict=True):
                if is_there:  # the token before the draft, and the draft
                    assert 5 <= slot < length - 1


def test_slots_count_as_the_objective_says():
    """One slot learned: its own loss; of two, the later one weighs less."""
    rng = np.random.default_rng(0)
    log_q, log_p = (
        jax.nn.log_softmax(jnp.asarray(rng.normal(size=(1, 1, 2, 5)), jnp.float32)) for _ in "qp"
    )
    objective = parts.Objective(cross_entropy=0.5, total_variation=2.0, slot_decay=0.25)
    p, q = (np.exp(np.asarray(x, np.float64))[0, 0] for x in (log_p, log_q))
    each = 0.5 * -np.sum(p * np.log(q), -1) + 2.0 * (1 - np.minimum(p, q).sum(-1))
    for learned, weights in (([1, 0], [1, 0]), ([1, 1], [1, 0.25]), ([0, 1], [0, 0.25])):
        found = parts.totals(objective, log_q, log_p, jnp.asarray([[learned]], bool))
        np.testing.assert_allclose(found.loss, np.dot(weights, each), rtol=1e-5)
        np.testing.assert_allclose(found.weight, np.sum(weights))
        np.testing.assert_allclose(
            found.metrics["acceptance"][0], learned * np.minimum(p, q).sum(-1), rtol=1e-5
        )
    broken = log_q.at[0, 0, 1].set(jnp.nan)
    found = parts.totals(objective, broken, log_p, jnp.asarray([[[True, False]]]))
    np.testing.assert_allclose(found.loss, each[0], rtol=1e-5)  # nothing of what is not learned
