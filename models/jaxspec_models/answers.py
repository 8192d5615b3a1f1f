"""A target's own answers to prompts: what drafters are trained on.

A directory of them holds `answers.json`, which says what they are answers to and how they were
drawn, and shards. The order of the work is fixed when it begins, each answer has a key of its own,
and a shard appears at once and whole: whoever is interrupted runs the same call again, and
nothing is lost, repeated or changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

import jaxspec
from jaxspec_models.files import write_atomically
from jaxspec_models.text import encode_prompt

if TYPE_CHECKING:
    from jaxspec_models.recording import Recorder

_VERSION = 1


class Answer(NamedTuple):
    """One prompt with its answer.

    Attributes:
      tokens: i32[N], the prompt, chat template included, and the answer, an EOS included.
      prompt_length: where the answer begins.
      prompt: the prompt's number.
      temperature: the answer was drawn at; 0: greedy.
    """

    tokens: np.ndarray
    prompt_length: int
    prompt: int
    temperature: float


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the work is.

    Attributes:
      num_answers: written, earlier calls included.
      num_tokens: their tokens, without the prompts'.
      num_tasks: answers there will be.
      tokens_wanted: where the work ends if that comes first; None: nowhere.
    """

    num_answers: int
    num_tokens: int
    num_tasks: int
    tokens_wanted: int | None

    @property
    def is_done(self) -> bool:
        """Whether no further shard will be written."""
        enough = self.tokens_wanted is not None and self.num_tokens >= self.tokens_wanted
        return enough or self.num_answers >= self.num_tasks


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a JSONL file: one object a line, with its text under "prompt".

    Args:
      path: the file.

    Returns:
      The texts, in the file's order.

    Raises:
      ValueError: a line is no such object, a prompt is empty, or there is none.
      OSError: the file cannot be read.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "prompts.jsonl")
      >>> _ = path.write_text('{"prompt": "What is a goose?"}')
      >>> read_prompts(path)
      ['What is a goose?']
    """
    prompts = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f'line {number} of {path} is no JSON object with a "prompt".'
                ) from error
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"the prompt in line {number} of {path} is no text, or empty.")
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"there are no prompts in {path}.")
    return prompts


def write_answers(
    model: jaxspec.LanguageModel,
    tokenizer: Any,
    prompts: Sequence[str],
    directory: str | os.PathLike[str],
    *,
    target: str,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 256,
    max_prompt_tokens: int = 512,
    tokens_wanted: int | None = None,
    batch: int = 32,
    batches_a_shard: int = 4,
    seed: int = 0,
    recorder: Recorder | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Lets a model answer prompts, through its chat template, and keeps the answers.

    Every prompt is answered once at each temperature, in an order drawn from the seed: what has
    been written at any time is a fair sample of the whole. Prompts that are too long are left out.
    Called again with the same arguments it goes on behind the last whole shard; more tokens may be
    wanted then. An answer does not depend on the batch it was written in.

    Args:
      model: the target.
      tokenizer: its own; one with a chat template.
      prompts: what to answer.
      directory: where to; made if need be.
      target: the model's name, for whoever reads the answers.
      temperatures: one answer each; 0 is greedy.
      max_new_tokens: where an answer ends at the latest.
      max_prompt_tokens: longer prompts are left out.
      tokens_wanted: new tokens at which the work ends, with the shard that reaches them; None:
        when all is answered.
      batch: answers written at a time.
      batches_a_shard: batches between two writes to the disk.
      seed: another one, another order and other draws.
      recorder: a `recording.Recorder`, which keeps what the target computes on the way. Shards
        written without it are left to `features.write_features`.
      on_progress: called at the beginning and behind every shard.

    Returns:
      The `Progress` at the end.

    Raises:
      ValueError: the directory holds answers to other prompts, of another model or drawn
        otherwise; no prompt is short enough; or as `jaxspec.generate`.
      OSError: the directory cannot be written.

    Example:
      >>> import jax.numpy as jnp, tempfile, tokenizers
      >>> from jaxspec_models.tokenizer import TextTokenizer
      >>> def apply(params, tokens, cache, *, start):  # the next letter of the alphabet
      ...     return jaxspec.ModelOutput(params[tokens]), cache
      >>> def init_cache(batch, capacity, max_step):
      ...     return ()
      >>> model = jaxspec.LanguageModel(10.0 * jnp.eye(4)[jnp.array([1, 2, 3, 0])],
      ...                               apply, init_cache, vocab_size=4)
      >>> letters = tokenizers.models.BPE({"a": 0, "b": 1, "c": 2, "d": 3}, [])
      >>> tokenizer = TextTokenizer(tokenizers.Tokenizer(letters),
      ...                           chat_template="{{ messages[0]['content'] }}")
      >>> directory = tempfile.mkdtemp()
      >>> done = write_answers(model, tokenizer, ["a", "cd"], directory, target="alphabet",
      ...                      temperatures=[0.0], max_new_tokens=3, batch=2)
      >>> done.num_answers, done.num_tokens
      (2, 6)
      >>> sorted(answer.tokens.tolist() for answer in read_answers(directory))
      [[0, 1, 2, 3], [2, 3, 0, 1, 2]]
    """
    directory = Path(directory)
    encoded = [
        np.asarray(encode_prompt(tokenizer, [{"role": "user", "content": prompt}]), np.int32)
        for prompt in prompts
    ]
    settings: dict[str, Any] = {
        "version": _VERSION,
        "target": target,
        "prompts": _digest(encoded),
        "temperatures": [float(t) for t in temperatures],
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "answers_a_shard": batch * batches_a_shard,
        "seed": seed,
    }
    tasks = _tasks(encoded, settings)
    if not tasks:
        raise ValueError(f"no prompt has at most max_prompt_tokens={max_prompt_tokens} tokens.")
    longest = max(len(encoded[task.prompt]) for task in tasks) + max_new_tokens
    if model.max_length is not None and longest > model.max_length:
        raise ValueError(
            f"the longest prompt with max_new_tokens={max_new_tokens} makes {longest} tokens, and "
            f"the model is made for {model.max_length}; lower max_new_tokens or max_prompt_tokens."
        )
    _begin(directory, settings)
    if recorder is not None:
        recorder.begin(settings)

    shards = list(_batched(tasks, settings["answers_a_shard"]))
    progress = Progress(0, 0, len(tasks), tokens_wanted)
    num_told = 0
    for number, shard in enumerate(shards):
        path = _shard_path(directory, number)
        if path.exists():
            answers = read_shard(path)
        else:
            if progress.is_done:
                break
            if not num_told:
                on_progress(progress)
                num_told = 1
            answers, heard = _answer(model, encoded, shard, settings, batch, recorder)
            if recorder is not None:  # first: answers without features would stay without
                recorder.write(path.name, answers, heard)
            _write_shard(path, answers)
        num_tokens = sum(len(answer.tokens) - answer.prompt_length for answer in answers)
        progress = dataclasses.replace(
            progress,
            num_answers=progress.num_answers + len(answers),
            num_tokens=progress.num_tokens + num_tokens,
        )
        if num_told:
            on_progress(progress)
    return progress


