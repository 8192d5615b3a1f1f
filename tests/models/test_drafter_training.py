"""Training goes on bit for bit where it was killed, learns answers only, and tells how it went."""

import csv
import dataclasses
import os
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import trained

import jaxspec
from jaxspec_models import drafter_training
from jaxspec_models.drafters import block, learning

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
    first, last = lines[0], lines[-1]
    assert last["held_out_loss"] < first["held_out_loss"]
    for kind in ("greedy", "sampled"):
        assert all(1 < line[f"tokens_per_step_{kind}"] < 1 + K for line in lines)
    for kind in ("acceptance", "agreement"):
        assert all(0 < last[f"{kind}_{k + 1}"] < 1 for k in range(K))


def test_the_calibration_error_is_that_of_the_last_weights(learned, whole):
    """Against sums over tenths that are told apart by NumPy."""
    model = nnx.merge(block.abstract(SHAPE)[0], nnx.State(whole[0]))
    predicted, accepted = [], []
    for part in learned.texts["block"].evaluation():
        part = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:]), part)
        logits, confidence = jax.jit(lambda x: block.forward(model, x, learned.frozen))(part)
        slots, exists = learning.slots_of(part, K)
        log_p = learning.target_laws(part, learned.frozen)  # of all tokens
        p = np.exp(np.asarray(log_p))[np.arange(len(slots))[:, None, None], slots]
        q = np.asarray(jax.nn.softmax(logits))
        accepted.append(np.minimum(p, q).sum(-1)[exists])
        predicted.append(np.asarray(jax.nn.sigmoid(confidence))[exists])
    predicted, accepted = np.concatenate(predicted), np.concatenate(accepted)
    tenths = np.digitize(predicted, np.arange(1, 10) / 10)
    error = sum(abs(np.sum((predicted - accepted)[tenths == i])) for i in range(10))
    logged = log(whole[1])[-1]["calibration_error"]
    assert 0 < logged < 0.5
    # One prediction that rounding carries over an edge takes its own error, below 1, out of one sum
    # and into another.
    np.testing.assert_allclose(logged, error / len(predicted), rtol=1e-3, atol=2 / len(predicted))


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
    slots, exists = learning.slots_of(part, K)
    for row in range(len(part.tokens)):
        length = int(np.max(np.nonzero(part.tokens[row])[0], initial=-1)) + 1
        assert part.length[row] == length
        anchors = part.anchors[row][part.anchors[row] < length]
        assert len(set(anchors)) == len(anchors) == min(24, max(length - 6, 0))
        for block_slots, block_exists in zip(slots[row], exists[row], strict=True):
            for slot, is_there in zip(block_slots, block_exists, strict=True):
                if is_there:  # the token before the draft, and the draft
                    assert 5 <= slot < length - 1


def laws(seed, *shape):
    rng = np.random.default_rng(seed)
    return jax.nn.log_softmax(jnp.asarray(rng.normal(size=shape), jnp.float32))


def test_the_objective_is_a_weighted_sum():
    log_q, log_p = laws(0, 1, 1, 2, 5), laws(1, 1, 1, 2, 5)
    judged = learning.judge(log_q, log_p, jnp.zeros((1, 1, 2), jnp.int32))
    objective = learning.Objective(cross_entropy=0.5, total_variation=2.0)
    p, q = (np.exp(np.asarray(x, np.float64))[0, 0] for x in (log_p, log_q))
    accepted = np.minimum(p, q).sum(-1)
    np.testing.assert_allclose(judged.accepted[0, 0], accepted, rtol=1e-5)
    each = 0.5 * -np.sum(p * np.log(q), -1) + 2.0 * (1 - accepted)
    for weights in ([1, 0], [1, 0.25], [0, 0.25]):
        found = learning.totals(
            objective, log_q, log_p, judged, jnp.asarray([[weights]], jnp.float32)
        )
        np.testing.assert_allclose(found.loss, np.dot(weights, each), rtol=1e-5)
        np.testing.assert_allclose(found.weight, np.sum(weights))
    broken = log_q.at[0, 0, 1].set(jnp.nan)
    found = learning.totals(
        objective, broken, log_p, learning.judge(broken, log_p, jnp.zeros((1, 1, 2), jnp.int32)),
        jnp.asarray([[[1.0, 0.0]]]),
    )  # fmt: skip
    np.testing.assert_allclose(found.loss, each[0], rtol=1e-5)  # nothing of what is not learned


def part_of(temperatures, **changes):
    batch = len(temperatures)
    empty = learning.Part(*(jnp.zeros((batch, 1)) for _ in learning.Part._fields))
    return empty._replace(temperature=jnp.asarray(temperatures, jnp.float32), **changes)


