"""Acceptance rules that keep the target's distribution: one algorithm a file.

Each public name is a factory: `verifiers.rejection()` returns a `jaxspec.types.Verifier`.
"""

from jaxspec.verifiers.greedy import greedy as greedy
from jaxspec.verifiers.rejection import rejection as rejection

__all__ = ["greedy", "rejection"]
