"""One system under comparison, in a process of its own: reads requests, answers with timings.

`compare.py` starts it and speaks JSON lines with it; nobody else needs to.

    python benchmarks/systems.py SYSTEM --weights FILE.gguf --threads 2

It says {"name": "...", "modes": ["plain", "lookup", ...]} first, or {"missing": "why"}. A request
is {"mode": one of these, "ids": [...], "text": "...", "max_new_tokens": 128, "temperature": 0.0,
"seed": 0, "eos_ids": [...]}. The answer holds the number of new tokens, the seconds to the first of
them ("prefill"), and how many came in how many seconds after that ("decode_tokens", "decode"). Each
system gets the prompt's ids, or the same text where it takes no ids, and is used as its
documentation recommends; the constants were chosen on other prompts.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Answer = dict[str, Any]
Run = Callable[[dict[str, Any]], Answer]
MODES = ("plain", "lookup")


class System(NamedTuple):
    """What answers, how it does, and in which modes it can."""

    title: str
    run: Run
    modes: tuple[str, ...] = MODES


def write(
    model: Any, request: dict[str, Any], *, slots: int | None = None, **options: Any
) -> Answer:
    """Answers a request with `jaxspec`; options of `jaxspec.generate`.

    Prompts that are padded to the same number of slots (a power of two, unless told) run the same
    programs.
    """
    import jax
    import numpy as np

    from jaxspec import arguments, prompting
    from jaxspec.generate import prefill, result, run

    size = len(request["ids"])
    padded = np.zeros((1, slots or prompting.bucket(size)), np.int32)
    padded[0, :size] = request["ids"]
    start = time.perf_counter()
    prepared = arguments.prepare(
        model,
        padded,
        prompt_lengths=np.array([size], np.int32),
        max_new_tokens=request["max_new_tokens"],
        eos_ids=request["eos_ids"],
        key=jax.random.key(request["seed"]),
        **options,
    )
    engine, row = prepared.engine, prepared.request
    state = prefill(engine, row, prepared.prompts, max_new_tokens=prepared.max_new_tokens)
    state = run(engine, row, state, 1)
    first = int(state.lengths[0]) - size
    begin = time.perf_counter()
    state = jax.block_until_ready(run(engine, row, state, -1))
    end = time.perf_counter()
    done = result(engine, row, state, pad_id=0)
    count = int(done.lengths[0])
    return {
        "tokens": count,
        "prefill": begin - start,
        "decode": end - begin,
        "decode_tokens": count - first,
        "ids": done.tokens[0, :count].tolist(),
        "steps": int(done.stats.num_spec_steps[0]),
        "histogram": done.stats.acceptance_histogram[0].tolist(),
    }


def jaxspec_int8(weights: str, threads: int) -> System:
    """This project: int8 weights, prompt lookup and a trained drafter under a guarded policy."""
    del threads  # XLA takes the cores the process may use
    import jax

    import jaxspec
    import jaxspec_models
    from jaxspec.cli import running

    if cache := os.environ.get("JAXSPEC_BENCHMARK_CACHE"):
        jax.config.update("jax_compilation_cache_dir", cache)
    model = jaxspec_models.load_model(weights, quantization="int8")
    drafters = {"lookup": (jaxspec.drafters.prompt_lookup(), 10)}
    if (trained := model.default_drafter) is not None:
        drafters["trained"] = (trained, trained.max_draft_tokens)

    @functools.cache
    def options(mode: str, temperature: float) -> dict[str, Any]:
        sampling = jaxspec.Sampling(temperature=temperature)
        if mode == "plain":
            return {"drafter": None, "sampling": sampling}
        drafter, num_draft_tokens = drafters[mode]
        if mode == "trained":
            return running.drafting(drafter, None, "int8") | {"sampling": sampling}
        profile = jaxspec.measure_costs(
            model, drafter, num_draft_tokens=num_draft_tokens, context_length=256, sampling=sampling
        )
        return {
            "drafter": drafter,
            "policy": jaxspec.policies.guarded(jaxspec.policies.goodput(profile)),
            "num_draft_tokens": num_draft_tokens,
            "sampling": sampling,
        }

    def answer(request: dict[str, Any]) -> Answer:
        return write(model, request, **options(request["mode"], request["temperature"] or 0))

    title = f"jaxspec {jaxspec.__version__}, jax {jax.__version__}, int8"
    return System(title, answer, ("plain", *drafters))


def transformers(weights: str, threads: int) -> System:
    """HF transformers: bfloat16, eager, with and without prompt lookup."""
    import torch
    import transformers as hf

    torch.set_num_threads(threads)
    folder, name = os.path.split(os.path.abspath(weights))
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    model = hf.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    model.eval()

    class Clock(hf.generation.streamers.BaseStreamer):
        """Notes when tokens come; the first call brings the prompt."""

        def __init__(self):
            self.times, self.counts = [], []

        def put(self, value):
            self.times.append(time.perf_counter())
            self.counts.append(value.numel())

        def end(self):
            pass

    def answer(request: dict[str, Any]) -> Answer:
        ids = torch.tensor([request["ids"]])
        torch.manual_seed(request["seed"])
        clock, options = Clock(), {}
        if request["temperature"]:
            options = {"temperature": request["temperature"], "top_k": 0, "top_p": 1.0}
        if request["mode"] == "lookup":
            options["prompt_lookup_num_tokens"] = 10
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request["max_new_tokens"],
                do_sample=bool(request["temperature"]),
                eos_token_id=request["eos_ids"],
                pad_token_id=request["eos_ids"][0],
                streamer=clock,
                **options,
            )
        end = time.perf_counter()
        new = out[0, ids.shape[1] :].tolist()
        first = clock.times[1]
        return {
            "tokens": len(new),
            "prefill": first - start,
            "decode": end - first,
            "decode_tokens": len(new) - clock.counts[1],
            "ids": new,
        }

    return System(f"transformers {hf.__version__}, torch {torch.__version__}, bfloat16", answer)


def llama_cpp(weights: str, threads: int) -> System:
    """llama.cpp through llama-cpp-python: the file's own quantisation."""
    import llama_cpp as lib
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    options = {
        "model_path": weights,
        "n_ctx": 4096,
        "n_threads": threads,
        "n_threads_batch": threads,
        "verbose": False,
    }
    models = {
        "plain": lib.Llama(**options),
        # Scores of every position are what its lookup reads.
        "lookup": lib.Llama(
            **options, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4), logits_all=True
        ),
    }

    def answer(request: dict[str, Any]) -> Answer:
        model, eos = models[request["mode"]], set(request["eos_ids"])
        model.reset()
        model.set_seed(request["seed"])
        new: list[int] = []
        start = time.perf_counter()
        first = start
        for token in model.generate(
            request["ids"], temp=request["temperature"], top_k=0, top_p=1.0, min_p=0.0,
            repeat_penalty=1.0, reset=True,
        ):  # fmt: skip
            if not new:
                first = time.perf_counter()
            new.append(int(token))
            if token in eos or len(new) >= request["max_new_tokens"]:
                break
        end = time.perf_counter()
        return {
            "tokens": len(new),
            "prefill": first - start,
            "decode": end - first,
            "decode_tokens": len(new) - 1,
            "ids": new,
        }

    return System(f"llama-cpp-python {lib.__version__}, the file's quantisation", answer)


