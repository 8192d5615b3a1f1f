"""Where drafts come from: one drafter a file.

Each public name is a factory: `drafters.prompt_lookup()` returns a `jaxspec.types.Drafter`.
"""

from jaxspec.drafters.fallback import fallback as fallback
from jaxspec.drafters.model import model as model
from jaxspec.drafters.prompt_lookup import prompt_lookup as prompt_lookup
from jaxspec.drafters.token_recycling import token_recycling as token_recycling

__all__ = ["fallback", "model", "prompt_lookup", "token_recycling"]
