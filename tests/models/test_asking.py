"""Prompts that a model writes itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from support.checkpoints import BYTES, byte_tokenizer, write_model

import jaxspec
import jaxspec_models
from jaxspec_models import answers, asking
from jaxspec_models.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("models") / "target", eos=256, scale=0.5)
    model = jaxspec_models.load_model(path, dtype="float32")
    return model, jaxspec_models.load_tokenizer(path)


def write(loaded, path, **changes):
    options = {"target": "tiny", "count": 12, "max_prompt_tokens": 64, "batch": 8} | changes
    return asking.write_prompts(*loaded, path, **options)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "prompts.jsonl"
    assert write(loaded, path) == 12
    return path


def rows_of(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_the_template_up_to_the_user(loaded):
    assert loaded[1].decode(asking.user_turn(loaded[1])) == "<user>"
    assert loaded[1].decode(asking.user_turn(loaded[1], "a goose")) == "<user>a goose"


def test_prompts_are_whole_and_new(loaded, whole):
    prompts = answers.read_prompts(whole)
    assert prompts == [row["prompt"] for row in rows_of(whole)]
    assert len(set(prompts)) == 12
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)
    assert not any("<|end|>" in prompt for prompt in prompts)
    assert {row["source"] for row in rows_of(whole)} == {"tiny, temperature 1, seed 0, 64 tokens"}
    numbers = [row["number"] for row in rows_of(whole)]
    assert numbers == sorted(set(numbers))
    assert numbers != list(range(12))  # some did not end


def test_beginnings_take_turns(loaded, tmp_path):
    """Each prompt has the one of its attempt, and is what the model says behind that."""
    path, beginnings = tmp_path / "prompts.jsonl", ["a goose", "b", ""]
    assert write(loaded, path, count=5, beginnings=["a goose ", "b", ""]) == 5
    assert write(loaded, path, beginnings=beginnings, batch=5) == 12
    rows = rows_of(path)
    kinds = [row["number"] % 3 for row in rows]
    assert set(kinds) == {0, 1, 2}
    model, tokenizer = loaded
    for row, kind in zip(rows, kinds, strict=True):
        alone = jaxspec.generate(
            model,
            [asking.user_turn(tokenizer, beginnings[kind])],
            sampling=jaxspec.Sampling(temperature=1.0),
            max_new_tokens=64,
            key=jax.random.fold_in(
                jax.random.key(0, impl="threefry2x32"), np.uint32(row["number"])
            )[None],
        )
        said = tokenizer.decode(alone.tokens[0, : alone.lengths[0] - 1].tolist())
        assert said.strip()  # a beginning alone is no prompt
        assert row["prompt"] == (beginnings[kind] + said).strip()
    with pytest.raises(ValueError, match="choose another file"):
        write(loaded, path, count=20, beginnings=beginnings[:2])
    with pytest.raises(ValueError, match="beginnings is empty"):
        write(loaded, path, beginnings=[])
    with pytest.raises(ValueError, match=r"12 tokens.*max_prompt_tokens=64 make 76.* made for 70"):
        write((model.replace(max_length=70), tokenizer), path, beginnings="a goos")


def test_a_beginning_without_prompts_is_told(loaded, tmp_path):
    """Those of others do not hide it: behind "b" there is never an end here."""
    letters = [BYTES.index(letter) for letter in "bcdefghijklmnopqrstuvwxyz"]
    logits = np.full((loaded[0].vocab_size, loaded[0].vocab_size), -1e9, np.float32)
    logits[:, [*letters[1:], 256]] = 0.0
    logits[letters[0]] = -1e9
    logits[letters[0], letters[0]] = 0.0
    path = tmp_path / "prompts.jsonl"
    told = "1000 attempts with the beginning 'b' brought nothing"
    with pytest.raises(ValueError, match=told) as error:
        write(
            (table(loaded[0], logits), loaded[1]), path, count=10**6, beginnings=["a", "b"],
            max_prompt_tokens=8, batch=500,
        )  # fmt: skip
    prompts = answers.read_prompts(path)
    assert len(prompts) > 100
    assert f" {len(prompts)} prompts in " in str(error.value)  # those of the last batch, too
    # Whoever wants no more than there can be is not told.
    few = tmp_path / "few.jsonl"
    options = {"count": 3, "beginnings": ["a", "b"], "max_prompt_tokens": 8, "batch": 2000}
    assert write((table(loaded[0], logits), loaded[1]), few, **options) == 3
    assert all(prompt.startswith("a") for prompt in prompts)


def test_a_decoder_that_takes_the_first_blank():
    """As SentencePiece's do: the blank behind a beginning stays."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({"▁Why": 0, "▁geese": 1, "▁fly": 2, "<e>": 3}, [])
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = TextTokenizer(backend)
    assert tokenizer.decode([1, 2]) == "geese fly"
    assert asking._said(tokenizer, [0], "Why", [1, 2]) == "Why geese fly"


