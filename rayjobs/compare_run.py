"""One comparison from the checked configuration to the table: untrained backbones, then every method and seed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from evaluation import Metric, ModelResult
from image_data.prepared import PreparedData
from methods import METHODS
from rayjobs.capacity import ClusterInfo
from rayjobs.compare_config import CompareConfig, CompareSetup, changed_settings, prepare_comparison
from rayjobs.comparison import build_rows, columns_of
from rayjobs.comparison_report import markdown, print_comparison, save_plot
from rayjobs.configs import PretrainConfig, config_hash, from_dict, to_dict
from rayjobs.named_runs import COMPARISON, state_folder
from rayjobs.ray_tune import SweepPlan, run_label
from rayjobs.record import data_record, git_revision, package_versions, run_record
from rayjobs.result_files import read_samples, write_files
from rayjobs.transfer import compare_models
from rayjobs.tune_session import Interrupted, TuneSession, write_json

__all__ = ["read_started", "resumed_setup", "run_comparison", "stored_results", "write_report"]


def run_comparison(
    setup: CompareSetup, data: PreparedData, cluster: ClusterInfo, console: Console, command: str
) -> dict[str, Any]:
    """Run (or continue) a comparison; returns what ``comparison.json`` holds.

    Args:
        setup: the checked comparison.
        data: prepared data.
        cluster: where the runs go.
        console: the terminal.
        command: the command line, stored with the table of a new comparison.

    Raises:
        Interrupted: Ctrl-C; the runs are closed and the comparison can be resumed.
    """
    config, began = setup.config, time.time()
    session = TuneSession(config.name, "comparison", config.output, config.train, data, cluster, console)
    started = _start(session, setup, cluster, command)
    _log_parent(session, setup)
    try:
        baselines = _run_baselines(session, setup)
        runs = _run_methods(session, setup)
    except KeyboardInterrupt as interrupt:
        session.parent.end("KILLED")
        session.tracker.close(20)
        raise Interrupted from interrupt
    finally:
        started["seconds"] += time.time() - began
        write_json(session.local / COMPARISON.state, started)
    results = _results(setup, data, started, baselines, runs)
    results["together"] = _compare_first_seed(session, setup, baselines + runs)
    write_json(session.local / COMPARISON.results, results)
    _log_report(session, results, write_report(results, config))
    print_comparison(results, console)
    session.parent.end("FINISHED" if any(run["outcome"] == "finished" for run in runs) else "FAILED")
    session.tracker.close()
    return results


def resumed_setup(config: CompareConfig, data: PreparedData) -> CompareSetup:
    """The comparison as it was started: its methods, whatever ``METHODS`` has become since.

    Raises:
        ValueError: the images changed, or a method cannot run any more.
    """
    started = read_started(config)
    if started["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"--resume: the images of comparison {config.name!r} have changed since its start (fingerprint "
            f"{started['fingerprint']} then, {data.fingerprint} now). Restore them, or start another comparison."
        )
    setup = prepare_comparison(replace(config, methods=tuple(started["methods"])), data)
    return replace(setup, config=config, left_out=started["left_out"])


def read_started(config: CompareConfig) -> dict[str, Any]:
    """What was written when the comparison started."""
    return json.loads((state_folder(config.output, config.name) / COMPARISON.state).read_text())


def stored_results(config: CompareConfig) -> dict[str, Any] | None:
    """The results of a finished comparison; None while runs are missing, or crashed and can be tried again."""
    path = state_folder(config.output, config.name) / COMPARISON.results
    results = json.loads(path.read_text()) if path.is_file() else None
    if results is None or any(run["outcome"] == "crashed" for run in results["runs"]):
        return None
    return results


def _start(session: TuneSession, setup: CompareSetup, cluster: ClusterInfo, command: str) -> dict[str, Any]:
    """Note this start; a resumed comparison keeps the command and date of its first one."""
    config, path = setup.config, session.local / COMPARISON.state
    started = read_started(config) if path.is_file() else {}
    if not started:
        started = {
            "config": to_dict(config),
            "command": command,
            "fingerprint": session.data.fingerprint,
            "methods": list(setup.base),
            "left_out": setup.left_out,
            "seconds": 0.0,
            "starts": [],
        }
    hardware = run_record(next(iter(setup.base.values())), session.data)["hardware"]
    hardware |= {"cpus": cluster.total("CPU") or os.cpu_count() or 1, "gpus": cluster.total("GPU")}
    hardware["runs_at_once"] = min(session.max_concurrent, len(setup.base) * config.seeds)
    start = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "git": git_revision()}
    started["starts"].append({**start, "versions": package_versions(), "hardware": hardware})
    write_json(path, started)
    return started


def _log_parent(session: TuneSession, setup: CompareSetup) -> None:
    config = to_dict(setup.config)
    flat = {k: v for k, v in config.items() if k not in ("train", "data", "options")}
    for task in setup.tasks:
        flat |= {f"{task}_{name}": value for name, value in config["options"][task].items()}
    session.parent.params({**flat, **config["train"], **{f"data_{k}": v for k, v in config["data"].items()}})
    session.parent.tags({"objective": setup.objective, "data_fingerprint": session.data.fingerprint})
    session.parent.json({"config": config, "data": data_record(session.data)}, COMPARISON.state)


def _plan(session: TuneSession, setup: CompareSetup, base: Mapping[str, PretrainConfig], folder: str) -> SweepPlan:
    points = len(base) * setup.config.seeds
    common: dict[str, Any] = {"num_trials": points, "direction": "maximize", "prune": False}
    common |= {"phases": ("test",), "named_by_seed": True, "task_data": setup.task_data}
    return session.plan(base, folder, setup.tasks, setup.objective, **common)


def _run_baselines(session: TuneSession, setup: CompareSetup) -> list[dict[str, Any]]:
    """The untrained backbones with the methods' seeds: what pretraining has to beat."""
    base = {  # nothing is trained: a process group would only cost time
        method: replace(run, train=replace(run.train, num_workers=1)) for method, run in setup.baselines.items()
    }
    points = [{"method": m, "epochs": 0, "seed": seed} for seed in setup.config.all_seeds for m in base]
    return session.run_points(_plan(session, setup, base, "baseline"), points, "baseline")


