"""Steps: what optax would do with the whole batch, however it is split, and bit-equal again."""

import os
import pathlib
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxspec.training import steps


def loss(params, part, frozen):
    """Weighted squares of a linear map; positions have weights of their own."""
    error = (part["x"] @ params["w"] + params["b"][None] - part["y"]) ** 2
    error = jnp.sum(error, axis=1) * frozen
    return steps.Totals(
        jnp.sum(error * part["weight"]),
        jnp.sum(part["weight"]),
        {"first": (jnp.sum(part["weight"] * part["x"][:, 0]), jnp.sum(part["weight"]))},
    )


def start():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        "b": jnp.zeros((2,), jnp.float32),
    }


def batch(seed=1, size=24):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(size, 3)).astype(np.float32),
        "y": rng.normal(size=(size, 2)).astype(np.float32),
        "weight": (rng.random(size) < 0.5).astype(np.float32) * 2,
    }


def update(tx, *args):
    """By itself optax does not keep to the strictness of these tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return tx.update(*args)


def split(batch, parts):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


FROZEN = np.float32(0.7)


def test_a_step_is_the_optimiser_s_of_the_mean():
    tx = steps.optimizer(num_steps=20, num_warmup_steps=2, learning_rate=0.1)
    params, state = start(), steps.init(start(), tx)
    opt_state = tx.init(params)
    step = steps.make_step(loss, tx)
    for seed in range(5):
        data = batch(seed)

        def mean(params, data=data):
            totals = loss(params, data, FROZEN)
            return totals.loss / totals.weight

        value, gradient = jax.value_and_grad(mean)(params)
        updates, opt_state = update(tx, gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, split(data, 1), FROZEN)
        chex.assert_trees_all_close(state.params, params, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
        np.testing.assert_allclose(
            metrics["first"], np.average(data["x"][:, 0], weights=data["weight"]), rtol=1e-4
        )
    assert int(state.step) == 5


@pytest.mark.parametrize("parts", [2, 3, 24])
def test_parts_change_nothing(parts):
    """Also where a part has no weight at all: positions count, not parts."""
    tx = optax.sgd(0.1)
    step = steps.make_step(loss, tx)
    whole, metrics = step(steps.init(start(), tx), split(batch(), 1), FROZEN)
    state, same = step(steps.init(start(), tx), split(batch(), parts), FROZEN)
    chex.assert_trees_all_close(state.params, whole.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, same, rtol=1e-5)


def test_a_batch_without_weight_moves_nothing():
    tx = optax.sgd(0.1)
    data = batch() | {"weight": np.zeros(24, np.float32)}
    state, metrics = steps.make_step(loss, tx)(steps.init(start(), tx), split(data, 2), FROZEN)
    chex.assert_trees_all_equal(state.params, start())
    chex.assert_tree_all_finite(metrics)


def test_the_first_weights_may_be_used_on():
    """The steps reuse the state's memory, and not what it was made of."""
    tx, params = optax.sgd(0.1), start()
    steps.make_step(loss, tx)(steps.init(params, tx), split(batch(), 1), FROZEN)
    chex.assert_trees_all_equal(params, start())


def test_steps_are_bit_equal_again():
    tx = steps.optimizer(num_steps=20)
    step = steps.make_step(loss, tx)

    def run():
        state = steps.init(start(), tx)
        for seed in range(4):
            state, _ = step(state, split(batch(seed), 3), FROZEN)
        return state

    chex.assert_trees_all_equal(run(), run())


def test_vectors_are_not_decayed_and_the_rate_rises_and_falls():
    tx = steps.optimizer(num_steps=100, num_warmup_steps=50, learning_rate=1e-2, weight_decay=0.1)
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones((2,))}
    opt_state, none = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    sizes = []
    for _ in range(100):
        updates, opt_state = update(tx, none, opt_state, params)
        assert not np.any(updates["b"])
        sizes.append(-float(updates["w"][0, 0]))
    np.testing.assert_allclose(sizes[0], 0, atol=1e-9)
    assert np.argmax(sizes) == 10  # a tenth of so few steps
    np.testing.assert_allclose(max(sizes), 1e-2 * 0.1, rtol=1e-4)
    assert sizes[-1] < 0.02 * max(sizes)


@pytest.mark.parametrize("change", [{"num_steps": 0}, {"learning_rate": 0.0}, {"max_norm": -1.0}])
def test_numbers_that_are_not_positive(change):
    with pytest.raises(ValueError, match="must be positive"):
        steps.optimizer(**{"num_steps": 10, **change})


def test_four_devices_train_as_one():
    """In a process of its own: devices are counted when JAX starts."""
    code = """
    import sys
    sys.path[:0] = sys.argv[1:]
    import chex, jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from test_steps import FROZEN, batch, loss, split, start
    from jaxspec.training import steps

    assert len(jax.devices()) == 4
    mesh = Mesh(np.array(jax.devices()), ("data",))
    tx = steps.optimizer(num_steps=10, num_warmup_steps=1)

    def train(place, place_state):
        step = steps.make_step(loss, tx)
        state = place_state(steps.init(start(), tx))
        for seed in range(3):
            state, metrics = step(state, place(split(batch(seed), 3)), FROZEN)
        return state, metrics

    data, everywhere = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P())
    many, many_metrics = train(
        lambda parts: jax.device_put(parts, data), lambda state: jax.device_put(state, everywhere)
    )
    assert len(many.params["w"].sharding.device_set) == 4
    one, one_metrics = train(lambda parts: parts, lambda state: state)
    chex.assert_trees_all_close(many.params, one.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(many_metrics, one_metrics, rtol=1e-5)
    """

    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(pathlib.Path(__file__).parent)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
