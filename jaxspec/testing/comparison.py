"""An empirical law against an exact one: chi-square, total variation, and what they can see."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxspec.testing.oracle import Law, Text

Array: TypeAlias = np.ndarray[Any, Any]

FALSE_ALARM = 1e-6
"""The probability with which a check fails a correct program, unless told otherwise."""

_LEAST_EXPECTED = 5.0  # texts expected more rarely are tested together
_MOST_LINES = 20


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How well observed texts fit an exact law.

    Two tests, each with half of the false-alarm probability: Pearson's chi-square, in which texts
    expected fewer than five times count as one, and the total variation against a bound that
    holds for any sample size (McDiarmid: E[TV] + √(ln(1/δ) / 2n), E[TV] ≤ ½ Σ √(p (1 - p) / n)).
    The chi-square's false alarm is nominal: far in the tail, counts of a few are not normal (at
    worst, two texts of which one is expected five times, chance fails it with 2e-5, not 1e-6).

    Attributes:
      law: {text: probability}, the exact law.
      counts: {text: times observed}.
      num_samples: n.
      statistic: Pearson's chi-square.
      degrees_of_freedom: of the statistic; 0: only impossible texts can fail it.
      p_value: of the statistic; 0 where a text of probability 0 was observed.
      total_variation: ½ Σ |observed frequency - probability|.
      bound: what the total variation of a correct program stays below.
      false_alarm: the probability with which a correct program fails.
    """

    law: Law
    counts: dict[Text, int]
    num_samples: int
    statistic: float
    degrees_of_freedom: int
    p_value: float
    total_variation: float
    bound: float
    false_alarm: float

    @property
    def passed(self) -> bool:
        """Whether the observed texts fit the law."""
        return self.p_value > self.false_alarm / 2 and self.total_variation <= self.bound

    def power(self, distance: float) -> float:
        """The probability, at least, of failing a program whose law is off by `distance`.

        Of the two tests the one that sees more. The chi-square's noncentrality is
        n Σ (q - p)² / p ≥ 4 n d²; shifts among texts that are tested together are not seen, so
        their mass is taken off the distance first. The total variation's mean is at least d, and
        it falls below the bound with a probability of at most exp(-2 n (d - bound)²) (McDiarmid).

        Args:
          distance: total variation between the wrong law and the exact one.
        """
        return power_of(self.law, self.num_samples, distance, false_alarm=self.false_alarm)

    def __str__(self) -> str:
        """One line, and a table of the texts with the largest errors."""
        verdict = "fits" if self.passed else "DOES NOT FIT"
        lines = [
            f"{verdict}: n = {self.num_samples}, chi-square {self.statistic:.1f} at "
            f"{self.degrees_of_freedom} degrees of freedom (p = {self.p_value:.2g}), total "
            f"variation {self.total_variation:.4f} (bound {self.bound:.4f}); would see 0.03 with "
            f"probability {self.power(0.03):.3f}",
            f"{'text':>24}  {'target':>9}  {'empirical':>9}  {'error':>9}",
        ]
        rows = []
        for text in set(self.law) | set(self.counts):
            exact = self.law.get(text, 0.0)
            seen = self.counts.get(text, 0) / self.num_samples
            rows.append((abs(seen - exact), text, exact, seen))
        rows.sort(key=lambda row: (-row[0], row[1]))
        for _, text, exact, seen in rows[:_MOST_LINES]:
            note = "  impossible" if exact == 0 else ""
            name = " ".join(map(str, text))
            lines.append(f"{name:>24}  {exact:9.5f}  {seen:9.5f}  {seen - exact:+9.5f}{note}")
        if len(rows) > _MOST_LINES:
            lines.append(f"{f'({len(rows) - _MOST_LINES} more)':>24}")
        return "\n".join(lines)


