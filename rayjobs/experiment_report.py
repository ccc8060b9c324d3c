"""The report of an MLflow experiment: tables in the terminal, an HTML page on disk and in MLflow, Markdown on request.

Reads what sweeps, comparisons and evaluations have logged; needs no cluster and no images, and works while they run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from rayjobs.comparison import Column
from rayjobs.comparison_report import markdown_tables, print_tables
from rayjobs.experiment_runs import Experiment, ExperimentRun, read_experiment
from rayjobs.experiment_tables import ResultTable, objective_of, result_tables
from rayjobs.named_runs import state_folder
from rayjobs.orderings import Judged, judge_all, orderings_markdown, orderings_summary, samples_of
from rayjobs.tracking import tracking_summary

__all__ = ["ExperimentReport", "build_report", "experiment_markdown", "report_experiment"]

FAILED = ("diverged", "crashed", "interrupted")


@dataclass(frozen=True)
class ExperimentReport:
    """What the page shows, as data.

    Attributes:
        experiment: the runs.
        tables: the tables, the most important first.
        objective: what the plots show; None before the first run has finished.
        phase: whose objective the plots show: "val" for a sweep's trials, "test" otherwise.
        judged: the papers' claims that can be judged here.
        facts: (heading, text) of what stands above the tables.
        protocol: phase -> how the metrics were computed.
    """

    experiment: Experiment
    tables: list[ResultTable]
    objective: Column | None
    phase: str
    judged: list[Judged]
    facts: list[tuple[str, str]]
    protocol: dict[str, Any]


def report_experiment(name: str, output: str, console: Console, write_docs: str = "", is_shown: bool = True) -> Path:
    """Print the tables of an experiment, write its HTML page, log it to MLflow, and say where it is.

    Args:
        name: MLflow experiment.
        output: folder under which the experiment's folder lies, or is made.
        console: the terminal.
        write_docs: also write the tables to this Markdown file.
        is_shown: print the tables; a command that has just printed its own leaves them out.

    Returns:
        Path of the page.

    Raises:
        ValueError: no such experiment, or the store does not answer.
    """
    from rayjobs.html_report import html_page

    report = build_report(read_experiment(name))
    if is_shown:
        print_report(report, console)
    folder = state_folder(output, name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(html_page(report), encoding="utf-8")
    if write_docs:
        Path(write_docs).expanduser().write_text(experiment_markdown(report))
        console.print(f"Tables     {write_docs}", soft_wrap=True, markup=False)
    console.print(f"Page       {path}", soft_wrap=True, markup=False)
    _log(report.experiment, path, console)
    if is_shown:
        console.print(f"MLflow     {tracking_summary(report.experiment.store.uri)}   experiment {name}", markup=False)
    return path


def build_report(experiment: Experiment) -> ExperimentReport:
    """Tables, claims and facts of an experiment."""
    tables = result_tables(experiment)
    phase = "val" if experiment.kind == "sweep" or not any(table.phase == "test" for table in tables) else "test"
    shown = next((table for table in tables if table.phase == phase), None)
    over_seeds = [] if shown is None or experiment.kind == "sweep" else shown.runs
    return ExperimentReport(
        experiment=experiment,
        tables=tables,
        objective=None if shown is None else objective_of(experiment, shown.columns),
        phase=phase,
        judged=judge_all(samples_of(over_seeds)),
        facts=_facts(experiment),
        protocol=_protocol(experiment),
    )


def print_report(report: ExperimentReport, console: Console) -> None:
    """The tables, for the terminal."""
    for table in report.tables:
        print_tables(table.rows, table.columns, table.title, console)
        console.print(f"[dim]{table.legend}[/dim]")
    if not report.tables:
        console.print("No run with downstream metrics has finished yet.")
    if report.judged:
        console.print(f"\nThe papers' orderings. {orderings_summary(report.judged)}", markup=False)
    console.print(f"\nRuns: {_outcomes(report.experiment)}.", markup=False)
    for run in report.experiment.runs:
        if run.outcome in FAILED:
            console.print(f"{run.name} {run.outcome}: {run.error}".rstrip(": "), markup=False, soft_wrap=True)


def experiment_markdown(report: ExperimentReport) -> str:
    """The facts, the tables with their legends, and the papers' orderings."""
    parts = [f"# {report.experiment.name}", "\n".join(f"- {heading}: {text}." for heading, text in report.facts)]
    for table in report.tables:
        parts += [f"## {table.title}", markdown_tables(table.rows, table.columns), table.legend]
    if report.judged:
        parts += ["## The papers' orderings", orderings_markdown(report.judged)]
    failed = [run for run in report.experiment.runs if run.outcome in FAILED]
    if failed:
        parts += ["Not in the means:", "\n".join(f"- {run.name} {run.outcome}: {run.error}" for run in failed)]
    return "\n\n".join(parts) + "\n"


def _outcomes(experiment: Experiment) -> str:
    counts = Counter(run.outcome for run in experiment.runs)
    return ", ".join(f"{number} {outcome}" for outcome, number in counts.items())


