"""The int8 kernel in C++ gives what XLA gives, bit for bit; without it only speed is lost."""

import ctypes
import functools
import itertools
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec
from jaxspec_models import layers, llama, llama_int8, native, quantization

CONFIG = llama.LlamaConfig(
    vocab_size=96, hidden_size=72, intermediate_size=136, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, dtype="float32",
)  # fmt: skip


@pytest.fixture
def kernel():
    """Skips where there is no kernel."""
    if reason := native.why_not():
        pytest.skip(reason)


@pytest.fixture
def afresh():
    """Programs are traced anew, before and after."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def layer_of(rows, width, outputs, seed=0):
    """x, weight, scale: rows of very different sizes, one of zeros, and the largest sums."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) * np.exp(3 * rng.normal(size=(rows, 1)))
    x[0] = 0 if seed % 2 else 127
    weight = rng.integers(-128, 128, (outputs, width))
    weight[0], weight[-1] = 127, -128
    scale = rng.uniform(0, 2, outputs)
    return x.astype(np.float32), weight.astype(np.int8), scale.astype(np.float32)


# One output is rewritten by XLA, into another order of roundings.
SHAPES = [(2, 1), (5, 3), (7, 15), (16, 16), (33, 65), (101, 64), (7, 130), (576, 576), (40, 1536)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("outputs", "width"), SHAPES)
def test_every_bit_is_xlas(outputs, width):
    for rows, seed in itertools.product(ROWS, range(2)):
        layer = layer_of(rows, width, outputs, seed)
        ours = jax.jit(native.linear)(*layer)
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, jax.jit(layers._quantized_linear)(*layer))


@pytest.mark.usefixtures("kernel")
def test_broken_and_tiny_rows():
    x = np.array([[np.nan, 1, 2], [np.inf, 1, 2], [1e-42, 0, 1e-43], [3e38, 1, 2]], np.float32)
    weight, scale = np.ones((2, 3), np.int8), np.ones(2, np.float32)
    ours = np.asarray(native.linear(x, weight, scale))
    np.testing.assert_array_equal(ours, layers._quantized_linear(x, weight, scale))
    assert not np.isfinite(ours[:2]).any()
    assert np.isfinite(ours[2:]).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "patch",
    [
        ("if (i < shape.width) {", "if (false) {"),  # what is left of a row
        ("chunk * per_chunk, count", "chunk * per_chunk + chunk, count"),
        ("largest * kStep", "largest / kSteps"),  # another rounding
        ("std::rint(", "std::trunc("),
        ("* (steps[r] * scale);", "* steps[r] * scale;"),
        ("r < shape.rows; r += kMaxRows", "r < kMaxRows; r += kMaxRows"),
    ],
    ids=["rest", "chunks", "step", "round", "scale", "rows"],
)
def test_planted_bugs_are_seen(patch, tmp_path):
    source = native._SOURCE.read_text()
    old, new = patch
    assert source.count(old) == 1
    name = f"jaxspec_mutant_{abs(hash(patch))}"
    path = tmp_path / "mutant.cc"
    path.write_text(source.replace(old, new).replace(native._LINEAR, name))
    handler = getattr(ctypes.CDLL(str(native.compiled(path))), name)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")

    def differs(rows, width, outputs, seed):
        layer = layer_of(rows, width, outputs, seed)
        result = jax.ShapeDtypeStruct((rows, outputs), jnp.float32)
        return not np.array_equal(
            jax.ffi.ffi_call(name, result)(*layer), jax.jit(layers._quantized_linear)(*layer)
        )

    # Outputs in several chunks, a rest of each width, more rows than are taken at a time.
    assert any(differs(rows, 600, 600, seed) for rows in (5, 17) for seed in range(6))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, None), (None, 0, 0), (1, None, None)])
