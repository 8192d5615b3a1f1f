"""Training a drafter: texts to batches, steps, checkpoints, a log.

What a step learns from depends on the seed and the step's number only, so that a checkpoint needs
the state and nothing else: killed and begun again, training goes on bit for bit as it would have
(in float32, on one machine).
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.training import steps
from jaxspec_models import answers
from jaxspec_models.drafters import learning, methods, parts
from jaxspec_models.features import Features
from jaxspec_models.files import write_atomically

Array: TypeAlias = jax.Array

_WIDTHS = (128, 256, 384, 512, 768, 1024)
_HELD_OUT = 50  # every so manieth prompt is kept for evaluation


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
      num_steps: optimiser steps.
      tokens_a_part: of the texts (with padding) in one part of a batch.
      parts_a_step: parts whose gradients are accumulated.
      anchors_a_text: blocks learned of a text of 128 tokens; longer texts have more.
      objective: what is minimised.
      learning_rate: at its highest.
      num_warmup_steps: of its rise.
      weight_decay: of matrices.
      dtype: "float32" or "bfloat16", of the products; weights and sums are float32 in both.
      num_devices: that share each part, row by row.
      seed: of the order, the anchors and the first weights.
    """

    num_steps: int
    tokens_a_part: int = 2048
    parts_a_step: int = 1
    anchors_a_text: int = 16
    objective: learning.Objective = dataclasses.field(default_factory=learning.Objective)
    learning_rate: float = 1.5e-3
    num_warmup_steps: int = 100
    weight_decay: float = 0.01
    dtype: str = "float32"
    num_devices: int = 1
    seed: int = 0


