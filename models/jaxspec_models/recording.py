"""Features recorded while the answers are written: the target computes them on the way anyway.

Computed afterwards (`features.write_features`) they cost as much again as writing the answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import jaxspec
from jaxspec import pytree
from jaxspec.types import Context, Draft, Outcome, Signals
from jaxspec_models import answers, features, layers, llama
from jaxspec_models.files import write_atomically

Array: TypeAlias = jax.Array


@pytree.dataclass
class Listener:
    """A drafter that drafts nothing and keeps the target's hidden states.

    Its state is uint16[B, 1, S, L · D], bits of bfloat16; that of the last token, which no forward
    was fed, stays what it is.

    Attributes:
      hidden_layers: which; numbered as for `LanguageModel.apply`.
      hidden_size: D.
    """

    hidden_layers: tuple[int, ...] = pytree.static()
    hidden_size: int = pytree.static()

    def init(self, batch: int, capacity: int) -> Array:
        """Nothing heard yet."""
        width = len(self.hidden_layers) * self.hidden_size
        return jnp.zeros((batch, 1, capacity, width), jnp.uint16)

    def prefill(
        self,
        state: Array,
        tokens: Array,
        hidden: tuple[Array, ...],
        start: Array,
        num_new: Array,
    ) -> Array:
        """Keeps what the target made of a chunk; padding is overwritten later."""
        del tokens, num_new
        return _kept(state, hidden, start)

    def propose(
        self,
        keys: Array,
        state: Array,
        context: Context,
        num_draft: Array,
        keep_drafting: Callable[[Signals], Array],
    ) -> tuple[Draft, Array]:
        """Proposes nothing."""
        del context, keep_drafting
        return Draft(jnp.zeros(keys.shape, jnp.int32), None, jnp.zeros_like(num_draft)), state

    def commit(self, state: Array, outcome: Outcome) -> Array:
        """Keeps what the target made of the pending token."""
        return _kept(state, outcome.hidden, outcome.start)


def _kept(state: Array, hidden: tuple[Array, ...], start: Array) -> Array:
    bits = features.as_bits(hidden)
    new = bits.reshape(*bits.shape[:2], -1)[:, None]
    return layers.write_slots(state, new, start, axis=2)


class Recorder:
    """Keeps features for `answers.write_answers`, in the form of `features.write_features`.

    Args:
      model: the target.
      directory: where to; made if need be.
      layers: hidden states to keep, as for `features.write_features`.
      weights: how the target's weights are kept, such as "int8".

    Raises:
      ValueError: the model is no Llama of `jaxspec_models`.
    """

    def __init__(
        self,
        model: jaxspec.LanguageModel,
        directory: str | os.PathLike[str],
        *,
        layers: Sequence[int],
        weights: str,
    ):
        self._model, self._directory = model, Path(directory)
        self._layers, self._weights = tuple(layers), weights
        self.listener = Listener(self._layers, llama.config_of(model).hidden_size)

    def begin(self, settings: dict[str, Any]) -> None:
        """Notes the answers' settings, or compares them.

        Raises:
          ValueError: the directory holds features of others.
        """
        features.begin(self._directory, settings, layers=self._layers, weights=self._weights)

    def heard(self, generation: jaxspec.Generation, num_tokens: Sequence[int]) -> list[np.ndarray]:
        """What the listener heard of the first rows, of so many tokens: uint16[N, L, D] each."""
        assert generation.state is not None  # `return_state` was asked for
        rows = np.asarray(generation.state.state.drafter)[:, 0]
        rows = rows.reshape(*rows.shape[:2], len(self._layers), -1)
        # Copies: the batch's own buffer is not kept for the sake of its rows.
        return [rows[i, :count].copy() for i, count in enumerate(num_tokens)]

    def write(
        self, name: str, found: Sequence[answers.Answer], hidden: Sequence[np.ndarray]
    ) -> None:
        """Writes a shard, at once and whole."""
        columns = features.columns(self._model, found, hidden, self._layers)
        write_atomically(self._directory / name, safetensors.numpy.save(columns))
