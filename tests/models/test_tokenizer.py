"""The light tokenizer agrees with `tokenizers` and transformers, and streams whole characters."""

import json
import random
import subprocess
import sys

import pytest
import tokenizers

from jaxspec_models import chat, tokenizer
from jaxspec_models.gguf_file import GGUFFile

TEXTS = [
    "hello hello",
    "x =  12",
    "123456",
    "héllo wörld, 日本語 und 🎉👩‍👩‍👧!",
    " leading and trailing \n\n\ttabs\r\n",
    "don't we'll",
    "<|im_start|>user\nhello<|im_end|>",
    "",
]
CHATS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1 = 🤔?"}],
]


@pytest.fixture
def light(tiny, tmp_path):
    return tokenizer.from_gguf(GGUFFile(tiny.write_gguf(tmp_path / "tiny.gguf")))


@pytest.fixture
def directory(tiny, tmp_path):
    tiny.write_tokenizer(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------
# Text and ids.


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_and_directory_agree(light, directory, text):
    other = tokenizer.from_directory(directory)
    ids = light.encode(text)
    assert ids == other.encode(text)
    assert light.decode(ids) == other.decode(ids) == text


def test_ids_by_hand(light):
    vocabulary = light.backend.get_vocab()
    assert light.encode("hello") == [vocabulary["hello"]]
    # Digits stand alone, whatever the merges say; so does the space before them.
    assert light.encode("12") == [vocabulary["1"], vocabulary["2"]]
    assert light.encode(" 1") == [vocabulary["Ġ"], vocabulary["1"]]
    assert light.encode("<|im_end|>hell") == [2, vocabulary["hell"]]
    assert light.eos_token_id == 2


def test_pre_tokenizer_matters(light):
    """The planted bug: without the digits step, "12" is merged."""
    vocabulary = light.backend.get_vocab()
    light.backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert light.encode("12") == [vocabulary["12"]]


def test_gpt2_kind_merges_digits(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "x.gguf", fields={"tokenizer.ggml.pre": "gpt-2"})
    light = tokenizer.from_gguf(GGUFFile(path))
    assert light.encode("12") == [light.backend.get_vocab()["12"]]


def test_special_tokens_are_skipped_on_request(light):
    ids = light.encode("<|im_start|>hello<|im_end|>")
    assert light.decode(ids) == "<|im_start|>hello<|im_end|>"
    assert light.decode(ids, skip_special_tokens=True) == "hello"


def test_user_defined_tokens_are_kept(tiny, tmp_path):
    types = [3, 4, 3] + [1] * (tiny.config["vocab_size"] - 3)
    path = tiny.write_gguf(tmp_path / "x.gguf", fields={"tokenizer.ggml.token_type": types})
    light = tokenizer.from_gguf(GGUFFile(path))
    ids = light.encode("<|im_start|>hello<|im_end|>")
    assert ids[0] == 1
    assert light.decode(ids, skip_special_tokens=True) == "<|im_start|>hello"


def test_bos_is_added_where_the_file_says_so(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "x.gguf", fields={"tokenizer.ggml.add_bos_token": 1})
    light = tokenizer.from_gguf(GGUFFile(path))
    ids = light.encode("hello")
    assert ids == [1, *light.encode("hello", add_special_tokens=False)]
    rendered = light.apply_chat_template(CHATS[0])
    assert rendered.count(1) == 1  # the template wrote it already


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_tokenizer_is_the_same(light, text):
    full = light.to_transformers()
    assert full.encode(text) == light.encode(text)
    for skip in (False, True):
        ids = light.encode(text)
        assert full.decode(ids, skip_special_tokens=skip) == light.decode(
            ids, skip_special_tokens=skip
        )
    assert (full.eos_token, full.eos_token_id, full.bos_token_id) == ("<|im_end|>", 2, 1)
    assert full.model_max_length == 64
    assert full.is_fast


# ---------------------------------------------------------------------------------------------
# Chats.


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [False, True])
def test_chats_are_rendered_as_transformers_does(light, messages, prompt):
    full = light.to_transformers()
    expected = full.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert expected.startswith(f"<|im_start|>{messages[0]['role']}\n")
    assert expected.endswith("<|im_start|>assistant\n") == prompt
    text = light.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert text == expected
    assert light.apply_chat_template(messages, add_generation_prompt=prompt) == full.encode(
        expected
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages | tojson }}",
        "{% for m in messages %}\n    {% if m['role'] == 'x' %}{% continue %}{% endif %}\n"
        "{{ m['content'] | trim }}\n{% endfor %}\n",
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') | length }}",
    ],
)
def test_templates_are_rendered_as_transformers_does(light, template):
    messages = [{"role": "user", "content": " é <b> "}]
    full = light.to_transformers()
    expected = full.apply_chat_template(messages, chat_template=template, tokenize=False)
    special = {"bos_token": "<|im_start|>"}
    assert chat.render_chat(template, messages, special_tokens=special) == expected


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", CHATS[0], "roles must alternate"),
        ("{{ messages[0].content.x.y }}", CHATS[0], "refuses these messages"),
        ("{% for %}", CHATS[0], "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", CHATS[0], "unsafe"),
        ("{{ messages }}", [], "non-empty list"),
        ("{{ messages }}", ["hello"], 'with "role" and "content"'),
        ("{{ messages }}", [{"content": "x"}], 'with "role" and "content"'),
    ],
)
def test_chats_that_are_refused(template, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.render_chat(template, messages)


def test_no_chat_template(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "x.gguf", fields={"tokenizer.chat_template": None})
    with pytest.raises(ValueError, match="no chat template; pass a plain text prompt"):
        tokenizer.from_gguf(GGUFFile(path)).apply_chat_template(CHATS[0])


# ---------------------------------------------------------------------------------------------
# Streams.


def stream(of, ids, sizes=(1,), **options):
    detokenizer = tokenizer.Detokenizer(of, **options)
    pieces, first = [], 0
    while first < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.push(ids[first : first + size]))
        first += size
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 4, 0, 2)])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_emits_whole_characters(light, text, sizes):
    ids = light.encode(text)
    for of in (light, light.to_transformers()):
        pieces = stream(of, ids, sizes, skip_special_tokens=False)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_token_by_token_decoding_is_not_enough(light):
    """The planted bug: what a naive stream prints."""
    ids = light.encode("日本")
    assert len(ids) == 6
    assert "\ufffd" in "".join(light.decode([token]) for token in ids)
    assert stream(light, ids) == ["", "", "日", "", "", "本", ""]


