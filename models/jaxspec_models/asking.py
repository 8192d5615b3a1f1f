"""Prompts from the model itself, for training a drafter without a file of them.

A model that was tuned on chats has learned what users say as well as what it answers: given its
chat template up to the user's turn, it goes on as a user would (Xu et al., Magpie, arXiv
2406.08464).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxspec
from jaxspec_models.files import write_atomically

_PLACE = "PLACE-OF-THE-USER"
_MOST_IN_VAIN = 1000


def user_turn(tokenizer: Any, beginning: str = "") -> list[int]:
    r"""The chat template up to where a user's first words stand, as ids.

    Args:
      tokenizer: one with a chat template.
      beginning: those words, as far as they are given.

    Raises:
      ValueError: there is no template, or it does not repeat what a user says.

    Example:
      >>> class Letters:
      ...     def apply_chat_template(self, messages, **unused):
      ...         return f"user: {messages[0]['content']}\nassistant:"
      ...     def encode(self, text, add_special_tokens):
      ...         return [ord(letter) for letter in text]
      >>> user_turn(Letters(), "Why") == [ord(letter) for letter in "user: Why"]
      True
    """
    messages = [{"role": "user", "content": _PLACE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    before, place, _ = text.partition(_PLACE)
    if not place:
        raise ValueError("the chat template does not repeat what the user says.")
    return list(tokenizer.encode(before + beginning, add_special_tokens=False))


def write_prompts(
    model: jaxspec.LanguageModel,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    target: str,
    count: int,
    beginnings: str | Sequence[str] = ("",),
    temperature: float = 1.0,
    max_prompt_tokens: int = 128,
    batch: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Lets a model say what it would be asked, and keeps what is whole and new.

    Called again with the same arguments it goes on where it was, also for a higher `count`. What is
    kept does not depend on the batch: each attempt has a number, and a key of its own.

    Args:
      model: the target.
      tokenizer: its own; one with a chat template.
      path: JSONL, one prompt a line, as `answers.read_prompts` reads it.
      target: the model's name, for whoever reads the prompts.
      count: prompts that are wanted.
      beginnings: first words, which the attempts are given in turn: the kinds of prompts that are
        wanted. The empty one leaves the kind to the model. Blanks at their ends are left out: the
        blank before a word is part of the word's token, and so the model's to write.
      temperature: they are drawn at; lower, they are plainer.
      max_prompt_tokens: what has not ended by then is left out; beginnings are not counted.
      batch: attempts at a time.
      seed: another seed, other prompts.
      on_progress: called with the prompts there are, and how many are wanted; never, where nothing
        is left to do.

    Returns:
      How many there are.

    Raises:
      ValueError: there is no beginning, the file holds something else, the model has no EOS token
        or no chat template or is not made for texts so long, or a thousand attempts and more with
        one beginning bring nothing whole and new; what was kept stays.
      OSError: the file cannot be written.
    """
    path = Path(path)
    given = (beginnings,) if isinstance(beginnings, str) else beginnings
    kinds = tuple(beginning.rstrip() for beginning in given)
    if not kinds:
        raise ValueError('beginnings is empty; give first words, or "" for none.')
    firsts = [user_turn(tokenizer, kind) for kind in kinds]
    num_first = max(map(len, firsts))
    longest = num_first + max_prompt_tokens
    if model.max_length is not None and longest > model.max_length:
        raise ValueError(
            f"a beginning of {num_first} tokens, those of the template included, and "
            f"max_prompt_tokens={max_prompt_tokens} make {longest}; the model is made for "
            f"{model.max_length}: lower max_prompt_tokens, or shorten the beginnings."
        )
    if not model.eos_ids:
        raise ValueError("the model has no EOS token: what it says would never end.")
    drawn = f"{target}, temperature {temperature:g}, seed {seed}, {max_prompt_tokens} tokens"
    if kinds != ("",):
        drawn += f", beginnings {hashlib.sha256(repr(kinds).encode()).hexdigest()[:8]}"
    kept = _read(path, drawn)
    number = kept[-1]["number"] + 1 if kept else 0
    known = {row["prompt"] for row in kept}
    key = jax.random.key(seed, impl="threefry2x32")
    num_in_vain, has_begun = np.zeros(len(kinds), int), len(kept) < count
    while len(kept) < count:
        on_progress(len(kept), count)
        numbers = np.arange(number, number + batch, dtype=np.uint32)
        kind_of = numbers % len(kinds)
        generation = jaxspec.generate(
            model,
            [firsts[kind] for kind in kind_of],
            sampling=jaxspec.Sampling(temperature=temperature),
            max_new_tokens=max_prompt_tokens,
            key=jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers),
        )
        tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
        has_ended = np.asarray(generation.status) == jaxspec.status.EOS
        num_in_vain += np.bincount(kind_of, minlength=len(kinds))
        for row in np.flatnonzero(has_ended):
            kind, rest = kind_of[row], tokens[row, : lengths[row] - 1].tolist()
            text = _said(tokenizer, firsts[kind], kinds[kind], rest)
            if text and text not in known and len(kept) < count:
                known.add(text)
                num_in_vain[kind] = 0
                kept.append({"prompt": text, "source": drawn, "number": int(numbers[row])})
        number += batch
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_atomically(path, lines.encode())
        worst = int(np.argmax(num_in_vain))
        if len(kept) < count and num_in_vain[worst] >= _MOST_IN_VAIN:
            behind = f" with the beginning {kinds[worst]!r}" if kinds[worst] else ""
            raise ValueError(
                f"the last {num_in_vain[worst]} attempts{behind} brought nothing whole and new, "
                f"beside the {len(kept)} prompts in {path}; raise max_prompt_tokens or the "
                "temperature."
            )
    if has_begun:
        on_progress(len(kept), count)
    return len(kept)


def _said(tokenizer: Any, first: list[int], beginning: str, rest: list[int]) -> str:
    """What a user said; nothing, if the template's own marks are in it, or no rest."""
    if tokenizer.decode(rest) != tokenizer.decode(rest, skip_special_tokens=True):
        return ""
    # Not the rest alone: some decoders take the blank from the first token of a text.
    before: str = tokenizer.decode(first)
    text: str = tokenizer.decode([*first, *rest])[len(before) :]
    return (beginning + text).strip() if text.strip() else ""


def _read(path: Path, drawn: str) -> list[dict[str, Any]]:
    """The rows that there are."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8") as lines:  # "\u2028" ends no line of a file
            rows = [json.loads(line) for line in lines]
        others = {row["source"] for row in rows} - {drawn}
        numbers = [row["number"] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no prompts of this kind; choose another file.") from error
    if others or numbers != sorted(numbers):
        raise ValueError(
            f"{path} holds prompts of {others or 'another order'}, and these would be of {drawn}; "
            "choose another file."
        )
    return rows
