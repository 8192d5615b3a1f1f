"""Strictness for every test: no implicit rank or dtype promotion, no key used twice."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)


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
