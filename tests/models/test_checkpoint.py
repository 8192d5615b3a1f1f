"""Every form of a checkpoint gives the same parameters, and a wrong one is refused by name."""

import json
import subprocess
import sys
import textwrap

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxspec_models import checkpoint, gguf_config, llama, tensorfile
from jaxspec_models.gguf_file import GGUFFile


def read(path, dtype="float32"):
    if path.is_dir():
        return checkpoint.read_directory(path, dtype=dtype)
    return checkpoint.read_gguf(GGUFFile(path), dtype=dtype)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_weights(directory, **changes):
    """Adds, replaces or (with None) removes tensors of an unsharded checkpoint."""
    weights = load_file(directory / "model.safetensors") | changes
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, directory / "model.safetensors")


# ---------------------------------------------------------------------------------------------
# What is read.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_arrives_where_it_belongs(make, tmp_path, tied, bias):
    tiny = make(tied=tied, bias=bias)
    config, params = read(tiny.write_directory(tmp_path))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), llama.abstract_params(config)
    )
    w = tiny.weights
    np.testing.assert_array_equal(params["embed"]["weight"], w["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["weight"], w["model.norm.weight"])
    for i in range(2):
        layer, key = params["layers"][i], f"model.layers.{i}"
        for kind in ("weight", "bias") if bias else ("weight",):
            qkv = [w[f"{key}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            np.testing.assert_array_equal(layer["attention"]["qkv"][kind], np.concatenate(qkv))
            gate_up = [w[f"{key}.mlp.{part}_proj.{kind}"] for part in ("gate", "up")]
            np.testing.assert_array_equal(layer["mlp"]["gate_up"][kind], np.concatenate(gate_up))
            for module, part in (("attention", "self_attn.o"), ("mlp", "mlp.down")):
                place = layer[module]["out" if module == "attention" else "down"]
                np.testing.assert_array_equal(place[kind], w[f"{key}.{part}_proj.{kind}"])
        for place, part in (
            ("input_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
        ):
            np.testing.assert_array_equal(layer[place]["weight"], w[f"{key}.{part}.weight"])
    if not tied:
        np.testing.assert_array_equal(params["head"]["weight"], w["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_shards_and_stored_dtypes_do_not_matter(make, tmp_path, stored, num_shards, dtype):
    tiny = make(tied=False)
    # float16 holds the values of bfloat16 that are not tiny: 3 bits more, but a small exponent.
    tiny.weights = {k: np.where(abs(w) < 1e-2, 0.5, w) for k, w in tiny.weights.items()}
    tiny.weights = {k: w.astype(np.float32) for k, w in tiny.weights.items()}
    _, plain = read(tiny.write_directory(tmp_path / "plain"), dtype)
    directory = tiny.write_directory(tmp_path / "other", dtype=stored, num_shards=num_shards)
    config, params = read(directory, dtype)
    assert config.dtype == dtype
    assert_same(params, plain)
    assert params["embed"]["weight"].dtype == dtype
    assert params["norm"]["weight"].dtype == np.float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_is_the_same_model_as_the_directory(make, tmp_path, tied, bias):
    tiny = make(tied=tied, bias=bias)
    hf_config, expected = read(tiny.write_directory(tmp_path))
    config, params = read(tiny.write_gguf(tmp_path / "tiny.gguf"))
    assert config == hf_config
    assert_same(params, expected)


def test_gguf_permutation_matters(tiny, tmp_path, monkeypatch):
    """The planted bug: without undoing the permutation the comparison above must fail."""
    _, expected = read(tiny.write_directory(tmp_path))
    monkeypatch.setattr(checkpoint, "_read", lambda tensor, out, heads: tensor.read_into(out))
    _, params = read(tiny.write_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(AssertionError):
        assert_same(params, expected)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_reader_agrees_with_the_gguf_package(tiny, tmp_path, monkeypatch, quantization):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", quantization=quantization)
    monkeypatch.setattr("jaxspec_models.gguf_file.CHUNK_BYTES", 3 * 4 * 64)  # a few rows at a time
    file, reference = GGUFFile(path), gguf.GGUFReader(path)
    assert file.tensors.keys() == {tensor.name for tensor in reference.tensors}
    for tensor in reference.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        out = np.empty(file.tensors[tensor.name].shape, np.float32)
        file.tensors[tensor.name].read_into(out)
        np.testing.assert_array_equal(out, expected)
    for key, value in file.metadata.items():
        assert value == reference.fields[key].contents()


def test_gguf_fields(tiny, tmp_path):
    fields = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.eot_token_id": 1,
    }
    config, _ = read(tiny.write_gguf(tmp_path / "tiny.gguf", fields=fields))
    assert config.rope_scaling == llama.RopeScaling("linear", 4.0, original_max_position=64)
    assert config.eos_ids == (2, 1)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 100000.0
    assert config.max_position_embeddings == 64


def test_generation_config_names_the_eos_tokens(tiny, tmp_path):
    directory = tiny.write_directory(tmp_path)
    assert checkpoint.read_config(directory, dtype="float32").eos_ids == (2,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert checkpoint.read_config(directory, dtype="float32").eos_ids == (2, 5)


def test_harmless_keys_are_ignored(tiny, tmp_path):
    directory = tiny.write_directory(tmp_path)
    _, expected = read(directory)
    edit_weights(
        directory,
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
            "lm_head.weight": tiny.weights["model.embed_tokens.weight"],
        },
    )
    assert_same(read(directory)[1], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_form_gives_the_same_model(make, tmp_path, dtype):
    tiny = make(tied=False, bias=True)
    config, params = read(tiny.write_gguf(tmp_path / "tiny.gguf"), dtype)
    checkpoint.save_converted(tmp_path / "fast.safetensors", config, params)
    again, fast = checkpoint.read_converted(tmp_path / "fast.safetensors")
    assert again == config
    assert_same(fast, params)
    load_file(tmp_path / "fast.safetensors")  # an ordinary safetensors file


def test_converted_form_of_another_version_is_refused(tiny, tmp_path, monkeypatch):
    path = tmp_path / "fast.safetensors"
    checkpoint.save_converted(path, *read(tiny.write_directory(tmp_path)))
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match="another format version; remove it"):
        checkpoint.read_converted(path)


def test_two_loads_share_a_trace(tiny, tmp_path):
    directory = tiny.write_directory(tmp_path)
    one, other = (llama.language_model(*read(directory)) for _ in range(2))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(other))


# ---------------------------------------------------------------------------------------------
# What is refused: safetensors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight; .* get all of its files"),
        ({"model.layers.0.mlp.router.weight": np.ones(3)}, r"has model\.layers\.0\.mlp\.router"),
        ({"lm_head.weight": np.ones((2, 2))}, None),
        (
            {"model.layers.1.self_attn.k_proj.weight": np.ones((32, 63), np.float32)},
            r"model\.layers\.1\.self_attn\.k_proj\.weight in .*model\.safetensors has shape "
            r"\(32, 63\), but the config calls for \(32, 64\)",
        ),
        ({"model.norm.weight": np.ones(64, np.int8)}, r"model\.norm\.weight in .* has dtype I8"),
    ],
)
def test_keys_and_shapes(tiny, tmp_path, changes, message):
    directory = tiny.write_directory(tmp_path)
    edit_weights(directory, **changes)
    if message is None:
        read(directory)
        return
    with pytest.raises(ValueError, match=message):
        read(directory)


def test_untied_checkpoint_without_head(make, tmp_path):
    directory = make(tied=False).write_directory(tmp_path)
    edit_weights(directory, **{"lm_head.weight": None})
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        read(directory)


def test_many_missing_keys_are_summarised(tiny, tmp_path):
    directory = tiny.write_directory(tmp_path)
    edit_json(directory / "config.json", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2.* and 13 more"):
        read(directory)


def test_doubled_key_across_shards(tiny, tmp_path):
    directory = tiny.write_directory(tmp_path, num_shards=2)
    second = directory / "model-00002-of-00002.safetensors"
    weights = load_file(second)
    save_file(weights | {"model.embed_tokens.weight": np.ones((2, 2), np.float32)}, second)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is doubled: in .*00002"):
        read(directory)


def test_doubled_key_in_a_file(tmp_path):
    entry = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors .*doubled: w"):
        tensorfile.SafetensorsFile(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(tiny, tmp_path, keep):
    path = tiny.write_directory(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated.*download it again"):
        read(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b'{"w": 1}', b'{"w": {"dtype": "F32"}}', b"\xff\xfe",
     b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'],
)  # fmt: skip
def test_broken_safetensors_header(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="broken header"):
        tensorfile.SafetensorsFile(path)


def test_shape_that_disagrees_with_its_bytes(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"w in .* has a broken header"):
        tensorfile.SafetensorsFile(path).tensors["w"].read_into(np.empty(2, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_written_safetensors_are_what_the_package_reads(tmp_path, dtype):
    weights = {"a": np.arange(6, dtype=dtype).reshape(2, 3), "b": np.ones(5, np.float32)}
    tensorfile.write_safetensors(tmp_path / "x.safetensors", weights, {"key": "value"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded[name].dtype == weight.dtype
        np.testing.assert_array_equal(loaded[name], weight)
    assert tensorfile.SafetensorsFile(tmp_path / "x.safetensors").metadata == {"key": "value"}


# ---------------------------------------------------------------------------------------------
# What is refused: directories.


def test_empty_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing; .* needs config\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("model.safetensors", None, r"has no \*\.safetensors; get all files"),
        ("model.safetensors", "pytorch_model.bin", "only PyTorch files; .*save_pretrained"),
    ],
)
def test_directory_without_weights(tiny, tmp_path, remove, add, message):
    directory = tiny.write_directory(tmp_path)
    (directory / remove).unlink()
    if add:
        (directory / add).touch()
    with pytest.raises(FileNotFoundError, match=message):
        read(directory)


def test_missing_shard(tiny, tmp_path):
    directory = tiny.write_directory(tmp_path, num_shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors, which"):
        read(directory)


@pytest.mark.parametrize("text", ["{", "[]", ""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json(tiny, tmp_path, name, text):
    directory = tiny.write_directory(tmp_path, num_shards=2)
    (directory / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is broken \(.*; copy or download it again"):
        read(directory)


def test_index_without_map(tiny, tmp_path):
    directory = tiny.write_directory(tmp_path, num_shards=2)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        read(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": None}, r"config\.json lacks 'hidden_size'"),
        ({"hidden_size": "64"}, r"config\.json has a broken value"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised weights .* use the original"),
    ],
)
def test_configs_that_are_refused(tiny, tmp_path, changes, message):
    directory = tiny.write_directory(tmp_path)
    edit_json(directory / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read(directory)


# ---------------------------------------------------------------------------------------------
# What is refused: GGUF.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.block_count": None}, r"lacks the field 'llama\.block_count'"),
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8 is not supported"),
        ({"llama.attention.sliding_window": 16}, r"llama\.attention\.sliding_window = 16 is not"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count = 8 beside heads of 16"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv differs between layers"),
        ({"llama.vocab_size": 100}, r"token_embd\.weight .* calls for \(100, 64\)"),
        ({"llama.feed_forward_length": 95}, r"blk\.0\.ffn_.* calls for"),
        ({"llama.block_count": 3}, r"lacks blk\.2\.attn_k\.weight"),
    ],
)
def test_gguf_fields_that_are_refused(tiny, tmp_path, fields, message):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", fields=fields)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_gguf_of_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported; 'llama' is"):
        read(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope_freqs.weight", r"rope_freqs\.weight .* in HF form is"),
        ("model.layers.0.self_attn.sinks", r"has blk\.0\.attn_sinks"),
    ],
)
def test_gguf_tensors_that_are_refused(tiny, tmp_path, name, message):
    extra = {name: np.ones(8, np.float32)}
    path = tiny.write_gguf(tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_gguf_doubled_tensor(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.attn_v.weight"))
    with pytest.raises(ValueError, match=r"blk\.1\.attn_v\.weight doubled"):
        read(path)


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.001, 0.01, 0.05, 0.5, 0.999])
def test_truncated_gguf(tiny, tmp_path, share):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"is truncated|is no GGUF file"):
        read(path)


def test_gguf_of_another_version(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[:4] + (1).to_bytes(4, "little") + content[8:])
    with pytest.raises(ValueError, match="has GGUF version 1"):
        read(path)


def test_gguf_quantisation_that_cannot_be_read(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    entry = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(content[:entry] + (15).to_bytes(4, "little") + content[entry + 4 :])
    with pytest.raises(ValueError, match=r"token_embd\.weight in .* is quantised as Q8_K"):
        read(path)


def test_config_as_json():
    config = llama.LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=4, eos_ids=(1, 2),
        rope_scaling=llama.RopeScaling("llama3", 8.0),
    )  # fmt: skip
    assert gguf_config.from_json(gguf_config.to_json(config)) == config


# ---------------------------------------------------------------------------------------------
# Memory.

MEASURE = """
    import pathlib, resource, sys
    def peak():  # bytes on macOS, KiB elsewhere
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    import jax
    from jaxspec_models import checkpoint, gguf_file, tensorfile
    path, dtype, with_bug = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "bug"
    if with_bug:  # the planted bug: every tensor stays in memory beside the parameter it went to
        kept, read = [], checkpoint._read
        def read_and_keep(tensor, out, heads):
            read(tensor, out, heads)
            kept.append(out.copy())
        checkpoint._read = read_and_keep
    import gguf  # imports are not what is measured
    jax.block_until_ready(jax.device_put(0.0))
    before = peak()
    if path.is_dir():
        _, params = checkpoint.read_directory(path, dtype=dtype)
    else:
        _, params = checkpoint.read_gguf(gguf_file.GGUFFile(path), dtype=dtype)
    jax.block_until_ready(params)
    print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """Checkpoints of 100 million parameters, a third of them in one tensor."""
    folder = tmp_path_factory.mktemp("large")
    config = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 4,
        "intermediate_size": 4096, "num_attention_heads": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    table = llama.checkpoint_table(llama.LlamaConfig.from_hf(config))
    for stored, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        directory = folder / stored
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        weights = {name: np.ones(target.shape, dtype) for name, target in table.items()}
        tensorfile.write_safetensors(directory / "model.safetensors", weights)
    return folder


def peak_memory(path, dtype, variant="shipped"):
    """Peak memory of a load above what there was before, as a multiple of its result."""
    # Through a shell that stays: Linux lets a process inherit the peak of the one that forked it.
    command = ["sh", "-c", '"$@"; exit $?', "sh"]
    command += [sys.executable, "-c", textwrap.dedent(MEASURE), str(path), dtype, variant]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")],
)
def test_peak_memory(large, stored, dtype):
    assert peak_memory(large / stored, dtype) <= 1.3


def test_peak_memory_measures_what_it_should(large):
    assert peak_memory(large / "bfloat16", "bfloat16", "bug") > 1.3
