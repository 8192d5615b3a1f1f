"""What each sampling option costs a round: the default model, K drafts that cost nothing.

    python benchmarks/options.py --quantization int8

Every program is compiled first; then they take turns, and an option's cost is the median, over the
turns, of its time for a round over that of the same round without options.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxspec
import jaxspec_models
from jaxspec import Sampling, sampling

sys.path.insert(0, str(Path(__file__).parent))
import synthetic


def shifted(text: sampling.Text, logits: jax.Array) -> jax.Array:
    """A user's processor that does next to nothing."""
    return logits.at[text.tokens[text.length - 1]].add(-1.0)


def options(vocab_size: int) -> dict[str, Sampling]:
    """An example of each option, numbers as data."""
    one = lambda value: np.float32(value)  # noqa: E731
    some = [[5, 6], [7, 8, 9], [11]]
    machine = sampling.grammar_of(np.tile([[0, 1], [1, 0]], (1, vocab_size // 2)))
    return {
        "none": Sampling(),
        "temperature": Sampling(temperature=one(0.8)),
        "top-k": Sampling(top_k=np.int32(50)),
        "top-p": Sampling(top_p=one(0.95)),
        "min-p": Sampling(min_p=one(0.05)),
        "typical-p": Sampling(typical_p=one(0.95)),
        "repetition penalty": Sampling(repetition_penalty=one(1.1)),
        "presence penalty": Sampling(presence_penalty=one(0.2)),
        "frequency penalty": Sampling(frequency_penalty=one(0.2)),
        "no repeated 3-gram": Sampling(no_repeat_ngram_size=np.int32(3)),
        "min new tokens": Sampling(min_new_tokens=np.int32(10)),
        "logit bias": Sampling(logit_bias={3: -1.0, 4: 1.0}),
        "bad words": Sampling(bad_words=some),
        "suppressed tokens": Sampling(suppress_tokens=[3, 4, 5]),
        "grammar": Sampling(grammar=machine),
        "processor": Sampling(processor=shifted),
        "temperature, top-k, top-p": Sampling(
            temperature=one(0.8), top_k=np.int32(50), top_p=one(0.95)
        ),
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--tiny", action="store_true", help="random weights, for a test of the script"
    )
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--drafts", type=int, default=4, help="K")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--only", nargs="*", help="names of options")
    arguments = parser.parse_args()
    if arguments.tiny:
        model = synthetic.model("tiny", dtype="float32")
    else:
        model = jaxspec_models.load_model(arguments.model, quantization=arguments.quantization)
    prompts = jnp.asarray([np.arange(40) % 30 + 300])
    chosen = {
        name: given
        for name, given in options(model.vocab_size).items()
        if not arguments.only or name in ("none", *arguments.only)
    }

    def seconds_a_round(given: Sampling) -> float:
        start = time.perf_counter()
        out = jaxspec.generate(
            model, prompts, drafter=synthetic.FreeDrafter(), sampling=given, eos_ids=(),
            num_draft_tokens=arguments.drafts, max_new_tokens=arguments.tokens,
            key=jax.random.key(0, impl="threefry2x32"),
        )  # fmt: skip
        rounds = int(out.stats.num_spec_steps[0])
        return (time.perf_counter() - start) / rounds

    for given in chosen.values():
        seconds_a_round(given)
    taken: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(arguments.turns):
        for name, given in chosen.items():
            taken[name].append(seconds_a_round(given))
    print("| option | ms a round | cost of it |\n|---|---|---|")
    for name, seconds in taken.items():
        ratios = [a / b for a, b in zip(seconds, taken["none"], strict=True)]
        cost = 100 * (statistics.median(ratios) - 1)
        print(f"| {name} | {1000 * statistics.median(seconds):.2f} | {cost:+.1f} % |")


if __name__ == "__main__":
    main()
