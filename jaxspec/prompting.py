"""What texts begin with: lists or arrays of token ids, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALLEST_BUCKET = 32


def bucket(length: int) -> int:
    """A power of two with room for a length, so that a new length rarely means a new program.

    Example:
      >>> bucket(3), bucket(33)
      (32, 64)
    """
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def read(prompts: Any, prompt_lengths: Any, pad_id: int, vocab_size: int) -> tuple[Any, Any]:
    """Checks prompts.

    Args:
      prompts: as `jaxspec.generate` takes them.
      prompt_lengths: likewise.
      pad_id: what rows are padded with.
      vocab_size: V.

    Returns:
      Token ids [B, L] and lengths [B]; NumPy where known before running.

    Raises:
      ValueError: something is wrong with them.
    """
    if prompts is None:
        raise ValueError("pass prompts: a list of token-id lists, or an array [B, L].")
    if isinstance(prompts, str) or (
        isinstance(prompts, (list, tuple)) and any(isinstance(p, str) for p in prompts)
    ):
        raise ValueError(
            "prompts must be token ids, got text; jaxspec_models.generate_text takes text, or "
            "encode it with the model's tokenizer."
        )
    if isinstance(prompts, (list, tuple)):
        if prompt_lengths is not None:
            raise ValueError("prompt_lengths goes with an array of prompts; a list needs none.")
        tokens, lengths = _bucketed(prompts)
    else:
        tokens, lengths = _array(prompts, prompt_lengths, pad_id, vocab_size)
    _check_ids(tokens, lengths, vocab_size)
    return tokens, lengths


def _bucketed(prompts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pads lists to a power of two, so that a new length rarely means a new program."""
    if not prompts:
        raise ValueError("prompts is empty: pass at least one prompt.")
    rows = [np.asarray(prompt) for prompt in prompts]
    if any(row.ndim != 1 for row in rows):
        raise ValueError("prompts must be a list of token-id lists: wrap one prompt as [prompt].")
    if empty := [i for i, row in enumerate(rows) if row.size == 0]:
        raise ValueError(
            f"prompt {empty[0]} is empty: a model needs a token to start from, such as its "
            "beginning-of-sequence id."
        )
    if any(not np.issubdtype(row.dtype, np.integer) for row in rows):
        raise ValueError("prompts must hold integers, the tokens' ids.")
    lengths = np.array([row.size for row in rows], np.int32)
    size = bucket(int(lengths.max()))
    tokens = np.zeros((len(rows), size), np.int64)  # ids are checked before they are narrowed
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths


def _array(prompts: Any, prompt_lengths: Any, pad_id: int, vocab_size: int) -> tuple[Any, Any]:
    if getattr(prompts, "ndim", None) != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise ValueError(
            "prompts must be a list of token-id lists or an integer array [B, L], got "
            f"{getattr(prompts, 'dtype', type(prompts).__name__)}{getattr(prompts, 'shape', '')}."
        )
    batch, size = prompts.shape
    if batch == 0 or size == 0:
        raise ValueError(f"prompts has shape {prompts.shape}: pass at least one token a row.")
    has_lengths = prompt_lengths is not None
    if not has_lengths:
        prompt_lengths = np.full((batch,), size, np.int32)
    if not isinstance(prompts, jax.core.Tracer):
        prompts = np.asarray(prompts)
    if not isinstance(prompt_lengths, jax.core.Tracer):
        prompt_lengths = np.asarray(prompt_lengths)
        if prompt_lengths.shape != (batch,) or not np.issubdtype(prompt_lengths.dtype, np.integer):
            raise ValueError(
                f"prompt_lengths must be {batch} integers, one a row; got "
                f"{prompt_lengths.dtype}{prompt_lengths.shape}."
            )
        if np.any(prompt_lengths < 1) or np.any(prompt_lengths > size):
            raise ValueError(
                f"prompt_lengths must lie in 1 … {size}, the width of prompts; an empty prompt "
                f"gives a model nothing to start from. Got {prompt_lengths.tolist()}."
            )
        if isinstance(prompts, np.ndarray):
            _check_padding(prompts, prompt_lengths, pad_id, has_lengths, vocab_size)
    return prompts, prompt_lengths


def _check_padding(
    prompts: np.ndarray, lengths: np.ndarray, pad_id: int, has_lengths: bool, vocab_size: int
) -> None:
    """Left-padded rows are refused: a row whose head is padding and whose last token is text."""
    size = prompts.shape[1]
    is_pad = prompts == pad_id
    ends_in_text = (prompts[:, -1] >= 0) & (prompts[:, -1] < vocab_size) & ~is_pad[:, -1]
    if has_lengths:
        is_left_padded = any(
            length < size and pads[: size - length].all() and is_text
            for pads, is_text, length in zip(is_pad, ends_in_text, lengths, strict=True)
        )
    else:
        heads = is_pad[:, 0]
        is_left_padded = (heads.any() and not heads.all()) or bool(
            is_pad[:, :2].all(axis=1).any() and size > 1
        )
    if is_left_padded:
        raise ValueError(
            "prompts look left-padded. Pad on the right and pass prompt_lengths, or pass a list "
            f"of token-id lists; if the leading {pad_id}s are real tokens, pass them as lists."
        )


def _check_ids(tokens: Any, lengths: Any, vocab_size: int) -> None:
    if isinstance(tokens, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        return
    is_prompt = np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]
    ids = np.asarray(tokens)[is_prompt]
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"prompts hold the token id {ids.min() if ids.min() < 0 else ids.max()}; the "
            f"target's ids are 0 … {vocab_size - 1}. Use the target's own tokenizer."
        )
