"""What `jaxspec tune` finds out for a model, a drafter and a machine, and `generate` takes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxspec.trees import Topology

_FORMAT = 1
_KNOWN = ("format", "num_draft_tokens", "tree", "measured")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is drafted, and in what shape. Hashable, compares by value.

    Attributes:
      num_draft_tokens: K of a chain, or 0: plain decoding is faster.
      tree: drafted in the place of a chain; None: a chain.
      measured: what was measured to come to that, in JSON's types, for the reader.

    Raises:
      ValueError: `num_draft_tokens` is below 0, or not the tree's number of nodes.

    Example:
      >>> from jaxspec import trees
      >>> found = Settings(4, trees.comb((2, 2)))
      >>> from_json(found.to_json()) == found
      True
    """

    num_draft_tokens: int
    tree: Topology | None = None
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        count = self.num_draft_tokens
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"num_draft_tokens must be a whole number of at least 0: {count!r}.")
        if self.tree is not None and count != self.tree.num_nodes:
            raise ValueError(
                f"num_draft_tokens must be the tree's number of nodes, {self.tree.num_nodes}; "
                f"got {count}."
            )

    def to_json(self) -> str:
        """The text of a file that `read` reads."""
        settings = {
            "format": _FORMAT,
            "num_draft_tokens": self.num_draft_tokens,
            "tree": None if self.tree is None else list(self.tree.parents),
            "measured": dict(self.measured),
        }
        return json.dumps(settings, indent=2) + "\n"


def from_json(text: str) -> Settings:
    """Reads what `Settings.to_json` wrote.

    Args:
      text: JSON.

    Returns:
      `Settings`.

    Raises:
      ValueError: it is something else, or of a later format.
    """
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"settings must be JSON: {error}.") from error
    if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
        raise ValueError(
            f"these are no settings of format {_FORMAT}, which `jaxspec tune` writes; run it again."
        )
    unknown = settings.keys() - set(_KNOWN)
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}.")
    parents, measured = settings.get("tree"), settings.get("measured", {})
    if parents is not None and not isinstance(parents, list):
        raise ValueError(f"a tree must be a list of parents, or null; got {parents!r}.")
    if not isinstance(measured, dict):
        raise ValueError(f"measured must be an object, got {measured!r}.")
    tree = None if parents is None else Topology(tuple(parents))
    return Settings(settings.get("num_draft_tokens"), tree, measured)  # type: ignore[arg-type]


def read(path: str | os.PathLike[str]) -> Settings:
    """Reads a file of `jaxspec tune`.

    Args:
      path: the file.

    Returns:
      `Settings`.

    Raises:
      ValueError: it cannot be read, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the settings {os.fspath(path)} cannot be read: {reason}.") from error
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
