"""What trees bring: chain against tree for the same drafter, and whether the planner foresaw it.

    .venv/bin/python benchmarks/trees.py --prompts FILE.jsonl --per-category 3 --json trees.json

A trained drafter drafts chains, the best trees of several sizes for its acceptance, and a growing
one; beside them what needs no training: `prompt_lookup` in a chain and in a tree, and
`token_recycling`. All answer the same prompts in turn, A B C C B A …, beside plain decoding;
prefill is timed apart. Before that, acceptance by rank and depth is measured on prompts that follow
those in the file, and the costs of rounds. From these two comes what `jaxspec.trees.plan` foresees
for each shape, printed beside what was measured, and the shape that it would choose beside the
fastest.
"""

from __future__ import annotations

import argparse
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
from jaxspec import costs, trees, tuning

SHIPPED = pathlib.Path(jaxspec_models.__file__).parent / "shipped" / "smollm2-135m"


def foreseen(tree: trees.Topology, acceptance: Any, cost: costs.RoundCosts) -> tuple[float, float]:
    """Tokens a step and times plain decoding, as the planner reckons."""
    is_timed = tree.is_chain and tree.num_nodes < len(cost.chains.verify)
    own = cost.chains if is_timed else cost.trees
    verify = np.asarray(own.verify, np.float64)
    tokens = 1 + trees.expected_accepted(tree, acceptance)
    seconds = verify[tree.num_nodes] + tree.depth * float(own.draft)
    return tokens, tokens * float(verify[0]) / seconds


