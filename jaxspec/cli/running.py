"""What both commands do: load, compile, and print a text while it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxspec
from jaxspec import arguments
from jaxspec.cli.errors import INTERRUPTED, UserError, told_to_the_user
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.generate import prefill, result, run
from jaxspec.loop import paid_widths
from jaxspec.types import PREFILL_CHUNK, Policy

_NUM_DRAFTED = 4
_NATIVE, _UNIT = "int8, our kernel", "int8, XLA's with a matrix unit"
# As far as verifying costs almost nothing, and as much of what was trained as pays
# (benchmarks/README.md).
_NUM_LOOKED_UP = {None: 4, "int8": 2, _UNIT: 4, _NATIVE: 2}
_NUM_TRAINED = {None: 2, "int8": 1, _UNIT: 2, _NATIVE: 2}
_COSTS = {
    None: ((1, 5, 8, 11), (1.0, 1.06, 1.1, 1.2)),
    "int8": ((1, 3, 5, 8, 11), (1.0, 1.25, 1.7, 2.4, 3.0)),
    _UNIT: ((1, 3, 5, 7, 9, 13), (1.0, 1.08, 1.2, 1.28, 1.35, 1.45)),
    _NATIVE: ((1, 3, 5, 7, 9, 13), (1.0, 1.13, 1.45, 1.75, 2.05, 2.55)),
}
"""Tokens of a target forward, and its time over that of one token's, by quantisation: measured on
2 cores with smollm2-135m; int8 by XLA between a machine with AVX-512 (3 tokens: 1.13) and one
without (1.36), and apart with AMX (benchmarks/README.md). `jaxspec.measure_costs` takes a minute.
"""
_LOOKUP_COST, _TRAINED_COST = 0.005, 0.06
"""Of a draft, likewise: copied from the text, and of an EAGLE-3 drafter beside an int8 target."""


@dataclasses.dataclass(frozen=True)
class Written:
    """One text and what it took.

    Attributes:
      text: without special tokens.
      token_ids: the new tokens, the one that ended the text included.
      generation: the one row's `jaxspec.Generation`.
      seconds: prefill and decoding.
    """

    text: str
    token_ids: list[int]
    generation: jaxspec.Generation
    seconds: float

    @property
    def num_steps(self) -> int:
        """Target forwards, prefill apart."""
        return int(self.generation.stats.num_spec_steps[0])


def say(text: str) -> None:
    """Tells someone at a terminal what takes so long."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def put(text: str) -> None:
    """Prints text to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Lets Ctrl-C end the process at once.

    For the time that JAX traces, compiles and runs: an exception that unwinds out of its compiler
    makes the interpreter crash at its end (seen with jax 0.10.2). All text is out by then.
    """

    def leave(*unused: Any) -> None:
        os.write(2, b"\nInterrupted.\n")
        os._exit(INTERRUPTED)

    try:
        before = signal.signal(signal.SIGINT, leave)
    except ValueError:  # not the main thread, which alone is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on the disk, beside the models.

    A later start with the same model and options then loads them. Whoever set
    JAX_COMPILATION_CACHE_DIR decides for himself.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    from jaxspec_models.cache import cache_dir

    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    # Also what compiles quickly: there are dozens of such programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a model.

    Raises:
      UserError: it could not be loaded.
    """
    say(f"Loading {name} ...")
    keep_compiled_programs()
    with told_to_the_user():
        from jaxspec_models import load_tokenizer

        return load_tokenizer(name)


def load_model(name: str, dtype: str, quantization: str | None) -> jaxspec.LanguageModel:
    """Loads a model.

    Raises:
      UserError: it could not be loaded.
    """
    with told_to_the_user():
        from jaxspec_models import load_model

        return load_model(name, dtype=dtype, quantization=quantization)


def read_prompts(path: str) -> list[str]:
    """The prompts of a JSONL file.

    Raises:
      UserError: it cannot be read, or has none.
    """
    with told_to_the_user():
        from jaxspec_models import answers

        try:
            return answers.read_prompts(path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"the prompts {path} cannot be read: {reason}") from error


def drafting(
    drafter: Any, num_draft_tokens: int | None, quantization: str | None
) -> dict[str, Any]:
    """How much is drafted.

    Of text that is looked up, and by what was trained, as much as pays; by a model always, while
    it pays: what its drafts cost, nobody has measured.

    Args:
      drafter: what drafts, or None.
      num_draft_tokens: the most tokens at a time; None: what suits the drafter.
      quantization: of the target.

    Returns:
      Options of `jaxspec.generate`.
    """
    kind = _kind_of(quantization)
    is_lookup = drafter is None or isinstance(drafter, PromptLookup)
    own: int | None = getattr(drafter, "max_draft_tokens", None)
    if num_draft_tokens is None:
        if is_lookup:
            num_draft_tokens = _NUM_LOOKED_UP[kind]
        elif own is None:
            num_draft_tokens = _NUM_DRAFTED
        else:
            num_draft_tokens = min(own, _NUM_TRAINED[kind])
    policy: Policy = jaxspec.policies.fixed(num_draft_tokens)
    if is_lookup or own is not None:
        tokens, seconds = _COSTS[kind]
        verify = np.interp(paid_widths(num_draft_tokens), tokens, seconds)
        costs = (verify, _LOOKUP_COST if is_lookup else _TRAINED_COST, 0.03)
        profile = jaxspec.Profile(*(jnp.asarray(cost, jnp.float32) for cost in costs))
        policy = jaxspec.policies.goodput(profile)
    return {
        "drafter": drafter,
        "num_draft_tokens": num_draft_tokens,
        "policy": jaxspec.policies.guarded(policy),
    }


def _kind_of(quantization: str | None) -> str | None:
    """By what int8 is multiplied on this machine."""
    if quantization != "int8":
        return quantization
    from jaxspec_models.quantization import has_matrix_unit, max_native_rows

    if max_native_rows():
        return _NATIVE
    return _UNIT if has_matrix_unit() else quantization


def encode(tokenizer: Any, prompt: str, *, is_chat: bool) -> list[int]:
    """The ids of a prompt, through the chat template if need be.

    Raises:
      UserError: there is no chat template.
    """
    with told_to_the_user():
        from jaxspec_models.text import encode_prompt

        messages = [{"role": "user", "content": prompt}]
        return encode_prompt(tokenizer, messages if is_chat else prompt)


@exit_on_interrupt()
def compile_programs(target: jaxspec.LanguageModel, prompt_ids: list[int], **options: Any) -> float:
    """Compiles and warms up what `write` will run with the same arguments.

    Args:
      target: as in `jaxspec.generate`.
      prompt_ids: the prompt.
      **options: of `jaxspec.generate`.

    Returns:
      The seconds it took.

    Raises:
      UserError: the arguments are wrong.
    """
    start = time.perf_counter()
    with told_to_the_user():
        prepared = arguments.prepare(target, [prompt_ids], **options)
    say("Compiling ...")
    engine = prepared.engine
    # The same shapes, the prompt's first chunk and two rounds with room for drafts. Not less: what
    # is only set up when it first runs (0.75 s in bfloat16, see benchmarks/README.md) belongs here.
    lengths = jnp.minimum(prepared.request.prompt_lengths, PREFILL_CHUNK + 1)
    request = prepared.request._replace(
        prompt_lengths=lengths,
        start_lengths=lengths,
        max_lengths=lengths + prepared.max_new_tokens,
    )
    state = prefill(engine, request, prepared.prompts, max_new_tokens=prepared.max_new_tokens)
    state = run(engine, request, state, 2)
    jax.block_until_ready(result(engine, request, state, pad_id=prepared.pad_id))
    return time.perf_counter() - start


@exit_on_interrupt()
def write(
    target: jaxspec.LanguageModel,
    tokenizer: Any,
    prompt_ids: list[int],
    *,
    on_text: Callable[[str], None],
    stop: Sequence[str] = (),
    **options: Any,
) -> Written:
    """Writes a text behind one prompt.

    Args:
      target: as in `jaxspec.generate`.
      tokenizer: the target's.
      prompt_ids: the prompt.
      on_text: called with each new piece of text, whole characters only.
      stop: texts that end it, which is cut right behind the first of them.
      **options: of `jaxspec.generate`.

    Returns:
      The text and its statistics.

    Raises:
      UserError: the arguments are wrong.
    """
    from jaxspec_models.text import cut_behind, stop_strings
    from jaxspec_models.tokenizer import Detokenizer

    detokenizer = Detokenizer(tokenizer)
    written = ""

    def emit(piece: str) -> None:
        nonlocal written
        whole = written + piece
        cut = cut_behind(whole, stop)
        new = whole if cut is None else cut
        if len(new) > len(written):
            on_text(new[len(written) :])
        written = new

    start = time.perf_counter()
    with told_to_the_user():
        ends = stop_strings(tokenizer, stop) if stop else None
        rounds = jaxspec.stream(target, [prompt_ids], stop=ends, **options)
    while True:
        try:
            _, ids = next(rounds)
        except StopIteration as end:
            generation = end.value
            break
        emit(detokenizer.push(ids))
    emit(detokenizer.finish())
    seconds = time.perf_counter() - start
    token_ids = np.asarray(generation.tokens)[0, : int(generation.lengths[0])].tolist()
    return Written(written, token_ids, generation, seconds)