def _run_methods(session: TuneSession, setup: CompareSetup) -> list[dict[str, Any]]:
    """Every method once before any gets its second seed: what is finished early covers all of them."""
    points = [{"method": m, "seed": seed} for seed in setup.config.all_seeds for m in setup.base]
    return session.run_points(_plan(session, setup, setup.base, "runs"), points, "run", may_fail=True)


def _compare_first_seed(session: TuneSession, setup: CompareSetup, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tasks say of the first seed's models side by side: files in the comparison's folder, and metrics.

    One model per method, all judged on the same images; a grid of every seed would not fit a page.
    """
    first = setup.config.train.seed
    models = []
    for row in rows:
        config = from_dict(PretrainConfig, row["config"])
        if row["outcome"] == "finished" and config.train.seed == first:
            models.append(_model_result(session, row, config))
    metrics, files, left_out = compare_models(setup.tasks, models, lambda _: True)
    write_files(session.local / "comparison", files, {})
    return {
        "seed": first,
        "models": [model.name for model in models],
        "metrics": {m.name: {"value": m.value, "ci95": m.ci95, "n": m.n} for m in metrics},
        "files": [f"comparison/{file.name}" for file in files],
        "left_out": left_out,
    }


def _model_result(session: TuneSession, row: Mapping[str, Any], config: PretrainConfig) -> ModelResult:
    stored = row["transfer"]["test"]["metrics"]
    metrics = {name: Metric(name, m["value"], m["ci95"], m["n"]) for name, m in stored.items()}
    place = row.get("files", {}).get("test")
    samples = read_samples(place) if place else {}
    num_classes = len(session.data.split("train").class_names) if config.train.epochs else 0
    label = run_label(config)
    return ModelResult(label, label, num_classes, metrics, samples)


def _results(
    setup: CompareSetup,
    data: PreparedData,
    started: Mapping[str, Any],
    baselines: list[dict[str, Any]],
    runs: list[dict[str, Any]],
) -> dict[str, Any]:
    """What ``comparison.json`` holds: all that the report shows, and every run's metrics."""
    untrained = {m: run_label(replace(c, train=replace(c.train, epochs=0))) for m, c in setup.baselines.items()}
    by_kind = {METHODS[method].color_space: label for method, label in untrained.items()}
    columns = columns_of(setup.tasks)
    brief = [_brief(row) for row in baselines + runs]
    rows = build_rows(
        {m: [run for run in brief if run["label"] == m] for m in setup.base},
        {label: [run for run in brief if run["label"] == label] for label in untrained.values()},
        {m: by_kind[METHODS[m].color_space] for m in setup.base},
        columns,
        setup.objective,
    )
    methods = {
        m: {"summary": METHODS[m].summary, "changed": changed_settings(c), "config": to_dict(c)}
        for m, c in setup.base.items()
    }
    return {
        "name": setup.config.name,
        "command": started["command"],
        "created": started["starts"][0]["created"],
        "seconds": started["seconds"],
        "starts": started["starts"],
        "settings": to_dict(setup.config),
        "seeds": list(setup.config.all_seeds),
        "data": data_record(data),
        "protocol": baselines[0]["transfer"]["test"]["protocol"],
        "objective": setup.objective,
        "columns": [asdict(column) for column in columns],
        "methods": methods,
        "left_out": setup.left_out,
        "rows": rows,
        "runs": brief,
    }


def _brief(row: Mapping[str, Any]) -> dict[str, Any]:
    """A run without its protocol and configuration, which stand once for all."""
    config = from_dict(PretrainConfig, row["config"])
    kept = ("trial_id", "name", "method", "outcome", "error", "collapsed", "seconds", "pretext", "checkpoint")
    return {
        **{key: row[key] for key in kept},
        "label": run_label(config),
        "seed": config.train.seed,
        "config_hash": config_hash(config),
        "metrics": row["transfer"].get("test", {}).get("metrics", {}),
        "files": row.get("files", {}),
    }


def write_report(results: Mapping[str, Any], config: CompareConfig) -> list[Path]:
    """Write the Markdown file and the plot (and the copy for the documentation); returns the first two."""
    folder = state_folder(config.output, config.name)
    plot = save_plot(results, folder / "plots")
    report = folder / "comparison.md"
    report.write_text(markdown(results, f"plots/{plot.name}" if plot else ""))
    if config.write_docs:
        Path(config.write_docs).expanduser().write_text(markdown(results))
    return [report, plot] if plot else [report]


def _log_report(session: TuneSession, results: Mapping[str, Any], files: list[Path]) -> None:
    """The parent run holds the table: as files, and as metrics for MLflow's own plots."""
    parent = session.parent
    parent.artifact(session.local / COMPARISON.results)
    for file in files:
        parent.artifact(file, "plots" if file.suffix == ".png" else None)
    if results["together"]["files"]:
        parent.artifact(session.local / "comparison", "comparison")
    values = {}
    for row in results["rows"]:
        for metric, cell in row["cells"].items():
            if cell is not None:
                values[f"{row['name']}/{metric}"] = cell["mean"]
                values |= {} if cell["ci95"] is None else {f"{row['name']}/{metric}_ci95": cell["ci95"]}
    parent.metrics(values)