def shapes(acceptance: Any, args: argparse.Namespace) -> dict[str, trees.Topology]:
    """Chains, and the best trees of their sizes, each once."""
    found = {f"chain {depth}": trees.chain(depth) for depth in args.chains}
    for size in args.sizes:
        tree = trees.sequoia(acceptance, size)
        if tree not in found.values():
            found[f"tree {size}"] = tree
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default=str(SHIPPED), help="a directory")
    parser.add_argument("--prompts", required=True, help="JSONL with category and turns")
    parser.add_argument("--per-category", type=int, default=3)
    parser.add_argument("--to-measure", type=int, default=1, help="prompts a category, apart")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--chains", type=int, nargs="*", default=[1, 2, 3, 4, 6])
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 3, 4, 6, 8, 12])
    parser.add_argument("--beam", type=int, nargs="*", default=[3, 4, 8], help="WIDTH DEPTH BEST")
    parser.add_argument("--untrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quantization", default="int8", choices=("int8", "none"))
    parser.add_argument("--json", default="trees.json")
    args = parser.parse_args()

    if cache := os.environ.get("JAXSPEC_BENCHMARK_CACHE"):
        jax.config.update("jax_compilation_cache_dir", cache)
    quantization = None if args.quantization == "none" else args.quantization
    model = jaxspec_models.load_model(args.model, quantization=quantization)
    tokenizer = jaxspec_models.load_tokenizer(args.model)
    held = read_prompts(args.prompts, args.per_category)
    more = read_prompts(args.prompts, args.per_category + args.to_measure)
    prompts = contest.read(tokenizer, held)
    apart = contest.read(tokenizer, [prompt for prompt in more if prompt not in held])
    report: dict[str, Any] = {"settings": vars(args), "temperatures": {}}
    for temperature in args.temperatures:
        jax.clear_caches()  # programs of another temperature would only hold memory
        figures = measure(model, prompts, apart, temperature, args)
        report["temperatures"][f"{temperature:g}"] = figures
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def measure(
    model: Any,
    prompts: list[dict[str, Any]],
    apart: list[dict[str, Any]],
    temperature: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All contestants at one temperature; prints tables."""
    sampling = {"sampling": jaxspec.Sampling(temperature=temperature or 0)}
    trained = jaxspec_models.load_drafter(args.drafter, model)
    acceptance = tuning.measure_acceptance(
        model,
        trained,
        [prompt["ids"] for prompt in apart],
        max_new_tokens=args.max_new_tokens,
        eos_ids=model.eos_ids,
        key=jax.random.key(0),
        **sampling,
    )
    topologies = shapes(acceptance, args)
    sizes = {tree.num_nodes: tree for tree in topologies.values()}
    cost = costs.measure_tree_costs(
        model,
        trained,
        [sizes[size] for size in sorted(sizes)],
        args.chains,
        context_length=256,
        **sampling,
    )
    jax.clear_caches()
    chosen = trees.plan(acceptance, cost.trees, chain_cost=cost.chains).tree
    if chosen is not None and chosen not in topologies.values():
        topologies[f"planned, {chosen.num_nodes}"] = chosen

    contestants: dict[str, dict[str, Any]] = {"plain": {"drafter": None}}
    for name, tree in topologies.items():
        drafter: Any = trained if tree.is_chain else jaxspec_models.in_trees(trained, tree)
        contestants[name] = {"drafter": drafter, "num_draft_tokens": tree.num_nodes}
    if args.beam:
        width, depth, best = args.beam
        growing = trees.Beam(width, depth, best=best)
        contestants["beam"] = {
            "drafter": jaxspec_models.in_trees(trained, growing, children="top_k")
        }
    if args.untrained:
        lookup = jaxspec.drafters.prompt_lookup
        contestants["lookup, chain"] = {"drafter": lookup(), "num_draft_tokens": 4}
        contestants["lookup, tree"] = {"drafter": lookup(tree=trees.comb((2, 2, 1, 1)))}
        contestants["recycling"] = {"drafter": jaxspec.drafters.token_recycling(model.vocab_size)}
    contestants = {name: {**options, **sampling} for name, options in contestants.items()}
    answers = contest.hold(
        model, prompts, contestants, max_new_tokens=args.max_new_tokens, rounds=args.rounds
    )

    seconds = np.asarray(cost.trees.verify, np.float64)
    categories = list(dict.fromkeys(prompt["category"] for prompt in prompts))
    plain = contest.tokens_per_second(answers["plain"])
    found: dict[str, Any] = {
        "acceptance": acceptance,
        "rounds_in_plain_steps": (seconds / seconds[0]).tolist(),
        "level_in_plain_steps": float(cost.trees.draft) / seconds[0],
        "chains_in_plain_steps": (np.asarray(cost.chains.verify) / seconds[0]).tolist(),
        "plain_tokens_per_second": plain,
        "contestants": {},
    }
    print(f"\ntemperature {temperature:g}, at most {args.max_new_tokens} new tokens, batch 1")
    print(f"plain: {plain:.1f} tokens/s; a level drafted: {found['level_in_plain_steps']:.3f}")
    print("rounds, plain steps: " + " ".join(f"{x:.2f}" for x in found["rounds_in_plain_steps"]))
    print(
        "chains, drafts included: " + " ".join(f"{x:.2f}" for x in found["chains_in_plain_steps"])
    )
    for depth, shares in enumerate(acceptance):
        print(f"accepted at depth {depth + 1}: " + " ".join(f"{share:.3f}" for share in shares))
    for name, rounds in answers.items():
        if name == "plain":
            continue
        figures: dict[str, Any] = {
            "tokens_per_step": contest.tokens_per_step(rounds),
            "over_plain": contest.tokens_per_second(rounds) / plain,
            "over_plain_by_category": {
                category: contest.tokens_per_second(rounds, category)
                / contest.tokens_per_second(answers["plain"], category)
                for category in categories
            },
            "same_texts": contest.same_texts(rounds, answers["plain"]),
        }
        line = (
            f"{name}: {figures['tokens_per_step']:.2f} tokens a step, "
            f"{figures['over_plain']:.3f} times plain"
        )
        if name in topologies:
            figures["parents"] = topologies[name].parents
            figures["foreseen"] = foreseen(topologies[name], acceptance, cost)
            line += ", foreseen {:.2f} and {:.3f}".format(*figures["foreseen"])
        found["contestants"][name] = figures
        print(line, flush=True)
    reckoned = {name: found["contestants"][name] for name in topologies}
    best = max(reckoned, key=lambda name: reckoned[name]["over_plain"])
    choice = next((name for name, tree in topologies.items() if tree == chosen), "plain")
    reached = reckoned[choice]["over_plain"] if choice in reckoned else 1.0
    found["choice"], found["fastest"] = choice, best
    print(f"chosen: {choice}, {reached / reckoned[best]['over_plain']:.3f} of the fastest ({best})")
    if args.untrained:
        for name in ("lookup, chain", "lookup, tree", "recycling"):
            by_category = found["contestants"][name]["over_plain_by_category"]
            print(f"{name}: " + ", ".join(f"{c} {x:.2f}" for c, x in by_category.items()))
    return found


if __name__ == "__main__":
    main()
