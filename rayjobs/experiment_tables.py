"""Which runs of an experiment make one row, and what the rows of each kind of experiment are.

A comparison has one row per method over its seeds. A sweep has one row per method on validation data, its best trial,
and on test data the winner, its confirmation over new seeds and the untrained backbone. Evaluations have one row per
method and setting, one table per phase and data set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation import TASKS
from methods import METHODS
from rayjobs.comparison import HIDDEN, SIGNS, Column, build_row, build_rows, heading, judged_metric
from rayjobs.comparison_report import MARKS_LEGEND, metrics_legend
from rayjobs.configs import config_hash
from rayjobs.experiment_runs import Experiment, ExperimentRun
from search_spaces import SPACES

__all__ = ["ResultTable", "columns_in", "objective_of", "result_tables", "row_names"]

MOST_NAMED = 3  # settings that a row's name spells out; more are a hash
OVER_SEEDS = (
    "± is the half width of the 95 % t-interval over seeds; in a row of one seed, of the interval over tasks or "
)
OVER_SEEDS += "images of that model."


@dataclass(frozen=True)
class ResultTable:
    """Rows that may be compared with each other.

    Attributes:
        title: what stands above them.
        phase: "val" or "test".
        columns: the metrics.
        rows: as ``comparison.build_row`` makes them.
        legend: what a row and a number are.
        runs: the runs behind the rows, as ``ExperimentRun.brief`` gives them.
    """

    title: str
    phase: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    legend: str
    runs: list[dict[str, Any]]


def result_tables(experiment: Experiment) -> list[ResultTable]:
    """The tables of an experiment; none before its first run has finished."""
    if experiment.kind == "comparison":
        tables = [_comparison(experiment)]
    elif experiment.kind == "sweep":
        tables = [_best_trials(experiment), _winner(experiment)]
    else:
        tables = _evaluations(experiment)
    return [table for table in tables if table.rows and table.columns]


def columns_in(runs: Iterable[Mapping[str, Any]], tasks: Sequence[str] = ()) -> list[Column]:
    """The main metrics that some run has, of the default options or named alike; ``tasks`` stand first."""
    names = {name: None for run in runs for name in run["metrics"]}
    columns = []
    for task in dict.fromkeys([*(task for task in tasks if task in TASKS), *TASKS]):
        spec = TASKS[task]
        alike = {re.sub(r"\d+", "#", metric) for metric in spec.metrics}
        found = [name for name in names if name.split("/")[0] == task and re.sub(r"\d+", "#", name) in alike]
        order = {metric: i for i, metric in enumerate(spec.metrics)}
        found.sort(key=lambda name, order=order: order.get(name, len(order)))
        columns += [Column(name, heading(name), SIGNS[spec.direction]) for name in found if name not in HIDDEN]
    return columns


def objective_of(experiment: Experiment, columns: Sequence[Column]) -> Column:
    """What the experiment is judged by, its sign the direction that a sweep optimised."""
    name = "" if experiment.parent is None else experiment.parent.tags.get("objective", "")
    found = next((column for column in columns if column.metric == name), None)
    if found is None:
        name = judged_metric(columns)
        found = next(column for column in columns if column.metric == name)
    space = "" if experiment.parent is None else experiment.parent.params.get("space", "")
    if space in SPACES and found.metric == SPACES[space].objective:
        return Column(found.metric, found.heading, 1 if SPACES[space].direction == "maximize" else -1)
    return found


def _tasks(experiment: Experiment) -> list[str]:
    """The tasks in the order in which the user (or the search space) named them."""
    params = {} if experiment.parent is None else experiment.parent.params
    space = SPACES.get(params.get("space", ""))
    return params.get("tasks", "").split() or list(space.tasks if space else ())


def row_names(runs: Sequence[ExperimentRun]) -> dict[str, list[ExperimentRun]]:
    """Runs that differ in nothing but the seed, under their method's name and, where it has several settings, these."""
    groups: dict[tuple[str, str], list[ExperimentRun]] = {}
    for run in runs:
        groups.setdefault((run.label, config_hash_of(run)), []).append(run)
    by_label: dict[str, list[list[ExperimentRun]]] = {}
    for (label, _), members in groups.items():
        by_label.setdefault(label, []).append(members)
    named = {}
    for label, settings in by_label.items():
        differing = _differing([members[0].settings for members in settings])
        for members in settings:
            values = members[0].settings
            spelled = ", ".join(f"{name} {values.get(name, 'none')}" for name in differing)
            detail = spelled if len(differing) <= MOST_NAMED else config_hash_of(members[0])
            named[f"{label} ({detail})" if differing else label] = members
    return named


