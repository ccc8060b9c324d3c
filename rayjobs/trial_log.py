"""What the driver does with a trial's events: one line for the terminal, everything to MLflow."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from methods.monitors import COLLAPSED_SPREAD, is_collapsed
from rayjobs.checkpoint import save_transfer_checkpoint
from rayjobs.configs import PretrainConfig, config_hash, to_dict
from rayjobs.number_text import metric_text
from rayjobs.ray_tune import SweepPlan, run_label, run_name, trial_config
from rayjobs.record import trial_record
from rayjobs.result_files import copy_files
from rayjobs.tracking import RunHandle, Tracker

__all__ = [
    "TrialLog",
    "collapse_text",
    "flat_parameters",
    "has_collapsed",
    "log_epoch",
    "log_transfer",
]

NOT_METRICS = ("epoch", "step", "curve")


def flat_parameters(config: PretrainConfig) -> dict[str, Any]:
    """Every setting of a run under its own name, so that MLflow compares them in one column across methods."""
    parts = to_dict(config)
    data = {f"data_{k}": v for k, v in parts["data"].items() if k != "cache"}
    return {"method": config.method, **parts["method_config"], **parts["optimizer"], **parts["train"], **data}


def log_epoch(run: RunHandle, report: Mapping[str, Any]) -> None:
    """One epoch's report as curves: the pretext metrics by epoch, the loss by step as well."""
    step = int(report["epoch"])
    speed = ("images_per_second", "data_wait_percent", "epoch_seconds")
    values: dict[str, float] = {}
    for name, value in report.items():
        if name in NOT_METRICS or not isinstance(value, int | float):
            continue
        is_transfer = name == "proxy" or name.startswith("probe/")
        values[name if name in speed or is_transfer else f"pretext/{name}"] = value
    run.metrics(values, step)
    curve = report.get("curve") or []
    run.curve("pretext/loss_by_step", [(s, loss) for s, loss, _ in curve])
    run.curve("learning_rate", [(s, lr) for s, _, lr in curve])


def log_transfer(run: RunHandle, transfer: Mapping[str, Any], epoch: int) -> None:
    """Downstream metrics: validation under their own names, the test split with the prefix ``test/``."""
    for phase, result in transfer.items():
        prefix = "test/" if phase == "test" else ""
        values = {}
        for name, metric in result["metrics"].items():
            values[f"{prefix}{name}"] = metric["value"]
            if metric["ci95"] is not None:
                values[f"{prefix}{name}_ci95"] = metric["ci95"]
        run.metrics(values, epoch)
        run.json(result["protocol"], f"protocol_{phase}.json")


def has_collapsed(report: Mapping[str, Any]) -> bool:
    """Whether a trial's last report (its final one, or an epoch's where it was stopped) shows a collapse."""
    return bool(report.get("collapsed", is_collapsed(dict(report))))


def collapse_text(metrics: Mapping[str, float]) -> str:
    """What a collapsed run means and what to try, for the terminal."""
    return (
        "Collapsed: the features of all images are nearly the same "
        f"(feature_spread {metrics['feature_spread']:.2f}; healthy is about 1, collapsed below {COLLAPSED_SPREAD:g}). "
        "It will transfer poorly. Try a lower --learning-rate, more --warmup-epochs or a larger "
        "--batch-size; if the method's own settings were changed, go back to its defaults."
    )


