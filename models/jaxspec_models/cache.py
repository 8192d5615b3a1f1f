"""The cache: files that are built once, published atomically, safe to share.

Every file here is built under a lock, beside its final name, and renamed; a *stamp* next to it
says what it was built from and what it should look like. A file whose stamp does not match is
built anew, whatever the reason: an interruption, a full disk, another version.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxspec_models.files import write_atomically

SMALL_BYTES = 16 << 20
"""Files up to this size are hashed whenever they are used: it takes milliseconds."""


def cache_dir() -> Path:
    """Where downloads are kept: `JAXSPEC_CACHE`, else the platform's cache directory.

    Example:
      >>> from unittest import mock
      >>> with mock.patch.dict(os.environ, {"JAXSPEC_CACHE": "models"}):
      ...     str(cache_dir())
      'models'
    """
    if path := os.environ.get("JAXSPEC_CACHE"):
        return Path(path).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxspec", appauthor=False))


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    """Tells the user what takes so long, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".stamp")


def _stamp(path: Path, stat: os.stat_result, source: str, digest: str) -> None:
    stamp = {"source": source, "sha256": digest, "size": stat.st_size, "mtime": stat.st_mtime_ns}
    write_atomically(_stamp_path(path), json.dumps(stamp).encode())


def is_intact(path: Path, source: str) -> bool:
    """Whether a file is what `build_once` published for this source.

    A large file is not hashed on every use (half a second for 500 MB): as long as its size and its
    time of change are those noted when its hash was known, nothing has written to it since. If
    only the time differs (the cache was copied), the hash decides, and is noted again.

    Args:
      path: the file.
      source: what it should have been built from.
    """
    try:
        stamp = json.loads(_stamp_path(path).read_text(encoding="utf-8"))
        stat = path.stat()
        if (stamp["source"], stamp["size"]) != (source, stat.st_size):
            return False
        is_small = stat.st_size <= SMALL_BYTES
        if stamp["mtime"] == stat.st_mtime_ns and not is_small:
            return True
        if stamp["sha256"] != sha256(path):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if stamp["mtime"] != stat.st_mtime_ns:
        with contextlib.suppress(OSError):  # a cache that may only be read
            _stamp(path, stat, source, stamp["sha256"])
    return True


def discard(path: Path) -> None:
    """Makes `build_once` build a file anew."""
    with contextlib.suppress(OSError):
        _stamp_path(path).unlink()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    import filelock

    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Waiting for another process that is preparing {directory.name} ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def build_once(path: Path, *, source: str, build: Callable[[Path], None]) -> Path:
    """Returns `path`, built first if it is missing, damaged or made from something else.

    Processes that come at the same time build it once: the others wait.

    Args:
      path: the file.
      source: names what it is built from; another source builds anew.
      build: writes the file to the path it is given.

    Raises:
      OSError: the cache cannot be written.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "greeting.txt"
      >>> def build(path):
      ...     print("building")
      ...     _ = path.write_text("hello")
      >>> build_once(path, source="v1", build=build).read_text()
      building
      'hello'
      >>> build_once(path, source="v1", build=build).read_text()
      'hello'
    """
    if is_intact(path, source):
        return path
    try:
        return _build_locked(path, source, build)
    except OSError as error:
        if error.errno is None:  # no failure of the file system: `build` says what is wrong
            raise
        advice = "free some space, or" if error.errno == errno.ENOSPC else "give access to it, or"
        raise OSError(
            f"{path} could not be written ({error}); {advice} set JAXSPEC_CACHE to a directory "
            "that can be written."
        ) from error


def _build_locked(path: Path, source: str, build: Callable[[Path], None]) -> Path:
    with _locked(path.parent):
        if is_intact(path, source):  # someone else built it while this process waited
            return path
        # What a process left that was killed here; nobody else holds the lock.
        for leftover in path.parent.glob("building-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix="building-", dir=path.parent, ignore_cleanup_errors=True
        ) as folder:
            temporary = Path(folder) / path.name
            build(temporary)
            digest, stat = sha256(temporary), temporary.stat()
            # A crash between these two lines leaves a file without its stamp: it is built anew.
            os.replace(temporary, path)
            _stamp(path, stat, source, digest)
    return path
