"""Grammars of a tokenizer's tokens, from regular expressions and JSON schemas.

outlines-core makes the machine (`pip install 'jaxspec[grammar]'`); `jaxspec.sampling` runs it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers

from jaxspec.sampling import Grammar, grammar_of
from jaxspec.sampling.grammar import NO_STATE

_MARKER = "\U0010ffff".encode()  # a noncharacter, which no text holds


def regex_grammar(
    expression: str, tokenizer: Any, *, vocab_size: int, eos_ids: Iterable[int]
) -> Grammar:
    """The grammar of texts that match a regular expression as a whole.

    Tokens that cross borders of the expression's parts count: a text is matched byte by byte. An
    end-of-text token is allowed where the text matches, and nowhere else.

    Args:
      expression: in the syntax of Rust's regex, without look-around, anchors and backreferences.
      tokenizer: of `jaxspec_models`, or a fast one of transformers.
      vocab_size: V of the model, which may exceed the tokenizer's; ids without text are banned.
      eos_ids: what ends a text: pass the model's, `model.eos_ids`, or those of the call.

    Returns:
      A `Grammar` for `Sampling(grammar=…)`.

    Raises:
      ImportError: outlines-core is not installed.
      ValueError: the expression is broken or no text of these tokens matches it, there is no
        end-of-text token, or the tokenizer is of an unknown kind.

    Example:
      >>> import tokenizers
      >>> from jaxspec_models.tokenizer import TextTokenizer
      >>> backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, []))
      >>> backend.decoder = tokenizers.decoders.ByteLevel()
      >>> grammar = regex_grammar("(ab)+", TextTokenizer(backend), vocab_size=4, eos_ids=[3])
      >>> import jaxspec
      >>> jaxspec.Sampling(grammar=grammar).grammar.vocab_size
      4
    """
    outlines_core = _outlines_core()
    ends = sorted({int(token) for token in eos_ids})
    if not ends or ends[0] < 0 or ends[-1] >= vocab_size:
        raise ValueError(
            f"eos_ids must name at least one token below vocab_size={vocab_size}, so that a text "
            f"can end; got {ends}."
        )
    # The end is a character of its own: where outlines-core looks for a match instead, it loses
    # ways to go on from matches that more text could lengthen ("ab" in "(ab)+").
    marker, unused = vocab_size, vocab_size + 1
    tokens = {_MARKER: [marker]}
    for token, text in enumerate(token_bytes(tokenizer)[:vocab_size]):
        if text and token not in ends:
            tokens.setdefault(text, []).append(token)
    try:
        index = outlines_core.Index(
            f"(?:{expression}){_MARKER.decode()}", outlines_core.Vocabulary(unused, tokens)
        )
    except ValueError as error:
        raise ValueError(
            f"no grammar can be made of the expression {_shortened(expression)}: {error}"
        ) from error
    transitions, complete = index.get_transitions(), index.get_final_states()
    numbers = {state: i for i, state in enumerate(transitions)}
    table = np.full((len(numbers), vocab_size + 2), NO_STATE, np.int32)
    finals = []
    for state, behind in transitions.items():
        for token, after in behind.items():
            table[numbers[state], token] = numbers.get(after, NO_STATE)
        if behind.get(marker) in complete:
            finals.append(numbers[state])
    table = table[:, :vocab_size]
    for state in finals:
        table[state, ends] = state
    table = _without_dead_ends(table, finals)
    start = numbers[index.get_initial_state()]
    if np.all(table[start] == NO_STATE):
        raise ValueError(
            f"no grammar can be made of the expression {_shortened(expression)}: no text of this "
            "tokenizer's tokens matches it."
        )
    return grammar_of(table, start)


def _without_dead_ends(table: np.ndarray[Any, Any], finals: list[int]) -> np.ndarray[Any, Any]:
    """Forbids what leads to states from which no text can end."""
    behind = [set(np.unique(row).tolist()) for row in table]
    can_end = set(finals)
    while grown := {i for i, states in enumerate(behind) if i not in can_end and states & can_end}:
        can_end |= grown
    dead = [state for state in range(len(table)) if state not in can_end]
    return np.where(np.isin(table, dead), NO_STATE, table)


def json_grammar(
    schema: str | Mapping[str, Any],
    tokenizer: Any,
    *,
    vocab_size: int,
    eos_ids: Iterable[int],
    whitespace: str | None = None,
) -> Grammar:
    """The grammar of JSON texts of a schema.

    A text that ends at an end-of-text token parses. One that is cut at its limit need not: give
    strings a `maxLength` and arrays a `maxItems`, and room for them.

    Args:
      schema: a JSON schema, as a text or a mapping; what outlines-core knows of it.
      tokenizer: see `regex_grammar`.
      vocab_size: see `regex_grammar`.
      eos_ids: see `regex_grammar`.
      whitespace: the expression of what may stand between parts; None: one space or none.

    Returns:
      A `Grammar` for `Sampling(grammar=…)`.

    Raises:
      ImportError: outlines-core is not installed.
      ValueError: the schema is broken or not supported, or as `regex_grammar`.
    """
    json_schema = _outlines_core().json_schema
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        expression = json_schema.build_regex_from_schema(text, whitespace)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"no grammar can be made of the schema {_shortened(text)}: {error}"
        ) from error
    return regex_grammar(expression, tokenizer, vocab_size=vocab_size, eos_ids=eos_ids)


def token_bytes(tokenizer: Any) -> list[bytes]:
    r"""What each token writes, by id; nothing for special tokens.

    Args:
      tokenizer: of `jaxspec_models`, or a fast one of transformers: byte-level, or pieces with
        "▁" for a space and "<0x0A>" for bytes.

    Returns:
      The bytes of tokens 0 … V - 1.

    Raises:
      ValueError: the tokenizer is of another kind.

    Example:
      >>> import tokenizers
      >>> from jaxspec_models.tokenizer import TextTokenizer
      >>> backend = tokenizers.Tokenizer(tokenizers.models.BPE({"Ġa": 0, "Ã": 1}, []))
      >>> backend.decoder = tokenizers.decoders.ByteLevel()
      >>> token_bytes(TextTokenizer(backend))
      [b' a', b'\xc3']
    """
    # transformers' `backend` is a string.
    backend = getattr(tokenizer, "backend_tokenizer", getattr(tokenizer, "backend", None))
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(
            "grammars need a tokenizer of jaxspec_models or a fast one of transformers, got "
            f"{type(tokenizer).__name__}."
        )
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        of_piece = _byte_level
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        of_piece = _sentencepiece
    else:
        raise ValueError(
            f"grammars need a byte-level tokenizer or one of pieces, and this one decodes by "
            f"{sorted(map(str, kinds))}."
        )
    added = backend.get_added_tokens_decoder()
    written = [b""] * backend.get_vocab_size(with_added_tokens=True)
    for piece, token in backend.get_vocab(with_added_tokens=True).items():
        if token >= len(written):  # ids with gaps
            written += [b""] * (token + 1 - len(written))
        if token not in added:
            written[token] = of_piece(piece)
        elif not added[token].special:
            written[token] = piece.encode()
    return written


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    letters = _bytes_of_letters()
    return bytes(letters[letter] for letter in piece) if set(piece) <= letters.keys() else b""


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _outlines_core() -> Any:
    try:
        import outlines_core
        import outlines_core.json_schema
    except ImportError as error:
        raise ImportError(
            "grammars of expressions and schemas need outlines-core: pip install 'jaxspec[grammar]'"
        ) from error
    return outlines_core


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
