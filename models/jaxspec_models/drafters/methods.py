"""The methods by name: a module each, with the same functions.

A method is one file: its shape (a `parts.DrafterConfig`), its Flax module, and

- `abstract(config)`: graph definition and shapes of its weights;
- `init_params(config, target, sample, seed)`: weights before training, float32; `sample` are texts;
- `loss(graphdef, params, part, frozen, *, objective)`: `jaxspec.training.steps.Totals` of texts;
- `quantize(config, params)`: shape and weights in int8;
- `drafter(target, config, params, draft_ids, *, stop_below)`: what `jaxspec.generate` takes.

To add one, write the file and name it here.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from jaxspec_models.drafters import block, eagle3, parts, student


class Method(NamedTuple):
    """A way of drafting that can be trained.

    Attributes:
      module: with the functions above.
      config: its shape's class.
    """

    module: ModuleType
    config: type[parts.DrafterConfig]


METHODS = {
    "block": Method(block, block.BlockConfig),
    "eagle3": Method(eagle3, eagle3.EagleConfig),
    "student": Method(student, student.StudentConfig),
}


def of(name: str) -> Method:
    """The method of this name.

    Raises:
      ValueError: there is none.

    Example:
      >>> of("block").config.method
      'block'
      >>> of("oracle")
      Traceback (most recent call last):
      ValueError: there is no method 'oracle'; there are block, eagle3, student.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}.")
    return METHODS[name]
