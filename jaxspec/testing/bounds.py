"""How much any acceptance rule could accept: the optimal transport bound, for small V."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

MAX_TOKENS = 16
"""V at most: every set of tokens is looked at."""


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
      ValueError: V is too large, a draft is none of its tokens, or the probabilities do not add
        up to 1.

    References:
      Sun et al., SpecTr, arXiv 2310.15141; Hu et al., Towards Optimal Multi-draft Speculative
      Decoding, arXiv 2502.18779.

    Example:
      >>> optimal_acceptance([0.5, 0.3, 0.2], [((0, 1), 1.0)])  # a fixed pair: p of it
      0.8
    """
    law = np.asarray(target, np.float64)
    if law.ndim != 1 or not 1 <= law.size <= MAX_TOKENS:
        raise ValueError(
            f"optimal_acceptance takes target float[V], V ≤ {MAX_TOKENS}, got {law.shape}."
        )
    # Of each set H, a number whose bits are its tokens: p(H), and what is drafted inside of it.
    mass_of = np.zeros(2**law.size)
    mass_of[2 ** np.arange(law.size)] = law
    drafted = np.zeros_like(mass_of)
    for tokens, mass in drafts:
        chosen = set(tokens)
        if not chosen <= set(range(law.size)):
            raise ValueError(f"drafts must be tokens below {law.size}, got {sorted(chosen)}.")
        drafted[sum(2**token for token in chosen)] += mass
    if abs(drafted.sum() - 1.0) > 1e-6:
        raise ValueError("the drafts' probabilities must add up to 1.")
    for sums in (mass_of, drafted):  # over all subsets, one token after the other
        for token in range(law.size):
            halves = sums.reshape(-1, 2, 2**token)
            halves[:, 1] += halves[:, 0]
    return 1.0 + float(np.min(mass_of - drafted))
