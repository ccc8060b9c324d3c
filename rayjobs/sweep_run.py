"""One sweep from the checked configuration to the final table: baseline, search, test report, confirmation."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from image_data.prepared import PreparedData
from rayjobs.capacity import ClusterInfo, max_concurrent_trials, placement
from rayjobs.cli import plain
from rayjobs.configs import PretrainConfig, from_dict, preset, to_dict
from rayjobs.job import Job
from rayjobs.places import resolve_output
from rayjobs.ray_tune import (
    SweepPlan,
    build_points_tuner,
    build_tuner,
    can_restore,
    milestones,
    restore_tuner,
    run_name,
    trial_config,
)
from rayjobs.record import data_record, package_versions, run_record
from rayjobs.reports import print_report, save_plots
from rayjobs.sweep_config import SweepConfig, SweepSetup
from rayjobs.tracking import RunHandle, Tracker
from rayjobs.trial_log import TrialLog, has_collapsed, log_transfer

__all__ = ["SweepInterrupted", "run_sweep", "state_folder", "sweep_folder"]

STATE_FILE = "sweep.json"
RESULTS_FILE = "results.json"


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep; everything finished is on disk."""


def sweep_folder(config: SweepConfig) -> str:
    """Absolute folder or URI of the sweep."""
    return f"{resolve_output(config.output)}/{config.name}"


def state_folder(config: SweepConfig) -> Path:
    """Local folder of the sweep's state and report: its own folder, or ``results/NAME`` when that is a URI."""
    return Path(resolve_output("results" if "://" in config.output else config.output)) / config.name


class _Sweep:
    """State of a running sweep on the driver."""

    def __init__(self, setup: SweepSetup, data: PreparedData, cluster: ClusterInfo, console: Console) -> None:
        self.setup, self.data, self.console = setup, data, console
        config = setup.config
        self.folder = sweep_folder(config)
        self.local = state_folder(config)
        self.local.mkdir(parents=True, exist_ok=True)
        settings = config.train
        resources = {"CPU": settings.cpus_per_worker, "GPU": float(settings.use_gpu)}
        self.placement = placement(cluster)
        self.max_concurrent = max_concurrent_trials(cluster, settings.num_workers, resources)
        self.tracker = Tracker(config.name, self.local / "mlflow-pending.jsonl", log=plain(console))
        self.parent = self.tracker.run(config.name, {"key": config.name, "kind": "sweep"})

    def job(self, config: PretrainConfig, probe_epochs: tuple[int, ...]) -> Job:
        setup = self.setup
        record = run_record(config, self.data)
        return Job(config, record, self.data, setup.probe, probe_epochs, setup.probe_metric, self.placement)

    def plan(self, base: Mapping[str, PretrainConfig], folder: str, **changes: Any) -> SweepPlan:
        setup, config = self.setup, self.setup.config
        epochs = config.train.epochs
        probes = milestones(epochs) if folder == "tune" else ()
        values: dict[str, Any] = {
            "num_trials": config.num_trials,
            "prune": config.prune,
            "direction": setup.space.direction,
            **changes,
        }
        return SweepPlan(
            base=base,
            jobs={name: self.job(c, probes) for name, c in base.items()},
            tasks=setup.tasks,
            objective=setup.objective,
            storage=self.folder,
            name=config.name,
            max_concurrent=self.max_concurrent,
            seed=config.train.seed,
            folder=folder,
            **values,
        )


def run_sweep(setup: SweepSetup, data: PreparedData, cluster: ClusterInfo, console: Console) -> dict[str, Any]:
    """Run (or continue) a sweep; returns what ``results.json`` holds.

    Raises:
        SweepInterrupted: Ctrl-C; the runs are closed and the sweep can be resumed.
    """
    began = time.time()
    sweep = _Sweep(setup, data, cluster, console)
    _log_parent(sweep)
    _write(sweep.local / STATE_FILE, {"config": to_dict(setup.config), "fingerprint": data.fingerprint})
    try:
        baseline = _baseline(sweep)
        trials = _search(sweep)
        results: dict[str, Any] = {
            "name": setup.config.name,
            "objective": setup.objective,
            "direction": setup.space.direction,
            "rule": data.rule,
            "left_out": setup.left_out,
            "baseline": baseline,
            "trials": trials,
        }
        best = _best(trials, setup.space.direction)
        if best is not None:
            results["best"] = best
            results["test"] = _test_best(sweep, best)
            if setup.config.confirm:
                results["confirm"] = _confirm(sweep, best)
    except KeyboardInterrupt as interrupt:
        sweep.parent.end("KILLED")
        sweep.tracker.close(20)
        raise SweepInterrupted from interrupt
    results["seconds"] = time.time() - began
    results["versions"] = package_versions()
    _finish(sweep, results)
    return results


