"""Running the shipped loop, or a mutant of it, with the arguments of `generate`."""

from __future__ import annotations

import functools

import jax

from jaxspec import arguments, prefilling
from jaxspec.generate import begin, finish


@functools.cache
def _compiled(loop, prefilling):
    sizes = ("num_slots", "capacity", "max_new_tokens")
    return (
        jax.jit(prefilling.prefill, static_argnames="max_new_tokens"),
        jax.jit(prefilling.resume, static_argnames=sizes),
        jax.jit(loop.run, donate_argnames="state"),
    )


def generate_with(
    loop, target, prompts=None, *, arguments=arguments, prefilling=prefilling, **kwargs
):
    """`jaxspec.generate`, but by these modules, of which one or another is a mutant."""
    prepared = arguments.prepare(target, prompts, **kwargs)
    prefill, resume, run = _compiled(loop, prefilling)
    state = begin(prepared, prefill=prefill, resume=resume)
    return finish(prepared, run(prepared.engine, prepared.request, state, -1))


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
