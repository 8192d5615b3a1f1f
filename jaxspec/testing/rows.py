"""Prompts and options given once, for a batch in which each prompt stands in many rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxspec.sampling import Grammar, Sampling
from jaxspec.sampling.options import ROW_AXES

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
    selected: dict[str, Any] = {}
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if isinstance(value, Grammar):
            starts: Any = np.broadcast_to(np.asarray(value.start), (num_prompts,))[kind]
            selected[field.name] = dataclasses.replace(value, start=starts)
            continue
        is_list = field.name in ROW_AXES and not hasattr(value, "shape")
        if field.name == "processor" or is_list:  # one for all
            selected[field.name] = value
            continue
        shape = np.shape(value)
        row_axes = ROW_AXES.get(field.name, 0)
        if len(shape) not in (row_axes, row_axes + 1) or (
            len(shape) > row_axes and shape[0] != num_prompts
        ):
            raise ValueError(
                f"{field.name} must be one value for all or an array of one a prompt, of "
                f"{num_prompts}; got {shape}."
            )
        selected[field.name] = np.asarray(value)[kind] if len(shape) > row_axes else value
    return Sampling(**selected)
