"""How the outermost programs are compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.programs import Program


@pytest.fixture
def program():
    return Program(lambda x, *, power: x**power, static_argnames="power")


def test_it_is_the_function(program):
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(program(x, power=2), x**2)
    np.testing.assert_array_equal(jax.jit(lambda x: program(x, power=2) + 1.0)(x), x**2 + 1)
    np.testing.assert_array_equal(jax.vmap(lambda x: program(x, power=3))(x), x**3)
    # Inside a program whose arguments it does not take, it is part of that program all the same.
    np.testing.assert_array_equal(jax.jit(lambda: program(x, power=2))(), x**2)
    np.testing.assert_array_equal(
        jax.lax.fori_loop(0, 2, lambda _, x: program(x, power=2), x), x**4
    )


def test_it_counts_its_programs(program):
    x = jnp.arange(3.0)
    for power in (2, 2, 3):
        program(x, power=power)
    assert program.num_compiled() == 2


def test_options_of_the_cpu_are_for_the_outermost_program_alone(program):
    """A nested program with options would be an error of JAX's."""
    assert jax.default_backend() == "cpu"
    program(jnp.arange(3.0), power=2)
    assert (program.outermost._cache_size(), program.nested._cache_size()) == (1, 0)
    with pytest.raises(ValueError, match="compiler_options"):
        jax.jit(lambda x: program.outermost(x, power=2))(jnp.arange(3.0))
    jax.jit(lambda x: program(x, power=2))(jnp.arange(3.0))
    assert program.outermost._cache_size() == 1
