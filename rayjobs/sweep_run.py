"""One sweep from the checked configuration to the final table: baseline, search, test report, confirmation."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from evaluation import TASKS
from image_data.prepared import PreparedData
from rayjobs.capacity import ClusterInfo
from rayjobs.configs import PretrainConfig, from_dict, preset, to_dict
from rayjobs.named_runs import SWEEP
from rayjobs.ray_tune import SweepPlan, build_tuner, can_restore, milestones, restore_tuner
from rayjobs.record import data_record, package_versions
from rayjobs.reports import print_report, save_plots
from rayjobs.sweep_config import SweepConfig, SweepSetup
from rayjobs.tracking import RunHandle
from rayjobs.trial_log import log_transfer
from rayjobs.tune_session import Interrupted, TuneSession, write_json

__all__ = ["run_sweep", "stored_config", "with_resume"]


class _Sweep(TuneSession):
    """State of a running sweep on the driver."""

    def __init__(self, setup: SweepSetup, data: PreparedData, cluster: ClusterInfo, console: Console) -> None:
        config = setup.config
        super().__init__(config.name, "sweep", config.output, config.train, data, cluster, console)
        self.setup = setup

    def sweep_plan(self, base: Mapping[str, PretrainConfig], folder: str, **changes: Any) -> SweepPlan:
        """The sweep's tasks, objective and probe; trials of the search are probed at their milestones."""
        setup, config = self.setup, self.setup.config
        probe_epochs = milestones(config.train.epochs) if folder == "tune" else ()
        probe = (setup.probe, probe_epochs, setup.probe_metric)
        common = {"num_trials": config.num_trials, "prune": config.prune, "direction": setup.direction}
        common |= {"task_data": setup.task_data}
        return self.plan(base, folder, setup.tasks, setup.objective, *probe, **{**common, **changes})


def run_sweep(setup: SweepSetup, data: PreparedData, cluster: ClusterInfo, console: Console) -> dict[str, Any]:
    """Run (or continue) a sweep; returns what ``results.json`` holds.

    Raises:
        Interrupted: Ctrl-C; the runs are closed and the sweep can be resumed.
    """
    began = time.time()
    sweep = _Sweep(setup, data, cluster, console)
    _log_parent(sweep)
    write_json(sweep.local / SWEEP.state, {"config": to_dict(setup.config), "fingerprint": data.fingerprint})
    try:
        baseline = _baseline(sweep)
        trials = _search(sweep)
        results: dict[str, Any] = {
            "name": setup.config.name,
            "objective": setup.objective,
            "direction": setup.direction,
            "rule": data.rule,
            "left_out": setup.left_out,
            "baseline": baseline,
            "trials": trials,
        }
        best = _best(trials, setup.direction)
        if best is not None:
            results["best"] = best
            results["test"] = _test_best(sweep, best)
            if setup.config.confirm:
                results["confirm"] = _confirm(sweep, best)
    except KeyboardInterrupt as interrupt:
        sweep.parent.end("KILLED")
        sweep.tracker.close(20)
        raise Interrupted from interrupt
    results["seconds"] = time.time() - began
    results["versions"] = package_versions()
    _finish(sweep, results)
    return results


def _log_parent(sweep: _Sweep) -> None:
    setup = sweep.setup
    config = to_dict(setup.config)
    flat = {k: v for k, v in config.items() if k not in ("train", "data", "options")}
    for task in setup.tasks:
        flat |= {f"{task}_{name}": value for name, value in config["options"][task].items()}
    sweep.parent.params({**flat, **config["train"], **{f"data_{k}": v for k, v in config["data"].items()}})
    sweep.parent.tags({"objective": setup.objective, "data_fingerprint": sweep.data.fingerprint})
    sweep.parent.json({"config": config, "data": data_record(sweep.data)}, "sweep.json")


def _baseline(sweep: _Sweep) -> list[dict[str, Any]]:
    """The randomly initialised backbone, as runs of their own: what pretraining has to beat."""
    config = sweep.setup.config
    seeds = [config.train.seed + i for i in range(max(1, config.confirm))]
    train = replace(config.train, num_workers=1)  # nothing is trained: a process group would only cost time
    base = {"supervised": preset("supervised", train, config.data)}
    plan = sweep.sweep_plan(base, "baseline", phases=("val", "test"), num_trials=len(seeds))
    return sweep.run_points(plan, [{"epochs": 0, "seed": seed} for seed in seeds], "baseline")


def _search(sweep: _Sweep) -> list[dict[str, Any]]:
    setup = sweep.setup
    plan = sweep.sweep_plan(setup.base, "tune")
    log = sweep.log(plan, "trial", plan.num_trials)
    if can_restore(plan):
        tuner = restore_tuner(plan, log)
    else:
        tuner = build_tuner(plan, setup.space, setup.context, log)
    return sweep.fit(tuner, plan, log, plan.num_trials)


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
    from rayjobs.result_files import write_phases
    from rayjobs.transfer import evaluate_checkpoint

    stored = sweep.local / "test.json"
    if stored.is_file():
        previous = json.loads(stored.read_text())
        if previous["trial_id"] == best["trial_id"]:
            return previous["result"]
    settings = sweep.setup.config.train

    def evaluate() -> dict[str, Any]:
        with local_directory(best["checkpoint"]) as directory:
            found = evaluate_checkpoint(directory, sweep_tasks, "test", data, settings, **known)
        write_phases({"test": found}, files)
        return found.to_json()

    sweep_tasks, data = sweep.setup.tasks, sweep.data
    files = f"{sweep.folder}/winner-files"
    known: dict[str, Any] = {"task_data": sweep.setup.task_data, "storage": f"{sweep.folder}/winner-runs"}
    known["location"] = best["checkpoint"]
    # With several workers it waits for Ray jobs of its own: what it reserved they would lack.
    waits = settings.num_workers > 1 and any(TASKS[name].needs == "fine_tuning" for name in sweep_tasks)
    num_cpus, num_gpus = (0, 0) if waits else (settings.cpus_per_worker, float(settings.use_gpu))
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(evaluate)
    result = ray.get(remote.options(label_selector=sweep.placement.train or {}).remote())
    write_json(stored, {"trial_id": best["trial_id"], "result": result})
    return result


def _confirm(sweep: _Sweep, best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Retrain the winner's setting with new seeds and report the test split."""
    config: PretrainConfig = from_dict(PretrainConfig, best["config"])
    first = config.train.seed + 1000  # seeds that no trial has used
    plan = sweep.sweep_plan({config.method: config}, f"confirm-{best['trial_id']}", phases=("val", "test"), prune=False)
    plan = replace(plan, num_trials=sweep.setup.config.confirm)
    points = [{"method": config.method, "seed": first + i} for i in range(plan.num_trials)]
    return sweep.run_points(plan, points, "confirm")


def _finish(sweep: _Sweep, results: dict[str, Any]) -> None:
    """Write, show and log the report."""
    write_json(sweep.local / SWEEP.results, results)
    plots = save_plots(results, sweep.local / "plots")
    parent: RunHandle = sweep.parent
    parent.artifact(sweep.local / SWEEP.results)
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


def stored_config(folder: Path) -> SweepConfig:
    """The configuration that a sweep was started with."""
    return from_dict(SweepConfig, json.loads((folder / SWEEP.state).read_text())["config"])


def with_resume(config: SweepConfig, stored: SweepConfig) -> SweepConfig:
    """The stored sweep with the two fields that may change between starts."""
    return dataclasses.replace(stored, resume=True, confirm=max(config.confirm, stored.confirm))
