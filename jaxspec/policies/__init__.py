"""How much to draft in each round: one policy a file.

Each public name is a factory: `policies.fixed(4)` returns a `jaxspec.types.Policy`.
"""

from jaxspec.policies.confidence import confidence as confidence
from jaxspec.policies.fixed import fixed as fixed
from jaxspec.policies.goodput import goodput as goodput
from jaxspec.policies.guarded import guarded as guarded
from jaxspec.policies.heuristic import heuristic as heuristic

__all__ = ["confidence", "fixed", "goodput", "guarded", "heuristic"]
