"""Chat templates, rendered as transformers does, without transformers."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A chat: dictionaries with "role" and "content"."""


@functools.lru_cache(maxsize=16)
def _template(source: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant said, for training; here it is a no-op."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The environment that transformers makes: templates are written for it.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def render_chat(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    r"""Renders a chat template in a sandbox.

    Args:
      template: Jinja, as in HF's `chat_template`.
      messages: the chat.
      add_generation_prompt: end with the start of the assistant's answer.
      special_tokens: names such as "bos_token" that the template may use.

    Raises:
      ValueError: the template is broken or refuses the messages.

    Example:
      >>> template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
      >>> render_chat(template, [{"role": "user", "content": "Hello"}])
      'user: Hello\n'
    """
    import jinja2

    if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ValueError(
            'a chat is a non-empty list of dictionaries with "role" and "content"; '
            f"got {messages!r}."
        )
    try:
        return _template(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
