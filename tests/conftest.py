"""Strictness for every test: no implicit rank or dtype promotion, no key used twice."""

import ctypes
import gc
import itertools
import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)


_MAPS, _MEMORY = Path("/proc/self/maps"), Path("/proc/self/statm")
_MAX_MAPS = 35_000  # Linux allows a process 65,530; every compiled program holds dozens
_MAX_BYTES = 4 * 2**30  # of several workers on one machine
_TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _small_process():
    """Lets go of compiled programs before there are too many memory maps, or too much memory."""
    yield
    if next(_TESTS) % 8 == 0 and _MAPS.exists():
        with _MAPS.open("rb") as lines:
            count = sum(1 for _ in lines)
        resident = int(_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if count > _MAX_MAPS or resident > _MAX_BYTES:
            jax.clear_caches()
            gc.collect()
            # The C library keeps what was freed; glibc gives it back when asked.
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)


def pytest_terminal_summary(terminalreporter):
    """What the exactness matrix has shown, over all workers."""
    numbers = {"proven": [], "refused": [], "caught": [], "total_variation": []}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", ()):
            if name in numbers and report.when == "call":
                numbers[name].append(value)
    if any(numbers.values()):
        terminalreporter.write_line(
            f"exactness matrix: {sum(numbers['proven'])} cells proven (largest total variation "
            f"{max(numbers['total_variation'], default=0.0):.4f}), {sum(numbers['refused'])} "
            f"refused with their reason, {sum(numbers['caught'])} planted bugs caught"
        )
