"""Options that commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

DEFAULT_MODEL = "smollm2-135m"


def add_count(parser: Any, name: str, default: int | None, meaning: str) -> None:
    """Adds a positive integer."""
    parser.add_argument(
        name,
        metavar="N",
        type=number(int, lambda x: x >= 1, "at least 1"),
        default=default,
        help=meaning if default is None else f"{meaning} (default: %(default)s)",
    )


def add_seed(parser: Any) -> None:
    """Adds --seed."""
    parser.add_argument(
        "--seed",
        metavar="N",
        type=number(int, lambda x: 0 <= x < 2**32, "between 0 and 2**32 - 1"),
        default=0,
        help="another seed, another text; the same seed, the same text (default: %(default)s)",
    )


def add_dtype(parser: Any) -> None:
    """Adds --dtype and --quantization."""
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of weights and cache (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        choices=("int8",),
        help="int8 weights: half the memory of bfloat16, and faster (default: none)",
    )


def add_max_new_tokens(parser: Any, default: int) -> None:
    """Adds --max-new-tokens."""
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=number(int, lambda x: x >= 1, "at least 1"),
        default=default,
        help="where to stop at the latest (default: %(default)s)",
    )


def add_num_draft_tokens(parser: Any, default: str) -> None:
    """Adds --num-draft-tokens."""
    parser.add_argument(
        "--num-draft-tokens",
        metavar="N",
        type=number(int, lambda x: x >= 1, "at least 1"),
        help=f"the most tokens proposed at a time (default: {default})",
    )


def number(kind: type, is_allowed: Callable[[Any], bool], meaning: str) -> Callable[[str], Any]:
    """An argument's type: a number in a range, or one line that tells the range."""
    noun = "an integer" if kind is int else "a number"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {noun} {meaning}, got {text!r}")
        return value

    return read
