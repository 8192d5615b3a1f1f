"""Planted bugs: small patches of the shipped source, never a rewrite."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
import types

_count = itertools.count()


def mutant(
    module_name: str,
    *patches: tuple[str, str],
    within: str | tuple[str, ...] | None = None,
) -> types.ModuleType:
    """A copy of a shipped module with strings replaced.

    Each string must occur exactly once, so that a mutant cannot go stale unseen.

    Args:
      module_name: the module that is wanted.
      patches: (old, new) strings.
      within: the module that is patched, where it is one that `module_name` uses; the copy of
        `module_name` uses the patched one then. Several: the way there, module by module.
    """
    if within:
        used, *further = (within,) if isinstance(within, str) else within
        inner, outer = mutant(used, *patches, within=tuple(further)), mutant(module_name)
        shipped = sys.modules[used]
        names = [name for name, value in vars(outer).items() if value is shipped]
        assert names, f"{module_name} does not use {used}"
        for name in names:
            setattr(outer, name, inner)
        return outer
    source = inspect.getsource(importlib.import_module(module_name))
    for old, new in patches:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module_name}"
        source = source.replace(old, new)
    name = f"{module_name}_mutant_{next(_count)}".replace(".", "_")
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(source, name, "exec"), module.__dict__)
    return module
