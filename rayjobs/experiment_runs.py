"""An experiment of ours as MLflow holds it: its runs, their curves, and the facts that stand above a report."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation import TASKS
from rayjobs.tracking import default_tracking_uri

__all__ = ["Experiment", "ExperimentRun", "Store", "read_experiment"]

PARENTS = ("sweep", "comparison")  # runs that hold an experiment together
CHILDREN = ("trial", "baseline", "confirm", "run", "evaluate", "pretrain")
CURVES = ("pretext/loss", "pretext/feature_spread", "proxy", "epoch_seconds", "images_per_second")
# Settings that change how a run is computed or where it lies, but not what is trained.
NOT_SETTINGS = frozenset(
    (
        *("seed", "num_workers", "use_gpu", "cpus_per_worker", "accumulate", "precision", "compile", "stream"),
        *("memory_limit_gb", "augmentation", "checkpoint_every", "max_failures", "checkpoint", "phase"),
    )
)
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class ExperimentRun:
    """One trained or evaluated model.

    Attributes:
        run_id: MLflow's.
        name: shown to the user.
        kind: one of ``CHILDREN``.
        label: method, or which untrained backbone it is.
        outcome: finished, pruned, diverged, crashed, interrupted or running.
        params: every setting, as MLflow stores it.
        metrics: newest value of every metric.
        tags: all tags.
        start: milliseconds since 1970.
        seconds: from start to end; 0 while it runs.
        curves: metric -> (epoch, value) points, of ``CURVES`` and of the probe.
        error: why it failed; empty otherwise.
    """

    run_id: str
    name: str
    kind: str
    label: str
    outcome: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    start: int
    seconds: float
    curves: Mapping[str, Curve] = field(default_factory=dict)
    error: str = ""

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return int(self.params.get("seed", 0))

    @property
    def settings(self) -> dict[str, str]:
        """What was trained and how, without the seed and without what only says where it was computed."""
        return {k: v for k, v in self.params.items() if k not in NOT_SETTINGS}

    def downstream(self, phase: str) -> dict[str, dict[str, float | None]]:
        """Downstream metrics of a phase: name -> value and half width over tasks or images, where there is one."""
        prefix = "test/" if phase == "test" else ""
        found: dict[str, dict[str, float | None]] = {}
        for key, value in self.metrics.items():
            name = key.removeprefix(prefix)
            is_here = key.startswith(prefix) and name.split("/")[0] in TASKS and math.isfinite(value)
            if is_here and not name.endswith("_ci95"):
                found[name] = {"value": value, "ci95": self.metrics.get(f"{key}_ci95")}
        return found

    def brief(self, phase: str) -> dict[str, Any]:
        """The run as ``comparison.build_row`` and ``orderings.samples_of`` take it."""
        speed = self.metrics.get("images_per_second")
        return {
            "name": self.name,
            "label": self.label,
            "seed": self.seed,
            "outcome": self.outcome,
            "error": self.error,
            "collapsed": self.tags.get("collapsed") == "true",
            "seconds": self.seconds,
            "pretext": {} if speed is None else {"images_per_second": speed},
            "metrics": self.downstream(phase),
        }

    @property
    def device_seconds(self) -> float:
        """Time of the training steps times GPUs, or times CPU cores where there was none."""
        workers = int(self.params.get("num_workers", 1))
        per_worker = 1.0 if self.uses_gpu else float(self.params.get("cpus_per_worker", 1))
        return workers * per_worker * sum(seconds for _, seconds in self.curves.get("epoch_seconds", []))

    @property
    def uses_gpu(self) -> bool:
        """Whether it was trained on GPUs."""
        return self.params.get("use_gpu") == "True"

    @property
    def images_seen(self) -> float:
        """Images that training has read, each as often as it was read."""
        seconds, speeds = (dict(self.curves.get(name, [])) for name in ("epoch_seconds", "images_per_second"))
        return sum(seconds[epoch] * speeds[epoch] for epoch in seconds.keys() & speeds.keys())


class Store:
    """MLflow, for reading; an artifact that is missing reads as None."""

    def __init__(self, uri: str) -> None:
        for name, value in {"HTTP_REQUEST_MAX_RETRIES": "1", "HTTP_REQUEST_TIMEOUT": "20"}.items():
            os.environ.setdefault(f"MLFLOW_{name}", value)
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            raise ValueError(
                f"There is no MLflow store at {uri}. Set MLFLOW_TRACKING_URI to the one that holds the experiment, or "
                "run a sweep or comparison first."
            )
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri = uri
        self.client = MlflowClient(uri)

    @contextmanager
    def file(self, run_id: str, path: str) -> Iterator[Path | None]:
        """A local copy of an artifact, which goes at the end."""
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory(prefix="artifact-") as folder:
            try:
                found = Path(self.client.download_artifacts(run_id, path, folder))
            except (MlflowException, OSError):
                found = None
            yield found if found is not None and found.is_file() else None

    def text(self, run_id: str, path: str) -> str | None:
        """A text artifact."""
        with self.file(run_id, path) as found:
            return None if found is None else found.read_text(errors="replace")

    def json(self, run_id: str, path: str) -> Any:
        """A JSON artifact."""
        text = self.text(run_id, path)
        return None if text is None else json.loads(text)

    def list_files(self, run_id: str, suffix: str, skip: Sequence[str] = ()) -> list[str]:
        """Paths of a run's artifacts that end in ``suffix``, folders included, but those in ``skip``."""
        from mlflow.exceptions import MlflowException

        found, folders = [], [""]
        while folders:
            try:
                entries = self.client.list_artifacts(run_id, folders.pop() or None)
            except (MlflowException, OSError):
                continue
            for entry in entries:
                if entry.is_dir and entry.path not in skip:
                    folders.append(entry.path)
                elif not entry.is_dir and entry.path.endswith(suffix):
                    found.append(entry.path)
        return sorted(found)


