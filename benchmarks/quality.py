"""What does quantisation cost in quality? Perplexity and greedy agreement against float32.

    .venv/bin/python benchmarks/quality.py --tokens 10000

The text is prose that comes with Python (`pydoc_data.topics`), or `--text FILE`. It is read in
windows of 512 tokens, each from its beginning. Every model sees the same tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxspec
import jaxspec_models

WINDOW = 512


def text_of(path: str | None) -> str:
    """A file's text, or Python's own documentation of its language."""
    if path is None:
        from pydoc_data import topics

        return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    with open(path, encoding="utf-8") as file:
        return file.read()


@functools.partial(jax.jit, static_argnames="apply")
def _score(apply, params, cache, tokens):
    """Log-probability of each next token f32[T - 1], and the argmax before it i32[T - 1]."""
    start = jnp.zeros((1,), jnp.int32)
    logits = apply(params, tokens[None], cache, start=start)[0].logits[0, :-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_probs, tokens[1:, None], 1)[:, 0], jnp.argmax(logits, -1)


def evaluate(model: jaxspec.LanguageModel, windows: np.ndarray) -> tuple[float, np.ndarray]:
    """The perplexity of windows i32[N, T], and the argmaxes i32[N, T - 1]."""
    scores = []
    for window in windows:
        cache = model.init_cache(1, window.size, window.size)
        scores.append(jax.device_get(_score(model.apply, model.params, cache, window)))
    log_probs, argmaxes = (np.stack(column) for column in zip(*scores, strict=True))
    return math.exp(-log_probs.mean(dtype=np.float64)), argmaxes


def measure(name: str, text: str, num_tokens: int, kinds: list[str]) -> dict[str, dict]:
    """Figures of each kind of weights, float32 first."""
    tokenizer = jaxspec_models.load_tokenizer(name)
    ids = tokenizer.encode(text, add_special_tokens=False)[: num_tokens // WINDOW * WINDOW]
    windows = np.asarray(ids, np.int32).reshape(-1, WINDOW)
    figures: dict[str, dict] = {}
    for kind in ["float32", *kinds]:
        quantization = kind if kind == "int8" else None
        model = jaxspec_models.load_model(
            name, dtype="bfloat16" if quantization else kind, quantization=quantization
        )
        perplexity, argmaxes = evaluate(model, windows)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        figures[kind] = {"perplexity": perplexity, "bytes_per_parameter": num_bytes / num_params}
        if kind == "float32":
            reference, best = perplexity, argmaxes
        figures[kind]["ratio"] = perplexity / reference
        figures[kind]["greedy_agreement"] = float((argmaxes == best).mean())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", help="a text file; default: prose that comes with Python")
    parser.add_argument("--tokens", type=int, default=10_240)
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    figures = measure(args.model, text_of(args.text), args.tokens, args.kinds)
    for kind, row in figures.items():
        print(
            f"{kind:>9}: perplexity {row['perplexity']:.4f} ({row['ratio']:.4f} of float32's), "
            f"greedy agreement {row['greedy_agreement']:.4f}, "
            f"{row['bytes_per_parameter']:.3f} bytes a parameter"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(args), "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
