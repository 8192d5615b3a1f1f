"""Models with random weights, and speculation with an acceptance rate of your choice.

For benchmarks alone: what it writes is noise, and `Generation.guarantee` says "none".
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import jaxspec
from jaxspec import Draft, Verdict, pytree
from jaxspec.types import NO_TOKEN
from jaxspec_models import llama, llama_int8

CONFIGS = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
             "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
           "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
           "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "vocab_size": 512},
}  # fmt: skip


def model(size: str, *, dtype: str = "bfloat16", quantization: str | None = None):
    """A Llama of a known shape with random weights, made on the device."""
    config = llama.LlamaConfig(
        **CONFIGS[size], max_position_embeddings=8192, tie_word_embeddings=size == "135m",
        dtype=dtype,
    )  # fmt: skip
    shapes = llama.abstract_params(config)

    @jax.jit
    def make(key: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(shapes)
        keys = jax.random.split(key, len(leaves))
        made = [
            jnp.ones(leaf.shape, leaf.dtype)
            if len(leaf.shape) == 1
            else jax.random.normal(k, leaf.shape, leaf.dtype) * leaf.shape[-1] ** -0.5
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, made)

    params = make(jax.random.key(0, impl="threefry2x32"))
    if quantization is not None:
        config, params = llama_int8.quantize(config, params)
    return llama.language_model(config, params)


@pytree.dataclass
class FreeDrafter:
    """Drafts token 0, as often as it is asked, for nothing."""

    hidden_layers: ClassVar[tuple[int, ...]] = ()

    def init(self, batch: int, capacity: int) -> tuple[()]:
        """Nothing."""
        return ()

    def prefill(self, state, tokens, hidden, start, num_new):
        """Nothing to take in."""
        return state

    def propose(self, keys, state, context, num_draft, keep_drafting):
        """Zeros."""
        return Draft(jnp.zeros(keys.shape, jnp.int32), None, num_draft), state

    def commit(self, state, outcome):
        """Nothing to remember."""
        return state


@pytree.dataclass
class UniformDrafter(FreeDrafter):
    """Drafts tokens that have nothing to do with the text, each as likely as any other."""

    vocab_size: int = pytree.static()

    def propose(self, keys, state, context, num_draft, keep_drafting):
        """Uniform draws and their law."""
        draw = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), 0, self.vocab_size)))
        log_probs = jnp.full((*keys.shape, self.vocab_size), -math.log(self.vocab_size))
        return Draft(draw(keys), log_probs, num_draft), state


@pytree.dataclass
class Coin:
    """Accepts each draft with a fixed probability, whatever the target says."""

    acceptance: Any

    guarantee: ClassVar[str] = "none"

    def __call__(self, keys: jax.Array, draft: Draft, target_log_probs: jax.Array) -> Verdict:
        """Judges one row's draft by coins; the token behind it is the target's likeliest."""
        slots = jnp.arange(target_log_probs.shape[0])
        coins = jax.vmap(jax.random.uniform)(keys)[:-1] < self.acceptance
        coins = coins & (slots[:-1] < draft.length)
        num_accepted = jnp.sum(jnp.cumprod(coins.astype(jnp.int32)), dtype=jnp.int32)
        drafted = jnp.concatenate([draft.tokens, jnp.full((1,), NO_TOKEN, jnp.int32)])
        tokens = jnp.where(slots < num_accepted, drafted, NO_TOKEN)
        best = jnp.argmax(target_log_probs[num_accepted]).astype(jnp.int32)
        return Verdict(jnp.where(slots == num_accepted, best, tokens), num_accepted)


def speculation(acceptance: float) -> dict[str, Any]:
    """Arguments of `jaxspec.generate` that accept drafts at a rate of your choice."""
    verifier = Coin(jnp.float32(acceptance))
    return {"drafter": FreeDrafter(), "verifier": verifier, "exact": False}


def check() -> None:
    """The acceptance is what was asked for; the result says that it guarantees nothing."""
    out = jaxspec.generate(
        model("tiny"), [[1, 2, 3]] * 8, max_new_tokens=200, num_draft_tokens=1, eos_ids=(),
        key=jax.random.key(0), **speculation(0.8),
    )  # fmt: skip
    rate = float(jnp.sum(out.stats.num_accepted_draft_tokens) / jnp.sum(out.stats.num_draft_tokens))
    assert out.guarantee == "none"
    assert abs(rate - 0.8) < 0.06, rate  # 900 coins: 4.5 standard deviations


if __name__ == "__main__":
    check()
