"""What the `jaxspec` command understands. Imports nothing but argparse's kin."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxspec.cli.errors import UserError

DEFAULT_MODEL = "smollm2-135m"

_DESCRIPTION = """\
Exact speculative decoding in JAX: a language model writes several tokens per forward pass, and
writes what it would have written one token at a time."""

_EPILOG = """\
start here:
  jaxspec demo
  jaxspec generate --chat --prompt "What is the capital of France?"

`jaxspec generate --help` tells more. The first run downloads the default model (93 MB)."""

_GENERATE_DESCRIPTION = """\
Writes text behind a prompt and prints it as it is written. The prompt comes from --prompt, from
--prompt-file, or from standard input."""

_GENERATE_EPILOG = """\
examples:
  jaxspec generate --prompt "In a distant future,"
  jaxspec generate --chat --temperature 0.8 --top-p 0.9 --seed 1 --prompt "Name my goose."
  jaxspec generate --prompt-file story.txt --max-new-tokens 300 > more.txt
  jaxspec generate --chat --json-schema pet.json --prompt "Describe a pet as JSON."
  jaxspec generate --model ./target --draft ./small-model-of-the-same-tokenizer --prompt "Once"
  cat notes.txt | jaxspec generate --chat --json | python -m json.tool

The text goes to standard output, everything else to standard error. Exit codes: 0; 1 if the
model computed NaN or the output cannot be written; 2 for a mistake in the arguments or files;
130 after Ctrl-C; 141 if the reader of the output went away."""


_TRAIN_EPILOG = """\
examples:
  jaxspec train data --prompts prompts.jsonl --out answers --tokens 1500000 --quantization int8
  jaxspec train drafter --data answers --out drafter --quantization int8"""


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        name = self.prog.partition(" ")[2]
        help_command = " ".join(("jaxspec", *name.split(), "--help"))
        raise UserError(f"{message} (see {help_command})")


class _Version(argparse.Action):
    """Prints the version, looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> NoReturn:
        import jaxspec

        print(f"jaxspec {jaxspec.__version__}")
        parser.exit()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments.

    Args:
      argv: without the program's name.

    Returns:
      A namespace with `run`, the command's function of that namespace.

    Raises:
      UserError: they are wrong.
      SystemExit: the help or the version was asked for, and has been printed.
    """
    parser = _Parser(
        prog="jaxspec",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")

    def print_help(_: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=print_help)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    _add_generate(commands)
    _add_train(commands)
    return parser.parse_args(argv)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch a real model write, plainly and several tokens per forward",
        description="Lets a real model write one text twice, several tokens per forward and one, "
        "and compares speed and text.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run_demo)
    _add_dtype(parser)
    _add_max_new_tokens(parser, 96)
    _add_num_draft_tokens(parser, "7")


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="write text behind a prompt",
        description=_GENERATE_DESCRIPTION,
        epilog=_GENERATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run_generate)

    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        default=DEFAULT_MODEL,
        help="the model that writes: a name, a directory in Hugging Face form, a .gguf file or a "
        "hub id (default: %(default)s)",
    )
    drafts = models.add_mutually_exclusive_group()
    drafts.add_argument(
        "--draft",
        metavar="NAME_OR_PATH",
        help="a smaller model with the same tokenizer, which proposes tokens",
    )
    drafts.add_argument(
        "--drafter",
        choices=("prompt-lookup", "none"),
        default="prompt-lookup",
        help="what proposes tokens without a model of its own: text that stands in the prompt or "
        "the output already, or nothing (default: %(default)s)",
    )
    _add_num_draft_tokens(models, "4, or 2 with --quantization int8 and no --draft")
    _add_dtype(models)

    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a file that holds it, in UTF-8; a newline at its end is dropped, as it is for "
        "standard input",
    )
    prompt.add_argument("--chat", action="store_true", help="ask through the model's chat template")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature",
        metavar="F",
        type=_number(float, lambda x: x >= 0, "at least 0"),
        help="0 always takes the likeliest token (default: 0, or 1 with --top-k, --top-p, "
        "--min-p or --typical-p)",
    )
    sampling.add_argument(
        "--top-k",
        metavar="N",
        type=_number(int, lambda x: x >= 0, "at least 0"),
        help="draw from the N likeliest tokens only",
    )
    sampling.add_argument(
        "--top-p",
        metavar="F",
        type=_number(float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        help="draw from the fewest tokens that have probability F together",
    )
    sampling.add_argument(
        "--min-p",
        metavar="F",
        type=_number(float, lambda x: 0 <= x <= 1, "between 0 and 1"),
        help="draw from tokens at least F times as likely as the likeliest",
    )
    sampling.add_argument(
        "--typical-p",
        metavar="F",
        type=_number(float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        help="draw from the tokens of most typical surprise that have probability F together",
    )
    sampling.add_argument(
        "--repetition-penalty",
        metavar="F",
        type=_number(float, lambda x: x > 0, "above 0"),
        help="above 1 makes tokens that occurred already less likely",
    )
    sampling.add_argument(
        "--presence-penalty",
        metavar="F",
        type=_number(float, lambda x: True, "that is finite"),
        help="above 0 makes tokens that were written already less likely",
    )
    sampling.add_argument(
        "--frequency-penalty",
        metavar="F",
        type=_number(float, lambda x: True, "that is finite"),
        help="the same, for each time they were written",
    )
    sampling.add_argument(
        "--no-repeat-ngram-size",
        metavar="N",
        type=_number(int, lambda x: x >= 0, "at least 0"),
        help="never write the same N tokens in a row twice",
    )
    sampling.add_argument(
        "--min-new-tokens",
        metavar="N",
        type=_number(int, lambda x: x >= 0, "at least 0"),
        help="do not end before so many tokens",
    )
    _add_seed(sampling)

    grammar = sampling.add_mutually_exclusive_group()
    grammar.add_argument(
        "--json-schema",
        metavar="FILE",
        help="write JSON of this schema, and nothing else (needs outlines-core)",
    )
    grammar.add_argument(
        "--regex",
        metavar="EXPRESSION",
        help="write text that matches this expression as a whole (needs outlines-core)",
    )

    output = parser.add_argument_group("output")
    _add_max_new_tokens(output, 128)
    output.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        type=_nonempty,
        default=[],
        help="end behind this text once it is written; may be given several times",
    )
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end: text, token ids, statistics, seconds",
    )


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a drafter for a model",
        description="Trains a drafter on a model's own answers.",
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def print_help(_: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=print_help)
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_train_data(subcommands)
    _add_train_drafter(subcommands)


def _add_train_data(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="let the model answer prompts",
        description="Lets the model answer every prompt of a file through its chat template, "
        "greedily and sampled, and keeps the answers. Interrupted, it goes on where it was: run "
        "the same command again.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run_train_data)
    parser.add_argument(
        "--target",
        metavar="NAME_OR_PATH",
        default=DEFAULT_MODEL,
        help="the model that answers, and that the drafter is for (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help='JSONL: one object a line, with the text of a prompt under "prompt"',
    )
    parser.add_argument(
        "--out", metavar="DIRECTORY", required=True, help="where the answers go, in shards"
    )
    parser.add_argument(
        "--temperature",
        metavar="F",
        nargs="+",
        type=_number(float, lambda x: x >= 0, "at least 0"),
        default=[0.0, 1.0],
        help="each prompt is answered once at each; 0 is greedy (default: 0 1)",
    )
    parser.add_argument(
        "--features",
        metavar="DIRECTORY",
        help="keep what the target computes on the way, for `jaxspec train drafter --features`, "
        "which computes it otherwise; 5 kB a token with smollm2-135m",
    )
    _add_max_new_tokens(parser, 256)
    _add_count(parser, "--max-prompt-tokens", 512, "longer prompts are left out")
    _add_count(parser, "--tokens", None, "end at so many new tokens (default: with the prompts)")
    _add_count(parser, "--batch", 32, "answers written at a time")
    _add_count(parser, "--batches-a-shard", 4, "batches between two writes to the disk")
    _add_seed(parser)
    _add_dtype(parser)


def _add_train_drafter(commands: Any) -> None:
    parser = commands.add_parser(
        "drafter",
        help="train a drafter on the model's answers",
        description="Trains a drafter on what `jaxspec train data` has written. "
        "Interrupted, it goes on where it was: run the same command again.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run_train_drafter)
    parser.add_argument(
        "--method",
        choices=("block", "eagle3", "student"),
        default="block",
        help="block: all drafts from one forward; eagle3: one layer that goes on from the model's "
        "own states; student: some of the model's layers (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        metavar="NAME_OR_PATH",
        default=DEFAULT_MODEL,
        help="the model that answered (default: %(default)s)",
    )
    parser.add_argument(
        "--data", metavar="DIRECTORY", required=True, help="of `jaxspec train data`"
    )
    parser.add_argument(
        "--out", metavar="DIRECTORY", required=True, help="for the drafter, checkpoints and a log"
    )
    parser.add_argument(
        "--features",
        metavar="DIRECTORY",
        help="for the target's features, which several trainings may share (default: in --out); "
        "5 kB a token with smollm2-135m",
    )
    _add_num_draft_tokens(parser, "6")
    _add_count(parser, "--steps", 4000, "optimiser steps")
    _add_count(parser, "--tokens-a-part", 2048, "tokens that pass through the drafter at a time")
    _add_count(parser, "--parts-a-step", 1, "parts whose gradients make a step")
    _add_count(parser, "--anchors", 16, "drafted blocks learned for every 128 tokens")
    _add_count(parser, "--vocabulary", 8192, "tokens it can draft, the most frequent ones")
    _add_count(parser, "--layers", 1, "of the drafter")
    _add_count(parser, "--mlp", None, "width of its MLPs (default: the target's)")
    _add_count(parser, "--markov-rank", None, "block: of what a draft tells the next one (128)")
    parser.add_argument(
        "--source-layers",
        metavar="N",
        nargs="+",
        type=_number(int, lambda x: x >= 0, "at least 0"),
        help="student: the model's layers it begins with, from 0 (default: spread evenly)",
    )
    for name, default, meaning in (
        ("--cross-entropy", 0.1, "cross-entropy"),
        ("--total-variation", 1.8, "the probability that a draft is rejected"),
        ("--lk-lambda", 0.0, "KL and that probability, mixed by how far it has come"),
    ):
        parser.add_argument(
            name,
            metavar="F",
            type=_number(float, lambda x: x >= 0, "at least 0"),
            default=default,
            help=f"weight in the loss of {meaning} (default: %(default)s)",
        )
    parser.add_argument(
        "--products",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the drafter's products in training; weights and sums are float32 "
        "(default: %(default)s; bfloat16 is faster on accelerators)",
    )
    _add_count(parser, "--devices", None, "that share each part (default: all there are)")
    _add_count(parser, "--warmup-steps", 100, "of the learning rate")
    parser.add_argument(
        "--learning-rate",
        metavar="F",
        type=_number(float, lambda x: x > 0, "above 0"),
        default=1e-3,
        help="at its highest (default: %(default)s)",
    )
    _add_seed(parser)
    _add_dtype(parser)


def _add_count(parser: Any, name: str, default: int | None, meaning: str) -> None:
    parser.add_argument(
        name,
        metavar="N",
        type=_number(int, lambda x: x >= 1, "at least 1"),
        default=default,
        help=meaning if default is None else f"{meaning} (default: %(default)s)",
    )


def _add_seed(parser: Any) -> None:
    parser.add_argument(
        "--seed",
        metavar="N",
        type=_number(int, lambda x: 0 <= x < 2**32, "between 0 and 2**32 - 1"),
        default=0,
        help="another seed, another text; the same seed, the same text (default: %(default)s)",
    )


def _add_dtype(parser: Any) -> None:
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of weights and cache (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        choices=("int8",),
        help="int8 weights: half the memory of bfloat16, and faster (default: none)",
    )


def _add_max_new_tokens(parser: Any, default: int) -> None:
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=_number(int, lambda x: x >= 1, "at least 1"),
        default=default,
        help="where to stop at the latest (default: %(default)s)",
    )


def _add_num_draft_tokens(parser: Any, default: str) -> None:
    parser.add_argument(
        "--num-draft-tokens",
        metavar="N",
        type=_number(int, lambda x: x >= 1, "at least 1"),
        help=f"the most tokens proposed at a time (default: {default})",
    )


def _number(kind: type, is_allowed: Callable[[Any], bool], meaning: str) -> Callable[[str], Any]:
    noun = "an integer" if kind is int else "a number"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {noun} {meaning}, got {text!r}")
        return value

    return read


def _nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _run_demo(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import demo

    return demo.run(arguments)


def _run_generate(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import generate

    return generate.run(arguments)


def _run_train_data(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import train

    return train.write_data(arguments)


def _run_train_drafter(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import train

    return train.train_drafter(arguments)
