"""Language models for `jaxspec`: checkpoints in, pure JAX functions out.

>>> import jaxspec_models
>>> print(*sorted(jaxspec_models.__all__))
from_hf generate_text in_trees load load_drafter load_model load_tokenizer stop_strings
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxspec_models.drafters.directory import load_drafter
    from jaxspec_models.drafters.tree import in_trees
    from jaxspec_models.huggingface import from_hf
    from jaxspec_models.loading import load, load_model, load_tokenizer
    from jaxspec_models.text import generate_text, stop_strings

__all__ = [
    "from_hf",
    "generate_text",
    "in_trees",
    "load",
    "load_drafter",
    "load_model",
    "load_tokenizer",
    "stop_strings",
]

# No module here may have the name of a function: importing it would replace the function.
_MODULES = {
    "from_hf": "jaxspec_models.huggingface",
    "generate_text": "jaxspec_models.text",
    "in_trees": "jaxspec_models.drafters.tree",
    "load": "jaxspec_models.loading",
    "load_drafter": "jaxspec_models.drafters.directory",
    "load_model": "jaxspec_models.loading",
    "load_tokenizer": "jaxspec_models.loading",
    "stop_strings": "jaxspec_models.text",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that importing the package costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