def read_answers(directory: str | os.PathLike[str]) -> list[Answer]:
    """What `write_answers` has written so far.

    Args:
      directory: the directory.

    Returns:
      The answers, in the order of the work.

    Raises:
      ValueError: there are no answers there.

    Example:
      See `write_answers`.
    """
    directory = Path(directory)
    read_settings(directory)
    answers = [answer for path in shard_paths(directory) for answer in read_shard(path)]
    if not answers:
        raise ValueError(f"{directory} holds no answers yet.")
    return answers


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What the answers are of, and how they were drawn: the contents of `answers.json`.

    Args:
      directory: of `write_answers`.

    Raises:
      ValueError: there are none, or of another version.
    """
    path = Path(directory) / "answers.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory} holds no answers: no readable answers.json. "
            "`jaxspec train data` writes them."
        ) from error
    if settings.get("version") != _VERSION:
        raise ValueError(f"{path} is of version {settings.get('version')}, not {_VERSION}.")
    return settings


def shard_paths(directory: str | os.PathLike[str]) -> list[Path]:
    """The shards written so far, in the order of the work."""
    return sorted(Path(directory).glob("shard-*.safetensors"))


def read_shard(path: Path) -> list[Answer]:
    """The answers of one shard."""
    columns = safetensors.numpy.load(path.read_bytes())
    tokens = np.split(columns["tokens"], np.cumsum(columns["lengths"])[:-1])
    rest = zip(
        columns["prompt_lengths"].tolist(),
        columns["prompts"].tolist(),
        columns["temperatures"].tolist(),
        strict=True,
    )
    return [Answer(text, *others) for text, others in zip(tokens, rest, strict=True)]


class _Task(NamedTuple):
    number: int  # of all tasks, in a fixed order; the key is folded with it
    prompt: int
    temperature: float


def _tasks(encoded: Sequence[np.ndarray], settings: dict[str, Any]) -> list[_Task]:
    """All that there is to do, in a random order."""
    pairs = [
        (prompt, temperature)
        for prompt, tokens in enumerate(encoded)
        for temperature in settings["temperatures"]
        if len(tokens) <= settings["max_prompt_tokens"]
    ]
    order = np.random.default_rng(settings["seed"]).permutation(len(pairs))
    return [_Task(number, *pairs[at]) for number, at in enumerate(order)]


def _answer(
    model: jaxspec.LanguageModel,
    encoded: Sequence[np.ndarray],
    tasks: Sequence[_Task],
    settings: dict[str, Any],
    batch: int,
    recorder: Recorder | None,
) -> tuple[list[Answer], list[np.ndarray]]:
    """One shard, and what the recorder heard of each answer.

    Prompts of like length share a batch; all batches have one shape of rows.
    """
    key = jax.random.key(settings["seed"], impl="threefry2x32")
    answers: dict[int, Answer] = {}
    heard: dict[int, np.ndarray] = {}
    listening: dict[str, Any] = {}
    if recorder is not None:
        # One draft at most: rounds without any run at the width of plain decoding.
        listening = {"drafter": recorder.listener, "num_draft_tokens": 1, "return_state": True}
    by_length = sorted(tasks, key=lambda task: (len(encoded[task.prompt]), task.number))
    for group in _batched(by_length, batch):
        # The last one is filled up, so that no other program is needed.
        rows = [group[i % len(group)] for i in range(batch)]
        numbers = np.asarray([task.number for task in rows], np.uint32)
        temperatures = np.asarray([task.temperature for task in rows], np.float32)
        generation = jaxspec.generate(
            model,
            [encoded[task.prompt].tolist() for task in rows],
            sampling=jaxspec.Sampling(temperature=temperatures),
            max_new_tokens=settings["max_new_tokens"],
            key=jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers),
            **listening,
        )
        tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
        _check_status(generation.status)
        for row, task in enumerate(group):
            prompt = encoded[task.prompt]
            answers[task.number] = Answer(
                np.concatenate([prompt, tokens[row, : lengths[row]]]).astype(np.int32),
                len(prompt),
                task.prompt,
                task.temperature,
            )
        if recorder is not None:
            numbers_of_rows = [task.number for task in group]
            counts = [len(answers[number].tokens) for number in numbers_of_rows]
            states = recorder.heard(generation, counts)
            heard.update(zip(numbers_of_rows, states, strict=True))
    ordered = [task.number for task in tasks]
    return [answers[i] for i in ordered], [heard[i] for i in ordered if i in heard]


def _check_status(status: Any) -> None:
    if np.any(np.asarray(status) == jaxspec.status.NONFINITE):
        raise ValueError("the target's logits were not finite: it cannot be learned from.")


def _begin(directory: Path, settings: dict[str, Any]) -> None:
    """Writes the settings, or compares them with those of the work begun."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "answers.json"
    if not path.exists():
        write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())
        return
    found = read_settings(directory)
    others = [name for name in settings if found.get(name) != settings[name]]
    if others:
        differences = ", ".join(
            f"{name} {found.get(name)!r} (now {settings[name]!r})" for name in others
        )
        raise ValueError(
            f"{directory} holds answers written with {differences}: "
            "go on with those settings, or choose another directory."
        )


def _write_shard(path: Path, answers: Sequence[Answer]) -> None:
    columns = {
        "tokens": np.concatenate([answer.tokens for answer in answers]),
        "lengths": np.asarray([len(answer.tokens) for answer in answers], np.int32),
        "prompt_lengths": np.asarray([answer.prompt_length for answer in answers], np.int32),
        "prompts": np.asarray([answer.prompt for answer in answers], np.int32),
        "temperatures": np.asarray([answer.temperature for answer in answers], np.float32),
    }
    write_atomically(path, safetensors.numpy.save(columns))


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"


def _digest(encoded: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for tokens in encoded:
        digest.update(np.int64(len(tokens)).tobytes())
        digest.update(tokens.tobytes())
    return digest.hexdigest()[:16]


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
