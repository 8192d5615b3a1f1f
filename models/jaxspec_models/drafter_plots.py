"""A training's log as a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from jaxspec_models.files import write_atomically


def draw_log(log: Path, picture: Path) -> None:
    """Draws the losses, the acceptance of each draft and the tokens a step of `log.csv`.

    Args:
      log: of `drafter_training.train`.
      picture: a PNG file, written at once and whole.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: a file cannot be read or written.
    """
    from matplotlib.figure import Figure

    with log.open(encoding="utf-8", newline="") as file:
        lines = [{k: float(v) for k, v in line.items() if v} for line in csv.DictReader(file)]
    names = list(lines[0]) if lines else []
    panels = (
        ("loss", [n for n in names if n in ("loss", "held_out_loss")]),
        (
            "acceptance of each draft, held out",
            sorted(n for n in names if n.startswith("acceptance_")),
        ),
        ("tokens a step, held out", [n for n in names if n.startswith("tokens_per_step")]),
    )
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in curves:
            axes.plot([x["step"] for x in lines], [x[name] for x in lines], label=name)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    write_atomically(picture, image.getvalue())