def _log_parent(sweep: _Sweep) -> None:
    setup = sweep.setup
    config = to_dict(setup.config)
    flat = {k: v for k, v in config.items() if k not in ("train", "data")}
    sweep.parent.params({**flat, **config["train"], **{f"data_{k}": v for k, v in config["data"].items()}})
    sweep.parent.tags({"objective": setup.objective, "data_fingerprint": sweep.data.fingerprint})
    sweep.parent.json({"config": config, "data": data_record(sweep.data)}, "sweep.json")


def _run_points(sweep: _Sweep, plan: SweepPlan, points: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    """Run fixed settings, or read the results that an earlier start of this sweep left."""
    stored = sweep.local / f"{plan.folder}.json"
    if stored.is_file():
        return json.loads(stored.read_text())
    log = TrialLog(plan, sweep.tracker, sweep.parent, sweep.console, label, len(points), _numbers_file(sweep, plan))
    tuner = build_points_tuner(plan, points, log)
    rows = _fit(tuner, plan, log, len(points))
    failed = [row for row in rows if row["outcome"] != "finished"]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(points)} {label} runs failed; see {sweep.folder}/{plan.folder} for their logs."
        )
    _write(stored, rows)
    return rows


def _baseline(sweep: _Sweep) -> list[dict[str, Any]]:
    """The randomly initialised backbone, as runs of their own: what pretraining has to beat."""
    config = sweep.setup.config
    seeds = [config.train.seed + i for i in range(max(1, config.confirm))]
    train = replace(config.train, num_workers=1)  # nothing is trained: a process group would only cost time
    base = {"supervised": preset("supervised", train, config.data)}
    plan = sweep.plan(base, "baseline", phases=("val", "test"), num_trials=len(seeds))
    return _run_points(sweep, plan, [{"epochs": 0, "seed": seed} for seed in seeds], "baseline")


def _search(sweep: _Sweep) -> list[dict[str, Any]]:
    setup = sweep.setup
    plan = sweep.plan(setup.base, "tune")
    log = TrialLog(
        plan, sweep.tracker, sweep.parent, sweep.console, "trial", plan.num_trials, _numbers_file(sweep, plan)
    )
    if can_restore(plan):
        tuner = restore_tuner(plan, log)
    else:
        tuner = build_tuner(plan, setup.space, setup.context, log)
    return _fit(tuner, plan, log, plan.num_trials)


def _numbers_file(sweep: _Sweep, plan: SweepPlan) -> Path:
    return sweep.local / f"{plan.folder}-numbers.json"


def _fit(tuner: Any, plan: SweepPlan, log: TrialLog, expected: int) -> list[dict[str, Any]]:
    """Run Tune and turn its results into plain rows; Tune swallows Ctrl-C, so an incomplete grid means one."""
    grid = tuner.fit()
    trials = sorted(grid._experiment_analysis.trials, key=lambda trial: log.number(trial.trial_id))
    rows = [_row(plan, trial, log.number(trial.trial_id)) for trial in trials]
    if len(rows) < expected or any(row["outcome"] == "unfinished" for row in rows):
        log.interrupted()
        raise KeyboardInterrupt
    return rows


