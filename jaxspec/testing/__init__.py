"""Proofs for strategies of one's own: table models, the exact oracle, conformance checks.

Each check returns a report: `passed`, a readable `str`, and `assert_passed()` for tests.
"""

from jaxspec.testing.bounds import optimal_acceptance as optimal_acceptance
from jaxspec.testing.comparison import Comparison as Comparison
from jaxspec.testing.comparison import compare as compare
from jaxspec.testing.comparison import num_samples_for as num_samples_for
from jaxspec.testing.drafter import DrafterReport as DrafterReport
from jaxspec.testing.drafter import check_drafter as check_drafter
from jaxspec.testing.lossless import LosslessReport as LosslessReport
from jaxspec.testing.lossless import check_lossless as check_lossless
from jaxspec.testing.oracle import Oracle as Oracle
from jaxspec.testing.tables import random_logits as random_logits
from jaxspec.testing.tables import table_model as table_model
from jaxspec.testing.verifier import VerifierReport as VerifierReport
from jaxspec.testing.verifier import check_verifier as check_verifier

__all__ = [
    "Comparison",
    "DrafterReport",
    "LosslessReport",
    "Oracle",
    "VerifierReport",
    "check_drafter",
    "check_lossless",
    "check_verifier",
    "compare",
    "num_samples_for",
    "optimal_acceptance",
    "random_logits",
    "table_model",
]
