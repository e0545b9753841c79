"""How benchmarks state what they measured."""

from __future__ import annotations

import statistics


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Least, median and greatest of what was measured, rounded."""
    chosen = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, digits) for name, value in chosen.items()}
