"""What each sampling option costs a round: the default model, K drafts that cost nothing.

    python benchmarks/options.py --quantization int8

Every program is compiled first; then they take turns. An option's cost is the median, over the
turns, of its time for a round over that of the same round without options. That is noisy where a
machine is shared, so the option's work is also timed alone: from the logits of the K + 1 positions
of one row to what is reported of its tokens, the least of the turns, less that without options.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxspec
import jaxspec_models
from jaxspec import Draft, Sampling, sampling, verifiers
from jaxspec.sampling import processing

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


def alone(
    given: Sampling, vocab_size: int, num_drafts: int, repeats: int = 20
) -> Callable[[], float]:
    """A function that times an option's work for one row's round, in seconds."""
    peak = 20  # tokens that stand out, as in the laws of a language model
    logits = 2.5 * np.random.default_rng(0).standard_normal((1, num_drafts + 1, vocab_size))
    logits[:, :, :peak] += np.linspace(14, 6, peak)
    options = sampling.resolve(given, 1, vocab_size)
    length = jnp.array([40], jnp.int32)
    history = sampling.recall(
        options,
        300 + jnp.arange(64, dtype=jnp.int32)[None] % 30,
        length,
        vocab_size=vocab_size,
        prompt_lengths=length,
        eos_ids=jnp.zeros((1, 0), jnp.int32),
    )
    drafts = jnp.zeros((1, num_drafts), jnp.int32)

    @jax.jit
    def work(
        logits: jax.Array, options: sampling.Options, history: sampling.History
    ) -> tuple[jax.Array, jax.Array]:
        def once(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits, total = carry
            scores = processing.process_positions(logits, options, history, drafts)
            total += jnp.max(scores.log_probs) + jnp.sum(scores.report[:, :, 3])
            if options.are_on:
                of_token = jax.vmap(jax.vmap(sampling.log_prob, in_axes=(0, None)), (0, None))
                total += jnp.sum(of_token(logits, jnp.int32(3)))
            waits = (total == jnp.inf).astype(jnp.float32)  # 0: the next one waits for this one
            return lax.dynamic_update_slice(logits, logits[:, :, :1] + waits, (0, 0, 0)), total

        return lax.fori_loop(0, repeats, once, (logits, jnp.float32(0)))

    given_logits = jnp.asarray(logits, jnp.float32)

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(work(given_logits, options, history))
        return (time.perf_counter() - start) / repeats

    seconds()
    return seconds


def print_verification(vocab_size: int, num_drafts: int, turns: int) -> None:
    """What rules take over the vocabulary and over 256 tokens, and what finding k of them takes."""
    rng = np.random.default_rng(0)
    shape = (1, num_drafts + 1, vocab_size)
    target = jax.nn.log_softmax(jnp.asarray(2.5 * rng.standard_normal(shape), jnp.float32))
    drafted = jnp.roll(target[:, :-1], 1, axis=2)
    tokens = jnp.zeros((1, num_drafts), jnp.int32)
    keys = jax.random.split(jax.random.key(0), (1, num_drafts + 1))
    repeats = 20

    def timed(compute: Callable[[jax.Array], jax.Array], law: jax.Array) -> Callable[[], float]:
        def once(_: Any, law: jax.Array) -> jax.Array:
            found = (compute(law) < -1_000_000).astype(jnp.float32)  # 0: the next one waits for it
            return lax.dynamic_update_slice(law, law[:, :, :1] + found, (0, 0, 0))

        program = jax.jit(lambda law: lax.fori_loop(0, repeats, once, law))

        def seconds() -> float:
            start = time.perf_counter()
            jax.block_until_ready(program(law))
            return (time.perf_counter() - start) / repeats

        seconds()
        return seconds

    works = {}
    for name, rule in (("rejection", verifiers.rejection()), ("block", verifiers.block())):
        for size in (vocab_size, 256):
            q = drafted[:, :, :size]

            def judge(law: jax.Array, rule: Any = rule, q: jax.Array = q) -> jax.Array:
                draft = Draft(tokens, q, jnp.full((1,), num_drafts, jnp.int32))
                return jnp.sum(jax.vmap(rule)(keys, draft, law).tokens)

            works[f"{name} over {size}"] = timed(judge, target[:, :, :size])
    for k in (16, 64, 256):

        def find(law: jax.Array, k: int = k) -> jax.Array:
            return jnp.sum(lax.top_k(law, k)[1])

        works[f"lax.top_k of {k}"] = timed(find, target)
    least = dict.fromkeys(works, float("inf"))
    for _ in range(turns):
        least = {name: min(least[name], work()) for name, work in works.items()}
    print("| one row | least, ms |\n|---|---|")
    for name, seconds in least.items():
        print(f"| {name} | {1000 * seconds:.3f} |")


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
    parser.add_argument(
        "--verification", action="store_true", help="time the rules instead; needs no model"
    )
    arguments = parser.parse_args()
    if arguments.verification:
        print_verification(49_152, arguments.drafts, arguments.turns)
        return
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
    works = {
        name: alone(given, model.vocab_size, arguments.drafts) for name, given in chosen.items()
    }
    rounds: dict[str, list[float]] = {name: [] for name in chosen}
    least = dict.fromkeys(chosen, float("inf"))
    for _ in range(arguments.turns):
        for name, given in chosen.items():
            rounds[name].append(seconds_a_round(given))
        for name, work in works.items():
            least[name] = min(least[name], work(), work())
    print("| option | ms a round | cost of it | alone, ms | of the fastest round |")
    print("|---|---|---|---|---|")
    fastest = min(rounds["none"])
    for name, seconds in rounds.items():
        ratios = [a / b for a, b in zip(seconds, rounds["none"], strict=True)]
        cost = 100 * (statistics.median(ratios) - 1)
        added = least[name] - least["none"]
        print(
            f"| {name} | {1000 * statistics.median(seconds):.2f} | {cost:+.1f} % "
            f"| {1000 * added:.2f} | {100 * added / fastest:+.1f} % |"
        )


if __name__ == "__main__":
    main()