def config_hash_of(run: ExperimentRun) -> str:
    """Hash of what was trained and how, the same for all seeds."""
    return config_hash(_Settings(tuple(sorted(run.settings.items()))))


@dataclass(frozen=True)
class _Settings:
    items: tuple[tuple[str, str], ...]


def _differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    names = dict.fromkeys(name for values in settings for name in values)
    return [name for name in names if len({values.get(name) for values in settings}) > 1]


def _one_per_seed(runs: Sequence[ExperimentRun], phase: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The newest run of every seed, and a note where there were more."""
    by_seed = {run.seed: run for run in sorted(runs, key=lambda run: run.start)}
    extra = len(runs) - len(by_seed)
    note = [f"{extra} older of the same seed left out"] if extra else []
    return [run.brief(phase) for _, run in sorted(by_seed.items())], note


def _row(name: str, runs: Sequence[ExperimentRun], phase: str, columns: Sequence[Column]) -> dict[str, Any]:
    members, note = _one_per_seed(runs, phase)
    row = build_row(name, members, columns, name.startswith("random_init"), with_task_intervals=True)
    row["notes"] += note
    return row


def _comparison(experiment: Experiment) -> ResultTable:
    """Methods over seeds on test data, as the comparison itself prints them when it has finished."""
    order = {name: i for i, name in enumerate(METHODS)}
    runs = sorted(experiment.of_kind("run"), key=lambda run: order.get(run.label, len(order)))
    briefs = [run.brief("test") for run in runs]
    untrained = [run.brief("test") for run in experiment.of_kind("baseline")]
    columns = columns_in(briefs + untrained, _tasks(experiment))
    rows: list[dict[str, Any]] = []
    if columns:
        lab = {name for name, spec in METHODS.items() if spec.color_space == "lab"}
        labels = sorted({brief["label"] for brief in untrained})
        baselines = {label: [brief for brief in untrained if brief["label"] == label] for label in labels}
        methods = {b["label"]: [other for other in briefs if other["label"] == b["label"]] for b in briefs}
        of = {name: "random_init_lab" if name in lab else "random_init" for name in methods}
        rows = build_rows(methods, baselines, of, columns, objective_of(experiment, columns).metric)
    judged = objective_of(experiment, columns).heading if columns else ""
    legend = (
        f"± is the half width of the 95 % t-interval over seeds. {MARKS_LEGEND} {metrics_legend(columns)} Notes "
        f"compare {judged} with the untrained backbone of the same kind and seeds: below random init = the interval "
        "lies entirely on its worse side, not separated = the two intervals meet."
    )
    return ResultTable("Test data: every method over its seeds", "test", columns, rows, legend, briefs + untrained)


def _best_trials(experiment: Experiment) -> ResultTable:
    """The best finished trial of each method on validation data, best method first; then the untrained backbone."""
    trials = experiment.of_kind("trial")
    finished = [run for run in trials if run.outcome == "finished" and run.downstream("val")]
    untrained = experiment.of_kind("baseline")
    columns = columns_in([run.brief("val") for run in finished + untrained], _tasks(experiment))
    if not columns:
        return ResultTable("", "val", [], [], "", [])
    objective = objective_of(experiment, columns)
    best: dict[str, ExperimentRun] = {}
    for run in sorted(finished, key=lambda run: objective.sign * _value(run, objective), reverse=True):
        best.setdefault(run.label, run)
    rows = []
    for label, run in best.items():
        row = _row(label, [run], "val", columns)
        mine = [trial for trial in trials if trial.label == label]
        done = sum(trial.outcome == "finished" for trial in mine)
        row["notes"].append(f"{run.name}: best of {done}/{_count(len(mine), 'trial')}")
        rows.append(row)
    without = {run.label for run in trials} - best.keys()
    legend = (
        f"One row per method: its best trial by {objective.heading} on validation data, and how many of its trials "
        f"finished. The best of several is chosen by these very numbers, which favours methods with more trials. "
        f"{OVER_SEEDS} {MARKS_LEGEND} {metrics_legend(columns, 'val')}"
    )
    if without:
        legend += f" Without a finished trial: {', '.join(sorted(without))}."
    rows += [_row(name, members, "val", columns) for name, members in row_names(untrained).items()]
    runs = [run.brief("val") for run in [*best.values(), *untrained]]
    return ResultTable("Validation data: the best trial of each method", "val", columns, rows, legend, runs)


def _winner(experiment: Experiment) -> ResultTable:
    """The winner's own checkpoint, its retrained seeds and the untrained backbone on test data."""
    parent = experiment.parent
    assert parent is not None
    confirm, untrained = experiment.of_kind("confirm"), experiment.of_kind("baseline")
    winner = parent.brief("test") | {"outcome": "finished", "name": parent.tags.get("best_trial", "")}
    has_winner = bool(winner["metrics"])
    columns = columns_in([winner, *(run.brief("test") for run in confirm + untrained)], _tasks(experiment))
    rows = []
    if has_winner:
        name = f"{winner['name']} (winner)"
        rows.append(build_row(name, [winner], columns, is_baseline=False, with_task_intervals=True))
        rows[0]["seconds"] = 0.0  # the parent's time is the whole sweep's
    for name, members in row_names(confirm).items():
        rows.append(_row(f"{name}, {_count(len(members), 'new seed')}", members, "test", columns))
    if not rows:
        return ResultTable("", "test", [], [], "", [])
    rows += [_row(name, members, "test", columns) for name, members in row_names(untrained).items()]
    legend = (
        f"The winner's own checkpoint, its setting retrained with seeds that no trial had used, and the untrained "
        f"backbone. {OVER_SEEDS} {MARKS_LEGEND} {metrics_legend(columns)}"
    )
    runs = [run.brief("test") for run in confirm + untrained]
    return ResultTable("Test data: the winner", "test", columns, rows, legend, runs)


def _evaluations(experiment: Experiment) -> list[ResultTable]:
    """One table per phase and evaluated data set, rows by method and setting."""
    runs = experiment.of_kind("evaluate")
    data = {run.run_id: _evaluated_data(experiment, run) for run in runs}
    tables = []
    for phase, name in (("test", "Test data"), ("val", "Validation data")):
        for source in dict.fromkeys(data.values()):
            members = [run for run in runs if data[run.run_id] == source and run.downstream(phase)]
            columns = columns_in([run.brief(phase) for run in members])
            rows = [_row(label, group, phase, columns) for label, group in row_names(members).items()]
            legend = f"{OVER_SEEDS} {MARKS_LEGEND} {metrics_legend(columns, phase)}"
            briefs = [run.brief(phase) for run in members]
            title = f"{name}: {source}" if source else name
            tables.append(ResultTable(title, phase, columns, rows, legend, briefs))
    return tables


def _evaluated_data(experiment: Experiment, run: ExperimentRun) -> str:
    """Source and fingerprint of the images that an evaluation read."""
    record = experiment.store.json(run.run_id, "record.json") or {}
    data = record.get("data", {})
    return f"{' '.join(data['source'])} ({data['fingerprint']})" if data else ""


def _value(run: ExperimentRun, objective: Column) -> float:
    found = run.downstream("val").get(objective.metric)
    return float("-inf") * objective.sign if found is None or found["value"] is None else found["value"]


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
