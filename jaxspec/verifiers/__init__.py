"""Acceptance rules that keep the target's distribution: one algorithm a file.

Each public name is a factory: `verifiers.block()` returns a `jaxspec.types.Verifier`.
"""

from jaxspec.verifiers.block import block as block
from jaxspec.verifiers.descent import descent as descent
from jaxspec.verifiers.greedy import greedy as greedy
from jaxspec.verifiers.k_seq import k_seq as k_seq
from jaxspec.verifiers.match import match as match
from jaxspec.verifiers.recursive_rejection import recursive_rejection as recursive_rejection
from jaxspec.verifiers.rejection import rejection as rejection
from jaxspec.verifiers.traversal import traversal as traversal

__all__ = [
    "block",
    "descent",
    "greedy",
    "k_seq",
    "match",
    "recursive_rejection",
    "rejection",
    "traversal",
]
