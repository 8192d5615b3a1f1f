"""`jaxspec demo`: one text, written twice by a real model."""

from __future__ import annotations

import argparse
from typing import Any

import jaxspec
from jaxspec.cli import running
from jaxspec.cli.common import DEFAULT_MODEL

_NUM_LOOKED_UP = 7

PROMPT = """\
Write this letter out again, neatly.

Dear neighbour,

your goose has again walked into our kitchen, eaten the butter, and sat down on my husband. \
My husband is a patient man, but the goose is not a patient goose. \
Please come and collect the goose. You may also collect my husband.

Yours sincerely,
Agatha"""


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Args:
      arguments: from `jaxspec.cli.options.parse`.

    Returns:
      The exit code.

    Raises:
      UserError: the model cannot be loaded, or an argument is wrong.
    """
    tokenizer = running.load_tokenizer(DEFAULT_MODEL)
    prompt_ids = running.encode(tokenizer, PROMPT, is_chat=True)
    target = running.load_model(DEFAULT_MODEL, arguments.dtype, arguments.quantization)
    own = target.default_drafter
    options: dict[str, Any] = {
        "sampling": jaxspec.Sampling(temperature=0),
        "max_new_tokens": arguments.max_new_tokens,
        "num_draft_tokens": arguments.num_draft_tokens or _NUM_LOOKED_UP,
    }
    weights = arguments.quantization or arguments.dtype
    running.put(f"{DEFAULT_MODEL}, {weights}, is asked:\n\n{_indented(PROMPT)}\n\n")

    drafting = options | {"drafter": jaxspec.drafters.prompt_lookup()}
    if own is not None:
        drafting |= running.drafting(own, arguments.num_draft_tokens, arguments.quantization)
    compile_seconds = [running.compile_programs(target, prompt_ids, **drafting)]
    name = "prompt lookup" if own is None else "the drafter that comes with the model"
    running.put(f"It answers, several tokens per forward ({name}):\n\n")
    indent = _Indent()
    speculative = running.write(
        target, tokenizer, prompt_ids, on_text=lambda text: running.put(indent(text)), **drafting
    )
    running.put("\n\n")

    compile_seconds.insert(0, running.compile_programs(target, prompt_ids, **options))
    running.say("And once more, one token per forward ...")
    plain = running.write(target, tokenizer, prompt_ids, on_text=lambda text: None, **options)
    running.put(table([plain, speculative], compile_seconds))
    is_same = plain.token_ids == speculative.token_ids
    running.put(f"same text: {'yes' if is_same else 'no'}\n")
    if own is None:
        running.put("(An answer that repeats its prompt is the best case for prompt lookup.)\n")
    return 0


def table(written: list[running.Written], compile_seconds: list[float]) -> str:
    """Lays out plain against speculative decoding.

    Args:
      written: plain, speculative.
      compile_seconds: of each.

    Returns:
      Aligned lines.
    """
    lengths = [float(one.generation.stats.mean_acceptance_length[0]) for one in written]
    rows = [
        ("", ["plain", "speculative"]),
        ("tokens", [str(len(one.token_ids)) for one in written]),
        ("seconds, prefill included", [f"{one.seconds:.2f}" for one in written]),
        ("tokens/s", [f"{len(one.token_ids) / one.seconds:.1f}" for one in written]),
        ("target forwards", [str(one.num_steps) for one in written]),
        ("mean acceptance length", [f"{length:.2f}" for length in lengths]),
        ("compiling apart, seconds", [f"{seconds:.1f}" for seconds in compile_seconds]),
    ]
    return "".join(f"{name:<26}{left:>8}{right:>13}\n" for name, (left, right) in rows)


class _Indent:
    """Indents text that comes in pieces."""

    def __init__(self) -> None:
        self._is_line_start = True

    def __call__(self, text: str) -> str:
        out = []
        for line in text.splitlines(keepends=True):
            out.append(("  " if self._is_line_start and line.strip() else "") + line)
            self._is_line_start = line.endswith("\n")
        return "".join(out)


def _indented(text: str) -> str:
    return _Indent()(text)
