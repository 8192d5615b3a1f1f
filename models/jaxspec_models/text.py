"""Text in, text out: tokenizer, chat template and `jaxspec.generate` in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import jaxspec
from jaxspec_models.chat import Messages


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


def generate_text(
    model: jaxspec.LanguageModel,
    tokenizer: Any,
    text_or_messages: str | Messages | Sequence[str | Messages],
    **generate_arguments: Any,
) -> list[str]:
    """Generates text behind one prompt or several.

    Args:
      model: the target.
      tokenizer: what `jaxspec_models.load` or `load_tokenizer` returned with it.
      text_or_messages: a str is a plain prompt; a list of dictionaries with "role" and "content"
        is one chat; a list of these is a batch.
      **generate_arguments: of `jaxspec.generate`: `drafter`, `sampling`, `max_new_tokens`, ….

    Returns:
      The new text of each prompt, without special tokens; one entry for a single prompt.

    Raises:
      ValueError: a prompt is neither text nor chat, the batch is empty, or as `jaxspec.generate`.

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
    result = jaxspec.generate(model, ids, **generate_arguments)
    rows = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
    return [
        tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True)
        for tokens, length in rows
    ]
