"""The commands run as a user runs them: a process of their own, small images, results read from disk and MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.integration.heads import ROOT

__all__ = ["TINY", "environment", "mlflow_runs", "results_of", "run", "start", "wait_for"]

# Seconds per trial on one core, and small checkpoints enough for many of them.
TINY = [
    "--class-split",
    "0.4",
    "0.3",
    "0.3",
    "--backbone",
    "resnet18",
    "--image-size",
    "16",
    "--stem",
    "imagenet",
    "--batch-size",
    "32",
]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Cache, MLflow store and threads of their own."""
    own = {
        "PRETRANSFER_CACHE": str(folder / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **own, **more}


def start(command: str, arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in the background; its output goes to ``log``."""
    words = [sys.executable, str(ROOT / "rayjobs" / f"{command}.py"), *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(words, env=dict(variables), cwd=log.parent, stdout=output, stderr=output)


def run(command: str, arguments: Sequence[str], variables: Mapping[str, str], log: Path, timeout: float = 600) -> str:
    """Run a command to its end and return what it printed."""
    process = start(command, arguments, variables, log)
    code = process.wait(timeout)
    text = log.read_text()
    assert code == 0, f"exit code {code}\n{text[-6000:]}"
    return text


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path, timeout: float = 300) -> None:
    """Wait until ``condition()`` holds while the process runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the command ended early ({process.returncode})\n{log.read_text()[-6000:]}"
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.1)


def results_of(folder: Path) -> dict[str, Any]:
    """What a sweep wrote."""
    return json.loads((folder / "results.json").read_text())


def mlflow_runs(folder: Path, experiment: str) -> list[Any]:
    """All runs of an experiment in the folder's store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], max_results=1000))