def compare(
    counts: Mapping[Text, int], law: Mapping[Text, float], *, false_alarm: float = FALSE_ALARM
) -> Comparison:
    """Compares observed texts with an exact law.

    Args:
      counts: {text: times observed}, independent observations.
      law: {text: probability}.
      false_alarm: the probability with which a correct program may fail.

    Returns:
      A `Comparison`.

    Raises:
      ValueError: no counts, a law that does not add up to 1, or a false alarm outside (0, 1).

    Example:
      >>> compare({(0,): 480, (1,): 520}, {(0,): 0.5, (1,): 0.5}).passed
      True
      >>> compare({(0,): 300, (1,): 700}, {(0,): 0.5, (1,): 0.5}).passed
      False
    """
    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm must lie between 0 and 1, got {false_alarm}.")
    law = {text: float(p) for text, p in law.items() if p > 0}
    if abs(sum(law.values()) - 1) > 1e-6:
        raise ValueError(f"the law's probabilities add up to {sum(law.values())}, not 1.")
    counts = {text: int(count) for text, count in counts.items() if count > 0}
    total = sum(counts.values())
    if total == 0:
        raise ValueError("there is nothing to compare: counts is empty.")
    probs = np.array(list(law.values()))
    observed = np.array([counts.get(text, 0) for text in law], float)
    statistic, freedom = _chi_square(observed, probs * total)
    is_possible = all(text in law for text in counts)
    everything = set(law) | set(counts)
    distance = 0.5 * sum(abs(counts.get(t, 0) / total - law.get(t, 0.0)) for t in everything)
    return Comparison(
        law=law,
        counts=counts,
        num_samples=total,
        statistic=statistic,
        degrees_of_freedom=freedom,
        p_value=float(_survival(statistic, freedom)) if is_possible else 0.0,
        total_variation=distance,
        bound=_bound(probs, total, false_alarm / 2),
        false_alarm=false_alarm,
    )


def chi_square_p_value(observed: Array, expected: Array) -> float:
    """Pearson's test of several laws at once, each with its own total.

    Outcomes expected fewer than five times count as one in each group; where even that is rare it
    is left out, which makes the statistic smaller than a chi-square of the same freedom.

    Args:
      observed: float64[G, V], counts in each of G groups.
      expected: float64[G, V], what they should be; each row adds up to the observed total.

    Returns:
      The p-value; 0 where the impossible was observed, 1 where nothing is frequent enough.
    """
    if ((expected <= 0) & (observed > 0)).any():
        return 0.0
    is_rare = expected < _LEAST_EXPECTED
    rest = np.stack([np.where(is_rare, x, 0.0).sum(axis=1) for x in (observed, expected)])
    has_rest = rest[1] >= _LEAST_EXPECTED
    statistic = np.sum((observed - expected)[~is_rare] ** 2 / expected[~is_rare])
    statistic += np.sum((rest[0] - rest[1])[has_rest] ** 2 / rest[1][has_rest])
    is_complete = has_rest | (rest[1] == 0)  # all of the group's outcomes are in the statistic
    cells = (~is_rare).sum(axis=1) + has_rest
    freedom = np.sum(np.where(is_complete & (cells > 0), cells - 1, cells))
    return float(_survival(statistic, freedom))


