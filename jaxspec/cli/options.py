"""What the `jaxspec` command understands. Imports nothing but argparse's kin."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxspec.cli import common, train_options
from jaxspec.cli.errors import UserError

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


_TUNE_DESCRIPTION = """\
Measures how often proposals are accepted on a file of prompts, and what verifying and proposing
them takes on this machine, and writes the shape that promises most tokens per second to a small
file, for `jaxspec generate --settings` and `jaxspec.generate(settings=...)`."""

_TUNE_EPILOG = """\
example:
  jaxspec tune --tree --chat --prompts prompts.jsonl --quantization int8 --out settings.json
  jaxspec generate --chat --quantization int8 --settings settings.json --prompt "Name my goose."

It compiles some twenty programs, which takes minutes; keep the machine quiet meanwhile."""


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
      A namespace with `run`, the command's function of that namespace, and `argv`.

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
    _add_tune(commands)
    train_options.add(commands)
    arguments = parser.parse_args(argv)
    arguments.argv = list(argv)
    return arguments


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch a real model write, plainly and several tokens per forward",
        description="Lets a real model write one text twice, several tokens per forward and one, "
        "and compares speed and text.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run_demo)
    common.add_dtype(parser)
    common.add_max_new_tokens(parser, 96)
    common.add_num_draft_tokens(
        parser,
        "up to 6 by the drafter that comes with the model; 1 with --quantization int8, 2 where "
        "the CPU has a matrix unit",
    )


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

    models = _add_models(parser)
    how_much = models.add_mutually_exclusive_group()
    common.add_num_draft_tokens(
        how_much,
        "4, up to 6 by what was trained; with --quantization int8 2 by looking up, 1 by what was "
        "trained, and twice as many where the CPU has a matrix unit",
    )
    how_much.add_argument(
        "--settings",
        metavar="FILE",
        help="how much is proposed, and in what shape, as jaxspec tune found it",
    )

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
        type=common.number(float, lambda x: x >= 0, "at least 0"),
        help="0 always takes the likeliest token (default: 0, or 1 with --top-k, --top-p, "
        "--min-p or --typical-p)",
    )
    sampling.add_argument(
        "--top-k",
        metavar="N",
        type=common.number(int, lambda x: x >= 0, "at least 0"),
        help="draw from the N likeliest tokens only",
    )
    sampling.add_argument(
        "--top-p",
        metavar="F",
        type=common.number(float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        help="draw from the fewest tokens that have probability F together",
    )
    sampling.add_argument(
        "--min-p",
        metavar="F",
        type=common.number(float, lambda x: 0 <= x <= 1, "between 0 and 1"),
        help="draw from tokens at least F times as likely as the likeliest",
    )
    sampling.add_argument(
        "--typical-p",
        metavar="F",
        type=common.number(float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        help="draw from the tokens of most typical surprise that have probability F together",
    )
    sampling.add_argument(
        "--repetition-penalty",
        metavar="F",
        type=common.number(float, lambda x: x > 0, "above 0"),
        help="above 1 makes tokens that occurred already less likely",
    )
    sampling.add_argument(
        "--presence-penalty",
        metavar="F",
        type=common.number(float, lambda x: True, "that is finite"),
        help="above 0 makes tokens that were written already less likely",
    )
    sampling.add_argument(
        "--frequency-penalty",
        metavar="F",
        type=common.number(float, lambda x: True, "that is finite"),
        help="the same, for each time they were written",
    )
    sampling.add_argument(
        "--no-repeat-ngram-size",
        metavar="N",
        type=common.number(int, lambda x: x >= 0, "at least 0"),
        help="never write the same N tokens in a row twice",
    )
    sampling.add_argument(
        "--min-new-tokens",
        metavar="N",
        type=common.number(int, lambda x: x >= 0, "at least 0"),
        help="do not end before so many tokens",
    )
    common.add_seed(sampling)

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
    common.add_max_new_tokens(output, 128)
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


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="find what is fastest on this machine",
        description=_TUNE_DESCRIPTION,
        epilog=_TUNE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run_tune)
    _add_models(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--tree", action="store_true", help="find the tree of proposals, a chain or none included"
    )
    what.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help="prompts such as will be asked, JSON lines with a field prompt",
    )
    what.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    common.add_count(what, "--num-prompts", 12, "how many of them, from the first on")
    common.add_max_new_tokens(what, 64)
    common.add_count(what, "--max-nodes", 16, "of the largest tree that is tried")
    what.add_argument(
        "--temperature",
        metavar="F",
        type=common.number(float, lambda x: x >= 0, "at least 0"),
        default=0,
        help="of the texts that are written (default: %(default)s)",
    )
    common.add_seed(what)
    what.add_argument("--out", metavar="FILE", required=True, help="the settings, as JSON")


def _add_models(parser: argparse.ArgumentParser) -> Any:
    """Adds --model, --draft, --drafter, --dtype and --quantization."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        default=common.DEFAULT_MODEL,
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
        metavar="NAME_OR_PATH",
        default="auto",
        help="what proposes tokens: prompt-lookup, for text that stands in the prompt or the "
        "output already; a directory of jaxspec train drafter; none; or auto, what was trained for "
        "the model and comes with it, or else prompt-lookup (default: %(default)s)",
    )
    common.add_dtype(models)
    return models


def _nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _run_demo(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import demo

    return demo.run(arguments)


def _run_tune(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import tune

    return tune.run(arguments)


def _run_generate(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import generate

    return generate.run(arguments)
