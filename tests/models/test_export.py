"""`generate` is lowered for accelerators on a machine without one: none breaks unseen."""

import dataclasses
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest

import jaxspec
from jaxspec import drafters, policies, verifiers
from jaxspec_models import layers, llama, llama_int8

CONFIG = llama.LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)  # fmt: skip
PROFILE = jaxspec.Profile(jnp.linspace(1.0, 1.4, 5), jnp.float32(0.1), jnp.float32(0.1))


def model_of(kind):
    dtype = "bfloat16" if kind == "int8" else kind
    config = dataclasses.replace(CONFIG, dtype=dtype)
    params = llama.init_params(config, seed=0)
    if kind == "int8":
        config, params = llama_int8.quantize(config, params)
    return llama.language_model(config, params)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    ("kind", "drafter", "verifier"),
    [
        ("bfloat16", "model", "block"),
        ("int8", "lookup", "rejection"),
        ("float32", "model", "match"),
    ],
)
def test_generate_is_lowered(platform, kind, drafter, verifier):
    lm = model_of(kind)

    def write(lm, prompts, key, temperature):
        strategy = drafters.model(lm) if drafter == "model" else drafters.prompt_lookup()
        return jaxspec.generate(
            lm, prompts, drafter=strategy, verifier=getattr(verifiers, verifier)(),
            policy=policies.guarded(policies.goodput(PROFILE)),
            sampling=jaxspec.Sampling(temperature=temperature, top_k=20, top_p=0.9),
            max_new_tokens=8, key=key,
        )  # fmt: skip

    exported = jax.export.export(jax.jit(write), platforms=[platform])(
        lm, jnp.ones((2, 6), jnp.int32), jax.random.key(0), jnp.float32(1.0)
    )
    assert exported.platforms == (platform,)
    text = exported.mlir_module()
    assert "stablehlo.while" in text
    # On an accelerator every round runs at the full width, K + 1 = 5 tokens of 2 rows; one token
    # of each is fed by the model drafter alone, padded to what products of its dtype have at least.
    narrow = layers.MIN_BFLOAT16_ROWS if kind == "bfloat16" else 2
    assert head_rows(text) == ({narrow, 10} if drafter == "model" else {10})


def head_rows(text):
    """The numbers of rows that the vocabulary head is applied to."""
    products = re.findall(r"dot_general.*-> tensor<(\d+)x320x", text)
    return set(map(int, products))


def test_the_cpu_has_the_narrow_width():
    """The assertion above can fail."""
    lm = model_of("float32")

    def write(lm, prompts):
        return jaxspec.generate(
            lm, prompts, drafter=drafters.prompt_lookup(), max_new_tokens=8,
            sampling=jaxspec.Sampling(temperature=0),
        )  # fmt: skip

    exported = jax.export.export(jax.jit(write), platforms=["cpu"])(lm, jnp.ones((2, 6), jnp.int32))
    assert head_rows(exported.mlir_module()) == {2, 10}
