"""Prompts and options given once, for a batch in which each prompt stands in many rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxspec.sampling import Sampling

Array: TypeAlias = np.ndarray[Any, Any]


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Array, Array]:
    """Token ids i32[P, L], padded on the right, and lengths i64[P].

    Raises:
      ValueError: no prompts, an empty one, or no lists of integers.
    """
    is_list = not isinstance(prompts, str) and len(prompts) > 0
    rows = [np.asarray(prompt) for prompt in prompts] if is_list else []
    if not rows or any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows):
        raise ValueError(
            "prompts must be a list of token-id lists, none of them empty: wrap one prompt as "
            f"[prompt]; got {prompts!r}."
        )
    lengths = np.array([len(row) for row in rows])
    padded = np.full((len(rows), int(lengths.max())), pad_id, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths


def per_prompt(sampling: Sampling, kind: Array | int, num_prompts: int) -> Sampling:
    """Options given by prompt, for a batch of rows of the prompts `kind`, or for one prompt.

    Numbers stay numbers, and may be off statically.

    Raises:
      ValueError: no `Sampling`, or an array has not one element for each prompt.
    """
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a jaxspec.Sampling, got {sampling!r}.")
    selected = {}
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        shape = np.shape(value)
        if shape not in ((), (num_prompts,)):
            raise ValueError(
                f"{field.name} must be one number or an array of one number a prompt, "
                f"({num_prompts},); got {shape}."
            )
        selected[field.name] = np.asarray(value)[kind] if shape else value
    return Sampling(**selected)
