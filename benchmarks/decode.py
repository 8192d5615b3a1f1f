"""How fast is decoding, plain and speculative, on this machine?

    .venv/bin/python benchmarks/decode.py --dtype bfloat16 --prompts FILE.jsonl --limit 4

Runs every setting in turn, round after round (A B A B), on the same prompts, and prints medians
with their spread: compile time apart, tokens/s of prefill and decoding together, tokens per
target forward and the acceptance histogram. Plain decoding is measured in the same run.

`--prompts` takes a JSONL file whose rows have "turns" (a list of user messages; the first is
used) or "prompt". Without it, two short prompts of the script's own are used.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import jax
import numpy as np

import jaxspec
import jaxspec_models

PROMPTS = [
    "Tell me a short story about a lighthouse keeper who collects maps.",
    "Repeat this text exactly: The ferry leaves at nine, the baker opens at seven, and the "
    "library, which nobody visits on Mondays, opens whenever the librarian has found her keys.",
]


def read_prompts(path: str | None, limit: int) -> list[str]:
    """The first user message of each row."""
    if path is None:
        return PROMPTS[:limit]
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [row["turns"][0] if "turns" in row else row["prompt"] for row in rows[:limit]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", help="JSONL with 'turns' or 'prompt'")
    parser.add_argument("--limit", type=int, default=4, help="prompts to use")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of all settings")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()

    model = jaxspec_models.load_model(args.model, dtype=args.dtype)
    tokenizer = jaxspec_models.load_tokenizer(args.model)
    chats = [[{"role": "user", "content": text}] for text in read_prompts(args.prompts, args.limit)]
    prompts = [
        tokenizer.encode(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )
        for chat in chats
    ]
    settings = {"plain": None, "prompt lookup": jaxspec.drafters.prompt_lookup()}
    temperature = 0 if args.temperature == 0 else args.temperature
    options = {
        "sampling": jaxspec.Sampling(temperature=temperature),
        "max_new_tokens": args.max_new_tokens,
        "num_draft_tokens": args.num_draft_tokens,
    }

    def run(drafter, prompt):
        start = time.perf_counter()
        generation = jaxspec.generate(
            model, [prompt], drafter=drafter, key=jax.random.key(0), **options
        )
        jax.block_until_ready(generation)
        return generation, time.perf_counter() - start

    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, {platform.machine()}")
    print(f"{args.model} {args.dtype}, temperature {temperature}, K = {args.num_draft_tokens}, "
          f"{len(prompts)} prompts, batch 1, at most {args.max_new_tokens} new tokens")  # fmt: skip

    first = {name: sum(run(d, p)[1] for p in prompts) for name, d in settings.items()}
    speeds: dict[str, list[float]] = {name: [] for name in settings}
    last: dict[str, list[jaxspec.Generation]] = {}
    for _ in range(args.rounds):
        for name, drafter in settings.items():
            done = [run(drafter, prompt) for prompt in prompts]
            tokens = sum(int(generation.lengths[0]) for generation, _ in done)
            speeds[name].append(tokens / sum(seconds for _, seconds in done))
            last[name] = [generation for generation, _ in done]

    figures = {}
    for name, generations in last.items():
        tokens = sum(int(g.lengths[0]) for g in generations)
        steps = sum(int(g.stats.num_spec_steps[0]) for g in generations)
        histogram = np.sum([np.asarray(g.stats.acceptance_histogram[0]) for g in generations], 0)
        speed = statistics.median(speeds[name])
        figures[name] = {
            "tokens_per_second": speed,
            "spread": [min(speeds[name]), max(speeds[name])],
            "tokens_per_step": tokens / steps,
            "acceptance_histogram": histogram.tolist(),
            "first_run_seconds": first[name],
            "compile_seconds": first[name] - tokens / speed,
        }
        print(
            f"{name:>14}: {speed:6.1f} tokens/s ({min(speeds[name]):.1f} … "
            f"{max(speeds[name]):.1f}), {tokens / steps:.2f} tokens a forward, accepted "
            f"{histogram.tolist()}, compiling {figures[name]['compile_seconds']:.1f} s"
        )
    ratio = figures["prompt lookup"]["tokens_per_second"] / figures["plain"]["tokens_per_second"]
    same = all(
        np.array_equal(a.tokens, b.tokens)
        for a, b in zip(last["plain"], last["prompt lookup"], strict=True)
    )
    print(f"prompt lookup / plain: {ratio:.2f}; same text: {'yes' if same else 'no'}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(args), "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