def openvino(weights: str, threads: int) -> System:
    """OpenVINO GenAI, from the GGUF file."""
    import openvino_genai as ov

    options = {"INFERENCE_NUM_THREADS": threads}
    pipes = {
        "plain": ov.LLMPipeline(weights, "CPU", **options),
        "lookup": ov.LLMPipeline(weights, "CPU", prompt_lookup=True, **options),
    }

    def answer(request: dict[str, Any]) -> Answer:
        config = ov.GenerationConfig()
        config.max_new_tokens = request["max_new_tokens"]
        config.apply_chat_template = False
        config.eos_token_id = request["eos_ids"][0]
        config.stop_token_ids = set(request["eos_ids"])
        if request["temperature"]:
            config.do_sample = True
            config.temperature = request["temperature"]
            config.rng_seed = request["seed"]
        if request["mode"] == "lookup":
            config.num_assistant_tokens = 5
            config.max_ngram_size = 3
        first: list[float] = []

        def on_text(_: str) -> Any:
            if not first:
                first.append(time.perf_counter())
            return ov.StreamingStatus.RUNNING

        start = time.perf_counter()
        out = pipes[request["mode"]].generate([request["text"]], config)
        end = time.perf_counter()
        metrics = out.perf_metrics
        count = int(metrics.get_num_generated_tokens())
        prefill = metrics.get_ttft().mean / 1e3
        return {
            "tokens": count,
            "prefill": prefill,
            "decode": end - start - prefill,
            "decode_tokens": count - 1,
        }

    return System(f"openvino-genai {ov.__version__}, from GGUF", answer)


SYSTEMS: dict[str, Callable[[str, int], System]] = {
    "jaxspec": jaxspec_int8,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "openvino": openvino,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    # Libraries print what they like: answers go out by a copy of stdout, the rest to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: Answer) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        system = SYSTEMS[args.system](args.weights, args.threads)
    except ImportError as error:
        say({"missing": str(error)})
        return
    say({"name": system.title, "modes": system.modes})
    for line in sys.stdin:
        say(system.run(json.loads(line)))


if __name__ == "__main__":
    main()
