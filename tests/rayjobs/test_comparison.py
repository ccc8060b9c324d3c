"""The comparison table: t-intervals over seeds, and the notes that they allow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rayjobs.comparison import (
    Column,
    build_row,
    build_rows,
    cell,
    column_groups,
    columns_of,
    grouped_reasons,
    judged_metric,
    marks,
    notes_of,
)
from rayjobs.transfer import task_configs

SHOT = "few_shot/5way_5shot_acc"


@pytest.mark.parametrize("count", [2, 3, 7])
def test_cells_are_t_intervals(count):
    values = np.random.default_rng(count).normal(60, 3, count)
    found = cell(list(values))
    assert found is not None
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["mean"] - found["ci95"] == pytest.approx(low)
    assert found["mean"] + found["ci95"] == pytest.approx(high)
    assert found["n"] == count


def test_a_single_value_has_no_interval_and_none_no_cell():
    assert cell([3.0]) == {"mean": 3.0, "ci95": None, "n": 1, "values": [3.0]}
    assert cell([]) is None
    assert cell([math.nan, 3.0, math.inf]) == cell([3.0])


def interval(mean, half):
    return {"mean": mean, "ci95": half, "n": 3, "values": []}


@pytest.mark.parametrize(
    ("mine", "sign", "expected"),
    [
        (interval(70, 4), 1, []),
        (interval(50, 4), 1, ["below random init"]),
        (interval(62, 4), 1, ["not separated from random init"]),
        (interval(67, 5), 1, ["not separated from random init"]),  # the intervals meet at 62
        (interval(70, 4), -1, ["below random init"]),
        (interval(50, 4), -1, []),
        (interval(50, 4), 0, []),
        (interval(50, None), 1, ["one run: no interval"]),
        (None, 1, []),
    ],
)
def test_notes_against_random_initialisation(mine, sign, expected):
    assert notes_of(mine, interval(60, 2), sign) == expected


def test_columns_and_the_metric_that_judges():
    columns = columns_of(task_configs(["knn", "few_shot", "entropy", "uniformity"]))
    headings = [column.heading for column in columns]
    assert headings == ["kNN top-1", "5-way 1-shot", "5-way 5-shot", "H_R", "U"]
    assert [column.sign for column in columns] == [1, 1, 1, 0, 0]
    assert judged_metric(columns) == SHOT
    assert judged_metric(columns_of(task_configs(["entropy", "linear"]))) == "linear/top1"
    assert judged_metric(columns_of(task_configs(["entropy"]))) == "entropy/h_r"


def run(seed, value, outcome="finished", collapsed=False, speed=100.0):
    return {
        "seed": seed,
        "outcome": outcome,
        "collapsed": collapsed,
        "seconds": 10.0,
        "pretext": {"images_per_second": speed} if outcome == "finished" else {},
        "metrics": {SHOT: {"value": value}, "few_shot/5way_1shot_acc": {"value": value - 10}} if value else {},
    }


def test_rows_count_what_failed_and_average_what_finished():
    columns = columns_of(task_configs(["few_shot"]))
    methods = {
        "good": [run(0, 80.0, speed=90.0), run(1, 81.0), run(2, 82.0, speed=110.0)],
        "shaky": [run(0, 80.0), run(1, None, "diverged"), run(2, None, "crashed")],
        "flat": [run(seed, 20.0 + seed / 10, collapsed=True) for seed in range(3)],
        "gone": [run(seed, None, "diverged") for seed in range(3)],
    }
    baselines = {"random_init": [run(seed, 50.0 + seed) for seed in range(3)]}
    rows = build_rows(methods, baselines, dict.fromkeys(methods, "random_init"), columns, SHOT)
    assert [row["name"] for row in rows] == ["good", "shaky", "flat", "gone", "random_init"]
    notes = {row["name"]: row["notes"] for row in rows}
    assert notes == {
        "good": [],
        "shaky": ["1 of 3 diverged", "1 of 3 crashed", "one run: no interval"],
        "flat": ["collapsed", "below random init"],
        "gone": ["diverged"],
        "random_init": [],
    }
    good, shaky, _, gone, untrained = rows
    assert good["cells"][SHOT] == cell([80.0, 81.0, 82.0])
    assert good["cells"]["few_shot/5way_1shot_acc"]["mean"] == 71.0
    assert good["images_per_second"]["mean"] == 100.0
    assert good["seconds"] == 30.0
    assert (shaky["finished"], shaky["runs"]) == (1, 3)
    assert gone["cells"][SHOT] is None
    assert untrained["is_baseline"]
    found = marks(rows, columns[1])
    assert found["good"] == "best"
    assert "flat" not in found
    assert "shaky" not in found, "one finished run: no test"


def test_methods_left_out_for_one_reason_share_a_line():
    left_out = {"a": "a needs a map.", "b": "too small.", "c": "c needs a map."}
    assert grouped_reasons(left_out) == [("a, c", "needs a map."), ("b", "too small.")]


def test_ties_with_the_best_are_marked_by_a_test():
    columns = columns_of(task_configs(["knn", "entropy"]))

    def row(name, *values):
        return {"name": name, "cells": {column.metric: cell(values) for column in columns}}

    rows = [
        row("best", 80.0, 81.0, 82.0),
        row("near", 79.0, 80.0, 83.0),
        row("worse", 70.0, 71.0, 72.0),
        row("single", 80.9),
        row("gone"),
    ]
    assert marks(rows, columns[0]) == {"best": "best", "near": "tied"}
    assert marks(rows, columns[1]) == {}, "more entropy is not better"
    assert marks([row("gone")], columns[0]) == {}
    assert marks([row("only", 1.0), row("many", 0.5, 0.6)], columns[0]) == {"only": "best"}


def test_many_rows_make_it_harder_to_be_worse():
    """Holm's correction: 0.02 alone is worse than the best row; beside twenty such rows it is not."""
    column = columns_of(task_configs(["knn"]))[0]
    values = {"best": (80.0, 81.0, 82.0), **{f"m{i}": (77.0, 78.0, 79.0) for i in range(20)}}
    assert stats.ttest_ind(values["best"], values["m0"], equal_var=False).pvalue == pytest.approx(0.0213, abs=1e-3)
    rows = [{"name": name, "cells": {column.metric: cell(numbers)}} for name, numbers in values.items()]
    assert marks(rows[:2], column) == {"best": "best"}
    assert marks(rows, column)["m0"] == "tied"


