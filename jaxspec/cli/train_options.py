"""What `jaxspec train` understands. Imports nothing but argparse's kin."""

from __future__ import annotations

import argparse
from typing import Any

from jaxspec.cli import common

_TRAIN_EPILOG = """\
examples:
  jaxspec train prompts --count 5000 --out prompts.jsonl --quantization int8
  jaxspec train data --prompts prompts.jsonl --out answers --tokens 1500000 --quantization int8
  jaxspec train drafter --data answers --out drafter --quantization int8"""


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
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
    _add_train_prompts(subcommands)
    _add_train_data(subcommands)
    _add_train_drafter(subcommands)


def _add_target(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument(
        "--target",
        metavar="NAME_OR_PATH",
        default=common.DEFAULT_MODEL,
        help=f"{meaning} (default: %(default)s)",
    )


def _add_train_prompts(commands: Any) -> None:
    parser = commands.add_parser(
        "prompts",
        help="let the model say what it would be asked",
        description="Writes prompts where there is no file of them: given its chat template up to "
        "the user's turn, a model goes on as a user would. Interrupted, it goes on where it was: "
        "run the same command again.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run_train_prompts)
    _add_target(parser, "the model that the drafter is for")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSONL, a prompt a line")
    common.add_count(parser, "--count", 5000, "prompts that are wanted")
    parser.add_argument(
        "--beginnings",
        metavar="TEXT",
        nargs="+",
        default=[""],
        help="first words, given to attempts in turn: the kinds of prompts that are wanted, like "
        "'Write a Python function that'; '' leaves the kind to the model (default)",
    )
    parser.add_argument(
        "--temperature",
        metavar="F",
        type=common.number(float, lambda x: x > 0, "above 0"),
        default=1.0,
        help="lower: plainer prompts (default: %(default)s)",
    )
    common.add_count(
        parser, "--max-prompt-tokens", 128, "longer prompts are left out; beginnings do not count"
    )
    common.add_count(parser, "--batch", 64, "prompts written at a time")
    common.add_seed(parser)
    common.add_dtype(parser)


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
    _add_target(parser, "the model that answers, and that the drafter is for")
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
        type=common.number(float, lambda x: x >= 0, "at least 0"),
        default=[0.0, 1.0],
        help="each prompt is answered once at each; 0 is greedy (default: 0 1)",
    )
    parser.add_argument(
        "--features",
        metavar="DIRECTORY",
        help="keep what the target computes on the way, for `jaxspec train drafter --features`, "
        "which computes it otherwise; 5 kB a token with smollm2-135m",
    )
    common.add_max_new_tokens(parser, 256)
    common.add_count(parser, "--max-prompt-tokens", 512, "longer prompts are left out")
    common.add_count(
        parser, "--tokens", None, "end at so many new tokens (default: with the prompts)"
    )
    common.add_count(parser, "--batch", 32, "answers written at a time")
    common.add_count(parser, "--batches-a-shard", 4, "batches between two writes to the disk")
    common.add_seed(parser)
    common.add_dtype(parser)


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
        choices=("eagle3", "block", "student"),
        default="eagle3",
        help="eagle3: one layer that goes on from the model's own states; block: all drafts from "
        "one forward; student: some of the model's layers (default: %(default)s)",
    )
    _add_target(parser, "the model that answered")
    parser.add_argument(
        "--data",
        metavar="DIRECTORY",
        nargs="+",
        required=True,
        help="of `jaxspec train data`; one or several",
    )
    parser.add_argument(
        "--out", metavar="DIRECTORY", required=True, help="for the drafter, checkpoints and a log"
    )
    parser.add_argument(
        "--features",
        metavar="DIRECTORY",
        nargs="+",
        help="for the target's features, one for each --data, which several trainings may share "
        "(default: in --out); 5 kB a token with smollm2-135m",
    )
    common.add_num_draft_tokens(parser, "6")
    common.add_count(parser, "--steps", 4000, "optimiser steps")
    common.add_count(parser, "--tokens-a-part", 2048, "tokens that pass the drafter at a time")
    common.add_count(parser, "--parts-a-step", 1, "parts whose gradients make a step")
    common.add_count(parser, "--anchors", 16, "drafted blocks learned for every 128 tokens")
    common.add_count(parser, "--vocabulary", 8192, "tokens it can draft, the most frequent ones")
    common.add_count(parser, "--layers", 1, "of the drafter")
    common.add_count(parser, "--mlp", None, "width of its MLPs (default: the target's)")
    common.add_count(parser, "--markov-rank", None, "block: of what drafts tell the next one (128)")
    parser.add_argument(
        "--source-layers",
        metavar="N",
        nargs="+",
        type=common.number(int, lambda x: x >= 0, "at least 0"),
        help="student: the model's layers it begins with, from 0 (default: spread evenly)",
    )
    for name, default, meaning in (
        ("--cross-entropy", 1.0, "cross-entropy"),
        ("--total-variation", 1.0, "the probability that a draft is rejected"),
        ("--lk-lambda", 0.0, "KL and that probability, mixed by how far it has come"),
    ):
        parser.add_argument(
            name,
            metavar="F",
            type=common.number(float, lambda x: x >= 0, "at least 0"),
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
    common.add_count(parser, "--devices", None, "that share each part (default: all there are)")
    common.add_count(parser, "--warmup-steps", 100, "of the learning rate")
    parser.add_argument(
        "--learning-rate",
        metavar="F",
        type=common.number(float, lambda x: x > 0, "above 0"),
        default=1.5e-3,
        help="at its highest (default: %(default)s)",
    )
    common.add_seed(parser)
    common.add_dtype(parser)


def _run_train_prompts(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import train

    return train.write_prompts(arguments)


def _run_train_data(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import train

    return train.write_data(arguments)


def _run_train_drafter(arguments: argparse.Namespace) -> int:
    from jaxspec.cli import train

    return train.train_drafter(arguments)