@dataclass(frozen=True)
class Experiment:
    """An experiment and its store.

    Attributes:
        name: its name.
        experiment_id: MLflow's.
        store: where it lies.
        kind: "sweep" or "comparison", or "runs" where no run holds the others together.
        parent: the run that does; None without one.
        shared: further runs whose pictures belong here: evaluations that compare several models.
        runs: the models, in the order of their starts.
    """

    name: str
    experiment_id: str
    store: Store
    kind: str
    parent: ExperimentRun | None
    shared: tuple[ExperimentRun, ...]
    runs: tuple[ExperimentRun, ...]

    def of_kind(self, *kinds: str) -> list[ExperimentRun]:
        """The runs of these kinds."""
        return [run for run in self.runs if run.kind in kinds]


def read_experiment(name: str, uri: str = "") -> Experiment:
    """Read an experiment with its curves.

    Args:
        name: its name.
        uri: tracking URI; empty takes ``default_tracking_uri()``.

    Raises:
        ValueError: the store does not answer, has no such experiment (lists those it has), or nothing has run in it.
    """
    from mlflow.exceptions import MlflowException

    where = uri or default_tracking_uri()
    store = Store(where)
    try:
        experiment_id = _experiment_id(store, name)
        found = _search(store, experiment_id)
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"MLflow at {where} does not answer: {str(error).splitlines()[0][:300]}. Start the server (make ui), or "
            "correct MLFLOW_TRACKING_URI."
        ) from error
    parents = [run for run in found if run.data.tags.get("kind") in PARENTS]
    parent = max(parents, key=lambda run: run.info.start_time, default=None)
    children = [run for run in found if run.data.tags.get("kind") in CHILDREN]
    if parent is not None:  # of a name that was used twice, the newest
        children = [run for run in children if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    if not children and parent is None:
        raise ValueError(f"Experiment {name!r} at {where} has no runs of ours yet. Wait until its first one has begun.")
    shared = [run for run in found if run.data.tags.get("kind") == "evaluation"]
    return Experiment(
        name=name,
        experiment_id=experiment_id,
        store=store,
        kind="runs" if parent is None else parent.data.tags["kind"],
        parent=None if parent is None else _plain(parent),
        shared=tuple(_plain(run) for run in shared),
        runs=tuple(_with_history(store, run) for run in sorted(children, key=lambda run: run.info.start_time)),
    )


def _experiment_id(store: Store, name: str) -> str:
    found = store.client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "deleted":
        return found.experiment_id
    known = [e.name for e in store.client.search_experiments(order_by=["last_update_time DESC"], max_results=200)]
    known = [other for other in known if other != "Default"]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    raise ValueError(f"MLflow at {store.uri} has no experiment {name!r}.{hint} It has: {shown or 'none'}.")


def _search(store: Store, experiment_id: str) -> list[Any]:
    found, token = [], None
    while True:
        page = store.client.search_runs([experiment_id], max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _plain(run: Any, curves: Mapping[str, Curve] | None = None, error: str = "") -> ExperimentRun:
    tags, end = run.data.tags, run.info.end_time
    by_status = {"FINISHED": "finished", "FAILED": "crashed", "KILLED": "interrupted"}
    is_running = run.info.status == "RUNNING"
    return ExperimentRun(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        kind=tags.get("kind", ""),
        label=tags.get("method", ""),
        outcome="running" if is_running else tags.get("outcome") or by_status.get(run.info.status, "crashed"),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags=dict(tags),
        start=run.info.start_time,
        seconds=0.0 if is_running or not end else (end - run.info.start_time) / 1000,
        curves=curves or {},
        error=error,
    )


def _with_history(store: Store, run: Any) -> ExperimentRun:
    """A run with its curves, and with the reason where it failed."""
    wanted = [name for name in run.data.metrics if name in CURVES or name.startswith("probe/")]
    curves = {}
    for name in wanted:
        history = store.client.get_metric_history(run.info.run_id, name)
        points = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
        curves[name] = [(step, value) for step, value in sorted(points.items()) if math.isfinite(value)]
    found = _plain(run, curves)
    if found.outcome not in ("crashed", "diverged"):
        return found
    lines = (store.text(found.run_id, "error.txt") or "").strip().splitlines()
    return _plain(run, curves, lines[-1][:300] if lines else "no error.txt was logged")
