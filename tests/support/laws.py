"""Comparing empirical laws with exact ones."""

from __future__ import annotations

import numpy as np
from scipy import stats

FALSE_ALARM = 1e-6
"""The probability with which one chi-square check fails a correct program."""


def chi_square_p_value(counts: dict, law: dict) -> float:
    """The p-value of observed counts under an exact law; 0 if the impossible was observed.

    Cells with an expectation below 5 are merged into one, so that the approximation holds.
    """
    if any(law.get(text, 0.0) <= 0.0 for text in counts):
        return 0.0
    total = sum(counts.values())
    expected = np.array([law[text] * total for text in law])
    observed = np.array([counts.get(text, 0) for text in law], float)
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
        if expected[-1] < 1:  # too little to test: join the smallest cell
            smallest = np.argmin(expected[:-1])
            expected[smallest] += expected[-1]
            observed[smallest] += observed[-1]
            expected, observed = expected[:-1], observed[:-1]
    if len(expected) < 2:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(expected) - 1))


def total_variation(counts: dict, law: dict) -> float:
    """Half the L1 distance of the empirical law from the exact one."""
    total = sum(counts.values())
    texts = set(counts) | set(law)
    return 0.5 * sum(abs(counts.get(t, 0) / total - law.get(t, 0.0)) for t in texts)


def counts_of(generation) -> dict:
    """{text: rows}, each text cut at its row's length."""
    tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
    rows, repeats = np.unique(np.c_[lengths, tokens], axis=0, return_counts=True)
    counts: dict = {}
    for (length, *row), repeat in zip(rows.tolist(), repeats.tolist(), strict=True):
        text = tuple(row[:length])
        counts[text] = counts.get(text, 0) + repeat
    return counts
