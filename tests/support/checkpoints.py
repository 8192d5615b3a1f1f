"""Small random checkpoints in HF form, with tokenizers of bytes."""

import json

import numpy as np
import tokenizers
from safetensors.numpy import save_file

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(num_extra=1):
    """One token a byte, then `num_extra` special ones."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(BYTES)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", *(f"<|{i}|>" for i in range(num_extra - 1))])
    return backend


def write_model(directory, *, seed=0, num_extra=1, context=4096, eos=None, chat=True, scale=1.0):
    """Writes a random Llama of one layer in HF form."""
    directory.mkdir()
    backend = byte_tokenizer(num_extra)
    vocab_size, dim, ffn = backend.get_vocab_size(), 32, 48
    config = {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": dim,
        "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": context, "eos_token_id": eos,
        "tie_word_embeddings": True,
    }  # fmt: skip
    layer, norms = "model.layers.0", ("input_layernorm", "post_attention_layernorm")
    shapes = {
        "model.embed_tokens": (vocab_size, dim), "model.norm": (dim,),
        f"{layer}.self_attn.q_proj": (dim, dim), f"{layer}.self_attn.k_proj": (dim // 2, dim),
        f"{layer}.self_attn.v_proj": (dim // 2, dim), f"{layer}.self_attn.o_proj": (dim, dim),
        f"{layer}.mlp.gate_proj": (ffn, dim), f"{layer}.mlp.up_proj": (ffn, dim),
        f"{layer}.mlp.down_proj": (dim, ffn), **{f"{layer}.{norm}": (dim,) for norm in norms},
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    weights = {
        f"{name}.weight": (scale * rng.normal(size=shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors")
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    if chat:
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory
