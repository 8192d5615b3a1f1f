"""Running the shipped loop, or a mutant of it, with the arguments of `generate`."""

from __future__ import annotations

import functools

import jax

from jaxspec import arguments
from jaxspec.generate import result


@functools.cache
def _compiled(module):
    return (
        jax.jit(module.prefill, static_argnames="max_new_tokens"),
        jax.jit(module.run),
    )


def generate_with(module, target, prompts, *, arguments=arguments, **kwargs):
    """`jaxspec.generate`, but by the loop in `module` (and by mutated `arguments`)."""
    prepared = arguments.prepare(target, prompts, **kwargs)
    prefill, run = _compiled(module)
    state = prefill(
        prepared.engine,
        prepared.request,
        prepared.prompts,
        max_new_tokens=prepared.max_new_tokens,
    )
    state = run(prepared.engine, prepared.request, state, -1)
    return result(prepared.engine, prepared.request, state, pad_id=prepared.pad_id)


def compiled_parts(target, prompts, **kwargs):
    """The abstract state of a call, and its compiled prefill and loop (nothing is run)."""
    from jaxspec.generate import prefill, run

    prepared = arguments.prepare(target, prompts, **kwargs)
    size = {"max_new_tokens": prepared.max_new_tokens}
    lowered = prefill.outermost.lower(prepared.engine, prepared.request, prepared.prompts, **size)
    state = jax.eval_shape(
        functools.partial(prefill, **size), prepared.engine, prepared.request, prepared.prompts
    )
    loop = run.outermost.lower(prepared.engine, prepared.request, state, -1)
    return state, lowered.compile(), loop.compile()
