"""What trained drafters share: shapes, vocabularies, the target's tables, weights.

All of them share the target's embeddings and the rows of its vocabulary head that belong to the
tokens they can draft: neither is trained, neither is stored with the drafter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxspec
from jaxspec_models import layers, llama, quantization

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """The shape of a trained drafter; hashable, compares by value.

    Attributes:
      target: the target's shape, whose width, heads and rotary positions it shares.
      tapped_layers: the target's hidden states it reads, numbered as for `LanguageModel.apply`.
      num_draft_tokens: K, the most drafts of a round.
      draft_vocab_size: W, tokens it can draft.
      num_hidden_layers: of its own.
      intermediate_size: width inside its MLPs.
      dtype: "float32" or "bfloat16", of weights and cache.
      quantization: None or "int8", of the products' weights.
    """

    method: ClassVar[str]

    target: llama.LlamaConfig
    tapped_layers: tuple[int, ...] = ()
    num_draft_tokens: int = 6
    draft_vocab_size: int = 8192
    num_hidden_layers: int = 1
    intermediate_size: int = 1024
    dtype: str = "float32"
    quantization: str | None = None

    @property
    def layer(self) -> llama.LlamaConfig:
        """The shape of its layers."""
        return dataclasses.replace(
            self.target,
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=self.intermediate_size,
            attention_bias=False,
            mlp_bias=False,
            dtype=self.dtype,
            quantization=self.quantization,
        )


# ---------------------------------------------------------------------------------------------
# Vocabularies.


def draft_vocabulary(
    texts: list[np.ndarray], size: int, *, vocab_size: int, always: tuple[int, ...] = ()
) -> np.ndarray:
    """The tokens that a drafter of a reduced vocabulary can propose.

    Args:
      texts: i32[N] each, what the target wrote.
      size: how many.
      vocab_size: V of the target.
      always: ids that are taken however seldom they are, such as those that end a text.

    Returns:
      i32[size], the most frequent ids of the texts in rising order; of equally frequent ones, the
      lower.

    Raises:
      ValueError: more are asked for than there are.

    Example:
      >>> draft_vocabulary([np.array([5, 3, 5]), np.array([3, 1])], 3, vocab_size=8, always=(7,))
      array([3, 5, 7], dtype=int32)
    """
    if not 0 < size <= vocab_size:
        raise ValueError(f"a draft vocabulary has 1 to {vocab_size} tokens, got {size}.")
    counts = np.zeros((vocab_size,), np.int64)
    for text in texts:
        np.add.at(counts, text, 1)
    counts[list(always)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def positions_in(draft_ids: Array, vocab_size: int) -> Array:
    """Where each target token stands in the draft vocabulary, i32[V]; its size: nowhere."""
    size = draft_ids.shape[0]
    return (
        jnp.full((vocab_size,), size, jnp.int32)
        .at[draft_ids]
        .set(jnp.arange(size, dtype=jnp.int32))
    )


def spread(draft_logits: Array, draft_ids: Array, vocab_size: int) -> Array:
    """f32[..., W] of the draft vocabulary -> f32[..., V]; -inf for the other tokens."""
    whole = jnp.full((*draft_logits.shape[:-1], vocab_size), -jnp.inf, jnp.float32)
    return whole.at[..., draft_ids].set(draft_logits, unique_indices=True, indices_are_sorted=True)


# ---------------------------------------------------------------------------------------------
# Of the target.


def embed(config: llama.LlamaConfig, params: Any, tokens: Array) -> Array:
    """The target's embeddings: its shape, its table's weights, i32[...] -> f32[..., D]."""
    return nnx.merge(_embedding(config), nnx.State(params))(tokens)


@functools.lru_cache(maxsize=32)
def _embedding(config: llama.LlamaConfig) -> Any:
    make = functools.partial(layers.Embedding, config.vocab_size, config.hidden_size, config=config)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


def head_of(target: jaxspec.LanguageModel, config: llama.LlamaConfig, draft_ids: Array) -> Any:
    """The head's rows for the draft vocabulary, kept as the target keeps them; for `logits`."""
    head = target.params["embed" if config.tie_word_embeddings else "head"]
    return {name: head[name][draft_ids] for name in ("weight", "scale") if name in head}


def logits(head: Any, h: Array) -> Array:
    """Logits of the draft vocabulary: of `head_of`, f32[..., D] -> f32[..., W]."""
    return layers.product(h, head["weight"], head.get("scale"))


# ---------------------------------------------------------------------------------------------
# Weights.


@functools.lru_cache(maxsize=64)
def abstract(model: Callable[..., nnx.Module], config: DrafterConfig) -> tuple[Any, Any]:
    """The graph definition and the shapes of a module's weights, as a nested dict."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def in_int8(wanted: Any, given: Any) -> Any:
    """Weights with one scale an output channel, wherever the wanted shapes have one."""
    if not isinstance(wanted, dict):
        return given
    if "scale" in wanted:
        steps, scale = quantization.quantize_rows(given["weight"])
        found = {"weight": steps, "scale": scale}
        if "factors" in wanted:
            found["factors"] = jnp.ones(wanted["factors"].shape, jnp.float32)
        return found
    return {name: in_int8(wanted[name], given[name]) for name in wanted}


def in_float32(given: Any) -> Any:
    """The inverse of `in_int8`, up to its rounding; other weights are cast."""
    if not isinstance(given, dict):
        return given.astype(jnp.float32)
    if "scale" in given:
        rest = {name: value for name, value in given.items() if name != "scale"}
        weight = given["weight"].astype(jnp.float32) * given["scale"][:, None]
        return in_float32(rest | {"weight": weight})
    return {name: in_float32(value) for name, value in given.items()}
