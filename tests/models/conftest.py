"""Tiny checkpoints, made on the fly in every form that `jaxspec_models` reads."""

import dataclasses
import json

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ w", "1 2"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def vocabulary():
    """Special tokens, the 256 bytes, and what the merges make of them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]


@dataclasses.dataclass
class Tiny:
    """A random Llama: HF's config and float32 weights under HF's keys."""

    config: dict
    weights: dict

    def write_directory(self, directory, *, dtype="float32", num_shards=1, tokenizer=True):
        """Writes it in HF form."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        weights = {name: weight.astype(DTYPES[dtype]) for name, weight in self.weights.items()}
        if num_shards == 1:
            save_file(weights, directory / "model.safetensors")
        else:
            index = {}
            for i in range(num_shards):
                file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
                shard = dict(list(weights.items())[i::num_shards])
                save_file(shard, directory / file)
                index |= dict.fromkeys(shard, file)
            text = json.dumps({"metadata": {}, "weight_map": index})
            (directory / "model.safetensors.index.json").write_text(text)
        if tokenizer:
            self.write_tokenizer(directory)
        return directory

    def write_tokenizer(self, directory):
        """Writes a tokenizer in HF form, built independently of the package."""
        tokens = {token: i for i, token in enumerate(vocabulary())}
        merges = [tuple(merge.split(" ")) for merge in MERGES]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(tokens, merges))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL)
        backend.save(str(directory / "tokenizer.json"))
        config = {
            "bos_token": SPECIAL[1],
            "eos_token": {"content": SPECIAL[2], "special": True},
            "model_max_length": 64,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)

    def write_gguf(self, path, *, fields=None, extra=None, quantization="F32"):
        """Writes it as llama.cpp does: q and k permuted, other names.

        `fields` replaces or, with None, drops metadata; `extra` adds tensors.
        """
        config = self.config
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(path, "llama")
        token_types = [3] * len(SPECIAL) + [1] * (config["vocab_size"] - len(SPECIAL))
        values = {
            "llama.block_count": config["num_hidden_layers"],
            "llama.context_length": config["max_position_embeddings"],
            "llama.embedding_length": config["hidden_size"],
            "llama.feed_forward_length": config["intermediate_size"],
            "llama.attention.head_count": config["num_attention_heads"],
            "llama.attention.head_count_kv": config["num_key_value_heads"],
            "llama.rope.freq_base": config["rope_theta"],
            "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": vocabulary(),
            "tokenizer.ggml.token_type": token_types,
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": CHAT_TEMPLATE,
        } | (fields or {})
        for key, value in values.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif value is not None:
                writer.add_uint32(key, value)
        kind = gguf.GGMLQuantizationType[quantization]
        for name, weight in (self.weights | (extra or {})).items():
            for part, heads in (("q_proj", "attention"), ("k_proj", "key_value")):
                if part in name:
                    weight = permute(weight, config[f"num_{heads}_heads"])
            is_plain = weight.ndim == 1 or quantization == "F32"
            data = weight if is_plain else gguf.quants.quantize(weight, kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=None if is_plain else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def permute(weight, heads):
    """llama.cpp's `LlamaModel.permute` (convert_hf_to_gguf.py)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def gguf_name(name):
    """llama.cpp's name of an HF key."""
    for old, new in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
        ("lm_head", "output"), ("model.layers", "blk"), ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"), ("mlp.", "ffn_"), ("_proj", ""),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def make_tiny(*, seed=0, tied=True, bias=False, vocab_size=None, **changes):
    """A random Llama of two layers with grouped-query attention."""
    config = {
        "model_type": "llama",
        "vocab_size": vocab_size or len(vocabulary()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "mlp_bias": bias,
        "eos_token_id": 2,
    } | changes
    dim, ffn = config["hidden_size"], config["intermediate_size"]
    kv = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (config["vocab_size"], dim)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj": (dim, dim), f"{layer}.self_attn.k_proj": (kv, dim),
            f"{layer}.self_attn.v_proj": (kv, dim), f"{layer}.self_attn.o_proj": (dim, dim),
            f"{layer}.mlp.gate_proj": (ffn, dim), f"{layer}.mlp.up_proj": (ffn, dim),
            f"{layer}.mlp.down_proj": (dim, ffn), f"{layer}.input_layernorm": (dim,),
            f"{layer}.post_attention_layernorm": (dim,),
        }  # fmt: skip
    shapes["model.norm"] = (dim,)
    if not tied:
        shapes["lm_head"] = (config["vocab_size"], dim)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        # Values that bfloat16 holds exactly, so that every form of the file holds the same model.
        weight = rng.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)
        weights[f"{name}.weight"] = weight
        if bias and "_proj" in name:
            weights[f"{name}.bias"] = weight[:, 0].copy()
    return Tiny(config, weights)


@pytest.fixture
def tiny():
    return make_tiny()


@pytest.fixture(scope="session")
def make():
    """`make_tiny`, for tests that want another shape."""
    return make_tiny
