"""Frozen dataclasses as pytrees whose tree structure knows their class."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

_T = TypeVar("_T")


def static(**kwargs: Any) -> Any:
    """A field that is part of the tree structure, hashed and compared by value."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def dataclass(cls: type[_T]) -> type[_T]:
    """Makes a class a frozen dataclass and registers it as a pytree.

    Use it for every drafter, verifier and policy, in place of
    `jax.tree_util.register_dataclass`: with that (seen in JAX 0.10.2), the structures of two
    classes with equal fields compare equal, and only their hashes differ. `jax.jit` then
    mistakes one for the other whenever the hashes collide, and runs the wrong program.

    Args:
      cls: a class with annotated fields; `static()` fields belong to the structure, all others
        are children.

    Returns:
      The class.

    Example:
      >>> import jax
      >>> @dataclass
      ... class Scale:
      ...     factor: float
      ...     name: str = static(default="x")
      >>> jax.tree.leaves(Scale(2.0))
      [2.0]
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    children = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten_with_keys(node: Any) -> tuple[Any, Any]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in children]
        return keyed, tuple(getattr(node, name) for name in statics)

    def flatten(node: Any) -> tuple[Any, Any]:
        return tuple(getattr(node, name) for name in children), tuple(
            getattr(node, name) for name in statics
        )

    def unflatten(values: Any, leaves: Any) -> Any:
        node: Any = object.__new__(cls)  # no checks: leaves may be placeholders
        for name, value in zip(statics, values, strict=True):
            object.__setattr__(node, name, value)
        for name, leaf in zip(children, leaves, strict=True):
            object.__setattr__(node, name, leaf)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
