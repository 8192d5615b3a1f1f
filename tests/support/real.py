"""The default model, and a copy that disagrees with it."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys

import jaxspec_models

_BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@functools.cache
def benchmark(name):
    """A benchmark script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", _BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@functools.cache
def load(kind):
    """SmolLM2-135M-Instruct in float32, bfloat16 or int8."""
    if kind == "int8":
        return jaxspec_models.load_model("smollm2-135m", quantization="int8")
    return jaxspec_models.load_model("smollm2-135m", dtype=kind)


@functools.cache
def noisy(dtype):
    """The model with noise in its weights: a draft that disagrees, and shares every trace."""
    return benchmark("verifiers").noisy(load(dtype))
