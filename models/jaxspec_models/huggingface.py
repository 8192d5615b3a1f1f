"""What people pass to transformers' `generate`, as arguments of `jaxspec.generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import jaxspec

# transformers' own defaults, where a field is None.
_DEFAULT_LENGTH, _DEFAULT_TOP_K, _DEFAULT_NGRAM = 20, 50, 2
# Neither changes the text: how it is computed, or how drafts are made.
_WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "renormalize_logits",
    "return_dict_in_generate", "bos_token_id", "decoder_start_token_id", "is_assistant",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "compile_config", "disable_compile",
    "low_memory", "prefill_chunk_size", "transformers_version", "length_penalty",
    "early_stopping", "output_scores", "use_mtp",
}  # fmt: skip
_TRANSLATED = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature",
    "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "sequence_bias", "pad_token_id", "eos_token_id",
    "num_return_sequences", "num_assistant_tokens", "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
}  # fmt: skip
_NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0, "penalty_alpha": 0.0,
}  # fmt: skip


def from_hf(inputs: Any, generation_config: Any = None) -> dict[str, Any]:
    """Translates a call of transformers' `model.generate(**inputs, generation_config=…)`.

    Fields that are None have transformers' defaults: greedy, `max_length` 20, `top_k` 50 where
    sampled. Fields that only say how the text is computed are dropped. What needs randomness also
    needs `key=jax.random.key(seed)`, which no config has.

    Args:
      inputs: what a tokenizer returned, a mapping with `input_ids` [B, L] and, unless every token
        counts, `attention_mask` [B, L], padded on either side; or `input_ids` alone.
      generation_config: a `transformers.GenerationConfig`, a mapping of its fields, or None.

    Returns:
      Keyword arguments of `jaxspec.generate`: `prompts` without padding, `sampling`, ….

    Raises:
      ValueError: a field asks for what there is no counterpart of (all of them are named), or the
        inputs are no token ids.

    Example:
      >>> arguments = from_hf(
      ...     {"input_ids": [[0, 0, 5], [3, 4, 5]], "attention_mask": [[0, 0, 1], [1, 1, 1]]},
      ...     {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "eos_token_id": 2})
      >>> arguments["prompts"], arguments["max_new_tokens"], arguments["eos_ids"]
      ([[5], [3, 4, 5]], 8, (2,))
      >>> arguments["sampling"].temperature, arguments["sampling"].top_k
      (0.7, 50)
    """
    config = _fields(generation_config)
    _refuse(config)
    prompts, width = _prompts(inputs)
    arguments: dict[str, Any] = {
        "prompts": prompts,
        "sampling": _sampling(config, width),
        "max_new_tokens": _limit(config, width),
    }
    if config.get("eos_token_id") is not None:
        arguments["eos_ids"] = tuple(_ids(config["eos_token_id"]))
    if config.get("pad_token_id") is not None:
        arguments["pad_id"] = int(config["pad_token_id"])
    if config.get("num_return_sequences") is not None:
        arguments["num_return_sequences"] = int(config["num_return_sequences"])
    if config.get("num_assistant_tokens") is not None:
        arguments["num_draft_tokens"] = int(config["num_assistant_tokens"])
    if config.get("prompt_lookup_num_tokens") is not None:
        longest = config.get("max_matching_ngram_size")
        arguments["num_draft_tokens"] = int(config["prompt_lookup_num_tokens"])
        arguments["drafter"] = jaxspec.drafters.prompt_lookup(
            max_ngram=_DEFAULT_NGRAM if longest is None else int(longest)
        )
    return arguments


def _fields(generation_config: Any) -> dict[str, Any]:
    if generation_config is None:
        return {}
    if not isinstance(generation_config, Mapping):
        if not hasattr(generation_config, "to_dict"):
            raise ValueError(
                "generation_config must be a transformers.GenerationConfig or a mapping of its "
                f"fields, got {type(generation_config).__name__}."
            )
        generation_config = generation_config.to_dict()
    return {name: value for name, value in generation_config.items() if not name.startswith("_")}


def _refuse(config: Mapping[str, Any]) -> None:
    """Raises ValueError naming every field without a counterpart that is not neutral."""
    unsupported = [
        f"{name}={value!r}"
        for name, value in config.items()
        if name not in _TRANSLATED | _WITHOUT_EFFECT
        and value is not None
        and value is not False
        and value != _NEUTRAL.get(name)
    ]
    if config.get("output_scores"):
        unsupported.append("output_scores=True (log_probs and num_top_log_probs report them)")
    if unsupported:
        raise ValueError(
            "jaxspec has no counterpart of "
            + ", ".join(unsupported)
            + "; take it out of the generation config."
        )


def _prompts(inputs: Any) -> tuple[list[list[int]], int]:
    """The rows without padding, and L."""
    mask = None
    if isinstance(inputs, Mapping) or (hasattr(inputs, "data") and hasattr(inputs, "keys")):
        if "input_ids" not in inputs:
            raise ValueError(
                f"inputs must have input_ids, as a tokenizer returns them; got {list(inputs)}."
            )
        mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
    try:
        ids = np.asarray(inputs)
    except ValueError:  # rows of several lengths
        ids = np.zeros(0)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            "input_ids must be integers [B, L] (padding=True, or one text in a list); got "
            f"{ids.dtype}{list(ids.shape)}."
        )
    is_text = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
    if is_text.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {ids.shape}; got {is_text.shape}."
        )
    if not is_text.any(axis=1).all():
        raise ValueError(f"row {int(np.argmin(is_text.any(axis=1)))} is all padding.")
    return [row[keep].tolist() for row, keep in zip(ids, is_text, strict=True)], ids.shape[1]


def _limit(config: Mapping[str, Any], width: int) -> int:
    if config.get("max_new_tokens") is not None:
        return int(config["max_new_tokens"])
    longest = config.get("max_length")
    longest = _DEFAULT_LENGTH if longest is None else int(longest)
    if longest <= width:
        raise ValueError(
            f"max_length={longest} counts the {width} tokens of the inputs and leaves none to "
            "write; set max_new_tokens."
        )
    return longest - width


def _sampling(config: Mapping[str, Any], width: int) -> jaxspec.Sampling:
    options: dict[str, Any] = {"temperature": 0}
    if config.get("do_sample"):
        options = {"top_k": _DEFAULT_TOP_K}
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
            if config.get(name) is not None:
                options[name] = config[name]
    for name in ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens"):
        if config.get(name) is not None:
            options[name] = config[name]
    if config.get("bad_words_ids") is not None:
        ends = {(token,) for token in _ids(config.get("eos_token_id"))}  # which transformers skips
        options["bad_words"] = [
            list(ids) for ids in config["bad_words_ids"] if tuple(ids) not in ends
        ]
    least = [
        int(config.get("min_new_tokens") or 0),
        int(config.get("min_length") or 0) - width,
    ]
    if max(least) > 0:
        options["min_new_tokens"] = max(least)
    if config.get("sequence_bias") is not None:
        options["logit_bias"] = _bias(config["sequence_bias"])
    return jaxspec.Sampling(**options)


def _bias(sequence_bias: Any) -> dict[int, float]:
    pairs = sequence_bias.items() if isinstance(sequence_bias, Mapping) else sequence_bias
    pairs = [(tuple(ids), float(bias)) for ids, bias in pairs]
    if longer := [list(ids) for ids, _ in pairs if len(ids) != 1]:
        raise ValueError(
            f"sequence_bias of {longer[0]}: jaxspec has biases of single tokens only; a ban of a "
            "sequence goes into bad_words_ids."
        )
    return {int(ids[0]): bias for ids, bias in pairs}


def _ids(value: Any) -> Sequence[int]:
    if value is None:
        return ()
    return [int(x) for x in np.atleast_1d(np.asarray(value))]