def test_tokens_emitted_in_sampled_texts_are_exact_on_average():
    """Over all texts of two tokens, each as often as p draws it: 1 + a + a b, a = Σ min(p, q)."""
    log_p, log_q = laws(2, 2, 3), laws(3, 2, 3)
    p, q = np.exp(np.asarray(log_p, np.float64)), np.exp(np.asarray(log_q, np.float64))
    mean = 0.0
    for x in range(3):
        for y in range(3):
            judged = learning.judge(log_q, log_p, jnp.asarray([x, y]))
            _, emitted = learning.rounds_along(judged.ratio[None, None], jnp.ones((1, 1, 2), bool))
            mean += p[0, x] * p[1, y] * float(emitted[0, 0])
    first, second = np.minimum(p, q).sum(-1)
    np.testing.assert_allclose(mean, 1 + first + first * second, rtol=1e-5)


def test_rounds_are_those_that_are_walked():
    """Every way through a stretch, followed one by one, with its probability."""
    passes = np.random.default_rng(0).uniform(0.1, 1.0, (2, 7, 2)).astype(np.float32)
    exists = np.ones((2, 7, 2), bool)
    exists[1, 5:] = [[True, False], [False, False]]
    begins, emitted = learning.rounds_along(jnp.asarray(passes), jnp.asarray(exists))
    wanted = np.zeros((2, 7))

    def walk(row, at, mass):
        if at >= 7:
            return
        wanted[row, at] += mass
        chances = np.cumprod(passes[row, at] * exists[row, at])
        exactly = -np.diff(np.concatenate([[1.0], chances, [0.0]]))
        np.testing.assert_allclose(emitted[row, at], exactly @ [1, 2, 3], rtol=1e-5)
        for accepted, chance in enumerate(exactly):
            walk(row, at + 1 + accepted, mass * chance)

    for row in range(2):
        walk(row, 0, 1.0)
    np.testing.assert_allclose(begins[:, 2:], wanted[:, 2:], rtol=1e-5)
    np.testing.assert_array_equal(begins[:, :2], 0)


def with_other_settings(learned, settings):
    texts = learned.texts["block"]
    return drafter_training.Texts(texts._found, texts._read, settings)


def test_tokens_a_step_are_those_of_generate(learned, whole):
    """Greedily, along whole answers: the rounds that the drafter goes through when it writes."""
    every = trained.with_settings(anchors_a_text=128, tokens_a_part=4096)
    drafter = trained.drafter(learned, whole[0])
    part = next(iter(with_other_settings(learned, every).evaluation()))
    part = jax.tree.map(lambda x: jnp.asarray(x[0]), part)
    logits, _ = block.forward(drafter.model(), part, learned.frozen)
    slots, exists = learning.slots_of(part, K)
    judged = learning.judge(
        jax.nn.log_softmax(logits), learning.target_laws(part, learned.frozen, slots),
        learning.next_tokens(part, learned.frozen)[jnp.arange(len(slots))[:, None, None], slots],
    )  # fmt: skip
    passes = np.asarray(judged.is_same & exists)
    begins, _ = learning.rounds_along(jnp.asarray(passes, jnp.float32), exists)
    checked = 0
    for row in np.flatnonzero((np.asarray(part.temperature) == 0) & (np.asarray(part.length) > 0)):
        first, length = int(part.first[row]), int(part.length[row])
        at, starts = first, []
        while at < length - 1:
            starts.append(at - first)
            at += 1 + int(np.cumprod(passes[row, at - first]).sum())
        found = np.flatnonzero(np.asarray(begins[row, : length - 1 - first]))
        assert found.tolist() == [start for start in starts if start >= K]
        out = jaxspec.generate(
            trained.TARGET, part.tokens[row : row + 1, : first + 1], drafter=drafter,
            num_draft_tokens=K, max_new_tokens=length - 1 - first,
            sampling=jaxspec.Sampling(temperature=0),
        )  # fmt: skip
        assert int(out.stats.num_spec_steps[0]) == len(starts)
        checked += 1
    assert checked == 2


def test_anchors_of_an_evaluation_stand_behind_one_another(learned):
    settings = trained.with_settings(anchors_a_text=8)
    starts = set()
    for part in with_other_settings(learned, settings).evaluation():
        for anchors, first, length in zip(
            part.anchors.reshape(-1, 8), part.first.ravel(), part.length.ravel(), strict=True
        ):
            real = anchors[anchors < length]
            if length == 0:
                continue
            assert len(real) == min(8, length - 1 - first)
            assert np.all(np.diff(real) == 1)
            assert real[0] >= first
            starts.add(int(real[0] - first))
    assert len(starts) > 1