def _chi_square(observed: Array, expected: Array) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, rare texts merged into one."""
    is_rare = expected < _LEAST_EXPECTED
    if is_rare.any():
        merged = np.array([[values[is_rare].sum()] for values in (observed, expected)])
        observed = np.append(observed[~is_rare], merged[0])
        expected = np.append(expected[~is_rare], merged[1])
        if expected[-1] < _LEAST_EXPECTED and len(expected) > 1:  # still rare: join the smallest
            smallest = int(np.argmin(expected[:-1]))
            for values in (observed, expected):
                values[smallest] += values[-1]
            observed, expected = observed[:-1], expected[:-1]
    return float(np.sum((observed - expected) ** 2 / expected)), len(expected) - 1


def _survival(statistic: Any, freedom: Any) -> Array:
    """P(chi-square ≥ statistic), float64; 1 without degrees of freedom."""
    half = np.maximum(np.asarray(freedom, np.float64), 1e-9) / 2
    with jax.enable_x64(True):
        tail = jax.scipy.special.gammaincc(half, np.asarray(statistic, np.float64) / 2)
        return np.where(np.asarray(freedom) > 0, np.asarray(tail), 1.0)


def _power(num_samples: int, freedom: int, distance: float, false_alarm: float) -> float:
    """P(a noncentral chi-square passes the threshold), as a Poisson mixture of central ones."""
    noncentrality = 4 * num_samples * distance**2
    mean = noncentrality / 2
    num_terms = mean + 12 * math.sqrt(mean) + 30
    terms = np.arange(1024 * math.ceil(num_terms / 1024))  # few shapes, few compilations
    log_factorials = np.array([math.lgamma(j + 1) for j in terms])
    weights = np.exp(terms * math.log(mean) - mean - log_factorials) if mean > 0 else terms == 0
    tails = _survival(np.full(len(terms), _threshold(freedom, false_alarm)), freedom + 2 * terms)
    return float(min(np.sum(weights * tails), 1.0))


def power_of(law: Law, num_samples: int, distance: float, *, false_alarm: float) -> float:
    """`Comparison.power` before anything is drawn."""
    probs = np.array([p for p in law.values() if p > 0])
    if len(probs) == 1:  # any other text is impossible, and seen at once
        return 1 - (1 - distance) ** num_samples
    expected = probs * num_samples
    rare = float(expected[expected < _LEAST_EXPECTED].sum()) / num_samples
    freedom = _chi_square(expected, expected)[1]
    by_chi_square = 0.0  # all texts tested together: nothing is seen
    if freedom > 0 and distance > rare:
        by_chi_square = _power(num_samples, freedom, distance - rare, false_alarm / 2)
    surplus = max(distance - _bound(probs, num_samples, false_alarm / 2), 0.0)
    return max(by_chi_square, -math.expm1(-2 * num_samples * surplus**2))


def _bound(probs: Array, num_samples: int, false_alarm: float) -> float:
    """What the total variation of n draws from `probs` exceeds with at most `false_alarm`."""
    if len(probs) == 1:
        return 0.0  # leaves nothing to chance
    mean = 0.5 * float(np.sum(np.sqrt(probs * (1 - probs) / num_samples)))
    return mean + math.sqrt(-math.log(false_alarm) / (2 * num_samples))


@functools.cache
def _threshold(freedom: int, false_alarm: float) -> float:
    """The chi-square that chance exceeds with probability `false_alarm`."""
    low, high = 0.0, freedom + 100.0
    while _survival(high, freedom) > false_alarm:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _survival(middle, freedom) > false_alarm else (low, middle)
    return high


@functools.cache
def num_samples_for(
    num_texts: int,
    *,
    distance: float = 0.03,
    power: float = 0.99,
    false_alarm: float = FALSE_ALARM,
) -> int:
    """How many texts must be drawn to see a wrong law.

    Args:
      num_texts: texts that the exact law allows.
      distance: total variation of the wrong law from the exact one.
      power: probability, at least, of seeing it.
      false_alarm: probability of failing a correct program.

    Returns:
      n, a multiple of 1,000, for texts of which none is rare; `Comparison.power` says what is
      reached for the law at hand.

    Raises:
      ValueError: a number that is no probability between 0 and 1.

    Example:
      >>> num_samples_for(27)
      27000
    """
    for name, value in (("distance", distance), ("power", power), ("false_alarm", false_alarm)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}.")
    freedom = num_texts - 1
    if freedom < 1:
        return 1_000
    low, high = 0, 1
    while _power(1_000 * high, freedom, distance, false_alarm / 2) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = _power(1_000 * middle, freedom, distance, false_alarm / 2) >= power
        low, high = (low, middle) if enough else (middle, high)
    return 1_000 * high
