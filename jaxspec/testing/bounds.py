"""How much any acceptance rule could accept: the optimal transport bound, for small V."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np


def optimal_acceptance(target: Any, drafts: Iterable[tuple[Iterable[int], float]]) -> float:
    """The highest probability with which any lossless rule accepts one of several drafts.

    α* = 1 + min over sets H of tokens of p(H) - Pr(all drafts lie in H): the cost of the optimal
    transport of the drafts' joint law to the target's, by Hall's theorem. The empty set makes it
    at most 1.

    Args:
      target: float[V], the target's law p; V ≤ 16, as every set of tokens is looked at.
      drafts: (the drafts of one node, their probability), adding up to 1; a draft without tokens
        is never accepted.

    Returns:
      α*.

    Raises:
      ValueError: V is too large, or the probabilities do not add up to 1.

    References:
      Sun et al., SpecTr, arXiv 2310.15141; Hu et al., Towards Optimal Multi-draft Speculative
      Decoding, arXiv 2502.18779.

    Example:
      >>> optimal_acceptance([0.5, 0.3, 0.2], [((0, 1), 1.0)])  # a fixed pair: p of it
      0.8
    """
    law = np.asarray(target, np.float64)
    groups = [(frozenset(tokens), float(mass)) for tokens, mass in drafts]
    if law.ndim != 1 or not 1 <= law.size <= 16:
        raise ValueError(f"optimal_acceptance takes target float[V], V ≤ 16, got {law.shape}.")
    if abs(sum(mass for _, mass in groups) - 1.0) > 1e-6:
        raise ValueError("the drafts' probabilities must add up to 1.")
    least = 0.0
    for size in range(law.size + 1):
        for chosen in itertools.combinations(range(law.size), size):
            inside = sum(mass for tokens, mass in groups if tokens <= set(chosen))
            least = min(least, float(law[list(chosen)].sum()) - inside)
    return 1.0 + least
