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

pytestmark = pytest.mark.optimized

CONFIG = llama.LlamaConfig(
    vocab_size=96, hidden_size=72, intermediate_size=136, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, dtype="float32",
)  # fmt: skip


@pytest.fixture
def kernel():
    """Skips where there can be no kernel; one that does not compile is a failure."""
    reason = native.why_not()
    if reason and reason.startswith(
        ("there is no C++ compiler", "this is no x86", "JAXSPEC_NATIVE")
    ):
        pytest.skip(reason)
    assert reason is None


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
        assert_same_bits(ours, jax.jit(layers._quantized_linear)(*layer))


def assert_same_bits(ours, theirs):
    """Zeros have signs; what is not a number has many forms."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    numbers = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[numbers].view("u4"), theirs[numbers].view("u4"))


@pytest.mark.usefixtures("kernel")
def test_the_kernel_for_other_processors(tmp_path, monkeypatch):
    """What is compiled without VNNI gives the same bits."""
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path))
    name = "jaxspec_of_avx2"
    path = tmp_path / "avx2.cc"
    source = native._SOURCE.read_text().replace(native._LINEAR, name)
    path.write_text("#undef __AVX512VNNI__\n" + source)
    library = ctypes.CDLL(str(native.compiled(path)))
    assert ctypes.c_int32.in_dll(library, "jaxspec_int8_lane").value == 16
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    for (outputs, width), rows in itertools.product(SHAPES, ROWS):
        layer = layer_of(rows, width, outputs)
        result = jax.ShapeDtypeStruct((rows, outputs), jnp.float32)
        ours = jax.ffi.ffi_call(name, result)(*layer)
        assert_same_bits(ours, jax.jit(layers._quantized_linear)(*layer))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [1, 17])
def test_sums_of_others_are_scaled_alike(rows):
    rng = np.random.default_rng(rows)
    sums = rng.integers(-(2**31), 2**31, (rows, 600)).astype(np.int32)
    step, scale = (rng.uniform(-2, 2, n).astype(np.float32) for n in (rows, 600))
    ours = native.rescale(sums, step, scale)
    assert_same_bits(ours, sums.astype(np.float32) * (step[:, None] * scale[None]))


@pytest.mark.usefixtures("kernel")
def test_broken_and_tiny_rows():
    x = [[np.nan, 1, 2], [np.inf, 1, 2], [1e-42, 0, 1e-43], [-1e-38, 1e-38, 0], [3e38, 1, -2]]
    x, scale = np.array(x, np.float32), np.ones(2, np.float32)
    weight = np.array([[1, 1, 1], [-1, 1, -1]], np.int8)
    ours = np.asarray(native.linear(x, weight, scale))
    assert_same_bits(ours, jax.jit(layers._quantized_linear)(x, weight, scale))
    assert not np.isfinite(ours[:2]).any()
    assert np.isfinite(ours[2:]).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "patch",
    [
        ("if (i < shape.width) {", "if (false) {"),  # what is left of a row
        ("chunk * per_chunk, count", "chunk * per_chunk + chunk, count"),
        ("largest * kStep;", "largest / kSteps;"),  # another rounding
        ("std::rint(", "std::trunc("),
        ("* (steps[r] * scale);", "* steps[r] * scale;"),
        ("r < shape.rows; r += kMaxRows", "r < kMaxRows; r += kMaxRows"),
    ],
    ids=["rest", "chunks", "step", "round", "scale", "rows"],
)
def test_planted_bugs_are_seen(patch, tmp_path, monkeypatch, request):
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path))
    source = native._SOURCE.read_text()
    old, new = patch
    assert source.count(old) == 1
    name = f"jaxspec_mutant_{request.node.callspec.id}"
    path = tmp_path / "mutant.cc"
    path.write_text(source.replace(old, new).replace(native._LINEAR, name))
    handler = getattr(ctypes.CDLL(str(native.compiled(path))), name)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")

    def differs(name):
        # Outputs in several chunks, a rest of each width, more rows than are taken at a time.
        for rows, seed in itertools.product((5, 17), range(6)):
            layer = layer_of(rows, 600, 600, seed)
            result = jax.ShapeDtypeStruct((rows, 600), jnp.float32)
            ours = jax.ffi.ffi_call(name, result)(*layer)
            if not np.array_equal(ours, jax.jit(layers._quantized_linear)(*layer)):
                return True
        return False

    assert differs(name)
    assert not differs(native._LINEAR)


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
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert np.any(np.asarray(plain[0]) != 0)


@pytest.mark.usefixtures("kernel")
def test_what_is_differentiated_is_what_is_computed():
    """An addition behind it would show a product that XLA has fused with it."""
    x, weight, scale = layer_of(5, 600, 600)
    rest = np.random.default_rng(1).normal(size=(5, 600)).astype(np.float32)

    def layer(x):
        return rest + layers.product(x, weight, scale)

    value = jax.jit(lambda x: jax.jvp(layer, (x,), (x,))[0])(x)
    assert_same_bits(value, jax.jit(layer)(x))
    assert np.any(np.asarray(value) != rest)


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
        ({"CXX": 'c++ "'}, "No closing quotation"),
        ({"JAXSPEC_CACHE": "/proc/nowhere"}, "could not be written"),
        ({"JAXSPEC_CACHE": "~nobody-of-that-name/x"}, "home directory"),
    ],
    ids=["switched off", "no compiler", "broken compiler", "half a quote", "no cache", "no home"],
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


@pytest.mark.parametrize(
    ("lane", "flags", "most"),
    [
        (16, {"avx2"}, quantization._MAX_ROWS_OF_AVX2),
        (64, {"avx2", "avx512_vnni"}, sys.maxsize),
        (64, {"avx512_vnni", "amx_int8"}, quantization._MAX_ROWS_BESIDE_UNIT),
        (None, set(), 0),
    ],
)
def test_few_rows_are_ours_many_where_it_pays(lane, flags, most, monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: None if lane else "no such processor")
    monkeypatch.setattr(native, "lane", lambda: lane)
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(flags))
    assert quantization.max_native_rows() == most


MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxspec_models import layers, quantization
devices = jax.device_count()
mesh = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
product = jax.shard_map(
    layers.product, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=P("d")
)
rng = np.random.default_rng(0)
x, weight = rng.normal(size=(8, 40)), rng.integers(-127, 128, (24, 40))
layer = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.int8), jnp.ones(24)
shared, alone = jax.jit(product)(*layer), jax.jit(layers.product)(*layer)
print(devices, np.array_equal(shared, alone), quantization.max_native_rows() > 0)
"""


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("devices", [1, 4])
def test_devices_that_share_take_xlas_product(devices, monkeypatch):
    """Under a mesh, of one device as well; outside of one, several devices may be used by `jit`."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    monkeypatch.setenv("XLA_FLAGS", flag)
    done = subprocess.run([sys.executable, "-c", MESH], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(devices), "True", str(devices == 1)]
