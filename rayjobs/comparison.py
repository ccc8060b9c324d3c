"""The arithmetic of the comparison table: intervals over seeds, and what they allow to say against random
initialisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation import TASKS
from rayjobs.reports import mean_interval
from rayjobs.transfer import TaskConfigs

__all__ = ["Column", "best_metrics", "build_rows", "cell", "columns_of", "grouped_reasons", "judged_metric", "notes_of"]

PREFERRED = "few_shot/5way_5shot_acc"
HEADINGS = {
    "few_shot/5way_1shot_acc": "5-way 1-shot",
    "few_shot/5way_5shot_acc": "5-way 5-shot",
    "linear/top1": "linear top-1",
    "knn/top1": "kNN top-1",
    "entropy/h_r": "H_R",
    "uniformity/normalized": "U",
}
ANALYSES = ("entropy", "uniformity")  # they describe features; neither direction is better by itself
HIDDEN = ("uniformity/raw",)  # grows with the features' length, which differs between methods; in the JSON

Cell = dict[str, Any]
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A metric of the table.

    Attributes:
        metric: its name.
        heading: what stands above it.
        sign: 1 where larger is better, -1 where smaller is, 0 where neither is.
    """

    metric: str
    heading: str
    sign: int


def columns_of(tasks: TaskConfigs) -> list[Column]:
    """The main metrics of the tasks, in the order of the tasks."""
    columns = []
    for task, config in tasks.items():
        spec = TASKS[task]
        sign = 0 if task in ANALYSES else 1 if spec.direction == "max" else -1
        names = [name for name in spec.metric_names(config) if name not in HIDDEN]
        columns += [Column(name, HEADINGS.get(name, name), sign) for name in names]
    return columns


def judged_metric(columns: Sequence[Column]) -> str:
    """The metric of notes and plot: 5-way 5-shot accuracy, else the first in which a direction is better."""
    names = [column.metric for column in columns]
    if PREFERRED in names:
        return PREFERRED
    return next((column.metric for column in columns if column.sign), names[0])


def cell(values: Sequence[float]) -> Cell | None:
    """Mean and half width of the 95 % t-interval over seeds; None without a finite value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    mean, half = mean_interval(finite)
    return {"mean": mean, "ci95": half, "n": len(finite), "values": finite}


def build_rows(
    methods: Mapping[str, Sequence[Run]],
    baselines: Mapping[str, Sequence[Run]],
    baseline_of: Mapping[str, str],
    columns: Sequence[Column],
    objective: str,
) -> list[dict[str, Any]]:
    """The rows of the table: methods, then untrained backbones.

    Args:
        methods: method -> its runs, one per seed, as ``compare_run`` stores them.
        baselines: name of an untrained backbone -> its runs.
        baseline_of: method -> the untrained backbone that it started as.
        columns: the metrics.
        objective: the metric that the notes judge by.
    """
    untrained = [_row(name, runs, columns, is_baseline=True) for name, runs in baselines.items()]
    by_name = {row["name"]: row for row in untrained}
    judged = next(column for column in columns if column.metric == objective)
    rows = [_row(name, runs, columns, is_baseline=False) for name, runs in methods.items()]
    for row in rows:
        row["baseline"] = baseline_of[row["name"]]
        reference = by_name[row["baseline"]]["cells"][objective]
        row["notes"] += notes_of(row["cells"][objective], reference, judged.sign)
    return rows + untrained


def _row(name: str, runs: Sequence[Run], columns: Sequence[Column], is_baseline: bool) -> dict[str, Any]:
    finished = [run for run in runs if run["outcome"] == "finished"]
    cells = {c.metric: cell([run["metrics"][c.metric]["value"] for run in finished]) for c in columns}
    speeds = [run["pretext"]["images_per_second"] for run in finished if "images_per_second" in run["pretext"]]
    counts = [
        ("diverged", sum(run["outcome"] == "diverged" for run in runs)),
        ("crashed", sum(run["outcome"] == "crashed" for run in runs)),
        ("collapsed", sum(bool(run["collapsed"]) for run in runs)),
    ]
    return {
        "name": name,
        "is_baseline": is_baseline,
        "runs": len(runs),
        "finished": len(finished),
        "cells": cells,
        "images_per_second": cell(speeds),
        "seconds": sum(run["seconds"] for run in runs),
        "notes": [_count(word, count, len(runs)) for word, count in counts if count],
    }


def _count(word: str, count: int, total: int) -> str:
    return word if count == total else f"{count} of {total} {word}"


def notes_of(mine: Cell | None, reference: Cell | None, sign: int) -> list[str]:
    """How a row's interval lies to that of its untrained backbone; nothing where it lies entirely above."""
    if mine is None or not sign:
        return []
    if mine["ci95"] is None:
        return ["one run: no interval"]
    if reference is None or reference["ci95"] is None:
        return ["no random init to compare with"]
    gap = sign * (mine["mean"] - reference["mean"])
    reach = mine["ci95"] + reference["ci95"]
    if gap < -reach:
        return ["below random init"]
    return [] if gap > reach else ["not separated from random init"]


def grouped_reasons(left_out: Mapping[str, str]) -> list[tuple[str, str]]:
    """Methods that were left out for the same reason together: (their names, the reason)."""
    groups: dict[str, list[str]] = {}
    for method, reason in left_out.items():
        groups.setdefault(reason.removeprefix(method).strip(" :"), []).append(method)
    return [(", ".join(methods), reason) for reason, methods in groups.items()]


def best_metrics(rows: Sequence[Mapping[str, Any]], column: Column) -> set[str]:
    """Names of the rows with the best mean of a column and of those whose interval meets its interval."""
    known = {row["name"]: row["cells"][column.metric] for row in rows if row["cells"][column.metric]}
    if not known or not column.sign:
        return set()
    best = max(known, key=lambda name: column.sign * known[name]["mean"])

    def meets(name: str) -> bool:
        gap = abs(known[name]["mean"] - known[best]["mean"])
        halves = [known[n]["ci95"] for n in (name, best)]
        return None not in halves and gap <= sum(halves)

    return {best} | {name for name in known if meets(name)}
