"""Strategies as pytrees: the structure knows the class, so that jit never mixes two programs."""

import jax
import jax.numpy as jnp
import pytest

from jaxspec import drafters, policies, pytree, states, verifiers
from jaxspec.verifiers.greedy import Greedy
from jaxspec.verifiers.rejection import Rejection


def test_structures_of_classes_with_equal_fields_differ():
    """`register_dataclass` fails this: its structures compare equal, their hashes apart."""
    greedy, rejection = map(jax.tree.structure, (Greedy(), Rejection()))
    assert greedy != rejection
    assert greedy == jax.tree.structure(Greedy())
    assert hash(greedy) == hash(jax.tree.structure(Greedy()))


@pytest.mark.parametrize(
    "strategy",
    [
        verifiers.greedy(),
        verifiers.rejection(),
        policies.fixed(3),
        policies.heuristic(2),
        drafters.prompt_lookup(max_ngram=2),
    ],
)
def test_strategies_survive_a_round_trip(strategy):
    leaves, structure = jax.tree.flatten(strategy)
    assert jax.tree.unflatten(structure, leaves) == strategy
    doubled = jax.tree.map(lambda x: 2 * x, strategy)
    assert type(doubled) is type(strategy)
    assert [2 * x for x in leaves] == jax.tree.leaves(doubled)


def test_static_fields_belong_to_the_structure():
    short, long = drafters.prompt_lookup(2), drafters.prompt_lookup(3)
    assert jax.tree.structure(short) != jax.tree.structure(long)
    assert jax.tree.leaves(short) == []


def test_hyperparameters_are_leaves_and_never_retrace():
    traces = []

    @jax.jit
    def length(policy):
        traces.append(1)
        return policy.num_draft(policy.init(2))

    assert length(policies.fixed(3)).tolist() == [3, 3]
    assert length(policies.fixed(5)).tolist() == [5, 5]
    assert len(traces) == 1


def test_key_paths_name_the_fields():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(policies.fixed(3))]
    assert paths == [".length"]


def test_frozen():
    @pytree.dataclass
    class Point:
        x: jax.Array

    with pytest.raises(AttributeError):
        Point(jnp.ones(2)).x = jnp.zeros(2)


def test_the_engine_tells_strategies_of_any_registration_apart():
    """Also a user's strategies, registered with JAX's own dataclass registration."""
    import dataclasses

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Mine(Greedy):
        pass

    def structure(verifier):
        outputs, kinds = states.Outputs(), (type(None), type(verifier), policies.fixed)
        return jax.tree.structure(states.Engine(None, None, verifier, None, 0, outputs, kinds))

    assert structure(Mine()) != structure(verifiers.greedy())
