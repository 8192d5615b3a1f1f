"""One optimiser step, as a pure function: sums over positions, so that no split changes it.

A loss returns sums and the weight they are over. Gradients are summed over the parts of a batch and
over the devices it lies on, and divided once: accumulating over more parts, or training on more
devices, computes the same step (up to the rounding of sums).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

Array: TypeAlias = jax.Array


class Totals(NamedTuple):
    """What a loss function returns of one part of a batch.

    Attributes:
      loss: f32[], the sum over positions; its gradient is followed.
      weight: f32[], the positions (or their weights) that it is the sum over.
      metrics: name -> (f32[...] sum, f32[...] weight), to be reported as their quotient.
    """

    loss: Array
    weight: Array
    metrics: Mapping[str, tuple[Array, Array]]


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: i32[], steps done.
      params: what is trained.
      opt_state: the optimiser's.
    """

    step: Array
    params: Any
    opt_state: Any


LossFunction: TypeAlias = Callable[[Any, Any, Any], Totals]
"""(params, part of a batch, frozen) -> `Totals`."""


def optimizer(
    *,
    learning_rate: float = 1e-3,
    num_steps: int,
    num_warmup_steps: int = 100,
    weight_decay: float = 0.01,
    max_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) under a cosine with warm-up, gradients clipped by their norm.

    Args:
      learning_rate: at its highest.
      num_steps: where the cosine has fallen to a hundredth.
      num_warmup_steps: of the linear rise; fewer where `num_steps` is short.
      weight_decay: of matrices; vectors (norms, biases) are not decayed.
      max_norm: of the whole gradient.

    Returns:
      An optax transformation.

    Raises:
      ValueError: a count or a rate is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optimizer(num_steps=10)
      >>> len(tx.init({"w": jnp.zeros((2, 2))})) > 0
      True
    """
    if num_steps < 1 or learning_rate <= 0 or max_norm <= 0:
        raise ValueError(
            f"num_steps, learning_rate and max_norm must be positive, got {num_steps}, "
            f"{learning_rate} and {max_norm}."
        )
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(num_warmup_steps, num_steps // 10),
        decay_steps=num_steps,
        end_value=0.01 * learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params),
        ),
    )


def init(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Args:
      params: float arrays.
      tx: the optimiser.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> int(init(jnp.zeros((3,)), optax.sgd(0.1)).step)
      0
    """
    params = jax.tree.map(jnp.array, params)  # a copy: the steps will reuse its memory
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_step(
    loss: LossFunction, tx: optax.GradientTransformation
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]:
    """A compiled training step.

    Args:
      loss: (params, part, frozen) -> `Totals`.
      tx: the optimiser.

    Returns:
      (state, parts, frozen) -> the new state, which takes the old one's place in memory, and the
      metrics: the loss's, "loss", and "gradient_norm" before clipping. Every array in `parts` has
      a leading axis of parts, whose gradients are accumulated; on several devices, shard another
      axis of it. `frozen` is what the loss reads and nothing trains.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> def squares(params, part, frozen):
      ...     return Totals(jnp.sum((params - part) ** 2), jnp.float32(part.size), {})
      >>> tx = optax.sgd(0.5)
      >>> step = make_step(squares, tx)
      >>> state, metrics = step(init(jnp.zeros(()), tx), jnp.ones((2, 4)), None)
      >>> float(state.params), float(metrics["loss"])
      (1.0, 1.0)
    """

    def step(state: TrainState, parts: Any, frozen: Any) -> tuple[TrainState, dict[str, Array]]:
        def of_part(part: Any) -> tuple[Totals, Any]:
            def summed(params: Any) -> tuple[Array, Totals]:
                totals = loss(params, part, frozen)
                return totals.loss, totals

            gradient, totals = jax.grad(summed, has_aux=True)(state.params)
            return totals, gradient

        shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(so_far: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, of_part(part)), None

        (totals, gradient), _ = lax.scan(add, zeros, parts)
        weight = jnp.maximum(totals.weight, jnp.finfo(jnp.float32).tiny)
        gradient = jax.tree.map(lambda x: x / weight.astype(x.dtype), gradient)
        # optax counts on promotion, whatever the user has told JAX.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": totals.loss / weight,
            "gradient_norm": optax.tree.norm(gradient),
            **mean_metrics(totals),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def mean_metrics(totals: Totals) -> dict[str, Array]:
    """The quotients of `Totals.metrics`; 0 where a weight is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> totals = Totals(jnp.float32(0), jnp.float32(0), {"a": (jnp.float32(3), jnp.float32(2))})
      >>> float(mean_metrics(totals)["a"])
      1.5
    """
    return {
        name: jnp.where(weight > 0, value / jnp.where(weight > 0, weight, 1.0), 0.0)
        for name, (value, weight) in totals.metrics.items()
    }