class TrialLog:
    """Listener of one Tune run.

    Args:
        plan: what the trials run.
        tracker: MLflow.
        parent: the sweep's run.
        console: the terminal.
        label: word before the trial number ("trial", "baseline", "confirm").
        total: trials to come.
        numbers: JSON file of the trials' numbers, which a restored Tune run would count in another order.
    """

    def __init__(
        self,
        plan: SweepPlan,
        tracker: Tracker,
        parent: RunHandle,
        console: Console,
        label: str,
        total: int,
        numbers: Path,
    ) -> None:
        self._plan, self._tracker, self._parent, self._console = plan, tracker, parent, console
        self._label, self._total = label, total
        self._runs: dict[str, RunHandle] = {}
        self._numbers_file = numbers
        self._numbers: dict[str, int] = json.loads(numbers.read_text()) if numbers.is_file() else {}
        self._names: dict[str, str] = {}
        self._ended: set[str] = set()

    def number(self, trial_id: str) -> int:
        """The trial's number, from 1 in the order of the first starts."""
        if trial_id not in self._numbers:
            self._numbers[trial_id] = len(self._numbers) + 1
            temporary = self._numbers_file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._numbers))
            os.replace(temporary, self._numbers_file)
        return self._numbers[trial_id]

    def trial_started(self, trial_id: str, sampled: Mapping[str, Any]) -> None:
        """Open (or, after a resume, reopen) a trial's run."""
        number = self.number(trial_id)
        config = trial_config(self._plan, sampled)
        name = run_name(self._plan, config, number)
        self._names[trial_id] = name
        run = self._tracker.run(
            name,
            {
                "key": f"{self._plan.name}/{self._plan.folder}/{trial_id}",
                "kind": self._label,
                "method": run_label(config),
                "config_hash": config_hash(config),
                "trial_id": trial_id,
            },
            self._parent,
        )
        self._runs[trial_id] = run
        run.params(flat_parameters(config))
        record = trial_record(self._plan.jobs[config.method].record, config, sampled)
        run.json({"config": to_dict(config), "record": record, "sampled": dict(sampled)}, "config.json")
        self._say(trial_id, "started", _short(sampled))

    def trial_reported(self, trial_id: str, report: Mapping[str, Any]) -> None:
        """Log an epoch, or the final transfer metrics."""
        run = self._runs[trial_id]
        if report.get("diverged"):
            self._say(trial_id, "[red]diverged[/red]", report["diverged"])
            return
        if "transfer" in report:
            log_transfer(run, report["transfer"], int(report["epoch"]) - 1)
            return
        if report["epoch"] == 0:
            return
        log_epoch(run, report)
        proxy = f"  probe {report['proxy']:.1f}" if report.get("proxy") is not None else ""
        self._say(
            trial_id,
            f"epoch {int(report['epoch'])}",
            f"loss {report.get('loss', float('nan')):.3f}{proxy}  {report.get('images_per_second', 0):.0f} images/s  "
            f"data wait {report.get('data_wait_percent', 0):.0f} %"
            + (f"  collapsed: feature_spread {report['feature_spread']:.2g}" if is_collapsed(dict(report)) else ""),
        )

    def trial_ended(self, trial_id: str, report: Mapping[str, Any], error: str | None) -> None:
        """Close the run with the status that fits."""
        run = self._runs[trial_id]
        self._ended.add(trial_id)
        collapsed = has_collapsed(report)
        if collapsed:
            run.tags({"collapsed": "true"})
        if error is not None or report.get("diverged"):
            run.tags({"outcome": "diverged" if report.get("diverged") else "crashed"})
            if report.get("diverged"):
                run.text(str(report["diverged"]), "error.txt")
            run.end("FAILED")
            if error is not None:
                self._say(
                    trial_id, "[red]failed[/red]", error or "the others go on; its error.txt in MLflow will say why"
                )
        elif "transfer" in report:
            self._log_checkpoint(run, report["checkpoint_path"])
            self._log_files(run, report.get("files") or {})
            run.tags({"outcome": "finished"})
            run.end("FINISHED")
            phase = next(iter(report["transfer"].values()))
            text = metric_text(phase["metrics"].get(self._plan.objective))
            text += "  collapsed: the features of all images are nearly the same" if collapsed else ""
            self._say(trial_id, "[green]finished[/green]", f"{self._plan.objective} {text}")
        else:
            run.tags({"outcome": "pruned"})
            run.end("KILLED")
            self._say(trial_id, "[yellow]pruned[/yellow]", f"after epoch {int(report.get('epoch', 0))}")

    def explain(self, trial_id: str, error: str) -> None:
        """Add to a crashed trial's run what Tune knows only after its end."""
        if trial_id in self._runs:  # not one that an earlier start of the sweep has explained
            self._runs[trial_id].text(error, "error.txt")

    def interrupted(self) -> None:
        """Close the runs of trials that an interruption stopped; a resumed sweep reopens them."""
        for trial_id in set(self._runs) - self._ended:
            self._runs[trial_id].tags({"outcome": "interrupted"})
            self._runs[trial_id].end("KILLED")

    def _log_checkpoint(self, run: RunHandle, path: str) -> None:
        """The part of the checkpoint that transfers, as an artifact; copied first, since Tune may delete it."""
        staging = Path(tempfile.mkdtemp(prefix="artifact-"))
        save_transfer_checkpoint(path, staging / "checkpoint")
        run.artifact(staging / "checkpoint", "checkpoint")
        run.remove(staging)

    def _log_files(self, run: RunHandle, places: Mapping[str, str]) -> None:
        """Plots and samples of the evaluation, as artifacts of each phase."""
        for phase, place in places.items():
            staging = Path(tempfile.mkdtemp(prefix="artifact-"))
            copy_files(place, staging / phase)
            run.artifact(staging / phase, f"evaluation_{phase}")
            run.remove(staging)

    def _say(self, trial_id: str, event: str, text: str) -> None:
        count = f"{self._label} {self._numbers[trial_id]:>2}/{self._total}"
        head = f"[dim]{count}[/dim]  [bold]{self._names[trial_id]:<20}[/bold]"
        self._console.print(f"{head} {event}  {escape(text)}", highlight=False, soft_wrap=True)


def _short(sampled: Mapping[str, Any]) -> str:
    parts = [f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in sampled.items() if k != "method"]
    return " ".join(parts)
