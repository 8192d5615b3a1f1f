"""Answers of several settings to the same prompts, one after the other in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from compare import rates
from systems import Answer, write

Rounds = list[list[Answer]]
"""The answers to all prompts, a list for each round."""


def read(tokenizer: Any, prompts: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The tokens of prompts with their categories, as `compare.read_prompts` reads them."""
    from jaxspec_models.text import encode_prompt

    return [
        {"category": category, "ids": encode_prompt(tokenizer, [{"role": "user", "content": text}])}
        for category, text in prompts
    ]


def hold(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    contestants: Mapping[str, Mapping[str, Any]],
    *,
    max_new_tokens: int,
    rounds: int,
) -> dict[str, Rounds]:
    """Lets each contestant (options of `jaxspec.generate`) answer each prompt, A B C C B A ….

    Every contestant's caches have room for the longest prompt, so that it compiles once.
    """
    slots = max(len(prompt["ids"]) for prompt in prompts)

    def ask(name: str, prompt: Mapping[str, Any], seed: int) -> Answer:
        request = {
            "ids": prompt["ids"],
            "max_new_tokens": max_new_tokens,
            "eos_ids": list(model.eos_ids),
            "seed": seed,
        }
        answer = write(model, request, slots=slots, **contestants[name])
        return {**answer, "category": prompt["category"]}

    for name in contestants:  # compiling is not part of it
        ask(name, prompts[0], 0)
    answers: dict[str, Rounds] = {name: [[] for _ in range(rounds)] for name in contestants}
    for turn in range(rounds):
        for index, prompt in enumerate(prompts):
            for name in list(contestants)[:: 1 if (turn + index) % 2 == 0 else -1]:
                time.sleep(0.1)
                answers[name][turn].append(ask(name, prompt, turn))
    return answers


def tokens_per_second(rounds: Rounds, category: str | None = None) -> float:
    """Of decoding, the median of the rounds; of one category, or of all."""
    chosen = [[a for a in one if category in (None, a["category"])] for one in rounds]
    return statistics.median(rates(one)["decode"] for one in chosen)


def tokens_per_step(rounds: Rounds) -> float:
    """Tokens for each forward of the target."""
    every = [answer for one in rounds for answer in one]
    return sum(answer["tokens"] for answer in every) / sum(answer["steps"] for answer in every)


def histogram(rounds: Rounds) -> np.ndarray:
    """i64[K + 1], in how many verifications so many drafts were accepted."""
    return np.sum([answer["histogram"] for one in rounds for answer in one], axis=0)


def same_texts(rounds: Rounds, reference: Rounds) -> float:
    """The share of answers that are the reference's, token for token."""
    pairs = [
        (one["ids"], two["ids"])
        for ours, theirs in zip(rounds, reference, strict=True)
        for one, two in zip(ours, theirs, strict=True)
    ]
    return sum(one == two for one, two in pairs) / len(pairs)
