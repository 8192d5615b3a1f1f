"""Features: what a forward over one text alone computes, whole after any interruption."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxspec
from jaxspec_models import answers, features, llama, recording

CONFIG = llama.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, dtype="float32", eos_ids=(3,),
)  # fmt: skip
MODEL = llama.language_model(CONFIG, llama.init_params(CONFIG, seed=0))
LAYERS = (1, 2, -1)


def encode(self, text, add_special_tokens=True):
    del add_special_tokens
    return [ord(letter) % 32 for letter in text]


class Tokenizer:
    """As many tokens as characters."""

    encode = encode

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return messages[0]["content"]


PROMPTS = ["a", "bcd" * 30, "gh", "What?", "efefe"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("answers")
    answers.write_answers(
        MODEL, Tokenizer(), PROMPTS, directory, target="tiny", max_new_tokens=7, batch=2,
        batches_a_shard=2,
    )  # fmt: skip
    return directory


def write(written, directory, **options):
    return features.write_features(
        MODEL, written, directory, **{"layers": LAYERS, "weights": "float32", **options}
    )


@pytest.fixture(scope="module")
def whole(written, tmp_path_factory):
    directory = tmp_path_factory.mktemp("features")
    assert write(written, directory) == 3
    return directory


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_features_are_those_of_the_text_alone(written, whole):
    found, read = features.read_features(written, whole, layers=(2, -1))
    assert [a.tokens.tolist() for a in found] == [
        a.tokens.tolist() for a in answers.read_answers(written)
    ]
    assert max(len(a.tokens) for a in found) > 64  # of two widths
    for i, answer in enumerate(found):
        count = len(answer.tokens)
        output, _ = MODEL.apply(
            MODEL.params, jnp.asarray(answer.tokens[None]), MODEL.init_cache(1, count, count),
            start=jnp.zeros((1,), jnp.int32), hidden_layers=(2, -1),
        )  # fmt: skip
        stored = read(i)
        assert stored.hidden.shape == (count, 2, 16)
        assert stored.hidden.dtype == ml_dtypes.bfloat16
        expected = np.stack([np.asarray(x[0]) for x in output.hidden], axis=1)
        np.testing.assert_allclose(stored.hidden.astype(np.float32), expected, rtol=5e-3, atol=1e-3)
        # Of the final state as it is stored, so that the law made of both sums to 1.
        first = answer.prompt_length - 1
        np.testing.assert_array_equal(stored.log_normalizers[:first], 0)
        final = stored.hidden[first:, 1].astype(np.float64)
        head = np.asarray(MODEL.params["head"]["weight"], np.float64)
        sums = np.exp(final @ head.T - stored.log_normalizers[first:, None]).sum(-1)
        np.testing.assert_allclose(sums, 1, rtol=1e-5)
        of_logits = jax.nn.logsumexp(output.logits[0, first:], axis=-1)
        np.testing.assert_allclose(stored.log_normalizers[first:], of_logits, atol=0.02)


def record(prompts, out, features_directory, **options):
    recorder = recording.Recorder(MODEL, features_directory, layers=LAYERS, weights="float32")
    return answers.write_answers(
        MODEL, Tokenizer(), prompts, out, target="tiny", max_new_tokens=7, batch=2,
        batches_a_shard=2, recorder=recorder, **options,
    )  # fmt: skip


def test_recorded_features_are_those_computed_afterwards(written, whole, tmp_path):
    record(PROMPTS, tmp_path / "answers", tmp_path / "features")
    assert files(tmp_path / "answers") == files(written)  # who listens changes nothing
    found, read = features.read_features(written, tmp_path / "features", layers=LAYERS)
    found_after, read_after = features.read_features(written, whole, layers=LAYERS)
    assert len(found) == len(found_after) == 10
    for i in range(len(found)):
        recorded, computed = read(i), read_after(i)
        # The last token was written, but never fed.
        np.testing.assert_allclose(
            recorded.hidden[:-1].astype(np.float32), computed.hidden[:-1].astype(np.float32),
            rtol=1e-2, atol=1e-3,
        )  # fmt: skip
        np.testing.assert_allclose(
            recorded.log_normalizers[:-1], computed.log_normalizers[:-1], atol=0.02
        )


def test_an_interrupted_recording_goes_on(written, tmp_path):
    record(PROMPTS, tmp_path / "answers", tmp_path / "whole")

    class Broken(recording.Recorder):
        def write(self, name, found, hidden):
            super().write(name, found, hidden)
            if name.endswith("1.safetensors"):  # behind the features, before the answers
                raise Killed

    recorder = Broken(MODEL, tmp_path / "features", layers=LAYERS, weights="float32")
    with pytest.raises(Killed):
        answers.write_answers(
            MODEL, Tokenizer(), PROMPTS, tmp_path / "again", target="tiny", max_new_tokens=7,
            batch=2, batches_a_shard=2, recorder=recorder,
        )  # fmt: skip
    assert len(answers.shard_paths(tmp_path / "again")) == 1
    record(PROMPTS, tmp_path / "again", tmp_path / "features")
    assert files(tmp_path / "again") == files(written)
    assert files(tmp_path / "features") == files(tmp_path / "whole")


def test_a_recorder_refuses_what_it_cannot_keep(written, whole, tmp_path):
    recorder = recording.Recorder(MODEL, whole, layers=(1, -1), weights="float32")
    with pytest.raises(ValueError, match="other answers, layers or weights"):
        recorder.begin(answers.read_settings(written))
    recorder = recording.Recorder(MODEL, tmp_path, layers=(1, 2), weights="float32")
    with pytest.raises(ValueError, match="layers must contain -1"):
        recorder.begin(answers.read_settings(written))
    table = jaxspec.LanguageModel(jnp.eye(4), None, None, vocab_size=4)
    with pytest.raises(ValueError, match="Llamas of jaxspec_models"):
        recording.Recorder(table, tmp_path, layers=LAYERS, weights="float32")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_goes_on(written, whole, tmp_path, after):
    def kill(done, total):
        assert total == 3
        if done == after:
            raise Killed

    with pytest.raises(Killed):
        write(written, tmp_path, on_progress=kill)
    found, _ = features.read_features(written, tmp_path, layers=LAYERS)
    assert len(found) == 4 * after  # what is there can be used
    write(written, tmp_path)
    assert files(tmp_path) == files(whole)


def test_what_does_not_belong_together(written, whole, tmp_path):
    before = files(whole)
    for change in ({"layers": (1, -1)}, {"weights": "int8"}):
        with pytest.raises(ValueError, match="other answers, layers or weights"):
            write(written, whole, **change)
    with pytest.raises(ValueError, match=r"holds layers \[1, 2, -1\], and not \[0\]"):
        features.read_features(written, whole, layers=(0, -1))
    with pytest.raises(ValueError, match=r"no readable features\.json"):
        features.read_features(written, tmp_path, layers=LAYERS)
    other = tmp_path / "answers"
    answers.write_answers(
        MODEL, Tokenizer(), PROMPTS, other, target="tiny", max_new_tokens=2, batch=10
    )
    with pytest.raises(ValueError, match="other answers"):
        features.read_features(other, whole, layers=LAYERS)
    assert files(whole) == before
