"""How the command ends: a user's mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""
CLOSED_PIPE = 141
"""Exit code when the reader went away (`| head`), as shells have it: 128 + SIGPIPE."""

MISSING_EXTRA = "{name} is not installed; language models need: pip install 'jaxspec[models]'"


class UserError(Exception):
    """What the user can put right; `str` of it is one line."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


@contextlib.contextmanager
def told_to_the_user() -> Iterator[None]:
    r"""Turns what loading and checking complain about into a `UserError`.

    Only around calls that say what to change: an error of the running program is a bug, and
    keeps its traceback.

    Raises:
      UserError: a ValueError, an OSError or a package that is not installed.

    Example:
      >>> with told_to_the_user():
      ...     raise ValueError("too long;\n  shorten it")
      Traceback (most recent call last):
      jaxspec.cli.errors.UserError: too long; shorten it
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(error) from error
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if not name or name.startswith("jaxspec"):
            raise
        raise UserError(MISSING_EXTRA.format(name=name)) from error
    except ImportError as error:
        if error.name is not None:  # else our own, which says what to install
            raise
        raise UserError(error) from error
