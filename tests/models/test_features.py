"""Features: what a forward over one text alone computes, whole after any interruption."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxspec_models import answers, features, llama

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
        np.testing.assert_allclose(
            stored.log_normalizers, jax.nn.logsumexp(output.logits[0], axis=-1), rtol=1e-5
        )


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