def test_wide_tables_are_split_by_what_the_columns_tell():
    few = columns_of(task_configs(["few_shot", "linear", "knn", "entropy", "uniformity"]))
    assert column_groups(few) == [("", few)]
    maps = [Column(f"cam/{name}", name, 0) for name in "ab"]
    many = [Column(f"domains/{name}", name, 1) for name in "abcdefgh"]
    groups = column_groups([*few, *maps, *many])
    assert [(title, len(columns)) for title, columns in groups] == [
        ("Classes that pretraining never saw", 2),
        ("Known classes and domains", 5),
        ("Known classes and domains (2)", 5),
        ("Geometry of the features", 2),
        ("Maps and pictures", 2),
    ]
    assert {c.metric for _, columns in groups for c in columns} == {c.metric for c in [*few, *maps, *many]}


def test_a_row_of_one_seed_can_keep_the_interval_of_its_tasks():
    columns = columns_of(task_configs(["few_shot"]))
    single = run(0, 80.0)
    single["metrics"][SHOT]["ci95"] = 0.75
    del single["metrics"]["few_shot/5way_1shot_acc"]
    kept = build_row("a", [single], columns, is_baseline=False, with_task_intervals=True)
    assert kept["cells"][SHOT] == {"mean": 80.0, "ci95": 0.75, "n": 1, "values": [80.0]}
    assert kept["cells"]["few_shot/5way_1shot_acc"] is None
    assert build_row("a", [single], columns, is_baseline=False)["cells"][SHOT]["ci95"] is None
