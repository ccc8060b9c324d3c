"""What commands that run many trials share on the driver: folders, MLflow, fixed settings that survive a restart."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from image_data.prepared import PreparedData
from rayjobs.capacity import ClusterInfo, max_concurrent_trials, placement
from rayjobs.cli import plain
from rayjobs.configs import PretrainConfig, TrainConfig, to_dict
from rayjobs.job import Job
from rayjobs.named_runs import output_folder, state_folder
from rayjobs.ray_tune import SweepPlan, build_points_tuner, can_restore, restore_tuner, run_name, trial_config
from rayjobs.record import run_record
from rayjobs.tracking import Tracker
from rayjobs.transfer import TaskConfigs
from rayjobs.trial_log import TrialLog, has_collapsed

__all__ = ["Interrupted", "TuneSession", "write_json"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during the trials; everything finished is on disk."""


class TuneSession:
    """State on the driver of a command that runs trials.

    Args:
        name: of the sweep or comparison: MLflow experiment and folder.
        kind: tag of the parent run.
        output: folder or URI under which the folder lies.
        train: training settings that all trials share.
        data: prepared data.
        cluster: where the trials run.
        console: the terminal.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        output: str,
        train: TrainConfig,
        data: PreparedData,
        cluster: ClusterInfo,
        console: Console,
    ) -> None:
        self.name, self.train, self.data, self.console = name, train, data, console
        self.folder = output_folder(output, name)
        self.local = state_folder(output, name)
        self.local.mkdir(parents=True, exist_ok=True)
        self.placement = placement(cluster)
        resources = {"CPU": train.cpus_per_worker, "GPU": float(train.use_gpu)}
        self.max_concurrent = max_concurrent_trials(cluster, train.num_workers, resources)
        self.tracker = Tracker(name, self.local / "mlflow-pending.jsonl", log=plain(console))
        self.parent = self.tracker.run(name, {"key": name, "kind": kind})

    def plan(
        self,
        base: Mapping[str, PretrainConfig],
        folder: str,
        tasks: TaskConfigs,
        objective: str,
        probe: TaskConfigs | None = None,
        probe_epochs: tuple[int, ...] = (),
        probe_metric: str = "",
        **more: Any,
    ) -> SweepPlan:
        """What the trials of one Tune run do; ``more`` are further fields of ``SweepPlan``."""
        jobs = {}
        for method, config in base.items():
            record = run_record(config, self.data)
            jobs[method] = Job(config, record, self.data, probe or {}, probe_epochs, probe_metric, self.placement)
        return SweepPlan(
            base=base,
            jobs=jobs,
            tasks=tasks,
            objective=objective,
            storage=self.folder,
            name=self.name,
            max_concurrent=self.max_concurrent,
            seed=self.train.seed,
            folder=folder,
            **more,
        )

    def log(self, plan: SweepPlan, label: str, total: int) -> TrialLog:
        """Listener of one Tune run."""
        numbers = self.local / f"{plan.folder}-numbers.json"
        return TrialLog(plan, self.tracker, self.parent, self.console, label, total, numbers)

    def run_points(
        self, plan: SweepPlan, points: list[dict[str, Any]], label: str, may_fail: bool = False
    ) -> list[dict[str, Any]]:
        """Run fixed settings; what an earlier start finished is kept, and what crashed then is tried again.

        Args:
            plan: what the trials do.
            points: one dictionary of parameters per trial.
            label: word before a trial's number in the terminal.
            may_fail: return crashed and diverged trials as rows; otherwise they are an error.

        Raises:
            KeyboardInterrupt: Ctrl-C; the runs are closed.
            RuntimeError: a trial crashed or diverged, and may not.
        """
        stored = self.local / f"{plan.folder}.json"
        if stored.is_file():
            rows = json.loads(stored.read_text())
            if not any(row["outcome"] == "crashed" for row in rows):
                return rows
        log = self.log(plan, label, len(points))
        if can_restore(plan):
            tuner = restore_tuner(plan, log, retry_crashed=True)
        else:
            tuner = build_points_tuner(plan, points, log)
        rows = self.fit(tuner, plan, log, len(points))
        failed = [row for row in rows if row["outcome"] != "finished"]
        if failed and not may_fail:
            raise RuntimeError(
                f"{len(failed)} of {len(points)} {label} runs failed; see {self.folder}/{plan.folder} for their logs."
            )
        write_json(stored, rows)
        return rows

    def fit(self, tuner: Any, plan: SweepPlan, log: TrialLog, expected: int) -> list[dict[str, Any]]:
        """Run Tune and turn its results into plain rows; Tune swallows Ctrl-C, so an incomplete grid means one."""
        grid = tuner.fit()
        trials = sorted(grid._experiment_analysis.trials, key=lambda trial: log.number(trial.trial_id))
        rows = [_row(plan, trial, log.number(trial.trial_id)) for trial in trials]
        if len(rows) < expected or any(row["outcome"] == "unfinished" for row in rows):
            log.interrupted()
            raise KeyboardInterrupt
        for trial, row in zip(trials, rows, strict=True):
            if row["outcome"] == "crashed":
                log.explain(trial.trial_id, str(trial.get_pickled_error() or row["error"]))
        return rows


def _row(plan: SweepPlan, trial: Any, number: int) -> dict[str, Any]:
    """One trial as plain data."""
    result, sampled = trial.last_result or {}, trial.config.get("point", trial.config)
    config = trial_config(plan, sampled)
    outcome, error = "unfinished", None
    if trial.status == "ERROR":
        outcome, error = "crashed", _last_line(trial.get_pickled_error())
    elif trial.status == "TERMINATED":
        outcome = "finished" if "transfer" in result else "diverged" if result.get("diverged") else "pruned"
        error = result.get("diverged")
    return {
        "trial_id": trial.trial_id,
        "name": run_name(plan, config, number),
        "method": config.method,
        "sampled": dict(sampled),
        "outcome": outcome,
        "error": error,
        "epoch": result.get("epoch", 0),
        "seconds": result.get("time_total_s", 0.0),
        "proxy": result.get("proxy"),
        "objective": result.get("objective"),
        "collapsed": has_collapsed(result),
        "pretext": result.get("pretext", {}),
        "transfer": result.get("transfer", {}),
        "files": result.get("files", {}),
        "checkpoint": result.get("checkpoint_path"),
        "config": to_dict(config),
    }


def _last_line(error: Any) -> str:
    """What an exception says after its traceback."""
    lines = str(error or "").strip().splitlines()
    return lines[-1][:300] if lines else "failed"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that an interruption leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str))
    os.replace(temporary, path)
