"""Planted bugs: small patches of the shipped source, never a rewrite."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
import types

_count = itertools.count()


def mutant(module_name: str, *patches: tuple[str, str]) -> types.ModuleType:
    """A copy of a shipped module with strings replaced.

    Each string must occur exactly once, so that a mutant cannot go stale unseen.
    """
    source = inspect.getsource(importlib.import_module(module_name))
    for old, new in patches:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module_name}"
        source = source.replace(old, new)
    name = f"{module_name}_mutant_{next(_count)}".replace(".", "_")
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(source, name, "exec"), module.__dict__)
    return module