def test_metrics_by_hand():
    """Greedy rows count what agrees from the left, and blocks that are cut do not count."""
    is_same = jnp.asarray([[[1, 1, 0], [0, 1, 1]], [[1, 1, 1], [1, 0, 1]]], bool)
    exists = jnp.asarray([[[1, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 1, 0]]], bool)
    half = jnp.full((2, 2, 3), 0.5)
    anchors = jnp.asarray([[3, 9], [5, 1]])
    found = learning.metrics(
        part_of([0.0, 0.0], anchors=anchors, length=jnp.asarray([50, 50])),
        learning.Judged(half, is_same, half), exists,
        predicted=jnp.full((2, 2, 3), 10.0),
    )  # fmt: skip
    # Of texts whose anchors do not stand behind one another, nothing is told of rounds.
    assert [float(x) for x in found["tokens_per_step_greedy"]] == [0, 0]
    np.testing.assert_array_equal(found["agreement"][0], [3, 3, 2])
    np.testing.assert_array_equal(found["agreement"][1], [4, 4, 3])
    np.testing.assert_allclose(found["acceptance"][0], [2, 2, 1.5])
    np.testing.assert_allclose(found["accepted"][0], [0] * 9 + [5.5])
    np.testing.assert_allclose(found["predicted"][0], [0] * 9 + [11], rtol=1e-3)
    # A token that cannot be drafted: never accepted, and where p leaves more than its best, wrong.
    log_p = jnp.log(jnp.asarray([0.3, 0.1]))
    judged = learning.judge(jnp.log(jnp.asarray([0.9, 0.1])), log_p, jnp.int32(2))
    assert not judged.is_same
    assert float(judged.ratio) == 0


def test_agreement_is_of_the_likeliest_tokens():
    """Laws of more tokens than one block has; half of them have the same peak."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4, 700)).astype(np.float32)
    logits[:, :, :, 5] += 20.0  # no mass outside counts against it
    logits[0, :, 1:3, 680] += 40.0
    log_q, log_p = jax.nn.log_softmax(jnp.asarray(logits))
    judged = learning.judge(log_q, log_p, jnp.zeros((3, 4), jnp.int32))
    expected = np.argmax(logits[0], -1) == np.argmax(logits[1], -1)
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(judged.is_same, expected)


def test_rounds_are_told_apart_by_temperature():
    """One draft a round: [right, right, wrong, right, right] greedily, and 1/2 each if sampled."""
    right = jnp.asarray([[1, 1, 0, 1, 1]] * 3, bool)[..., None]
    half = jnp.full((3, 5, 1), 0.5)
    anchors = jnp.arange(5)[None] + jnp.asarray([[2], [7], [4]])
    anchors = anchors.at[2, 1].set(3)  # another order: no stretch
    exists = jnp.ones((3, 5, 1), bool).at[:2, 4].set(False)
    found = learning.metrics(
        part_of([0.0, 1.0, 0.0], anchors=anchors, length=jnp.asarray([8, 50, 50])),
        learning.Judged(half, right, half), exists,
    )  # fmt: skip
    # Greedily, rounds begin at 0, 2 and 3. That at 0 is left out, and at 4 none would be whole.
    assert [float(x) for x in found["tokens_per_step_greedy"]] == [1 + 2, 2]
    begins = np.array([1, 0.5, 0.75, 0.625, 0.6875])[1:4].sum()
    np.testing.assert_allclose(found["tokens_per_step_sampled"], [1.5 * begins, begins])


def test_bfloat16_products_learn_as_well(learned, whole, tmp_path):
    trained.train(learned, tmp_path, settings=trained.with_settings(dtype="bfloat16", num_steps=40))
    ours, theirs = log(tmp_path)[-1], log(whole[1])[-1]
    assert ours["held_out_loss"] != theirs["held_out_loss"]
    np.testing.assert_allclose(ours["held_out_loss"], theirs["held_out_loss"], rtol=0.02)


def test_four_devices_train_as_one(tmp_path):
    """In a process of its own: devices are counted when JAX starts."""
    code = """
    import pathlib, sys
    sys.path[:0] = sys.argv[2:]
    import chex, jax, numpy as np
    from support import trained

    assert jax.device_count() == 4
    root = pathlib.Path(sys.argv[1])
    learned = trained.write(root)
    assert learned.texts["block"].step(0).tokens.shape[1] == 8  # rows, two for each device

    def train(number, **options):
        settings = trained.with_settings(num_steps=3, num_devices=number)
        return trained.train(learned, root / str(number), settings=settings, **options)

    class Killed(BaseException):
        pass

    def kill(step, metrics):
        if step == 2:
            raise Killed

    try:
        train(4, on_step=kill)
    except Killed:
        pass
    seen = []
    found = train(1), train(4, on_step=lambda step, metrics: seen.append(step))
    assert seen == [2, 3], seen  # it went on
    assert len(jax.tree.leaves(found[1])[0].sharding.device_set) == 4
    chex.assert_trees_all_close(*map(jax.device_get, found), rtol=1e-3, atol=1e-5)
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), *sys.path],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_more_devices_than_there_are(learned, tmp_path):
    with pytest.raises(ValueError, match="num_devices is 1000, and there are"):
        trained.train(learned, tmp_path, settings=trained.with_settings(num_devices=1000))
