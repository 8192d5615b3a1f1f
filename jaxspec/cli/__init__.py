"""The `jaxspec` command: the outermost layer.

No model code is imported and no device started before the arguments are known to be right, so
that `--help` and a mistake in an option take no longer than importing JAX.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from jaxspec.cli.errors import CLOSED_PIPE, INTERRUPTED, UserError
from jaxspec.cli.options import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the arguments; None: those of the process.

    Returns:
      The exit code: 0; 1 if the model's logits were not finite or the output cannot be written;
      2 for a user's mistake, told in one line on stderr; 130 after Ctrl-C; 141 if the reader of
      the output went away.

    Example:
      >>> main(["generate", "--temperature", "-1"])
      2
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character: "?"
                stream.reconfigure(errors="replace")
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f"jaxspec: {error}\n")
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stderr.write("\nInterrupted.\n")
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return CLOSED_PIPE
    except OSError as error:  # everything that reads has told its mistakes already
        _silence_stdout()
        sys.stderr.write(f"jaxspec: the output cannot be written: {error.strerror or error}\n")
        return 1


def _run(argv: Sequence[str]) -> int:
    try:
        arguments = parse(argv)
    except SystemExit:  # --help or --version, which has been printed
        return 0
    return arguments.run(arguments)


def _silence_stdout() -> None:
    """Points stdout nowhere, or Python would complain when it flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):  # a stdout without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
