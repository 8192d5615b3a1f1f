"""int8 linear layers in C++: a few rows at the speed of the memory, bit for bit what XLA computes.

XLA's CPU backend has no kernel that multiplies a few int8 rows with a weight as fast as the weight
can be read: a forward over seven tokens took three times as long as over one
(`benchmarks/README.md`). So `int8_linear.cc` is compiled with the machine's C++ compiler when it is
first needed (seconds, once: the library is kept in the cache), and programs call it through XLA's
foreign functions. Where that cannot be, the layers are XLA's: the same numbers, later, though XLA
may fuse them with an addition behind them, and so round once where the kernel rounds twice. Within
one process all widths take one way, and their last bits agree.

`JAXSPEC_NATIVE=0`, set before the first forward, does without it: for `jax.export`, whose programs
must not depend on a library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import jaxlib
from jax import custom_batching, lax

from jaxspec_models.cache import build_once, cache_dir, say

Array: TypeAlias = jax.Array

_SOURCE = Path(__file__).with_name("int8_linear.cc")
_LINEAR, _RESCALE = "jaxspec_int8_linear", "jaxspec_int8_rescale"
_FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-std=c++17", "-fPIC", "-shared", "-w"),
)
_SECONDS = 300
_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")


class UnavailableError(Exception):
    """Why products are XLA's."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this machine's processor can do, as Linux names it; nothing where it does not say.

    Example:
      >>> isinstance(cpu_flags(), frozenset)
      True
    """
    return frozenset(_cpuinfo().get("flags", "").split())


def _cpuinfo() -> dict[str, str]:
    """Of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value for name, _, value in lines}


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name, *options in filter(None, (wanted, ["c++"], ["g++"], ["clang++"])):
        if path := shutil.which(name):
            return [path, *options]
    raise UnavailableError(
        "there is no C++ compiler (c++, g++, clang++, or CXX in the environment)"
    )


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise UnavailableError(f"{command[0]} failed: {lines[0]}")
    return done.stdout


def compiled(source: Path = _SOURCE) -> Path:
    """The library of a C++ file for this processor and this jaxlib, compiled if it is not there.

    Raises:
      UnavailableError: it cannot be compiled, or not kept.
    """
    compiler = _compiler()
    parts = (
        source.read_text(encoding="utf-8"),
        jaxlib.__version__,
        _run([*compiler, "--version"]),
        *compiler,
        *_FLAGS,
        *(_cpuinfo().get(name, "") for name in _PROCESSOR),
    )
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def build(path: Path) -> None:
        say("Compiling the int8 kernel for this processor, once ...")
        includes = ("-I", jax.ffi.include_dir())
        _run([*compiler, *_FLAGS, *includes, str(source), "-o", str(path)])

    try:
        path = cache_dir() / "native" / f"{source.stem}-{key[:16]}.so"
        return build_once(path, source=key, build=build)
    except OSError as error:
        raise UnavailableError(str(error)) from error


@functools.cache
def why_not() -> str | None:
    """The reason why products are XLA's; None where they are this kernel's.

    The first call compiles the kernel, or loads it.

    Example:
      >>> why_not() is None or isinstance(why_not(), str)
      True
    """
    try:
        if os.environ.get("JAXSPEC_NATIVE", "1") == "0":
            raise UnavailableError("JAXSPEC_NATIVE is 0")
        if platform.machine() not in ("x86_64", "AMD64") or "avx2" not in cpu_flags():
            raise UnavailableError("this is no x86 processor with AVX2")
        library = ctypes.CDLL(str(compiled()))
        for name in (_LINEAR, _RESCALE):
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except UnavailableError as error:
        return str(error)
    except (OSError, AttributeError, ValueError, RuntimeError) as error:
        return f"the kernel could not be compiled or loaded: {error}"
    return None


@functools.cache
def lane() -> int:
    """How many products an instruction of the kernel makes: 64 by AVX-512's VNNI, else 16.

    Only where `why_not()` is None.
    """
    return ctypes.c_int32.in_dll(ctypes.CDLL(str(compiled())), "jaxspec_int8_lane").value


@custom_batching.custom_vmap
def linear(x: Array, weight: Array, scale: Array) -> Array:
    """`layers.product` of float rows with an int8 weight, on a CPU, where `why_not()` is None.

    Args:
      x: f32[N, I], rounded row by row to int8.
      weight: int8[O, I].
      scale: f32[O].

    Returns:
      f32[N, O].

    Example:
      >>> if why_not() is None:
      ...     x, weight = jnp.array([[127.0, -2.0]]), jnp.array([[3, 4], [5, 6]], jnp.int8)
      ...     assert linear(x, weight, jnp.ones(2)).tolist() == [[373.0, 623.0]]
    """
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(_LINEAR, result, vmap_method="sequential")(x, weight, scale)


@linear.def_vmap
def _mapped_linear(
    size: int, is_mapped: list[bool], x: Array, weight: Array, scale: Array
) -> tuple[Array, bool]:
    if is_mapped == [True, False, False]:
        _, rows, width = x.shape
        y = linear(x.reshape(size * rows, width), weight, scale)
        return y.reshape(size, rows, weight.shape[0]), True
    mapped = zip((x, weight, scale), is_mapped, strict=True)
    every = [a if is_one else jnp.broadcast_to(a, (size, *a.shape)) for a, is_one in mapped]
    return lax.map(lambda one: linear(*one), tuple(every)), True


def rescale(sums: Array, step: Array, scale: Array) -> Array:
    """`sums * (step[:, None] * scale)`, which XLA would fuse into an addition that follows.

    A fused multiplication and addition rounds once where `linear` rounds twice: rows that are
    multiplied elsewhere would differ from those of `linear` in their last bit.

    Args:
      sums: i32[N, O].
      step: f32[N].
      scale: f32[O].

    Returns:
      f32[N, O].

    Example:
      >>> if why_not() is None:
      ...     sums = jnp.array([[3, -5]])
      ...     assert rescale(sums, jnp.full(1, 0.5), jnp.ones(2)).tolist() == [[1.5, -2.5]]
    """
    result = jax.ShapeDtypeStruct(sums.shape, jnp.float32)
    return jax.ffi.ffi_call(_RESCALE, result, vmap_method="sequential")(sums, step, scale)
