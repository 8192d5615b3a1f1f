"""The methods by name: a module each, with the same functions.

A method is one file: its shape (a `parts.DrafterConfig`), its Flax module, and

- `abstract(config)`: graph definition and shapes of its weights;
- `init_params(config, target, sample, seed)`: weights before training, float32; `sample` are texts;
- `loss(model, part, frozen, *, objective)`: `jaxspec.training.steps.Totals` of texts;
- `drafter(target, config, params, draft_ids)`: what `jaxspec.generate` takes.

To add one, write the file and name it here.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

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


def quantize(config: parts.DrafterConfig, params: Any) -> tuple[parts.DrafterConfig, Any]:
    """A drafter with products in int8, one scale an output channel.

    Args:
      config: the shape, in float32.
      params: trained weights.

    Returns:
      The new shape and weights.
    """
    quantized = dataclasses.replace(config, quantization="int8")
    _, wanted = of(config.method).module.abstract(quantized)
    return quantized, parts.in_int8(wanted, params)
