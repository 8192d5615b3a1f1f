"""Acceptance rules that keep the target's distribution: one algorithm a file.

Each public name is a factory: `verifiers.block()` returns a `jaxspec.types.Verifier`.
"""

from jaxspec.verifiers.block import block as block
from jaxspec.verifiers.greedy import greedy as greedy
from jaxspec.verifiers.match import match as match
from jaxspec.verifiers.rejection import rejection as rejection

__all__ = ["block", "greedy", "match", "rejection"]
