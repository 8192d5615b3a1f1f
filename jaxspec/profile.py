"""What the parts of a round cost: numbers that policies weigh."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxspec import pytree

Array: TypeAlias = jax.Array


@pytree.dataclass
class Profile:
    """The costs of one round, measured by `jaxspec.measure_costs`. A registered pytree.

    Any unit of time serves: policies weigh costs against each other.

    Attributes:
      verify: f32[K + 1], seconds of a target forward over 1 … K + 1 tokens of every row, its
        verification included; v(m) = verify[m - 1] / verify[0].
      draft: f32[], seconds of drafting one token for every row; c = draft / verify[0].
      overhead: f32[], seconds of what else a round does; o = overhead / verify[0].

    References:
      Leviathan et al., arXiv 2211.17192, section 3.4 (c); a target forward is not free of the
      number of its tokens, hence v.

    Example:
      >>> profile = Profile(jnp.array([10.0, 11.0, 12.0]), jnp.float32(1.0), jnp.float32(0.5))
      >>> profile.round_costs().tolist()
      [10.5, 12.5, 14.5]
    """

    verify: Array
    draft: Array
    overhead: Array

    def round_costs(self) -> Array:
        """f32[K + 1], seconds of a round whose longest draft has 0 … K tokens."""
        lengths = jnp.arange(self.verify.shape[0], dtype=jnp.float32)
        return lengths * self.draft + self.verify + self.overhead
