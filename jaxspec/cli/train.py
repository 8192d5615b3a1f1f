"""`jaxspec train`: a drafter for a model of one's own."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any, cast

from jaxspec.cli import running
from jaxspec.cli.errors import UserError, told_to_the_user


def write_prompts(arguments: argparse.Namespace) -> int:
    """Runs `jaxspec train prompts`.

    Args:
      arguments: from `jaxspec.cli.options.parse`.

    Returns:
      The exit code.

    Raises:
      UserError: an argument, a file or the model is wrong.
    """
    tokenizer = running.load_tokenizer(arguments.target)
    model = running.load_model(arguments.target, arguments.dtype, arguments.quantization)
    with told_to_the_user(), running.exit_on_interrupt(), _Bar() as bar:
        from jaxspec_models import asking

        try:
            count = asking.write_prompts(
                model,
                tokenizer,
                arguments.out,
                target=arguments.target,
                count=arguments.count,
                beginnings=arguments.beginnings,
                temperature=arguments.temperature,
                max_prompt_tokens=arguments.max_prompt_tokens,
                batch=arguments.batch,
                seed=arguments.seed,
                on_progress=lambda done, total: bar.advance(done, total, " prompts"),
            )
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{arguments.out} cannot be written: {reason}") from error
    running.put(f"{count} prompts in {arguments.out}\n")
    return 0


def write_data(arguments: argparse.Namespace) -> int:
    """Runs `jaxspec train data`.

    Args:
      arguments: from `jaxspec.cli.options.parse`.

    Returns:
      The exit code.

    Raises:
      UserError: an argument, a file or the model is wrong.
    """
    with told_to_the_user():
        from jaxspec_models import answers

        prompts = running.read_prompts(arguments.prompts)
    tokenizer = running.load_tokenizer(arguments.target)
    model = running.load_model(arguments.target, arguments.dtype, arguments.quantization)
    with told_to_the_user(), running.exit_on_interrupt(), _Bar() as bar:
        recorder = None
        if arguments.features is not None:
            from jaxspec_models import drafter_making

            recorder = drafter_making.recorder(
                model, arguments.features, weights=_weights(arguments)
            )
        done = answers.write_answers(
            model,
            tokenizer,
            prompts,
            arguments.out,
            target=arguments.target,
            temperatures=arguments.temperature,
            max_new_tokens=arguments.max_new_tokens,
            max_prompt_tokens=arguments.max_prompt_tokens,
            tokens_wanted=arguments.tokens,
            batch=arguments.batch,
            batches_a_shard=arguments.batches_a_shard,
            seed=arguments.seed,
            recorder=recorder,
            on_progress=bar.show,
        )
    running.put(f"{done.num_answers} answers, {done.num_tokens} tokens in {arguments.out}\n")
    return 0


def _weights(arguments: argparse.Namespace) -> str:
    """How the target's weights are kept, as features note it."""
    return cast(str, arguments.quantization or arguments.dtype)


class _Bar:
    """A progress bar of new tokens, or of answers, on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Any) -> None:
        """Draws `jaxspec_models.answers.Progress`."""
        if progress.tokens_wanted is None:
            self.advance(progress.num_answers, progress.num_tasks, " answers")
        else:
            self.advance(progress.num_tokens, progress.tokens_wanted, " tokens")

    def advance(self, done: int, total: int, unit: str) -> None:
        """Draws how much there is; the estimate counts from the first call on."""
        import tqdm

        if self._bar is None:
            self._bar = tqdm.tqdm(
                total=total, initial=done, unit=unit, file=sys.stderr, dynamic_ncols=True
            )
            return
        self._bar.update(min(done, total) - self._bar.n)


def train_drafter(arguments: argparse.Namespace) -> int:
    """Runs `jaxspec train drafter`.

    Args:
      arguments: from `jaxspec.cli.options.parse`.

    Returns:
      The exit code.

    Raises:
      UserError: an argument, a directory or the model is wrong, or the loss is not finite.
    """
    with told_to_the_user():
        import jax

        from jaxspec_models import drafter_making, drafter_training
        from jaxspec_models.drafters import learning

    running.keep_compiled_programs()
    target = running.load_model(arguments.target, arguments.dtype, arguments.quantization)
    settings = drafter_training.Settings(
        num_steps=arguments.steps,
        tokens_a_part=arguments.tokens_a_part,
        parts_a_step=arguments.parts_a_step,
        anchors_a_text=arguments.anchors,
        objective=learning.Objective(
            cross_entropy=arguments.cross_entropy,
            total_variation=arguments.total_variation,
            lk_lambda=arguments.lk_lambda,
        ),
        learning_rate=arguments.learning_rate,
        num_warmup_steps=arguments.warmup_steps,
        dtype=arguments.products,
        num_devices=arguments.devices or jax.device_count(),
        seed=arguments.seed,
    )
    with told_to_the_user(), running.exit_on_interrupt():
        try:
            metrics = drafter_making.make_drafter(
                target,
                drafter_making.shape(target, arguments.method, **_shape(arguments)),
                arguments.data,
                arguments.out,
                target_name=arguments.target,
                weights=_weights(arguments),
                features_directory=arguments.features,
                settings=settings,
                command=shlex.join(["jaxspec", *arguments.argv]),
                on_stage=_Stages(),
            )
        except FloatingPointError as error:
            raise UserError(error) from error
    lines = (f"{name} {value:.4g}" for name, value in metrics.items())
    running.put(f"a drafter in {arguments.out}: {', '.join(lines)}\n")
    return 0


def _shape(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said of the drafter's shape; the rest is the method's default."""
    said = {
        "num_draft_tokens": arguments.num_draft_tokens,
        "draft_vocab_size": arguments.vocabulary,
        "num_hidden_layers": arguments.layers,
        "intermediate_size": arguments.mlp,
        "markov_rank": arguments.markov_rank,
        "source_layers": arguments.source_layers and tuple(arguments.source_layers),
    }
    return {name: value for name, value in said.items() if value is not None}


class _Stages:
    """A bar for each stage of the work: called with its name, how much is done, and of how much."""

    def __init__(self) -> None:
        self._name, self._bar = "", cast(Any, None)

    def __call__(self, name: str, done: int, total: int, told: str = "") -> None:
        import tqdm

        if name != self._name:
            self._name = name
            self._bar = tqdm.tqdm(
                total=total, initial=done, desc=name, file=sys.stderr, dynamic_ncols=True
            )
        else:
            self._bar.update(done - self._bar.n)
        if told:
            self._bar.set_postfix_str(told, refresh=False)
        if done >= total:
            self._bar.close()
