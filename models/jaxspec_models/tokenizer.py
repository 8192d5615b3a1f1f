"""Tokenizers without transformers: from a GGUF's own fields, or from an HF directory.

`TextTokenizer` has the few methods that generating text needs, named as in transformers, so that
either can be used; importing transformers takes longer than loading a small model.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxspec_models.chat import Messages, render_chat
from jaxspec_models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types
_GGUF_SPECIAL = {  # transformers' name -> GGUF's
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_NO_LIMIT = 10**30  # what transformers writes for a model without a known context


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      special_tokens: "bos_token", "eos_token", "unk_token", "pad_token" -> the token's text.
      chat_template: a Jinja template, or None.
      model_max_length: the context that the model was made for, in tokens.

    Example:
      >>> vocabulary = {"a": 0, "b": 1, "ab": 2, "<|end|>": 3}
      >>> backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
      >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
      >>> backend.decoder = decoders.ByteLevel()
      >>> tokenizer = TextTokenizer(backend, {"eos_token": "<|end|>"})
      >>> tokenizer.encode("aab")
      [0, 2]
      >>> tokenizer.decode([0, 2])
      'aab'
      >>> tokenizer.eos_token_id
      3
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    model_max_length: int = _NO_LIMIT

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: the text; special tokens written out in it are recognised.
          add_special_tokens: put the tokens around it that the tokenizer calls for (often none).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of some ids; bytes that are no character become U+FFFD."""
        ids = [int(token) for token in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Messages, *, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> str | list[int]:
        """Writes a chat as the model was trained to read it.

        Args:
          messages: the chat.
          tokenize: return the ids rather than the text.
          add_generation_prompt: end with the start of the assistant's answer.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template; pass a plain text prompt instead of messages."
            )
        text = render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )
        # The template has written every special token that there should be.
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """The same tokenizer as a `transformers.PreTrainedTokenizerFast`."""
        # Without this, importing transformers where there is no PyTorch says so on stderr.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend,
            model_max_length=self.model_max_length,
            chat_template=self.chat_template,
            clean_up_tokenization_spaces=False,
            **self.special_tokens,
        )


class Detokenizer:
    """Turns a growing list of ids into text, and never emits half a character.

    The pieces, the last from `finish`, join to the text that decoding all ids at once gives. Works
    with `TextTokenizer` and with `transformers` tokenizers.

    Args:
      tokenizer: what decodes.
      skip_special_tokens: leave special tokens out of the text.

    Example:
      >>> backend = tokenizers.Tokenizer(models.BPE({"Ã": 0, "©": 1, "!": 2}, []))
      >>> backend.decoder = decoders.ByteLevel()
      >>> stream = Detokenizer(TextTokenizer(backend))
      >>> [stream.push([0]), stream.push([1]), stream.push([2]), stream.finish()]
      ['', 'é', '!', '']
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True):
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        # Text is decoded from a point whose text is out already (`_context` ids): some decoders
        # treat the first token of a text in another way than the following ones.
        self._ids: list[int] = []
        self._context = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes in new ids and returns the text that is certain by now, perhaps none."""
        return self._advance(ids, is_last=False)

    def finish(self) -> str:
        """Returns what was held back: an unfinished character, as U+FFFD."""
        return self._advance((), is_last=True)

    def held_back(self) -> str:
        """What `finish` would return now."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._context])) :]

    def _advance(self, ids: Iterable[int], *, is_last: bool) -> str:
        self._ids += [int(token) for token in ids]
        done = self._decode(self._ids[: self._context])
        text = self._decode(self._ids)
        # U+FFFD at the end: a character whose last bytes may come with the next token.
        if not is_last and text.endswith("\ufffd"):
            return ""
        if new := text[len(done) :]:
            self._ids, self._context = self._ids[self._context :], len(self._ids) - self._context
        elif not is_last:
            self._context = len(self._ids)
        return new


# ---------------------------------------------------------------------------------------------
# From a GGUF file.


def _byte_level(*steps: Any) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([*steps, last]) if steps else last


_PRE_TOKENIZERS = {
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "gpt-2": _byte_level,
}


def from_gguf(file: GGUFFile) -> TextTokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      file: the opened file.

    Raises:
      ValueError: a field is missing, or the kind of tokenizer is not supported; the message
        names it.
    """
    fields = file.metadata
    if (model := fields.get("tokenizer.ggml.model")) != "gpt2":
        raise ValueError(
            f"{file.path} has the tokenizer {model!r}, which is not supported (byte-level BPE, "
            "'gpt2', is); load the model in HF form."
        )
    if (kind := fields.get("tokenizer.ggml.pre")) not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{file.path} has the pre-tokenizer {kind!r}, which is not supported "
            f"({' and '.join(map(repr, _PRE_TOKENIZERS))} are); load the model in HF form."
        )
    try:
        tokens: list[str] = fields["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
        types: list[int] = fields["tokenizer.ggml.token_type"]
    except KeyError as error:
        raise ValueError(f"{file.path} lacks the field {error}; get a sound file.") from error
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError(f"{file.path} has a token twice in its vocabulary; get a sound file.")
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{file.path} has broken merges ({error}); get a sound file.") from error
    backend.pre_tokenizer = _PRE_TOKENIZERS[kind]()
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=token_type == _CONTROL, normalized=False)
            for token, token_type in zip(tokens, types, strict=False)
            if token_type in (_CONTROL, _USER_DEFINED)
        ]
    )
    special_tokens = {}
    for name, key in _GGUF_SPECIAL.items():
        if (token_id := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if token_id >= len(tokens):
                raise ValueError(
                    f"{file.path} has broken special tokens ({key} is {token_id}, the vocabulary "
                    f"has {len(tokens)}); get a sound file."
                )
            special_tokens[name] = tokens[token_id]
    if fields.get("tokenizer.ggml.add_bos_token") and (bos := special_tokens.get("bos_token")):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, vocabulary[bos])]
        )
    return TextTokenizer(
        backend,
        special_tokens,
        fields.get("tokenizer.chat_template"),
        fields.get("llama.context_length", _NO_LIMIT),
    )


# ---------------------------------------------------------------------------------------------
# HF directories.

_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")  # the second one wins


def from_directory(directory: Path) -> TextTokenizer:
    """Reads a tokenizer in HF form: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    Args:
      directory: where the files are; only the first is a must.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file is broken.
    """
    from jaxspec_models.checkpoint import read_json

    path = directory / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has no tokenizer.json; save a fast tokenizer there with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(directory)."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{path} is broken ({error}); copy or download it again.") from error
    config: dict[str, Any] = {}
    for name in _CONFIGS:
        if (directory / name).exists():
            config |= read_json(directory / name)
    special_tokens = {}
    for name in _GGUF_SPECIAL:
        token = config.get(name)
        if token is not None:  # a string, or a dictionary that describes an AddedToken
            special_tokens[name] = token["content"] if isinstance(token, dict) else token
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if (file := directory / "chat_template.jinja").exists():
        template = file.read_text(encoding="utf-8")
    limit = int(config.get("model_max_length") or _NO_LIMIT)
    return TextTokenizer(backend, special_tokens, template, limit)
