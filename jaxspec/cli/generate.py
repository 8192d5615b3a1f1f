"""`jaxspec generate`: text behind a prompt, printed as it is written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxspec
from jaxspec.cli import running
from jaxspec.cli.errors import UserError, told_to_the_user
from jaxspec.settings import read as read_settings


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Args:
      arguments: from `jaxspec.cli.options.parse`.

    Returns:
      The exit code.

    Raises:
      UserError: an argument, a file or a model is wrong.
    """
    prompt = read_prompt(arguments)
    start = time.perf_counter()
    tokenizer = running.load_tokenizer(arguments.model)
    prompt_ids = running.encode(tokenizer, prompt, is_chat=arguments.chat)
    target = running.load_model(arguments.model, arguments.dtype, arguments.quantization)
    drafter = drafter_of(arguments, target)
    options: dict[str, Any] = {
        **_drafting(arguments, drafter),
        "sampling": dataclasses.replace(
            sampling_options(arguments), grammar=_grammar(arguments, tokenizer, target)
        ),
        "max_new_tokens": arguments.max_new_tokens,
        "key": jax.random.key(arguments.seed, impl="threefry2x32"),
    }
    load_seconds = time.perf_counter() - start
    compile_seconds = running.compile_programs(target, prompt_ids, **options)
    on_text = (lambda text: None) if arguments.json else running.put
    written = running.write(
        target, tokenizer, prompt_ids, on_text=on_text, stop=arguments.stop, **options
    )

    code = int(written.generation.status[0])
    if arguments.json:
        seconds = {
            "load": load_seconds,
            "compile": compile_seconds,
            "prefill_and_decode": written.seconds,
        }
        report = {"model": arguments.model, "prompt": prompt, "prompt_token_ids": prompt_ids}
        running.put(json.dumps(report | describe(written) | {"seconds": seconds}) + "\n")
    else:
        running.put("" if written.text.endswith("\n") else "\n")
        print(_summary(written, compile_seconds), file=sys.stderr)
    return 1 if code == jaxspec.status.NONFINITE else 0


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt, from where the arguments say.

    Raises:
      UserError: there is none, it is empty or it is no UTF-8.
    """
    if arguments.prompt is not None:
        source, text = "--prompt", arguments.prompt
        # What was no UTF-8 on the command line arrives as lone surrogates.
        encoded = text.encode("utf-8", errors="surrogateescape")
    elif arguments.prompt_file is not None:
        source, encoded = arguments.prompt_file, _read_file(arguments.prompt_file, "prompt")
    elif sys.stdin is None or sys.stdin.isatty():
        raise UserError(
            "there is no prompt; pass --prompt TEXT or --prompt-file FILE, or pipe a text in "
            "(see jaxspec generate --help)"
        )
    else:
        source, encoded = "standard input", sys.stdin.buffer.read()
    text = _text(encoded, source, "prompt")
    if arguments.prompt is None:
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UserError(f"the prompt from {source} is empty")
    return text


def _text(encoded: bytes, source: str, what: str) -> str:
    try:
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the {what} from {source} is not UTF-8 (byte {error.start}); convert it first"
        ) from error


def _read_file(name: str, what: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the {what} file {name} cannot be read: {reason}") from error


def drafter_of(arguments: argparse.Namespace, target: jaxspec.LanguageModel) -> Any:
    """What --draft or --drafter names, or None.

    Raises:
      UserError: it could not be loaded.
    """
    if arguments.draft is not None:
        running.say(f"Loading {arguments.draft} ...")
        draft = running.load_model(arguments.draft, arguments.dtype, arguments.quantization)
        return jaxspec.drafters.model(draft)
    if arguments.drafter == "none":
        return None
    if arguments.drafter == "auto":
        return target.default_drafter or jaxspec.drafters.prompt_lookup()
    if arguments.drafter == "prompt-lookup":
        return jaxspec.drafters.prompt_lookup()
    if not Path(arguments.drafter).is_dir():
        raise UserError(
            "--drafter is auto, prompt-lookup, none or a directory of jaxspec train drafter; "
            f"{arguments.drafter} is none of them"
        )
    with told_to_the_user():
        from jaxspec_models import load_drafter

        return load_drafter(arguments.drafter, target)


def _drafting(arguments: argparse.Namespace, drafter: Any) -> dict[str, Any]:
    if arguments.settings is None:
        return running.drafting(drafter, arguments.num_draft_tokens, arguments.quantization)
    with told_to_the_user():
        settings = read_settings(arguments.settings)
    count = settings.num_draft_tokens
    if settings.tree is None and count > 0:
        return running.drafting(drafter, count, arguments.quantization)
    policy = jaxspec.policies.guarded(jaxspec.policies.fixed(max(count, 1)))
    return {"drafter": drafter, "settings": settings, "policy": policy}


def _grammar(
    arguments: argparse.Namespace, tokenizer: Any, target: jaxspec.LanguageModel
) -> jaxspec.sampling.Grammar | None:
    if arguments.regex is None and arguments.json_schema is None:
        return None
    with told_to_the_user():
        from jaxspec_models.grammars import json_grammar, regex_grammar

        ids: dict[str, Any] = {"vocab_size": target.vocab_size, "eos_ids": target.eos_ids}
        if arguments.regex is not None:
            return regex_grammar(arguments.regex, tokenizer, **ids)
        schema = _text(_read_file(arguments.json_schema, "schema"), arguments.json_schema, "schema")
        return json_grammar(schema, tokenizer, **ids)


def sampling_options(arguments: argparse.Namespace) -> jaxspec.Sampling:
    """Greedy unless an option asks for drawing; options that were not given stay neutral."""
    names = (option.name for option in dataclasses.fields(jaxspec.Sampling))
    given = {name: getattr(arguments, name, None) for name in names}
    chosen = {name: value for name, value in given.items() if value is not None}
    draws = chosen.keys() & {"top_k", "top_p", "min_p", "typical_p"}
    return jaxspec.Sampling(**({"temperature": 1.0 if draws else 0} | chosen))


def describe(written: running.Written) -> dict[str, Any]:
    """What was written, in JSON's types: text, token_ids, status, guarantee and stats."""
    generation = written.generation
    names = (
        "num_spec_steps",
        "num_draft_tokens",
        "num_accepted_draft_tokens",
        "draft_acceptance_rate",
        "mean_acceptance_length",
        "tokens_per_step",
        "acceptance_histogram",
    )
    stats = {name: np.asarray(getattr(generation.stats, name))[0].tolist() for name in names}
    return {
        "text": written.text,
        "token_ids": written.token_ids,
        "status": jaxspec.status.message(int(generation.status[0])),
        "guarantee": generation.guarantee,
        "stats": stats,
    }


def _summary(written: running.Written, compile_seconds: float) -> str:
    num_tokens, num_steps = len(written.token_ids), written.num_steps
    return (
        f"[{num_tokens} tokens in {written.seconds:.2f} s "
        f"({num_tokens / written.seconds:.1f} tokens/s, compiling apart: {compile_seconds:.1f} s); "
        f"{num_steps} forwards, {num_tokens / max(num_steps, 1):.2f} tokens a forward; "
        f"{jaxspec.status.message(int(written.generation.status[0]))}]"
    )
