"""Which system writes fastest on this machine? This project and its peers, in one run.

    .venv/bin/python benchmarks/compare.py --weights FILE.gguf --prompts FILE.jsonl \
        --peer-python .peers/bin/python --per-category 3 --json compare.json --chart compare.png

Every system runs in a process of its own, from the same weights, on the same prompts (the first
turn of each row, through the chat template), one prompt after the other in turn: A B C A B C …,
the order reversed every other time. Prefill and decoding are timed apart. A system that is not
installed is named, and makes the comparison incomplete. `benchmarks/README.md` tells how each is
installed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jaxspec_models
from jaxspec_models import download, gguf_config
from jaxspec_models.gguf_file import GGUFFile
from jaxspec_models.text import encode_prompt

SYSTEMS = ("jaxspec", "transformers", "llama.cpp", "openvino")


class System:
    """A running `systems.py`."""

    def __init__(self, name: str, python: str, weights: str, threads: int, log: pathlib.Path):
        script = pathlib.Path(__file__).with_name("systems.py")
        self.name = name
        self.process = subprocess.Popen(
            [python, str(script), name, "--weights", weights, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self.log = log
        hello = self._read()
        self.title = hello.get("name", "")
        self.modes = hello.get("modes", ())
        self.missing = hello.get("missing")

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            return {"missing": f"it ended with {self.process.wait()}: {' / '.join(last)}"}
        return json.loads(line)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        if "missing" in answer:
            raise SystemExit(f"{self.name} failed: {answer['missing']}")
        return answer


def read_prompts(path: str, per_category: int) -> list[tuple[str, str]]:
    """(category, text) of the first rows of each category of a file in Spec-Bench's form."""
    chosen: list[tuple[str, str]] = []
    counts: dict[str, int] = {}
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, filter(str.strip, file)):
            category = row.get("category", "all")
            counts[category] = counts.get(category, 0) + 1
            if counts[category] <= per_category:
                chosen.append((category, row["turns"][0] if "turns" in row else row["prompt"]))
    return chosen


