"""Stop strings: where the text first holds one, however tokens and rounds fall."""

import itertools

import jax
import numpy as np
import pytest
import tokenizers

import jaxspec
import jaxspec_models
from jaxspec import drafters, status
from jaxspec_models.text import cut_behind
from jaxspec_models.tokenizer import TextTokenizer

_BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_LONGER = ["ab", "bc", "abc", "Ġa", "ca", "Ã©", "aÃ", "Ġb"]  # some end inside a character


@pytest.fixture(scope="module")
def tokenizer():
    pieces = _BYTES + _LONGER
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return TextTokenizer(backend, {"eos_token": "<|end|>"})


@pytest.mark.parametrize("strings", [["abc"], ["é"], ["ca b", "bb"], ["aé", " "], ["cab", "abca"]])
def test_the_token_that_completes_a_string_is_the_last(tokenizer, strings):
    rng = np.random.default_rng(0)
    letters = [_BYTES.index(c) for c in "abcÃ©Ġ"] + list(range(len(_BYTES), len(_BYTES) + 9))
    num_found = 0
    for _ in range(300):
        ids = rng.choice(letters, 12).tolist()
        decoded = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(13)]
        expected = next((n for n in range(13) if any(s in decoded[n] for s in strings)), None)
        stop, seen, found = jaxspec_models.stop_strings(tokenizer, strings), 0, None
        while seen < 12 and found is None:
            new = ids[seen : seen + int(rng.integers(1, 5))]
            kept = stop(3, np.array(new))
            found = None if kept is None else seen + kept
            seen += len(new)
        assert found == expected
        num_found += found is not None
    assert num_found > 30


def test_rows_have_texts_of_their_own(tokenizer):
    stop = jaxspec_models.stop_strings(tokenizer, "ab")
    a, b = _BYTES.index("a"), _BYTES.index("b")
    assert [stop(0, [a]), stop(1, [b]), stop(1, [a]), stop(0, [b]), stop(1, [b])] == [
        None, None, None, 1, 1,
    ]  # fmt: skip


def test_an_unfinished_character_does_not_hide_what_stands_before_it(tokenizer):
    stop = jaxspec_models.stop_strings(tokenizer, "a")
    assert stop(0, [len(_BYTES) + _LONGER.index("aÃ")]) == 1


def test_the_first_string_counts():
    assert cut_behind("a, b; c", [";", ", b"]) == "a, b"
    assert cut_behind("a, b", [";"]) is None


@pytest.mark.parametrize("strings", [[], "", ["a", ""], [3]])
def test_strings_that_are_none_are_refused(tokenizer, strings):
    with pytest.raises(ValueError, match="stop strings must be texts"):
        jaxspec_models.stop_strings(tokenizer, strings)


def _spelling(tokenizer, text):
    """A model that writes a text over and over, byte by byte."""
    ids = [_BYTES.index(c) for c in text]
    size = len(_BYTES) + len(_LONGER) + 1
    table = np.zeros((size, size), np.float32)
    for token, following in itertools.pairwise([*ids, ids[0]]):
        table[token, following] = 20.0

    def apply(params, tokens, cache, *, start):
        return jaxspec.ModelOutput(params[tokens]), cache

    return jaxspec.LanguageModel(
        jax.numpy.asarray(table), apply, lambda batch, capacity, step: (), vocab_size=size
    )


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 5])
def test_texts_end_right_behind_their_stop(tokenizer, num_draft_tokens):
    model = _spelling(tokenizer, "abcdefgh")
    arguments = {
        "sampling": jaxspec.Sampling(temperature=0), "drafter": drafters.model(model),
        "num_draft_tokens": num_draft_tokens, "max_new_tokens": 20,
    }  # fmt: skip
    write = jaxspec_models.generate_text

    def encode(letters):
        return [_BYTES.index(c) for c in letters]

    tokenizer.backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert encode("c") == tokenizer.encode("c")
    assert write(model, tokenizer, ["c", "h"], stop="gha", **arguments) == ["defgha", "abcdefgha"]
    assert write(model, tokenizer, "c", stop=["x", "fg"], **arguments) == ["defg"]
    assert write(model, tokenizer, "c", stop=["x"], **arguments) == ["defghabcdefghabcdefg"]


def test_what_stands_behind_a_stop_is_not_counted(tokenizer):
    model = _spelling(tokenizer, "abcdefgh")
    rounds = jaxspec.stream(
        model, [[_BYTES.index("c")]], stop=jaxspec_models.stop_strings(tokenizer, "gh"),
        sampling=jaxspec.Sampling(temperature=0), drafter=drafters.model(model),
        num_draft_tokens=3, max_new_tokens=20,
    )  # fmt: skip
    pieces = []
    while True:
        try:
            pieces.append(tokenizer.decode(next(rounds)[1]))
        except StopIteration as end:
            out = end.value
            break
    assert pieces == ["defg", "h"]
    assert out.lengths.tolist() == [5]
    assert out.status.tolist() == [status.STOP]
    assert out.stats.num_emitted_tokens.tolist() == [5]
    assert out.stats.num_accepted_draft_tokens.tolist() == [4]
    assert out.stats.num_draft_tokens.tolist() == [4]
