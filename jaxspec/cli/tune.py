"""`jaxspec tune`: what is fastest for a model, a drafter and this machine, in a small file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax

import jaxspec
from jaxspec.cli import generate, running
from jaxspec.cli.errors import UserError, told_to_the_user


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Args:
      arguments: from `jaxspec.cli.options.parse`.

    Returns:
      The exit code.

    Raises:
      UserError: an argument, a file or a model is wrong.
    """
    if not arguments.tree:
        raise UserError("say what to tune: --tree finds the fastest tree, chain or none")
    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise UserError(f"{arguments.out} cannot be written: {out.parent} is no directory")
    prompts = running.read_prompts(arguments.prompts)[: arguments.num_prompts]
    tokenizer = running.load_tokenizer(arguments.model)
    ids = [running.encode(tokenizer, prompt, is_chat=arguments.chat) for prompt in prompts]
    target = running.load_model(arguments.model, arguments.dtype, arguments.quantization)
    drafter = _drafter(arguments, target)
    running.say("Measuring; compiling takes most of the time ...")
    with told_to_the_user(), running.exit_on_interrupt():
        from jaxspec import tuning

        settings = tuning.tune_tree(
            target,
            drafter,
            ids,
            sizes=[size for size in tuning.SIZES if size <= arguments.max_nodes],
            sampling=jaxspec.Sampling(temperature=arguments.temperature),
            max_new_tokens=arguments.max_new_tokens,
            key=jax.random.key(arguments.seed, impl="threefry2x32"),
        )
        from jaxspec_models.files import write_atomically

        try:
            write_atomically(out, settings.to_json().encode())
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{arguments.out} cannot be written: {reason}") from error
    running.put(_summary(settings) + f"Written to {out}; jaxspec generate --settings takes it.\n")
    return 0


def _drafter(arguments: argparse.Namespace, target: jaxspec.LanguageModel) -> Any:
    drafter = generate.drafter_of(arguments, target)
    if not hasattr(drafter, "in_tree"):
        raise UserError(
            "there is no drafter that could draft a tree; pass --draft, or --drafter with "
            "prompt-lookup or a directory of jaxspec train drafter of method eagle3"
        )
    return drafter


def _summary(settings: jaxspec.Settings) -> str:
    found = settings.measured
    first = ", ".join(f"{share:.2f}" for share in found["acceptance_by_depth"][0])
    seconds = found["seconds_of_a_round_by_nodes"]
    chains = found["seconds_of_a_round_by_length_of_chain"]
    lines = [
        f"first drafts accepted, by rank: {first}",
        "a round over n drafts, in plain steps: "
        + ", ".join(f"{n}: {x / seconds[0]:.2f}" for n, x in enumerate(seconds)),
        f"drafting one level: {found['seconds_of_a_drafted_level'] / seconds[0]:.2f}",
        "a round over a chain of n, drafting included: "
        + ", ".join(f"{n}: {x / chains[0]:.2f}" for n, x in enumerate(chains)),
    ]
    if settings.num_draft_tokens == 0:
        lines.append("fastest: plain decoding")
    else:
        shape = f"a chain of {settings.num_draft_tokens}"
        if settings.tree is not None:
            shape = f"a tree of {settings.tree.num_nodes} nodes, parents {settings.tree.parents}"
        lines.append(
            f"fastest: {shape}; {found['predicted_tokens_per_step']:.2f} tokens a step, "
            f"{found['predicted_speedup']:.2f} times plain decoding, as predicted"
        )
    return "\n".join(lines) + "\n"
