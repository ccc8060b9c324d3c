"""Numbers as tables and logs show them: as many decimals as the interval can tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["metric_text", "value_text"]

DECIMALS = 2  # of accuracies in percent, whatever their interval
MOST = 6


def value_text(value: float, ci95: float | None = None) -> str:
    """``61.20 ± 0.75``; two digits of a smaller interval, ``0.0123 ± 0.0045``; four digits of a value without one."""
    if ci95 is None:
        return f"{value:.4g}"
    decimals = DECIMALS
    if 0 < ci95 < 0.1:
        decimals = min(MOST, 1 - math.floor(math.log10(ci95)))
    return f"{value:.{decimals}f} ± {ci95:.{decimals}f}"


def metric_text(metric: Mapping[str, Any] | None) -> str:
    """A stored metric, or an empty string where there is none."""
    return "" if metric is None else value_text(metric["value"], metric.get("ci95"))
