"""`jaxspec train`: a drafter for a model of one's own."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jaxspec.cli import running
from jaxspec.cli.errors import UserError, told_to_the_user


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

        prompts = _prompts(arguments.prompts)
    tokenizer = running.load_tokenizer(arguments.target)
    model = running.load_model(arguments.target, arguments.dtype, arguments.quantization)
    with told_to_the_user(), running.exit_on_interrupt(), _Bar() as bar:
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
            on_progress=bar.show,
        )
    running.put(f"{done.num_answers} answers, {done.num_tokens} tokens in {arguments.out}\n")
    return 0


def _prompts(path: str) -> list[str]:
    from jaxspec_models import answers

    try:
        return answers.read_prompts(path)
    except OSError as error:
        raise UserError(f"the prompts {path} cannot be read: {error.strerror or error}") from error


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
        """Draws `jaxspec_models.answers.Progress`; the estimate counts from the first on."""
        import tqdm

        if progress.tokens_wanted is None:
            done, total, unit = progress.num_answers, progress.num_tasks, " answers"
        else:
            done, total, unit = progress.num_tokens, progress.tokens_wanted, " tokens"
        if self._bar is None:
            self._bar = tqdm.tqdm(
                total=total, initial=done, unit=unit, file=sys.stderr, dynamic_ncols=True
            )
            return
        self._bar.update(min(done, total) - self._bar.n)
