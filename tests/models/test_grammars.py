"""Grammars of expressions and schemas, and JSON that always parses from a real model."""

import itertools
import json
import re

import jax
import jsonschema
import numpy as np
import pytest
import tokenizers
from support.real import load

import jaxspec
import jaxspec_models
from jaxspec import drafters, status
from jaxspec_models import grammars
from jaxspec_models.text import encode_prompt
from jaxspec_models.tokenizer import TextTokenizer

PIECES = ["a", "b", "ab", "1", "Ã", "©", "bé".replace("é", "Ã©")]
END = len(PIECES)


def _tokenizer(pieces=PIECES, decoder=None):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, []))
    backend.decoder = tokenizers.decoders.ByteLevel() if decoder is None else decoder
    return TextTokenizer(backend)


def _accepts(grammar, tokens):
    table = np.asarray(grammar.next_states)[:, np.asarray(grammar.classes)]
    state = int(grammar.start)
    for token in tokens:
        state = table[state, token]
        if state < 0:
            return False
    return True


@pytest.mark.parametrize(
    "expression", ["(ab)+", "a*b?", "[ab]{2}1?", "b?(é|a)*", "(a|ab)(b1|1)", "a|b(|1)|a1x|ab1|a1"]
)
def test_exactly_the_texts_that_match_are_allowed(expression):
    """Every text of up to four tokens, whatever the borders of its tokens."""
    written = grammars.token_bytes(_tokenizer())
    assert written == [b"a", b"b", b"ab", b"1", b"\xc3", b"\xa9", "bé".encode()]
    grammar = grammars.regex_grammar(
        expression, _tokenizer(), vocab_size=END + 3, eos_ids=[END, END + 1]
    )
    num_matches = 0
    for length in range(5):
        for tokens in itertools.product(range(END), repeat=length):
            text = b"".join(written[token] for token in tokens).decode(errors="replace")
            matches = re.fullmatch(expression, text) is not None
            num_matches += matches
            for end in (END, END + 1):
                assert _accepts(grammar, (*tokens, end)) == matches, text
            assert not _accepts(grammar, (*tokens, END + 2))  # an id that writes nothing
    assert num_matches >= 4


def test_pieces_with_spaces_and_bytes():
    steps = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    tokenizer = _tokenizer(["▁a", "<0x0A>", "b▁"], tokenizers.decoders.Sequence(steps))
    assert grammars.token_bytes(tokenizer) == [b" a", b"\n", b"b "]


def test_special_tokens_write_nothing():
    tokenizer = _tokenizer()
    tokenizer.backend.add_special_tokens(["<|end|>"])
    tokenizer.backend.add_tokens(["<tool>"])
    assert grammars.token_bytes(tokenizer)[END:] == [b"", b"<tool>"]


def test_transformers_tokenizers_give_the_same():
    assert grammars.token_bytes(_tokenizer().to_transformers()) == grammars.token_bytes(
        _tokenizer()
    )


def test_no_token_leads_where_no_text_can_end():
    tokenizer = _tokenizer(["b", "ab", "a1"])
    grammar = grammars.regex_grammar("(ab)*a2|(ab)?b", tokenizer, vocab_size=4, eos_ids=[3])
    assert _accepts(grammar, [0, 3])
    assert _accepts(grammar, [1, 0, 3])
    assert not _accepts(grammar, [1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expression": "(a"}, r"no grammar can be made of the expression '\(a'"),
        ({"expression": "x+"}, "no grammar can be made of the expression 'x[+]'"),
        ({"eos_ids": []}, "at least one token"),
        ({"eos_ids": [99]}, "at least one token below vocab_size=8"),
        ({"tokenizer": object()}, "grammars need a tokenizer"),
        ({"tokenizer": _tokenizer(decoder=tokenizers.decoders.Fuse())}, "decodes by"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"expression": "a", "tokenizer": _tokenizer(), "vocab_size": 8, "eos_ids": [END]}
    with pytest.raises(ValueError, match=message):
        grammars.regex_grammar(**arguments | change)


@pytest.mark.parametrize("schema", ["{", {"type": "nonsense"}])
def test_wrong_schemas_are_refused(schema):
    with pytest.raises(ValueError, match="no grammar can be made of the schema"):
        grammars.json_grammar(schema, _tokenizer(), vocab_size=8, eos_ids=[END])


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "is_tame": {"type": "boolean"},
        "toys": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
    },
    "required": ["name", "kind", "is_tame", "toys"],
}


@pytest.mark.real_model
def test_json_of_a_real_model_always_parses():
    """At temperature 1, speculatively, six texts at once; without the grammar hardly one does."""
    model = load("int8")
    tokenizer = jaxspec_models.load_tokenizer("smollm2-135m")
    grammar = grammars.json_grammar(
        SCHEMA, tokenizer, vocab_size=model.vocab_size, eos_ids=model.eos_ids
    )
    chat = [{"role": "user", "content": "Describe a pet as JSON with name, kind, is_tame, toys."}]
    prompt = encode_prompt(tokenizer, chat)
    texts = {}
    for name, machine in (("grammar", grammar), ("free", None)):
        out = jaxspec.generate(
            model, [prompt], drafter=drafters.prompt_lookup(), num_return_sequences=6,
            sampling=jaxspec.Sampling(grammar=machine), max_new_tokens=96, key=jax.random.key(0),
        )  # fmt: skip
        texts[name] = [
            tokenizer.decode(row[:length].tolist(), skip_special_tokens=True)
            for row, length in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
        ]
        if machine is not None:
            assert out.status.tolist() == [status.EOS] * 6
            assert np.sum(out.stats.num_accepted_draft_tokens) > 0
    for text in texts["grammar"]:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts["grammar"])) == 6

    def parses(text):
        try:
            jsonschema.validate(json.loads(text), SCHEMA)
        except (json.JSONDecodeError, jsonschema.ValidationError):
            return False
        return True

    assert sum(map(parses, texts["free"])) < 2
