"""MLflow as a sink: only the driver writes, in order, and an outage of the server loses nothing.

Layout: experiment = sweep (or pretraining name), parent run = the sweep, nested run = trial. Workers and trials never
talk to MLflow: their reports reach the driver through Ray, so a remote ``MLFLOW_TRACKING_URI`` need only be reachable
from the node that runs the driver, and a SQLite store has one writer. Writes go through a spool that a background
thread empties. Each stands in a journal file beside the results until the server has taken it, so that neither an
outage of the server nor a killed driver loses one.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rayjobs.places import home

__all__ = ["RunHandle", "Tracker", "default_tracking_uri", "tracking_summary"]

RETRY_SECONDS = 2.0
PARAM_LIMIT = 500  # longest parameter value that MLflow's SQL stores accept is 6000; the UI shows about this much


def default_tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, else the SQLite store ``mlflow.db`` in the project folder (a job's: see ``places``)."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    home().mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{home() / 'mlflow.db'}"


def tracking_summary(uri: str) -> str:
    """How to look at the results."""
    if uri.startswith("sqlite:"):
        return "make ui   (then open http://127.0.0.1:5000)"
    return uri


class RunHandle:
    """One MLflow run; every method returns at once, the write happens in the background."""

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self.run_id = run_id
        self._tracker = tracker

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; a value that was logged before stays (MLflow parameters never change)."""
        flat = {k: _text(v) for k, v in values.items()}
        self._tracker.submit("params", self.run_id, flat)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log one point of several curves."""
        self._tracker.submit("metrics", self.run_id, {k: float(v) for k, v in values.items()}, step, _now())

    def curve(self, name: str, points: Iterable[tuple[int, float]]) -> None:
        """Log many points of one curve."""
        self._tracker.submit("curve", self.run_id, name, [[int(s), float(v)] for s, v in points], _now())

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._tracker.submit("tags", self.run_id, dict(values))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a local file or folder; it must stay in place until ``Tracker.flush``."""
        self._tracker.submit("artifact", self.run_id, str(path), folder)

    def remove(self, folder: str | Path) -> None:
        """Delete a local staging folder after the writes queued before have been done."""
        self._tracker.submit("remove", self.run_id, str(folder))

    def text(self, text: str, name: str) -> None:
        """Log a small text file."""
        self._tracker.submit("text", self.run_id, text, name)

    def json(self, value: Any, name: str) -> None:
        """Log a value as a JSON file."""
        self.text(json.dumps(value, indent=2, sort_keys=True, default=str), name)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._tracker.submit("end", self.run_id, status, _now())

    def reopen(self) -> None:
        """Mark the run RUNNING again (a resumed trial)."""
        self._tracker.submit("reopen", self.run_id)