def _facts(experiment: Experiment) -> list[tuple[str, str]]:
    """What was run on what, with which code: (heading, text)."""
    records = [record for run in _first_and_last(experiment.runs) if (record := _record(experiment, run))]
    config = _parent_json(experiment)
    facts = [("Runs", _outcomes(experiment))]
    if command := (_stored(experiment, "comparison.json") or {}).get("command"):
        facts.append(("Command", command))
    facts.append(("Started", _when(experiment)))
    data = config.get("data") or next((record["data"] for record in records if "data" in record), None)
    if data:
        splits = data["splits"].items()
        sizes = ", ".join(f"{name} {split['images']:,} images of {split['classes']} classes" for name, split in splits)
        facts.append(("Data", f"{' '.join(data['source'])}, fingerprint {data['fingerprint']}; {sizes}"))
        facts.append(("Splits", str(data["rule"])))
    training = _training(experiment)
    if training:
        facts.append(("Training", training))
    revisions = list(dict.fromkeys(record["git"] for record in records if record.get("git")))
    if revisions:
        facts.append(("Code", " and ".join(revisions)))
    versions = next((record["versions"] for record in records if "versions" in record), {})
    if versions:
        facts.append(("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    hardware = next((record["hardware"] for record in records if "hardware" in record), None)
    if hardware:
        gpu = "GPU" if hardware.get("gpu") else "no GPU"
        facts.append(("Hardware", f"{hardware['cpus']} CPUs ({hardware['machine']}), {gpu}"))
    return facts


def _first_and_last(runs: Sequence[ExperimentRun]) -> list[ExperimentRun]:
    """Two runs whose records span the experiment: each could have been made by other code."""
    return [runs[0], runs[-1]] if len(runs) > 1 else list(runs)


def _record(experiment: Experiment, run: ExperimentRun) -> Mapping[str, Any]:
    """The run record: of a training run in its config.json, of an evaluation a file of its own."""
    config = experiment.store.json(run.run_id, "config.json")
    return config["record"] if config else experiment.store.json(run.run_id, "record.json") or {}


def _stored(experiment: Experiment, name: str) -> Any:
    return None if experiment.parent is None else experiment.store.json(experiment.parent.run_id, name)


def _parent_json(experiment: Experiment) -> Mapping[str, Any]:
    name = {"sweep": "sweep.json", "comparison": "started.json"}.get(experiment.kind)
    return (_stored(experiment, name) if name else None) or {}


def _when(experiment: Experiment) -> str:
    first = experiment.parent or experiment.runs[0]
    started = datetime.fromtimestamp(first.start / 1000, UTC)
    took = ", still running"
    if first.outcome != "running":
        end = max(run.start / 1000 + run.seconds for run in (first, *experiment.runs))
        took = f", took {timedelta(seconds=round(end - first.start / 1000))} h"
    return f"{started:%Y-%m-%d %H:%M} UTC{took}; this report {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"


def _training(experiment: Experiment) -> str:
    """Settings that all trained runs share."""
    trained = [run.params for run in experiment.runs if run.params.get("epochs", "0") != "0"]
    if not trained:
        return ""
    names = {
        "backbone": "{}",
        "stem": "{} stem",
        "epochs": "epochs {}",
        "batch_size": "batch {}",
        "image_size": "{} px",
    }
    parts = []
    for name, text in names.items():
        values = list(dict.fromkeys(params[name] for params in trained if name in params))
        parts += [text.format(" or ".join(values))] if values else []
    seeds = sorted({int(params["seed"]) for params in trained if "seed" in params})
    return ", ".join([*parts, f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"])


def _protocol(experiment: Experiment) -> dict[str, Any]:
    """Phase -> protocol of the newest run that has one."""
    found = {}
    for phase in ("val", "test"):
        known = [run for run in experiment.runs if run.downstream(phase)]
        protocol = experiment.store.json(known[-1].run_id, f"protocol_{phase}.json") if known else None
        if protocol:
            found[phase] = protocol
    return found


def _log(experiment: Experiment, path: Path, console: Console) -> None:
    """The page as ``report/report.html`` of the parent run, or of a run of its own."""
    from mlflow.exceptions import MlflowException

    client = experiment.store.client
    try:
        if experiment.parent is not None:
            run_id, is_own = experiment.parent.run_id, False
        else:
            found = client.search_runs([experiment.experiment_id], "tags.kind = 'report'", max_results=1)
            tags = {"kind": "report", "key": "report"}
            run = found[0] if found else client.create_run(experiment.experiment_id, run_name="report", tags=tags)
            run_id, is_own = run.info.run_id, True
        client.log_artifact(run_id, str(path), "report")
        if is_own:
            client.set_terminated(run_id)
    except (MlflowException, OSError) as error:
        console.print(f"The page is not in MLflow: {str(error).splitlines()[0][:200]}", markup=False, soft_wrap=True)
