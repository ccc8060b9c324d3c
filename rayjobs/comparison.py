"""The arithmetic of the comparison table: intervals over seeds, and what they allow to say against random
initialisation and against the best row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluation import TASKS
from rayjobs.reports import mean_interval
from rayjobs.significance import LEVEL, against_best
from rayjobs.transfer import TaskConfigs

__all__ = [
    "HIDDEN",
    "SIGNS",
    "Column",
    "build_row",
    "build_rows",
    "cell",
    "column_groups",
    "columns_of",
    "grouped_reasons",
    "heading",
    "judged_metric",
    "marks",
    "notes_of",
]

PREFERRED = "few_shot/5way_5shot_acc"
HEADINGS = {
    "few_shot/5way_1shot_acc": "5-way 1-shot",
    "few_shot/5way_5shot_acc": "5-way 5-shot",
    "few_shot_rfs/5way_1shot_acc": "1-shot, 5 copies",
    "few_shot_rfs/5way_5shot_acc": "5-shot, 5 copies",
    "few_shot_finetune/5way_1shot_acc": "1-shot, SGD",
    "few_shot_finetune/5way_5shot_acc": "5-shot, SGD",
    "few_shot_finetune/base_acc": "base classes",
    "linear/top1": "linear top-1",
    "linear_readoff/top1": "read-off with views",
    "knn/top1": "kNN top-1",
    "concept_generalization/top1": "concept gen.",
    "domains/mean_top1": "mean of domains",
    "entropy/h_r": "H_R",
    "uniformity/normalized": "U",
    "alignment/views": "alignment",
    "alignment/same_class": "alignment in class",
    "feature_plots/silhouette": "silhouette",
    "class_geometry/discriminative_ratio": "φ",
    "class_geometry/mixtureness": "Π",
    "class_geometry/redundancy": "R",
    "cam/area": "CAM area",
    "cam/spatial_entropy": "CAM entropy",
    "cam/mass_concentration": "CAM mass",
    "inversion/lpips": "inversion LPIPS",
    "inversion/feature_mse": "inversion feature error",
    "inversion/psnr": "inversion PSNR",
    "inversion/ssim": "inversion SSIM",
}
HIDDEN = ("uniformity/raw",)  # grows with the features' length, which differs between methods; in the JSON
UNSEEN = ("few_shot", "few_shot_rfs", "few_shot_finetune", "concept_generalization")  # tasks on classes never seen
MAPS = ("cam", "inversion")  # tasks that look at images through the backbone
MOST_COLUMNS = 7  # metrics beside each other that fit a terminal of 150 characters

GROUPS = (
    "Classes that pretraining never saw",
    "Known classes and domains",
    "Geometry of the features",
    "Maps and pictures",
)

SIGNS = {"max": 1, "min": -1, "none": 0}

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
        names = [name for name in spec.metric_names(config) if name not in HIDDEN]
        columns += [Column(name, heading(name), SIGNS[spec.direction]) for name in names]
    return columns


def heading(metric: str) -> str:
    """What stands above a metric's column."""
    return HEADINGS.get(metric, metric.replace("/", " ").replace("_", " "))


def column_groups(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """(title, columns) of the tables that hold these columns: one without a title where they fit beside each other.

    Otherwise unseen classes, known classes, geometry and maps apart, each over as many tables as it needs.
    """
    if len(columns) <= MOST_COLUMNS:
        return [("", list(columns))]
    groups: dict[str, list[Column]] = {title: [] for title in GROUPS}
    for column in columns:
        groups[_group(column)].append(column)
    found = []
    for title, members in groups.items():
        count = math.ceil(len(members) / MOST_COLUMNS)
        for i in range(count):  # in parts of nearly the same size
            part = members[i * len(members) // count : (i + 1) * len(members) // count]
            found.append((title if i == 0 else f"{title} ({i + 1})", part))
    return found


def _group(column: Column) -> str:
    """The title that a column stands under."""
    unseen, known, geometry, maps = GROUPS
    task = column.metric.split("/")[0]
    if task in MAPS:
        return maps
    if not column.sign:
        return geometry
    return unseen if task in UNSEEN and not column.metric.endswith("/base_acc") else known


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
    untrained = [build_row(name, runs, columns, is_baseline=True) for name, runs in baselines.items()]
    by_name = {row["name"]: row for row in untrained}
    judged = next(column for column in columns if column.metric == objective)
    rows = [build_row(name, runs, columns, is_baseline=False) for name, runs in methods.items()]
    for row in rows:
        row["baseline"] = baseline_of[row["name"]]
        reference = by_name[row["baseline"]]["cells"][objective]
        row["notes"] += notes_of(row["cells"][objective], reference, judged.sign)
    return rows + untrained


def build_row(
    name: str, runs: Sequence[Run], columns: Sequence[Column], is_baseline: bool, with_task_intervals: bool = False
) -> dict[str, Any]:
    """One row of a table.

    Args:
        name: its name.
        runs: its runs, one per seed.
        columns: the metrics; a run may lack some.
        is_baseline: whether it is an untrained backbone.
        with_task_intervals: a cell of a single value keeps the interval over tasks or images that came with it.
    """
    finished = [run for run in runs if run["outcome"] == "finished"]
    cells: dict[str, Cell | None] = {}
    for metric in (column.metric for column in columns):
        known = [run["metrics"][metric] for run in finished if metric in run["metrics"]]
        found = cells[metric] = cell([metric["value"] for metric in known])
        if with_task_intervals and found is not None and len(known) == 1:
            found["ci95"] = known[0]["ci95"]
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


def marks(rows: Sequence[Mapping[str, Any]], column: Column) -> dict[str, Literal["best", "tied"]]:
    """The row with the best mean of a column, and the rows that are not significantly worse.

    Welch's t-test over seeds against the best row, two-sided, Holm's correction over the rows. A row of one seed cannot
    be tested and gets no mark.
    """
    known = {row["name"]: row["cells"][column.metric]["values"] for row in rows if row["cells"].get(column.metric)}
    if not known or not column.sign:
        return {}
    best, p_values = against_best(known, column.sign)
    return {best: "best", **{name: "tied" for name, p in p_values.items() if p > LEVEL}}