def test_stream_of_random_bytes_joins_to_the_whole_text(light):
    """Broken characters too: what the pieces join to is what decoding all at once gives."""
    rng = random.Random(0)
    emoji = light.encode("é🎉")
    for _ in range(200):
        ids = [
            rng.choice([*emoji, rng.randrange(light.backend.get_vocab_size())]) for _ in range(12)
        ]
        for skip in (False, True):
            pieces = stream(light, ids, (1, 2), skip_special_tokens=skip)
            assert "".join(pieces) == light.decode(ids, skip_special_tokens=skip)


def test_stream_flushes_an_unfinished_character(light):
    ids = light.encode("a🎉")[:-1]
    assert stream(light, ids)[-1] == "\ufffd"
    assert tokenizer.Detokenizer(light).finish() == ""


def test_stream_skips_special_tokens(light):
    ids = light.encode("<|im_start|>hello<|im_end|> w<|im_end|>")
    pieces = stream(light, ids)
    assert "".join(pieces) == "hello w"
    assert pieces[0] == ""


def test_stream_keeps_spaces_that_a_decoder_strips():
    """Sentencepiece-like decoders drop the space in front of the first token only."""
    vocabulary = {
        "▁hello": 0,
        "▁world": 1,
        "</s>": 2,
        **{f"<0x{b:02X}>": 3 + b for b in range(256)},
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    emoji = [3 + byte for byte in "🎉".encode()]
    light = tokenizer.TextTokenizer(backend)
    ids = [2, 0, 1, 2, 1, *emoji, 0, 2]
    pieces = stream(light, ids)
    assert "".join(pieces) == light.decode(ids, skip_special_tokens=True)
    assert pieces == ["", "hello", " world", "", " world", "", "", "", "🎉", " hello", "", ""]


# ---------------------------------------------------------------------------------------------
# Files.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama', which is not supported"),
        ({"tokenizer.ggml.model": None}, "tokenizer None, which is not supported"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe', which is not supported"),
        ({"tokenizer.ggml.pre": None}, r"pre-tokenizer None, .*'smollm' and 'gpt-2' are"),
        ({"tokenizer.ggml.merges": None}, r"lacks the field 'tokenizer\.ggml\.merges'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "a token twice"),
        ({"tokenizer.ggml.merges": ["q zz"]}, r"has broken merges"),
        ({"tokenizer.ggml.eos_token_id": 9999}, r"has broken special tokens"),
    ],
)
def test_gguf_tokenizers_that_are_refused(tiny, tmp_path, fields, message):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", fields=fields)
    with pytest.raises(ValueError, match=message):
        tokenizer.from_gguf(GGUFFile(path))


def test_directory_fields(directory):
    light = tokenizer.from_directory(directory)
    assert light.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert light.model_max_length == 64
    assert light.apply_chat_template(CHATS[0], tokenize=False).startswith("<|im_start|>user")


def test_directory_with_nothing_but_tokenizer_json(directory):
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink()
    light = tokenizer.from_directory(directory)
    assert light.encode("hello") == [light.backend.get_vocab()["hello"]]
    assert (light.eos_token_id, light.chat_template, dict(light.special_tokens)) == (None, None, {})


@pytest.mark.parametrize(
    "template", ["T", [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T"}]]
)
def test_template_in_the_config(directory, template):
    (directory / "chat_template.jinja").unlink()
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    assert tokenizer.from_directory(directory).chat_template == "T"


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; save a fast tokenizer"):
        tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer_files(directory, name):
    (directory / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name} is broken"):
        tokenizer.from_directory(directory)


def test_light_tokenizer_does_not_import_transformers(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    script = (
        "import sys, jaxspec_models\n"
        "assert not {'jax', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "from jaxspec_models import load_tokenizer\n"
        f"t = load_tokenizer({str(path)!r})\n"
        "t.apply_chat_template([{'role': 'user', 'content': t.decode(t.encode('hello'))}])\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---------------------------------------------------------------------------------------------
# The real one.


@pytest.mark.real_model
def test_ids_of_the_default_model():
    from jaxspec_models import load_tokenizer

    light = load_tokenizer("smollm2-135m")
    full = light.to_transformers()
    for of in (light, full):
        assert of.encode("x =  12") == [104, 446, 256, 33, 34]
        assert of.encode("In a distant future,") == [788, 253, 9931, 1774, 28]
        assert of.decode([788, 253, 9931, 1774, 28]) == "In a distant future,"
        for text in TEXTS:
            assert of.decode(of.encode(text)) == text
    assert len(light.backend.get_added_tokens_decoder()) == 17
    assert all(token.special for token in light.backend.get_added_tokens_decoder().values())
    assert light.eos_token_id == full.eos_token_id == 2
    assert full.model_max_length == 8192
    for messages in CHATS:
        text = light.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == full.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
