"""Does throughput rise with the batch, and does speculation ever cost more than it brings?

    .venv/bin/python benchmarks/batch.py --prompts FILE.jsonl --batches 1 2 4 8 16

Rows of mixed lengths: the first prompts of the file, one of each category in turn. For every batch
size plain decoding, prompt lookup and a drafter whose tokens are uniformly random run in turn
(A B A B); both drafters under `guarded(goodput(profile))` with the costs measured for that batch.
Prints decoding tokens/s, medians with their spread, and each over plain. A row that ends before
the longest one leaves its place empty: "busy" is the share of row-rounds that wrote something, and
`--ignore-eos` keeps it at 1 for plain decoding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import synthetic
from compare import read_prompts

import jaxspec
import jaxspec_models
from jaxspec import arguments, policies
from jaxspec.generate import prefill, run
from jaxspec_models.text import encode_prompt


def mixed(prompts: list[tuple[str, str]]) -> list[str]:
    """The texts, category by category in turn."""
    groups = [
        [text for _, text in group]
        for _, group in itertools.groupby(sorted(prompts), key=lambda prompt: prompt[0])
    ]
    turns = itertools.zip_longest(*groups)
    return [text for turn in turns for text in turn if text is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, a path, or 'tiny'")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--quantization", default="int8", choices=["int8", "none"])
    parser.add_argument("--prompts", required=True, help="JSONL with category and turns")
    parser.add_argument("--categories", nargs="+", help="only these")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--drafters", nargs="+", default=["lookup", "random"])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ignore-eos", action="store_true", help="every row writes all its tokens")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of all settings")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()

    if args.model == "tiny":
        target = synthetic.model("tiny")
        encode = lambda text: [ord(letter) % target.vocab_size for letter in text[:200]]  # noqa: E731
    else:
        quantization = None if args.quantization == "none" else args.quantization
        target = jaxspec_models.load_model(args.model, dtype=args.dtype, quantization=quantization)
        tokenizer = jaxspec_models.load_tokenizer(args.model)
        encode = lambda text: encode_prompt(tokenizer, [{"role": "user", "content": text}])  # noqa: E731

    chosen = read_prompts(args.prompts, max(args.batches))
    if args.categories:
        chosen = [prompt for prompt in chosen if prompt[0] in args.categories]
    texts = mixed(chosen)
    figures: dict[int, Any] = {}
    for batch in args.batches:
        prompts = [encode(text) for text in itertools.islice(itertools.cycle(texts), batch)]
        figures[batch] = measure(target, prompts, args)
        line = f"batch {batch:3d}, prompts of {min(map(len, prompts))} to {max(map(len, prompts))}"
        for name, figure in figures[batch].items():
            low, high = figure["spread"]
            line += f" | {name} {figure['rate']:.0f} tokens/s [{low:.0f}, {high:.0f}]"
            line += f" {figure['busy']:.0%} busy"
            if name != "plain":
                line += f" = {figure['over_plain']:.2f} x plain"
        print(line, flush=True)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({"settings": vars(args), "batches": figures}, file, indent=1)


def measure(target: Any, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Decoding of one batch in every setting, in turn."""
    settings: dict[str, dict[str, Any]] = {"plain": {}}
    for name in args.drafters:
        drafter = (
            jaxspec.drafters.prompt_lookup()
            if name == "lookup"
            else synthetic.UniformDrafter(target.vocab_size)
        )
        profile = jaxspec.measure_costs(
            target,
            drafter,
            batch=len(prompts),
            num_draft_tokens=args.num_draft_tokens,
            context_length=128,  # not the prompts': each timing begins with a prefill
            sampling=jaxspec.Sampling(temperature=args.temperature),
            repeats=5,
        )
        settings[name] = {
            "drafter": drafter,
            "policy": policies.guarded(policies.goodput(profile)),
            "num_draft_tokens": args.num_draft_tokens,
        }
    rates: dict[str, list[float]] = {name: [] for name in settings}
    busy: dict[str, float] = {}
    for turn in range(args.rounds + 1):  # the first compiles
        for name, setting in settings.items():
            prepared = arguments.prepare(
                target,
                prompts,
                sampling=jaxspec.Sampling(temperature=args.temperature),
                max_new_tokens=args.max_new_tokens,
                eos_ids=() if args.ignore_eos else None,
                key=jax.random.key(turn),
                **setting,
            )
            engine, request, size = prepared.engine, prepared.request, prepared.max_new_tokens
            state = prefill(engine, request, prepared.prompts, max_new_tokens=size)
            jax.block_until_ready(state)
            start = time.perf_counter()
            state = jax.block_until_ready(run(engine, request, state, -1))
            seconds = time.perf_counter() - start
            if turn:
                num_new = int(jnp.sum(state.lengths - request.prompt_lengths))
                rates[name].append(num_new / seconds)
                busy[name] = float(jnp.mean(state.num_rounds) / jnp.max(state.num_rounds))
    plain = rates["plain"]
    return {
        name: {
            "rate": statistics.median(values),
            "spread": (min(values), max(values)),
            "busy": busy[name],
            # Neighbours in time are compared, so that a slow minute does not count for one side.
            "over_plain": statistics.median(x / y for x, y in zip(values, plain, strict=True)),
        }
        for name, values in rates.items()
    }


if __name__ == "__main__":
    main()
