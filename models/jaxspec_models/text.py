"""Text in, text out: tokenizer, chat template and `jaxspec.generate` in one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

import jaxspec
from jaxspec_models.chat import Messages
from jaxspec_models.tokenizer import Detokenizer


def encode_prompt(tokenizer: Any, prompt: str | Messages) -> list[int]:
    """Returns the ids of a plain text, or of a chat whose next turn is the assistant's.

    Args:
      tokenizer: of this package or of transformers.
      prompt: a text, or a list of dictionaries with "role" and "content".

    Raises:
      ValueError: the prompt is neither, or there is no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    if not _is_chat(prompt):
        raise ValueError(
            'a prompt is a str, or a chat: a list of dictionaries with "role" and "content"; '
            f"got {prompt!r}."
        )
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # The template has written every special token that there should be.
    return list(tokenizer.encode(text, add_special_tokens=False))


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


def stop_strings(
    tokenizer: Any, strings: str | Sequence[str]
) -> Callable[[int, np.ndarray], int | None]:
    """Ends a text once it holds one of some strings: for `jaxspec.stream(stop=…)`.

    A string may begin and end inside tokens, and lie across the borders of rounds. Only new text
    counts. The token that completes it is kept, like an EOS; the text that it writes may go on
    behind the string (`generate_text` and the command cut it there).

    Args:
      tokenizer: what decodes; special tokens write nothing.
      strings: one or several, none of them empty.

    Returns:
      A function with a memory of its rows: make one for each call.

    Raises:
      ValueError: there is no string, or an empty one.

    Example:
      >>> import tokenizers
      >>> from jaxspec_models.tokenizer import TextTokenizer
      >>> letters = tokenizers.models.BPE({"a": 0, "b": 1, "c": 2}, [])
      >>> tokenizer = TextTokenizer(tokenizers.Tokenizer(letters))
      >>> tokenizer.backend.decoder = tokenizers.decoders.Fuse()
      >>> stop = stop_strings(tokenizer, "bc")
      >>> stop(0, [0, 1]), stop(0, [2, 0])
      (None, 1)
    """
    strings = _checked(strings)
    longest = max(map(len, strings))
    rows: dict[int, Detokenizer] = defaultdict(lambda: Detokenizer(tokenizer))
    ends: dict[int, str] = defaultdict(str)  # what is certain of each row's text, its end

    def stop(row: int, ids: np.ndarray) -> int | None:
        for count, token in enumerate(ids, 1):
            ends[row] += rows[row].push([token])
            # An unfinished character behind the string must not hide it.
            if cut_behind(ends[row] + rows[row].held_back(), strings) is not None:
                return count
            ends[row] = ends[row][-longest:]
        return None

    return stop


def _checked(strings: str | Sequence[str]) -> list[str]:
    strings = [strings] if isinstance(strings, str) else list(strings)
    if not strings or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop strings must be texts, none of them empty; got {strings!r}.")
    return strings


def cut_behind(text: str, strings: Sequence[str]) -> str | None:
    """The text up to the end of the first of the strings in it; None: it holds none.

    Example:
      >>> cut_behind("one. two. three", ["wo", ". t"])
      'one. t'
    """
    ends = [text.find(string) + len(string) for string in strings if string in text]
    return text[: min(ends)] if ends else None


def generate_text(
    model: jaxspec.LanguageModel,
    tokenizer: Any,
    text_or_messages: str | Messages | Sequence[str | Messages],
    *,
    stop: str | Sequence[str] = (),
    **generate_arguments: Any,
) -> list[str]:
    """Generates text behind one prompt or several.

    Args:
      model: the target.
      tokenizer: what `jaxspec_models.load` or `load_tokenizer` returned with it.
      text_or_messages: a str is a plain prompt; a list of dictionaries with "role" and "content"
        is one chat; a list of these is a batch.
      stop: one text or several that end a text, which is cut right behind the first of them. Every
        round returns to the host then; token sequences (`stop_sequences`) end rows without that.
      **generate_arguments: of `jaxspec.generate`: `drafter`, `sampling`, `max_new_tokens`, ….

    Returns:
      The new text of each prompt, without special tokens; one entry for a single prompt.

    Raises:
      ValueError: a prompt is neither text nor chat, the batch or a stop string is empty, or as
        `jaxspec.generate`.

    Example:
      >>> import jax.numpy as jnp
      >>> import tokenizers
      >>> from jaxspec_models.tokenizer import TextTokenizer
      >>> def apply(params, tokens, cache, *, start):  # the next letter of the alphabet
      ...     return jaxspec.ModelOutput(params[tokens]), cache
      >>> def init_cache(batch, capacity, max_step):
      ...     return ()
      >>> model = jaxspec.LanguageModel(10.0 * jnp.eye(4)[jnp.array([1, 2, 3, 0])],
      ...                               apply, init_cache, vocab_size=4)
      >>> letters = tokenizers.models.BPE({"a": 0, "b": 1, "c": 2, "d": 3}, [])
      >>> tokenizer = TextTokenizer(tokenizers.Tokenizer(letters))
      >>> tokenizer.backend.decoder = tokenizers.decoders.Fuse()
      >>> generate_text(model, tokenizer, ["ab", "d"], max_new_tokens=3,
      ...               sampling=jaxspec.Sampling(temperature=0))
      ['cda', 'abc']
    """
    is_single = isinstance(text_or_messages, str) or _is_chat(text_or_messages)
    prompts = [text_or_messages] if is_single else list(text_or_messages)
    if not prompts:
        raise ValueError("there is no prompt; pass at least one text or chat.")
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]  # type: ignore[arg-type]
    strings = _checked(stop) if stop else []
    if strings:
        result = _run(
            jaxspec.stream(model, ids, stop=stop_strings(tokenizer, strings), **generate_arguments)
        )
    else:
        result = jaxspec.generate(model, ids, **generate_arguments)
    rows = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
    texts = [
        tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True)
        for tokens, length in rows
    ]
    return [text if (cut := cut_behind(text, strings)) is None else cut for text in texts]


def _run(rounds: Generator[Any, None, jaxspec.Generation]) -> jaxspec.Generation:
    """The return value of a stream."""
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            return end.value