class _Journal:
    """Append-only file of the writes that the server has not taken: one JSON line each, ``null`` for one done.

    Writes are done in their order, so a ``null`` stands for the oldest that is still open.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = None
        self.pending: deque[list[Any]] = deque()
        for line in self._path.read_text().splitlines() if self._path.is_file() else []:
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                break  # the last line of a process that was killed while it wrote
            if item is None:
                self.pending.popleft()
            else:
                self.pending.append(item)
        if self.pending:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(item) + "\n" for item in self.pending))
            os.replace(temporary, self._path)

    def add(self, item: list[Any]) -> None:
        """Keep a write."""
        self.pending.append(item)
        self._append(item)

    def done(self) -> None:
        """The oldest write has been taken; the file goes when none is left."""
        self.pending.popleft()
        if self.pending:
            self._append(None)
            return
        if self._file is not None:
            self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)

    def _append(self, item: list[Any] | None) -> None:
        if self._file is None:
            self._file = self._path.open("a")
        self._file.write(json.dumps(item) + "\n")
        self._file.flush()


class Tracker:
    """One experiment on one store.

    Args:
        experiment: experiment name.
        journal: file that keeps writes which the server has not taken yet; replayed by the next Tracker on it.
        uri: tracking URI; default ``default_tracking_uri()``.
        log: where one-line notices go.

    Raises:
        ValueError: the store cannot be reached at the start (before any long work).
    """

    def __init__(
        self, experiment: str, journal: str | Path, uri: str | None = None, log: Callable[[str], None] = print
    ) -> None:
        # A dead server must fail fast: the spool does the retrying.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import logging

        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # pages per write; the spool says it once
        for name in ("alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri = uri or default_tracking_uri()
        self.experiment = experiment
        self._log = log
        self._client = MlflowClient(self.uri)
        self.experiment_id = self._open_experiment()
        self._journal_path = journal
        self._journal = _Journal(journal)
        self._wake, self._idle = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._closing = self._is_down = False
        self._thread = threading.Thread(target=self._drain, name="mlflow-spool", daemon=True)
        self._thread.start()
        self._wake.set()

    def _open_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_experiment_by_name(self.experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            if found is not None:
                return found.experiment_id
            return self._client.create_experiment(self.experiment, artifact_location=self._artifact_location())
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0][:300]
            raise ValueError(
                f"MLflow at {self.uri} does not answer: {reason}. Start the server (make ui), correct "
                "MLFLOW_TRACKING_URI, or unset it to use the SQLite store in the project folder."
            ) from error

    def _artifact_location(self) -> str | None:
        """Beside a SQLite store; a server decides for itself."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()

    def run(self, name: str, tags: Mapping[str, str], parent: RunHandle | None = None) -> RunHandle:
        """Find the run with the same ``key`` tag (a resumed sweep or trial), else create it.

        Args:
            name: shown in the UI.
            tags: must hold ``key``, unique within the experiment.
            parent: the run that it is nested under.
        """
        full = dict(tags)
        if parent is not None:
            full["mlflow.parentRunId"] = parent.run_id
        found = self._retry(
            lambda: self._client.search_runs([self.experiment_id], f"tags.key = '{tags['key']}'", max_results=1)
        )
        if found:
            handle = RunHandle(self, found[0].info.run_id)
            handle.reopen()  # even if it is RUNNING: the end of an earlier start may still wait in the journal
            return handle
        run = self._retry(lambda: self._client.create_run(self.experiment_id, run_name=name, tags=full))
        return RunHandle(self, run.info.run_id)

    def _retry(self, call: Callable[[], Any], seconds: float = 600.0) -> Any:
        """Runs are created synchronously (their ids are needed); wait for a server that is down."""
        from mlflow.exceptions import MlflowException

        deadline = time.monotonic() + seconds
        while True:
            try:
                return call()
            except (MlflowException, OSError) as error:
                if not _is_outage(error) or time.monotonic() > deadline:
                    raise
                self._note_outage(error)
                time.sleep(RETRY_SECONDS)

    def submit(self, kind: str, *arguments: Any) -> None:
        """Queue one write."""
        with self._lock:
            self._journal.add([kind, *arguments])
            self._idle.clear()
        self._wake.set()

    def flush(self, seconds: float = 300.0) -> bool:
        """Wait until everything is written; False (and a journal file) when the server stays away."""
        self._wake.set()
        done = self._idle.wait(seconds)
        if not done:
            self._log(
                f"MLflow at {self.uri} did not answer: {len(self._journal.pending)} writes wait in "
                f"{self._journal_path}. "
                "They are replayed by the next command with --resume and the same name."
            )
        return done

    def close(self, seconds: float = 300.0) -> bool:
        """Flush and stop the background thread."""
        done = self.flush(seconds)
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=5)
        return done

    def _drain(self) -> None:
        from mlflow.exceptions import MlflowException

        while not self._closing:
            with self._lock:
                item = self._journal.pending[0] if self._journal.pending else None
                if item is None:
                    self._idle.set()
                    self._wake.clear()
            if item is None:
                self._wake.wait(1.0)
                continue
            try:
                self._write(*item)
            except (MlflowException, OSError) as error:
                if _is_outage(error):
                    self._note_outage(error)
                    time.sleep(RETRY_SECONDS)
                    continue
                self._log(f"MLflow refused a write ({item[0]}): {str(error).splitlines()[0][:200]}")
            if self._is_down:
                self._is_down = False
                self._log("MLflow answers again; the waiting writes follow.")
            with self._lock:
                self._journal.done()

    def _note_outage(self, error: Exception) -> None:
        if not self._is_down:
            self._is_down = True
            self._log(f"MLflow at {self.uri} does not answer ({type(error).__name__}); training goes on, writes wait.")

    def _write(self, kind: str, run_id: str, *arguments: Any) -> None:
        client = self._client
        if kind == "params":
            self._write_params(run_id, arguments[0])
        elif kind == "metrics":
            values, step, timestamp = arguments
            self._write_points(run_id, [(name, value, timestamp, step) for name, value in values.items()])
        elif kind == "curve":
            name, points, timestamp = arguments
            self._write_points(run_id, [(name, value, timestamp, step) for step, value in points])
        elif kind == "tags":
            for name, value in arguments[0].items():
                client.set_tag(run_id, name, value)
        elif kind == "artifact":
            path, folder = arguments
            log = client.log_artifacts if Path(path).is_dir() else client.log_artifact
            log(run_id, path, folder)
        elif kind == "remove":
            shutil.rmtree(arguments[0])
        elif kind == "text":
            client.log_text(run_id, *arguments)
        elif kind == "end":
            client.set_terminated(run_id, status=arguments[0], end_time=arguments[1])
        elif kind == "reopen":
            client.update_run(run_id, status="RUNNING")

    def _write_points(self, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, timestamp, step) for name, value, timestamp, step in points]
        for i in range(0, len(metrics), 1000):  # MLflow's limit per call
            self._client.log_batch(run_id, metrics=metrics[i : i + 1000])

    def _write_params(self, run_id: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(run_id).data.params
        params = [Param(name, value) for name, value in values.items() if name not in known]
        for i in range(0, len(params), 100):  # MLflow's limit per call
            self._client.log_batch(run_id, params=params[i : i + 100])


def _is_outage(error: Exception) -> bool:
    """A server that is away (no connection, 5xx, locked database), not a write that it refuses."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    code = getattr(error, "error_code", "")
    text = str(error)
    signs = ("API request to", "Max retries exceeded", "Connection", "database is locked", "too many 5")
    return code in ("TEMPORARILY_UNAVAILABLE",) or (code == "INTERNAL_ERROR" and any(s in text for s in signs))


def _text(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text[:PARAM_LIMIT]


def _now() -> int:
    return int(time.time() * 1000)
