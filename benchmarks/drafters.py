"""What a trained drafter is worth: side by side, against plain decoding, in one run.

    .venv/bin/python benchmarks/drafters.py --prompts FILE.jsonl --drafters DIRECTORY ... \
        --per-category 3 --json drafters.json

For each directory of `jaxspec train drafter`, greedily and at temperature 1: how often the draft of
each slot is accepted once those before it are, tokens a step, the time of a round's whole draft
phase over that of one plain step, bytes, what training took, and tokens/s over plain decoding, by
category. --with-lookup adds each behind a prompt lookup, with as many drafts, and as `jaxspec
generate` uses what comes with a model ("as shipped"): no more than pays. Prompts (the first turn of
each row, through the chat template) are answered one after the other in turn, A B C A B C …, the
order reversed every other time; prefill is timed apart.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import pathlib
from typing import Any

import contest
import jax
import numpy as np
from compare import read_prompts

import jaxspec
import jaxspec_models
from jaxspec.cli import running


def by_slot(histogram: np.ndarray) -> list[float]:
    """Of the rounds that accepted the first k drafts, the share that accepted the next one."""
    reached = np.cumsum(histogram[::-1])[::-1]
    return [float(b / a) if a else float("nan") for a, b in itertools.pairwise(reached)]


def describe(path: str) -> dict[str, Any]:
    """What can be told of a drafter without running it."""
    folder = pathlib.Path(path)
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "method": found["method"],
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "training_seconds": found["metrics"].get("seconds"),
    }


def costs(
    profile: jaxspec.Profile, plain: jaxspec.Profile, num_draft_tokens: int
) -> dict[str, float]:
    """A round with so many drafts, in plain steps.

    What a round with the drafter and no drafts takes over plain decoding is drafting, too.
    """
    verify = np.asarray(profile.verify, np.float64)
    idle = max(0.0, float(profile.overhead) - float(plain.overhead))
    return {
        "draft_phase": (float(profile.draft) * num_draft_tokens + idle) / verify[0],
        "verification": float(verify[num_draft_tokens] / verify[0]),
        "plain_step_ms": 1e3 * float(verify[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafters", nargs="+", required=True, help="directories")
    parser.add_argument("--prompts", required=True, help="JSONL with category and turns")
    parser.add_argument("--per-category", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[6])
    parser.add_argument("--with-lookup", action="store_true")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quantization", default="int8", choices=("int8", "none"))
    parser.add_argument("--json", default="drafters.json")
    args = parser.parse_args()

    if cache := os.environ.get("JAXSPEC_BENCHMARK_CACHE"):
        jax.config.update("jax_compilation_cache_dir", cache)
    quantization = None if args.quantization == "none" else args.quantization
    model = jaxspec_models.load_model(args.model, quantization=quantization)
    tokenizer = jaxspec_models.load_tokenizer(args.model)
    prompts = contest.read(tokenizer, read_prompts(args.prompts, args.per_category))
    report: dict[str, Any] = {"settings": vars(args), "temperatures": {}}
    for temperature in args.temperatures:
        jax.clear_caches()  # programs of another temperature would only hold memory
        figures = measure(model, prompts, temperature, args)
        report["temperatures"][f"{temperature:g}"] = figures
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def measure(
    model: Any, prompts: list[dict[str, Any]], temperature: float, args: argparse.Namespace
) -> dict[str, Any]:
    """All drafters at all draft lengths, and plain decoding; prints a table."""
    sampling = {"sampling": jaxspec.Sampling(temperature=temperature or 0)}
    contestants: dict[str, dict[str, Any]] = {"plain": {"drafter": None, **sampling}}
    figures: dict[str, Any] = {"plain": {}}
    plain = jaxspec.measure_costs(model, None, context_length=256, **sampling)
    for path in args.drafters:
        drafter = jaxspec_models.load_drafter(path, model)
        most = max(args.num_draft_tokens)

        @functools.cache
        def profile(count: int, *, drafter: Any = drafter) -> jaxspec.Profile:
            """With room for no more drafts than that: a round pays for the widths it has."""
            return jaxspec.measure_costs(
                model, drafter, num_draft_tokens=count, context_length=256, **sampling
            )

        def enter(name: str, count: int, *, path: str = path, profile: Any = profile, **options):
            name = f"{path.rstrip('/')} {name}"
            contestants[name] = {"num_draft_tokens": count, **options, **sampling}
            figures[name] = describe(path) | costs(profile(count), plain, count)

        for count in args.num_draft_tokens:
            enter(f"{count}", count, drafter=drafter)
        if args.with_lookup:
            lookup = jaxspec.drafters.prompt_lookup(max_ngram=5, min_ngram=4)
            both = jaxspec.drafters.fallback(lookup, drafter)
            enter(f"+ lookup {most}", most, drafter=both)
            shipped = running.drafting(both, None, None if args.quantization == "none" else "int8")
            enter("as shipped", shipped.pop("num_draft_tokens"), **shipped)

    answers = contest.hold(
        model, prompts, contestants, max_new_tokens=args.max_new_tokens, rounds=args.rounds
    )
    categories = list(dict.fromkeys(prompt["category"] for prompt in prompts))
    print(f"\ntemperature {temperature:g}, at most {args.max_new_tokens} new tokens, batch 1")
    for name, rounds in answers.items():
        found = figures[name]

        found["tokens_per_second"] = contest.tokens_per_second(rounds)
        if name == "plain":
            print(f"plain: {found['tokens_per_second']:.1f} tokens/s")
            continue
        found["tokens_per_step"] = contest.tokens_per_step(rounds)
        found["acceptance"] = by_slot(contest.histogram(rounds))
        found["over_plain_by_category"] = {
            category: contest.tokens_per_second(rounds, category)
            / contest.tokens_per_second(answers["plain"], category)
            for category in categories
        }
        found["over_plain"] = found["tokens_per_second"] / figures["plain"]["tokens_per_second"]
        found["same_texts"] = contest.same_texts(rounds, answers["plain"])
        lowest = min(found["over_plain_by_category"], key=found["over_plain_by_category"].get)
        print(
            f"{name} ({found['method']}, {found['bytes'] / 1e6:.1f} MB): "
            f"{found['tokens_per_step']:.2f} tokens a step, draft phase {found['draft_phase']:.2f} "
            f"and verification {found['verification']:.2f} plain steps, "
            f"{found['over_plain']:.2f} times plain (least: {lowest} "
            f"{found['over_plain_by_category'][lowest]:.2f}), slots "
            f"{' '.join(f'{rate:.2f}' for rate in found['acceptance'])}",
            flush=True,
        )
    return figures


if __name__ == "__main__":
    main()
