"""How close do the parts of a round come to what the machine can do?

    .venv/bin/python benchmarks/roofline.py --kind int8
    .venv/bin/python benchmarks/roofline.py --synthetic 8b --kind bfloat16

Measures the memory bandwidth and, for the model's own shapes, the rate of plain matrix products;
counts the bytes and the operations of a forward; and prints the share that forwards over 1 … 16
tokens, a round of the loop and prefill reach, with v(m), c and o. Runs unchanged on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import synthetic

import jaxspec
import jaxspec_models
from jaxspec import arguments, drawing, prefilling, programs
from jaxspec.generate import prefill, run
from jaxspec_models import layers


def seconds(compute: Callable[[], Any], repeats: int) -> float:
    """The median of several runs, the first not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compute())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def bandwidth(megabytes: int, repeats: int) -> float:
    """Bytes a second of reading: a float32 matrix times a vector, the best of three shapes."""
    best = 0.0
    for columns in (1024, 2048, 4096):
        matrix = jnp.ones((megabytes * 2**18 // columns, columns), jnp.float32)
        vector = jnp.ones((columns,), jnp.float32)
        multiply = jax.jit(jnp.dot)
        elapsed = seconds(functools.partial(multiply, matrix, vector), repeats)
        best = max(best, matrix.nbytes / elapsed)
    return best


def matrices(model: jaxspec.LanguageModel) -> list[tuple[Any, Any]]:
    """(weight, scale or None) of every product of a forward but the head's."""
    found = []

    def visit(node: Any) -> None:
        if not isinstance(node, dict):
            return
        if "weight" in node and node["weight"].ndim == 2:
            found.append((node["weight"], node.get("scale")))
        for child in node.values():
            visit(child)

    visit(model.params["layers"])
    return found


@jax.jit
def _products(x: dict[int, Any], weights: list[tuple[Any, Any]]) -> Any:
    """Every weight times rows of its own width: nothing but the products of a forward."""
    contract = functools.partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
    last = jnp.zeros(())
    for weight, scale in weights:
        kind = jnp.float32 if scale is None else jnp.int32
        # One after the other, so that the results share their memory.
        rows = x[weight.shape[1]].at[0, 0].set((last % 2).astype(weight.dtype))
        y = contract(rows, weight, preferred_element_type=kind)
        last = jax.lax.optimization_barrier(y)[0, 0]
    return last


def product_rate(model: jaxspec.LanguageModel, rows: int, repeats: int) -> float:
    """Operations a second of plain products of the model's shapes with so many rows."""
    weights = matrices(model)
    widths = {weight.shape[1] for weight, _ in weights}
    x = {width: jnp.ones((rows, width), weights[0][0].dtype) for width in widths}
    elapsed = seconds(lambda: _products(x, weights), repeats)
    return sum(2 * rows * weight.size for weight, _ in weights) / elapsed


def forward_seconds(model: jaxspec.LanguageModel, width: int, batch: int, repeats: int) -> float:
    """Of one forward inside a loop, at 100 cached tokens."""
    count = 4
    start = jnp.full((batch,), 100, jnp.int32)

    @functools.partial(programs.Program, donate_argnums=1)
    def forwards(model: jaxspec.LanguageModel, cache: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            tokens, cache = carry
            output, cache = model.forward(
                tokens, cache, start=start, num_new=jnp.full((batch,), width, jnp.int32)
            )
            return jax.vmap(jax.vmap(drawing.argmax))(output.logits), cache

        tokens = jnp.ones((batch, width), jnp.int32)
        return jax.lax.fori_loop(0, count, body, (tokens, cache))

    cache = [model.init_cache(batch, 256, 32)]

    def once() -> Any:
        tokens, cache[0] = forwards(model, cache[0])
        return tokens

    return seconds(once, repeats) / count


def prefill_seconds(model: jaxspec.LanguageModel, length: int, repeats: int) -> float:
    """Of the prompt alone; nothing is drafted or written."""
    prepared = arguments.prepare(
        model, [[1] * length], sampling=jaxspec.Sampling(temperature=0), max_new_tokens=1
    )
    # A function of its own each time: what is patched now must be traced now.
    compute = programs.Program(
        lambda engine, request, prompts: (
            prefilling.prefill(engine, request, prompts, max_new_tokens=1).cache
        )
    )
    return seconds(lambda: compute(prepared.engine, prepared.request, prepared.prompts), repeats)


def _no_attention(q: Any, *unused: Any, **also_unused: Any) -> Any:
    return q.reshape(*q.shape[:2], -1)


def decode(model: jaxspec.LanguageModel, num_tokens: int, **options: Any) -> dict[str, Any]:
    """Tokens/s of the loop alone."""
    prepared = arguments.prepare(
        model, [[1] * 60], max_new_tokens=num_tokens, eos_ids=(), key=jax.random.key(0),
        sampling=jaxspec.Sampling(temperature=0), **options,
    )  # fmt: skip
    times = []
    for _ in range(4):
        state = prefill(
            prepared.engine, prepared.request, prepared.prompts, max_new_tokens=num_tokens
        )
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = jax.block_until_ready(run(prepared.engine, prepared.request, state, -1))
        times.append(time.perf_counter() - start)
    rounds = int(state.num_rounds[0])
    return {
        "tokens_per_second": num_tokens / statistics.median(times[1:]),
        "round_seconds": statistics.median(times[1:]) / rounds,
        "tokens_per_step": num_tokens / rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--synthetic", choices=synthetic.CONFIGS, help="random weights instead")
    parser.add_argument("--kind", choices=("float32", "bfloat16", "int8"), default="int8")
    parser.add_argument("--synthetic-acceptance", type=float, default=0.8)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 5, 8, 11, 16])
    parser.add_argument("--prompt-length", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=512, help="read to measure bandwidth")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json")
    args = parser.parse_args()

    quantization = "int8" if args.kind == "int8" else None
    dtype = "bfloat16" if quantization else args.kind
    if args.synthetic:
        model = synthetic.model(args.synthetic, dtype=dtype, quantization=quantization)
    else:
        model = jaxspec_models.load_model(args.model, dtype=dtype, quantization=quantization)
    device = jax.devices()[0]
    report: dict[str, Any] = {"device": device.device_kind, "settings": vars(args)}
    print(
        f"{device.device_kind}, jax {jax.__version__}, {args.synthetic or args.model} {args.kind}"
    )

    rate = bandwidth(args.megabytes, args.repeats)
    # The table of embeddings is read row by row, unless it is the head as well.
    tied = "head" not in model.params
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    num_bytes -= 0 if tied else model.params["embed"]["weight"].nbytes
    print(f"memory: {rate / 1e9:.1f} GB/s; weights of a forward: {num_bytes / 1e6:.0f} MB, at best "
          f"{num_bytes / rate * 1e3:.2f} ms")  # fmt: skip
    report |= {"bandwidth": rate, "forward_bytes": num_bytes, "forwards": {}}

    num_weights = sum(weight.size for weight, _ in matrices(model))
    head = model.params["embed" if tied else "head"]["weight"].size
    for width in args.widths:
        elapsed = forward_seconds(model, width, 1, args.repeats)
        report["forwards"][width] = {
            "seconds": elapsed,
            "bandwidth_share": num_bytes / elapsed / rate,
            "flops_per_second": 2 * width * (num_weights + head) / elapsed,
        }
        first = report["forwards"][args.widths[0]]["seconds"]
        share = num_bytes / elapsed / rate
        print(f"forward over {width:2d} tokens: {elapsed * 1e3:7.2f} ms, "
              f"v = {elapsed / first:.2f}, {share:.2f} of the bandwidth")  # fmt: skip
    forwards = report["forwards"]
    if {2, 5} <= forwards.keys():
        print(f"5 tokens / 2 tokens: {forwards[5]['seconds'] / forwards[2]['seconds']:.2f}")

    plain = decode(model, 64)
    drafted = decode(
        model, 64, num_draft_tokens=args.num_draft_tokens,
        **synthetic.speculation(args.synthetic_acceptance),
    )  # fmt: skip
    report |= {"plain": plain, "synthetic": drafted}
    one = forward_seconds(model, 1, 1, args.repeats)
    wide = forward_seconds(model, args.num_draft_tokens + 1, 1, args.repeats)
    print(f"plain: {plain['tokens_per_second']:.1f} tokens/s, a round "
          f"{plain['round_seconds'] / one:.3f} of its forward")  # fmt: skip
    print(f"synthetic acceptance {args.synthetic_acceptance} (guarantee: none), "
          f"K = {args.num_draft_tokens}: {drafted['tokens_per_second']:.1f} tokens/s, "
          f"{drafted['tokens_per_step']:.2f} a step, a round "
          f"{drafted['round_seconds'] / wide:.3f} of its forward")  # fmt: skip

    profile = jaxspec.measure_costs(
        model, jaxspec.drafters.prompt_lookup(), num_draft_tokens=args.num_draft_tokens
    )
    base = float(profile.verify[0])
    report["profile"] = {"verify": profile.verify.tolist(), "draft": float(profile.draft),
                         "overhead": float(profile.overhead)}  # fmt: skip
    print(
        f"prompt lookup: v = {[round(float(v) / base, 3) for v in profile.verify]}, "
        f"c = {float(profile.draft) / base:.3f}, o = {float(profile.overhead) / base:.3f}"
    )

    length = args.prompt_length
    flops = 2 * (length - 1) * num_weights
    plain_rate = product_rate(model, 256, args.repeats)
    whole = prefill_seconds(model, length, args.repeats)
    with mock.patch.object(layers, "attention", _no_attention):
        jax.clear_caches()
        without = prefill_seconds(model, length, args.repeats)
    jax.clear_caches()
    report["prefill"] = {"product_rate": plain_rate, "seconds": whole, "without": without}
    print(f"products of these shapes, 256 rows: {plain_rate / 1e9:.0f} GFLOP/s")
    print(f"prefill of {length} tokens: {whole * 1e3:.0f} ms, {flops / whole / plain_rate:.2f} of "
          f"that rate; without attention {without * 1e3:.0f} ms, "
          f"{flops / without / plain_rate:.2f}; attention: {1 - without / whole:.2f}")  # fmt: skip
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