def rates(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens/s of decoding and end to end: all tokens over all seconds."""
    decode = sum(answer["decode"] for answer in answers)
    whole = decode + sum(answer["prefill"] for answer in answers)
    return {
        "decode": sum(answer["decode_tokens"] for answer in answers) / max(decode, 1e-9),
        "end_to_end": sum(answer["tokens"] for answer in answers) / whole,
    }


def summarise(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, with the spread."""
    each = [rates(answers) for answers in rounds]
    figures: dict[str, Any] = {}
    for name in ("decode", "end_to_end"):
        values = [one[name] for one in each]
        figures[name] = statistics.median(values)
        figures[f"{name}_spread"] = [min(values), max(values)]
    last = rounds[-1]
    if "steps" in last[0]:
        steps = sum(answer["steps"] for answer in last)
        figures["tokens_per_step"] = sum(answer["tokens"] for answer in last) / max(steps, 1)
    return figures


def chart(path: str, figures: dict[str, Any], temperature: float) -> None:
    """A bar for each system and mode: decoding, tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(figures)
    values = [figures[name]["all"]["decode"] for name in names]
    colours = ["#1f6f54" if name.startswith("jaxspec") else "#a0a7b0" for name in names]
    _, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.2))
    axes.barh(names[::-1], values[::-1], color=colours[::-1])
    for i, value in enumerate(values[::-1]):
        axes.text(value, i, f" {value:.0f}", va="center")
    axes.set_xlabel(f"decoding, tokens/s, batch 1, temperature {temperature:g}")
    axes.spines[["top", "right"]].set_visible(False)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="for the tokenizer and jaxspec")
    parser.add_argument("--weights", help="the GGUF file that the peers read")
    parser.add_argument("--prompts", required=True, help="JSONL with category and turns")
    parser.add_argument("--per-category", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--peer-python", default=sys.executable, help="where the peers live")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", default="compare.json")
    parser.add_argument("--chart", help="a PNG; one for each temperature")
    args = parser.parse_args()

    weights = args.weights or str(download.fetch(args.model))
    tokenizer = jaxspec_models.load_tokenizer(args.model)

    eos_ids = list(
        gguf_config.read_config(GGUFFile(pathlib.Path(weights)), dtype="float32").eos_ids
    )
    prompts = []
    for category, text in read_prompts(args.prompts, args.per_category):
        chat = [{"role": "user", "content": text}]
        templated = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append(
            {"category": category, "text": templated, "ids": encode_prompt(tokenizer, chat)}
        )

    # Compiled programs are kept for the run, so that only the first prompt of a shape waits.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAXSPEC_BENCHMARK_CACHE"] = folder
        systems, missing = [], {}
        for name in args.systems:
            mine = name == "jaxspec"
            system = System(
                name,
                sys.executable if mine else args.peer_python,
                args.model if mine else weights,
                args.threads,
                pathlib.Path(folder) / f"{name}.log",
            )
            if system.missing:
                missing[name] = system.missing
                print(f"{name} is MISSING ({system.missing}): the comparison is incomplete")
            else:
                systems.append(system)
                print(f"{name}: {system.title}", flush=True)
        report: dict[str, Any] = {"settings": vars(args), "missing": missing, "temperatures": {}}
        report["titles"] = {system.name: system.title for system in systems}
        for temperature in args.temperatures:
            report["temperatures"][str(temperature)] = measure(
                systems, prompts, eos_ids, temperature, args
            )
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
            if args.chart:
                path = pathlib.Path(args.chart)
                target = path.with_name(f"{path.stem}-t{temperature:g}{path.suffix}")
                chart(str(target), report["temperatures"][str(temperature)], temperature)


def measure(
    systems: list[System],
    prompts: list[dict[str, Any]],
    eos_ids: list[int],
    temperature: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All systems and modes on all prompts, and a table of it."""
    contestants = [(system, mode) for system in systems for mode in system.modes]

    def ask(system: System, mode: str, prompt: dict[str, Any], seed: int) -> dict[str, Any]:
        return system.ask(
            {
                "mode": mode,
                "ids": prompt["ids"],
                "text": prompt["text"],
                "max_new_tokens": args.max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                "eos_ids": eos_ids,
            }
        )

    # Compilation and warming up are not part of it: every shape once, every system twice.
    for system, mode in contestants:
        seen = set()
        for prompt in prompts:
            shape = max(len(prompt["ids"]) - 1, 1).bit_length()
            if (system.name == "jaxspec" and shape not in seen) or len(seen) < 2:
                ask(system, mode, prompt, 0)
            seen.add(shape)

    answers: dict[str, list[list[dict[str, Any]]]] = {
        f"{system.name} {mode}": [[] for _ in range(args.rounds)] for system, mode in contestants
    }
    for turn in range(args.rounds):
        for index, prompt in enumerate(prompts):
            order = contestants[:: 1 if (turn + index) % 2 == 0 else -1]
            for system, mode in order:
                time.sleep(0.25)  # threads that spin after their work do not disturb the next one
                answer = ask(system, mode, prompt, seed=turn)
                answer["category"] = prompt["category"]
                answers[f"{system.name} {mode}"][turn].append(answer)

    categories = list(dict.fromkeys(prompt["category"] for prompt in prompts))
    figures: dict[str, Any] = {}
    for name, rounds in answers.items():
        figures[name] = {"all": summarise(rounds)}
        for category in categories:
            chosen = [[a for a in one if a["category"] == category] for one in rounds]
            figures[name][category] = summarise(chosen)
    print_table(figures, categories, temperature, args)
    return figures


def print_table(
    figures: dict[str, Any], categories: list[str], temperature: float, args: argparse.Namespace
) -> None:
    """Tokens/s of decoding, end to end in brackets."""
    print(
        f"\ntemperature {temperature:g}, at most {args.max_new_tokens} new tokens, batch 1, "
        f"{args.threads} threads: decoding in tokens/s (end to end)"
    )
    for name, rows in figures.items():
        every = rows["all"]
        low, high = every["decode_spread"]
        steps = f", {every['tokens_per_step']:.2f} a step" if "tokens_per_step" in every else ""
        print(
            f"{name:>20}: {every['decode']:6.1f} ({every['end_to_end']:6.1f}), "
            f"{low:.1f} … {high:.1f}{steps}"
        )
    for name in figures:
        system, _, mode = name.rpartition(" ")
        if mode == "plain":
            continue
        plain = figures[f"{system} plain"]
        print(f"{name} over plain, decoding (end to end):")
        for category in categories:
            a, b = figures[name][category], plain[category]
            print(
                f"{category:>20}: {a['decode'] / b['decode']:.2f} "
                f"({a['end_to_end'] / b['end_to_end']:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
