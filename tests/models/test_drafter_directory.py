"""Drafters on the disk: what is saved is what is loaded, and for its own target only."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import jaxspec
from jaxspec.testing import random_logits, table_model
from jaxspec_models import llama, llama_int8
from jaxspec_models.drafters import block, directory, methods

CONFIG = llama.LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, dtype="float32",
    tie_word_embeddings=True,
)  # fmt: skip
PARAMS = llama.init_params(CONFIG, seed=0)
TARGET = llama.language_model(CONFIG, PARAMS)
SHAPE = block.BlockConfig(CONFIG, (1, -1), num_draft_tokens=2, draft_vocab_size=30, markov_rank=4)
IDS = np.sort(np.random.default_rng(0).permutation(48)[:30]).astype(np.int32)
_, WEIGHTS = nnx.split(block.BlockModel(SHAPE, rngs=nnx.Rngs(1)))
WEIGHTS = nnx.to_pure_dict(WEIGHTS)


def save(path, shape=SHAPE, weights=WEIGHTS):
    directory.save_drafter(
        path, TARGET, shape, weights, IDS, target_name="tiny", metrics={"acceptance": 0.5}
    )
    return path


def write(target, drafter):
    return jaxspec.generate(
        target, [[1, 2, 3], [4]], drafter=drafter, num_draft_tokens=2, max_new_tokens=12,
        key=jax.random.key(0),
    )  # fmt: skip


@pytest.mark.parametrize("is_quantized", [False, True])
def test_what_is_saved_is_loaded(tmp_path, is_quantized):
    shape, weights = methods.quantize(SHAPE, WEIGHTS) if is_quantized else (SHAPE, WEIGHTS)
    loaded = directory.load_drafter(save(tmp_path, shape, weights), TARGET)
    expected = block.drafter(TARGET, shape, weights, IDS)
    chex.assert_trees_all_equal(loaded, expected)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)  # no new trace
    out = write(TARGET, loaded)
    np.testing.assert_array_equal(out.tokens, write(TARGET, expected).tokens)
    assert json.loads((tmp_path / "config.json").read_text())["metrics"] == {"acceptance": 0.5}


def test_the_target_may_be_quantised(tmp_path):
    """The one it was trained for, in int8 and in bfloat16: it shares their own embeddings."""
    for config, params in (
        llama_int8.quantize(CONFIG, PARAMS),
        (
            dataclasses.replace(CONFIG, dtype="bfloat16"),
            jax.tree.map(
                lambda x, y: x.astype(y.dtype),
                PARAMS,
                llama.abstract_params(dataclasses.replace(CONFIG, dtype="bfloat16")),
            ),
        ),
    ):
        target = llama.language_model(config, params)
        loaded = directory.load_drafter(save(tmp_path), target)
        assert np.all(write(target, loaded).lengths == 12)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vocab_size": 49}, "vocab_size 48; this target has 49"),
        ({"hidden_size": 40}, "hidden_size 32; this target has 40"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2; this target has 3"),
    ],
)
def test_a_target_of_another_shape(tmp_path, change, told):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match=f"was trained for tiny, with {told}"):
        directory.load_drafter(
            save(tmp_path), llama.language_model(config, llama.init_params(config, seed=0))
        )


def test_another_target_of_the_shape(tmp_path):
    other = llama.language_model(CONFIG, llama.init_params(CONFIG, seed=1))
    with pytest.raises(ValueError, match=r"another model of its shape .* correlate by"):
        directory.load_drafter(save(tmp_path), other)


def test_a_target_that_is_no_llama(tmp_path):
    table = table_model(random_logits(0, vocab_size=8, order=1), order=1)
    with pytest.raises(ValueError, match="Llamas of jaxspec_models"):
        directory.load_drafter(save(tmp_path), table)


def test_broken_directories(tmp_path):
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        directory.load_drafter(tmp_path, TARGET)
    save(tmp_path)
    weights = (tmp_path / "drafter.safetensors").read_bytes()
    (tmp_path / "drafter.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="missing or broken"):
        directory.load_drafter(tmp_path, TARGET)
    (tmp_path / "drafter.safetensors").unlink()
    with pytest.raises(ValueError, match="missing or broken"):
        directory.load_drafter(tmp_path, TARGET)
    save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for changed, told in (
        (described | {"version": 2}, "version 2"),
        (described | {"method": "other"}, "'other'"),
        (described | {"config": described["config"] | {"markov_rank": 5}}, "missing or broken"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=told):
            directory.load_drafter(tmp_path, TARGET)