def _row(plan: SweepPlan, trial: Any, number: int) -> dict[str, Any]:
    """One trial as plain data."""
    result, sampled = trial.last_result or {}, trial.config.get("point", trial.config)
    config = trial_config(plan, sampled)
    outcome = "unfinished"
    if trial.status == "ERROR":
        outcome = "crashed"
    elif trial.status == "TERMINATED":
        outcome = "finished" if "transfer" in result else "diverged" if result.get("diverged") else "pruned"
    return {
        "trial_id": trial.trial_id,
        "name": run_name(plan, config, number),
        "method": config.method,
        "sampled": dict(sampled),
        "outcome": outcome,
        "epoch": result.get("epoch", 0),
        "seconds": result.get("time_total_s", 0.0),
        "proxy": result.get("proxy"),
        "objective": result.get("objective"),
        "collapsed": has_collapsed(result),
        "pretext": result.get("pretext", {}),
        "transfer": result.get("transfer", {}),
        "checkpoint": result.get("checkpoint_path"),
        "config": to_dict(config),
    }


def _best(trials: list[dict[str, Any]], direction: str) -> dict[str, Any] | None:
    finished = [t for t in trials if t["outcome"] == "finished"]
    if not finished:
        return None
    choose = max if direction == "maximize" else min
    return choose(finished, key=lambda t: t["objective"])


def _test_best(sweep: _Sweep, best: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the winner's own checkpoint on the test split: the first time that anything looks at it."""
    import ray

    from rayjobs.checkpoint import local_directory
    from rayjobs.transfer import evaluate_checkpoint

    stored = sweep.local / "test.json"
    if stored.is_file():
        previous = json.loads(stored.read_text())
        if previous["trial_id"] == best["trial_id"]:
            return previous["result"]
    settings = sweep.setup.config.train

    def evaluate() -> dict[str, Any]:
        with local_directory(best["checkpoint"]) as directory:
            return evaluate_checkpoint(directory, sweep_tasks, "test", data, settings).to_json()

    sweep_tasks, data = sweep.setup.tasks, sweep.data
    remote = ray.remote(num_cpus=settings.cpus_per_worker, num_gpus=float(settings.use_gpu))(evaluate)
    result = ray.get(remote.options(label_selector=sweep.placement.train or {}).remote())
    _write(stored, {"trial_id": best["trial_id"], "result": result})
    return result


def _confirm(sweep: _Sweep, best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Retrain the winner's setting with new seeds and report the test split."""
    config: PretrainConfig = from_dict(PretrainConfig, best["config"])
    first = config.train.seed + 1000  # seeds that no trial has used
    plan = sweep.plan({config.method: config}, f"confirm-{best['trial_id']}", phases=("val", "test"), prune=False)
    plan = replace(plan, num_trials=sweep.setup.config.confirm)
    points = [{"method": config.method, "seed": first + i} for i in range(plan.num_trials)]
    return _run_points(sweep, plan, points, "confirm")


def _finish(sweep: _Sweep, results: dict[str, Any]) -> None:
    """Write, show and log the report."""
    _write(sweep.local / RESULTS_FILE, results)
    plots = save_plots(results, sweep.local / "plots")
    parent: RunHandle = sweep.parent
    parent.artifact(sweep.local / RESULTS_FILE)
    for plot in plots:
        parent.artifact(plot, "plots")
    if "best" in results:
        best = results["best"]
        parent.tags({"best_trial": best["name"], "best_method": best["method"]})
        log_transfer(parent, {**best["transfer"], "test": results["test"]}, best["epoch"] - 1)
        parent.metrics({"objective": best["objective"]})
    print_report(results, sweep.console)
    parent.end("FINISHED" if "best" in results else "FAILED")
    sweep.tracker.close()


def _write(path: Path, value: Any) -> None:
    """Write JSON so that an interruption leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str))
    os.replace(temporary, path)


def stored_config(folder: Path) -> SweepConfig:
    """The configuration that a sweep was started with."""
    return from_dict(SweepConfig, json.loads((folder / STATE_FILE).read_text())["config"])


def is_finished(folder: Path) -> bool:
    """Whether a sweep has written its results."""
    return (folder / RESULTS_FILE).is_file()


def with_resume(config: SweepConfig, stored: SweepConfig) -> SweepConfig:
    """The stored sweep with the two fields that may change between starts."""
    return dataclasses.replace(stored, resume=True, confirm=max(config.confirm, stored.confirm))
