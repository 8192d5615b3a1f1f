"""Outcome codes of a row, and what they mean."""

from __future__ import annotations

RUNNING = 0
"""The row is still being written; never returned by `generate`."""
EOS = 1
"""The row emitted one of its end-of-sequence tokens."""
LENGTH = 2
"""The row emitted `max_new_tokens` tokens."""
NONFINITE = 3
"""The target's logits held NaN or +inf, or bans left no token; what was emitted before is kept."""
STOP = 4
"""The row emitted one of its stop sequences."""

MESSAGES: dict[int, str] = {
    RUNNING: "still running",
    EOS: "stopped at an end-of-sequence token",
    LENGTH: "stopped at max_new_tokens",
    NONFINITE: (
        "stopped because the target's logits were NaN or infinite, or the sampling options banned "
        "every token; the tokens before are kept. Check the options, the model's weights and its "
        "dtype."
    ),
    STOP: "stopped at a stop sequence",
}


def message(code: int) -> str:
    """The meaning of a status code, for a person.

    Args:
      code: an element of `Generation.status`.

    Returns:
      One sentence.

    Raises:
      ValueError: there is no such code.

    Example:
      >>> message(EOS)
      'stopped at an end-of-sequence token'
    """
    if int(code) not in MESSAGES:
        raise ValueError(f"{code} is not a status; the codes are {sorted(MESSAGES)}.")
    return MESSAGES[int(code)]