@pytest.mark.parametrize("batch", [8, 3])
def test_it_goes_on_where_it_was(loaded, whole, tmp_path, batch):
    """In two calls, with another batch: the same prompts."""
    path = tmp_path / "prompts.jsonl"
    told = []
    assert write(loaded, path, count=5, batch=batch) == 5
    assert write(loaded, path, batch=batch, on_progress=lambda *now: told.append(now)) == 12
    assert path.read_bytes() == whole.read_bytes()
    assert told[0] == (5, 12)
    assert told[-1] == (12, 12)
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_no_attempt_is_made_twice(loaded, tmp_path, monkeypatch):
    """What was tried before an interruption is not tried again."""
    keys, generate = [], jaxspec.generate

    def counted(*arguments, **options):
        keys.extend(map(tuple, jax.random.key_data(options["key"]).tolist()))
        return generate(*arguments, **options)

    monkeypatch.setattr(jaxspec, "generate", counted)
    path = tmp_path / "prompts.jsonl"
    write(loaded, path, count=5, batch=1)
    first = len(keys)
    write(loaded, path, batch=1)
    assert first < len(keys) == len(set(keys))


def test_nothing_new_is_an_end(loaded, tmp_path):
    """A model that says the same again and again: what it has said is kept, once."""
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(ValueError, match=r"the 1 prompts in .* raise max_prompt_tokens"):
        write((ending(loaded[0]), loaded[1]), path, temperature=1e-3, batch=250)
    assert len(answers.read_prompts(path)) == 1


def ending(model):
    """The model, whose likeliest token is "a", and behind it the EOS."""
    logits = np.zeros((model.vocab_size, model.vocab_size), np.float32)
    letter = BYTES.index("a")
    logits[:, letter] = 10.0
    logits[letter, 256] = 20.0
    return table(model, logits)


def table(model, logits):
    """The model with the logits of a token behind each token."""

    def apply(params, tokens, cache, *, start):
        del start
        return jaxspec.ModelOutput(params[tokens]), cache

    return jaxspec.LanguageModel(
        jnp.asarray(logits), apply, lambda *_: (), vocab_size=model.vocab_size, eos_ids=(256,)
    )


def test_once_there_nothing_is_left_to_do(loaded, whole):
    before = whole.stat().st_mtime_ns
    told = []
    assert write(loaded, whole, count=10, on_progress=lambda *now: told.append(now)) == 12
    assert not told
    assert whole.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 1}, "seed 1"),
        ({"temperature": 0.5}, "temperature 0.5"),
        ({"target": "b"}, "b, te"),
    ],
)
def test_other_prompts_are_refused(loaded, whole, changes, reason):
    before = whole.read_bytes()
    with pytest.raises(ValueError, match=reason):
        write(loaded, whole, count=20, **changes)
    assert whole.read_bytes() == before


@pytest.mark.parametrize("text", ["no JSON\n", '{"prompt": "a"}\n', "[]\n"])
def test_another_file_is_refused(loaded, tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no prompts of this kind"):
        write(loaded, path)
    assert path.read_text() == text


def test_what_never_ends_is_told(loaded, tmp_path):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="no EOS token"):
        write((model.replace(eos_ids=()), tokenizer), tmp_path / "a")
    never = model.replace(eos_ids=(model.vocab_size,))  # an id that is never drawn
    with pytest.raises(ValueError, match="nothing whole and new"):
        write((never, tokenizer), tmp_path / "a", batch=500, max_prompt_tokens=2)


def test_a_template_without_the_user_is_refused():
    tokenizer = TextTokenizer(byte_tokenizer(), chat_template="Hello.")
    with pytest.raises(ValueError, match="does not repeat"):
        asking.user_turn(tokenizer)


def test_marks_of_the_template_are_no_words(loaded):
    ids = loaded[1].encode("a goose", add_special_tokens=False)
    told = loaded[1].decode([32, *ids, 32]).strip()
    assert asking._said(loaded[1], [], "", [32, *ids, 32]) == told
    assert asking._said(loaded[1], [], "b", [*ids, 256, *ids]) == ""
    assert asking._said(loaded[1], ids, "b", []) == ""
    assert np.shape(ids) == (7,)
