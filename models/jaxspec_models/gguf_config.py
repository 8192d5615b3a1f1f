"""The shape of a Llama from the metadata of a GGUF file, and from JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxspec_models.gguf_file import GGUFFile
from jaxspec_models.llama import LlamaConfig, RopeScaling

_READ = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scale_linear",
})  # fmt: skip
"""The keys behind `llama.` that this module understands."""

_HARMLESS = frozenset({
    "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned",
})  # fmt: skip
"""Keys that change nothing for the rope scalings that are supported."""


def _shape_of(metadata: dict[str, Any], key: str, default: int | None = None) -> int:
    """An integer field; where every layer has its own, all must agree."""
    value = metadata.get(f"llama.{key}", default)
    if value is None:
        raise KeyError(f"llama.{key}")
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ValueError(f"llama.{key} differs between layers, which is not supported")
        value = value[0]
    return int(value)


def _rope_scaling(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """HF's `rope_scaling`."""
    old = metadata.get("llama.rope.scale_linear")
    kind = metadata.get("llama.rope.scaling.type", "linear" if old else "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"llama.rope.scaling.type {kind!r} is not supported; 'linear' is")
    if kind == "none":
        return None
    return {"rope_type": "linear", "factor": metadata.get("llama.rope.scaling.factor", old or 1.0)}


def read_config(file: GGUFFile, *, dtype: str) -> LlamaConfig:
    """Reads the shape of a model.

    Args:
      file: the opened file.
      dtype: "float32" or "bfloat16", of weights and cache.

    Raises:
      ValueError: the architecture, or something in it, is not supported, or a field is missing;
        the message names it.
    """
    try:
        return _read_config(file, dtype)
    except KeyError as error:
        raise ValueError(f"{file.path} lacks the field {error}; get a sound file.") from error
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}; use another checkpoint.") from error


def _read_config(file: GGUFFile, dtype: str) -> LlamaConfig:
    metadata, tensors = file.metadata, file.tensors
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"the architecture {architecture!r} is not supported; 'llama' is")
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            "rope_freqs.weight (frequency factors of Llama 3.1 and later) is not supported in "
            "GGUF form; the same model in HF form is"
        )
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if key != name and value and name not in _READ | _HARMLESS:
            raise ValueError(f"{key} = {value!r} is not supported")
    hidden = _shape_of(metadata, "embedding_length")
    heads = _shape_of(metadata, "attention.head_count")
    head_dim = _shape_of(metadata, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := _shape_of(metadata, key, head_dim)) != head_dim:
            raise ValueError(f"llama.{key} = {other} beside heads of {head_dim} is not supported")
    # llama.cpp stops at an end of turn as well as at the end of the text.
    eos = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    hf = {
        "model_type": "llama",
        "vocab_size": _shape_of(metadata, "vocab_size", tensors["token_embd.weight"].shape[0]),
        "hidden_size": hidden,
        "intermediate_size": _shape_of(metadata, "feed_forward_length"),
        "num_hidden_layers": _shape_of(metadata, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _shape_of(metadata, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _shape_of(metadata, "context_length"),
        # Stored in float32: the shortest decimal is what was meant (1e-5).
        "rms_norm_eps": _decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "eos_token_id": list(dict.fromkeys(int(token) for token in eos if token is not None)),
    }
    return LlamaConfig.from_hf(hf, dtype=dtype)


def _decimal(value: float) -> float:
    return float(f"{value:.7g}")


def to_json(config: LlamaConfig) -> str:
    """A config as JSON.

    Example:
      >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
      ...                      num_hidden_layers=1, num_attention_heads=2,
      ...                      num_key_value_heads=1, head_dim=8, eos_ids=(2,))
      >>> from_json(to_json(config)) == config
      True
    """
    return json.dumps(dataclasses.asdict(config))


def from_json(text: str) -> LlamaConfig:
    """The inverse of `to_json`."""
    fields = json.loads(text)
    fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    fields["eos_ids"] = tuple(fields["eos_ids"])
    return LlamaConfig(**fields)
