"""Acceptance rules that do not keep the target's distribution: one algorithm a file.

They accept more drafts and say so: `guarantee` is "none", and `jaxspec.generate` takes them with
`exact=False` only. All of them leave greedy rows exact. Each public name is a factory, as in
`jaxspec.verifiers`; `jaxspec.testing.check_verifier` computes how far one moves a law, and
`benchmarks/lossy.py` measures it on a real model.
"""

from jaxspec.lossy.confidence import confidence as confidence
from jaxspec.lossy.lenient import lenient as lenient
from jaxspec.lossy.typical import typical as typical

__all__ = ["confidence", "lenient", "typical"]