class Texts:
    """Answers with their features, as what each step learns from.

    Args:
      found: the answers.
      read: the features of the i-th; its last layer is what the target's head reads.
      settings: how to train.

    Raises:
      ValueError: there is nothing to learn from.
    """

    def __init__(
        self,
        found: Sequence[answers.Answer],
        read: Callable[[int], Features],
        settings: Settings,
    ):
        self._found, self._read, self._settings = found, read, settings
        usable = [i for i, a in enumerate(found) if _first_anchor(a) + 1 < len(a.tokens)]
        self.held_out = [i for i in usable if found[i].prompt % _HELD_OUT == 0]
        self.learned = [i for i in usable if found[i].prompt % _HELD_OUT != 0]
        if not self.learned:
            raise ValueError("there are no answers to learn from.")

    @property
    def steps_an_epoch(self) -> int:
        """How many steps go over every text once."""
        return len(self._epoch(0))

    @property
    def num_tokens(self) -> int:
        """Of the answers that are learned, prompts apart."""
        chosen = (self._found[i] for i in self.learned)
        return sum(len(answer.tokens) - answer.prompt_length for answer in chosen)

    def step(self, number: int) -> learning.Part:
        """What step `number` learns from; every array with a leading axis of parts."""
        epoch, index = divmod(number, self.steps_an_epoch)
        width, chosen = self._epoch(epoch)[index]
        rng = np.random.default_rng([self._settings.seed, 1, number])
        return self._stacked(width, chosen, rng)

    def sample(self, num_tokens: int = 50_000) -> learning.Part:
        """Learned texts of one width, without an axis of parts, for the first weights."""
        by_width: dict[int, list[int]] = {}
        for width, chosen in self._grouped(self.learned):
            by_width.setdefault(width, []).extend(chosen)
        width, chosen = max(by_width.items(), key=lambda item: len(item[1]) * item[0])
        rng = np.random.default_rng([self._settings.seed, 3])
        some = chosen[: max(1, num_tokens // width)]
        return jax.tree.map(lambda x: x[0], self._arrays(width, some, 1, len(some), rng))

    def evaluation(self) -> Iterator[learning.Part]:
        """The held-out texts, every time with the same anchors: of each text a stretch of tokens.

        Behind one another, since a round begins where the one before has ended.
        """
        for number, (width, chosen) in enumerate(self._grouped(self.held_out)):
            rng = np.random.default_rng([self._settings.seed, 2, number])
            yield self._stacked(width, chosen, rng, in_stretches=True)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the training)
    def _epoch(self, number: int) -> list[tuple[int, list[int]]]:
        rng = np.random.default_rng([self._settings.seed, 0, number])
        groups = self._grouped(rng.permutation(self.learned).tolist())
        return [groups[i] for i in rng.permutation(len(groups))]

    def _grouped(self, texts: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(width, texts) of each step: their number depends on the texts alone, not their order."""
        by_width: dict[int, list[int]] = {}
        for i in texts:
            by_width.setdefault(_padded(len(self._found[i].tokens)), []).append(i)
        return [
            (width, chosen[first : first + size])
            for width, chosen in sorted(by_width.items())
            for size in [self._rows(width) * self._settings.parts_a_step]
            for first in range(0, len(chosen), size)
        ]

    def _rows(self, width: int) -> int:
        devices = self._settings.num_devices
        return -(-max(1, self._settings.tokens_a_part // width) // devices) * devices

    def _stacked(
        self,
        width: int,
        chosen: Sequence[int],
        rng: np.random.Generator,
        *,
        in_stretches: bool = False,
    ) -> learning.Part:
        num_parts, rows = self._settings.parts_a_step, self._rows(width)
        return self._arrays(width, chosen, num_parts, rows, rng, in_stretches=in_stretches)

    def _arrays(
        self,
        width: int,
        chosen: Sequence[int],
        num_parts: int,
        rows: int,
        rng: np.random.Generator,
        *,
        in_stretches: bool = False,
    ) -> learning.Part:
        batch = num_parts * rows
        num_anchors = self._settings.anchors_a_text * width // _WIDTHS[0]
        features = [self._read(i) for i in chosen]
        _, num_layers, channels = features[0].hidden.shape
        tokens = np.zeros((batch, width), np.int32)
        hidden = np.zeros((batch, width, num_layers, channels), features[0].hidden.dtype)
        log_normalizers = np.zeros((batch, width), np.float32)
        first, lengths = np.ones((batch,), np.int32), np.zeros((batch,), np.int32)
        anchors = np.full((batch, num_anchors), width, np.int32)
        temperatures = np.zeros((batch,), np.float32)
        for row, i in enumerate(chosen):
            answer = self._found[i]
            length = lengths[row] = len(answer.tokens)
            tokens[row, :length] = answer.tokens
            hidden[row, :length] = features[row].hidden
            log_normalizers[row, :length] = features[row].log_normalizers
            first[row], temperatures[row] = _first_anchor(answer), answer.temperature
            count = length - 1 - first[row]
            if in_stretches:
                begin = rng.integers(max(count - num_anchors, 0) + 1)
                places = begin + np.arange(min(count, num_anchors))
            else:
                places = rng.permutation(count)[:num_anchors]
            anchors[row, : len(places)] = first[row] + places
        whole: Any = (
            tokens, hidden[:, :, :-1], hidden[:, :, -1], log_normalizers, first, lengths, anchors,
            temperatures,
        )  # fmt: skip
        whole = learning.Part(*whole)
        return jax.tree.map(lambda x: x.reshape(num_parts, rows, *x.shape[1:]), whole)


def train(
    config: parts.DrafterConfig,
    params: Any,
    frozen: learning.Frozen,
    texts: Texts,
    settings: Settings,
    directory: str | os.PathLike[str],
    *,
    seconds_a_checkpoint: float = 180.0,
    steps_an_evaluation: int = 250,
    on_step: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
) -> Any:
    """Trains, or goes on training where it was interrupted.

    Args:
      config: the drafter's shape, in float32, which says by which method.
      params: the first weights, of the method's `init_params`; not used where training goes on.
      frozen: what it shares with its target.
      texts: what it learns from.
      settings: how.
      directory: for checkpoints and `log.csv`, one line an evaluation.
      seconds_a_checkpoint: between two of them; one more at the end.
      steps_an_evaluation: between two of them; one more at the end.
      on_step: called behind each step with the number of steps done and the step's metrics.

    Returns:
      The trained weights, f32.

    Raises:
      ValueError: a training in the directory was begun with other settings, another shape or
        other texts; there are fewer devices.
      FloatingPointError: the loss is not finite.
    """
    import orbax.checkpoint as ocp

    if settings.num_devices > jax.device_count():
        raise ValueError(
            f"num_devices is {settings.num_devices}, and there are {jax.device_count()}."
        )
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    _begin(directory / "training.json", config, settings, texts)
    tx, step, evaluate = _programs(
        config,
        settings.objective,
        settings.dtype,
        learning_rate=settings.learning_rate,
        num_steps=settings.num_steps,
        num_warmup_steps=settings.num_warmup_steps,
        weight_decay=settings.weight_decay,
    )
    shard, replicate = _placers(settings.num_devices)
    state, frozen = replicate(steps.init(params, tx)), replicate(frozen)
    log = _Log(directory / "log.csv")
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            restored = manager.restore(latest, args=ocp.args.StandardRestore(state))
            state = steps.TrainState(*restored)  # where the first one lies
        done = int(state.step)
        log.cut(done)
        last_checkpoint = time.monotonic()
        seconds = 0.0
        while done < settings.num_steps:
            begun = time.monotonic()
            state, metrics = step(state, shard(texts.step(done)), frozen)
            done += 1
            values = {name: np.asarray(value) for name, value in metrics.items()}
            seconds += time.monotonic() - begun
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"the loss of step {done} is not finite; lower the learning rate."
                )
            on_step(done, values)
            is_last = done == settings.num_steps
            if is_last or done % steps_an_evaluation == 0:
                held_out = evaluate(state.params, texts, frozen)
                log.add({"step": done, "seconds": seconds, "loss": values["loss"]} | held_out)
            if is_last or time.monotonic() - last_checkpoint > seconds_a_checkpoint:
                manager.save(done, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
                last_checkpoint = time.monotonic()
    return state.params


def _begin(path: Path, config: parts.DrafterConfig, settings: Settings, texts: Texts) -> None:
    """Notes what is trained, or compares it with what was begun: mixed, it would be neither."""
    described = {
        "settings": dataclasses.asdict(settings),
        "shape": {"method": config.method, **dataclasses.asdict(config)},
        "texts": [len(texts.learned), len(texts.held_out)],
    }
    text = json.dumps(described, indent=2) + "\n"
    if not path.exists():
        write_atomically(path, text.encode())
        return
    found, now = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
    if others := [name for name in now if found.get(name) != now[name]]:
        raise ValueError(
            f"the training in {path.parent} was begun with other {' and '.join(others)} (see "
            f"{path.name}): go on with those, or choose another directory."
        )


@functools.lru_cache(maxsize=4)
def _programs(
    config: parts.DrafterConfig, objective: learning.Objective, dtype: str, **rates: Any
) -> tuple[Any, Any, Any]:
    """The optimiser, the step and the evaluation, compiled once for a shape and its rates."""
    tx = steps.optimizer(**rates)
    loss = _loss(config, objective)
    if dtype != "float32":
        loss = _in_dtype(loss, jnp.dtype(dtype))
    return tx, steps.make_step(loss, tx), _make_evaluation(loss)


def _loss(config: parts.DrafterConfig, objective: learning.Objective) -> steps.LossFunction:
    """The method's, of weights."""
    method = methods.of(config.method).module
    graphdef, _ = method.abstract(config)

    def of_weights(params: Any, part: Any, frozen: Any) -> steps.Totals:
        model = nnx.merge(graphdef, nnx.State(params))
        found: steps.Totals = method.loss(model, part, frozen, objective=objective)
        return found

    return of_weights


def _in_dtype(loss: steps.LossFunction, dtype: Any) -> steps.LossFunction:
    """With the products' weights cast; gradients come back as float32."""

    def cast(path: Any, x: Array) -> Array:
        is_matrix = x.ndim >= 2 and getattr(path[-1], "key", None) == "weight"
        return x.astype(dtype) if is_matrix else x

    def of_cast(params: Any, part: Any, frozen: Any) -> steps.Totals:
        return loss(jax.tree_util.tree_map_with_path(cast, params), part, frozen)

    return of_cast


def _placers(num_devices: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Two functions: one spreads parts' rows, their second axis, over devices, one replicates."""
    if num_devices == 1:
        return lambda tree: tree, lambda tree: tree
    # What each device computes is XLA's to find out; the losses know nothing of devices.
    mesh = jax.make_mesh(
        (num_devices,),
        ("rows",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )

    def placer(*axes: str | None) -> Callable[[Any], Any]:
        spec = jax.sharding.PartitionSpec(*axes)
        return lambda tree: jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))

    return placer(None, "rows"), placer()


def _make_evaluation(loss: steps.LossFunction) -> Callable[[Any, Texts, Any], dict[str, float]]:
    @jax.jit
    def of_parts(params: Any, parts: Any, frozen: Any) -> steps.Totals:
        def add(so_far: steps.Totals, part: Any) -> tuple[steps.Totals, None]:
            return jax.tree.map(jnp.add, so_far, loss(params, part, frozen)), None

        shapes = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], parts), frozen)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    def evaluate(params: Any, texts: Texts, frozen: Any) -> dict[str, float]:
        """Of the held-out texts: the loss, and each metric; of slots, each by itself."""
        totals = None
        for held_out in texts.evaluation():
            new = of_parts(params, held_out, frozen)
            totals = new if totals is None else jax.tree.map(jnp.add, totals, new)
        if totals is None:
            return {}
        found = {"held_out_loss": float(totals.loss / totals.weight)}
        means = {n: np.asarray(value) for n, value in steps.mean_metrics(totals).items()}
        if "predicted" in means:
            found["calibration_error"] = learning.calibration_error(
                means.pop("predicted"),
                means.pop("accepted"),
                np.asarray(totals.metrics["accepted"][1]),
            )
        for name, value in means.items():
            if value.ndim == 0:
                found[name] = float(value)
                continue
            for slot, of_slot in enumerate(value):
                found[f"{name}_{slot + 1}"] = float(of_slot)
        return found

    return evaluate


def last_line(path: Path) -> dict[str, float]:
    """The last evaluation in a log: its numbers by name."""
    with path.open(encoding="utf-8", newline="") as file:
        *_, last = csv.DictReader(file)
    return {name: float(value) for name, value in last.items()}


class _Log:
    """A CSV file, rewritten whole with each line."""

    def __init__(self, path: Path):
        self._path = path
        self._lines: list[dict[str, Any]] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self._lines = list(csv.DictReader(file))

    def cut(self, step: int) -> None:
        """Forgets what came behind a checkpoint: it will be done again."""
        self._lines = [line for line in self._lines if int(line["step"]) <= step]

    def add(self, line: dict[str, Any]) -> None:
        self._lines.append({name: f"{float(value):.6g}" for name, value in line.items()})
        self._lines[-1]["step"] = str(int(line["step"]))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self._lines[-1]), restval="")
        writer.writeheader()
        writer.writerows(self._lines)
        write_atomically(self._path, text.getvalue().encode())


def _first_anchor(answer: answers.Answer) -> int:
    """The last token of the prompt is pending when the first block is drafted."""
    return max(1, answer.prompt_length - 1)


def _padded(length: int) -> int:
    return next((width for width in _WIDTHS if width >= length), -(-length // 512) * 512)