def test_mapped(axes):
    parts = [layer_of(3, 40, 24, seed) for seed in range(2)]
    layer = [
        parts[0][i] if axis is None else np.stack([part[i] for part in parts], axis)
        for i, axis in enumerate(axes)
    ]
    mapped = jax.vmap(native.linear, axes)(*layer)
    each = [
        native.linear(*(parts[n if axis is not None else 0][i] for i, axis in enumerate(axes)))
        for n in range(2)
    ]
    np.testing.assert_array_equal(mapped, np.stack(each))


@pytest.mark.usefixtures("kernel")
def test_gradients_are_those_of_the_plain_computation():
    x, weight, scale = layer_of(3, 40, 24)

    def total(product, x, scale):
        return jnp.sum(jnp.sin(product(x, weight, scale)))

    ours = jax.grad(functools.partial(total, layers.product), (0, 1))(x, scale)
    plain = jax.grad(functools.partial(total, layers._quantized_linear), (0, 1))(x, scale)
    np.testing.assert_array_equal(ours[1], plain[1])
    np.testing.assert_array_equal(ours[0], plain[0])
    assert np.any(np.asarray(plain[0]) != 0)


def model():
    config, params = llama_int8.quantize(CONFIG, llama.init_params(CONFIG, seed=0))
    return llama.language_model(config, params)


def logits_of(lm, num_tokens):
    """Of the same last tokens, fed together and one by one."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, num_tokens)), jnp.int32)
    cache = lm.init_cache(2, num_tokens, num_tokens)
    start = jnp.zeros((2,), jnp.int32)
    together = jax.jit(lm.apply)(lm.params, tokens, cache, start=start)[0].logits
    step = jax.jit(lm.apply)
    each = []
    for i in range(num_tokens):
        out, cache = step(lm.params, tokens[:, i : i + 1], cache, start=start + i)
        each.append(out.logits[:, 0])
    return np.asarray(together), np.stack(each, 1)


@pytest.mark.usefixtures("kernel", "afresh")
@pytest.mark.parametrize("most", [4, sys.maxsize])
def test_text_does_not_depend_on_the_width(most, monkeypatch):
    """Also where a few rows are ours and many are XLA's."""
    monkeypatch.setattr(quantization, "max_native_rows", lambda: most)
    together, each = logits_of(model(), 12)
    np.testing.assert_array_equal(together, each)


@pytest.mark.usefixtures("kernel", "afresh")
def test_the_kernel_is_used_where_the_program_runs_on_a_cpu():
    lm = model()

    def write(lm, prompts):
        drafter = jaxspec.drafters.prompt_lookup()
        sampling = jaxspec.Sampling(temperature=0)
        return jaxspec.generate(lm, prompts, drafter=drafter, sampling=sampling, max_new_tokens=4)

    prompts = jnp.ones((1, 4), jnp.int32)
    assert native._LINEAR in jax.jit(write).lower(lm, prompts).as_text()
    exported = jax.export.export(jax.jit(write), platforms=["cuda"])(lm, prompts)
    assert native._LINEAR not in exported.mlir_module()


REPORT = """
from jaxspec_models import native, quantization
print(quantization.max_native_rows(), native.why_not())
"""


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"JAXSPEC_NATIVE": "0"}, "JAXSPEC_NATIVE is 0"),
        ({"PATH": "", "CXX": ""}, "there is no C++ compiler"),
        ({"CXX": "false"}, "false failed"),
        ({"JAXSPEC_CACHE": "/proc/nowhere"}, "could not be written"),
    ],
    ids=["switched off", "no compiler", "broken compiler", "no cache"],
)
@pytest.mark.usefixtures("kernel")
def test_why_there_is_no_kernel(variables, reason, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-c", REPORT], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("0 ")
    assert reason in done.stdout


@pytest.mark.parametrize("flags", [{"avx2"}, {"avx2", "avx512_vnni"}, {"avx2", "amx_int8"}, set()])
def test_few_rows_are_ours_many_where_it_pays(flags, monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: None if flags else "no such processor")
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(flags))
    most = quantization.max_native_rows()
    if not flags:
        assert most == 0
    elif "avx512_vnni" in flags:
        assert most == sys.maxsize
    else:
        assert most >= 8
