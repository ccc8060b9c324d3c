"""A real MLflow server is stopped and started again while runs are being written: nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from mlflow import MlflowClient

from rayjobs.tracking import Tracker


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(folder, port):
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    log = open(folder / "server.log", "a")  # noqa: SIM115 - the server keeps it
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a second process that the test has no use for
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
            return process
        except OSError:
            time.sleep(0.3)
    stop_server(process)
    raise AssertionError("the MLflow server did not start:\n" + (folder / "server.log").read_text()[-2000:])


def stop_server(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_writes_during_an_outage_arrive_later(tmp_path):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    said = []
    server = start_server(tmp_path, port)
    try:
        tracker = Tracker("sweep", tmp_path / "journal.jsonl", uri=uri, log=said.append)
        run = tracker.run("trial", {"key": "t0"})
        run.metrics({"loss": 3.0}, 1)
        assert tracker.flush(60)
        stop_server(server)
        plot = tmp_path / "plot.txt"
        plot.write_text("kept")
        for step in (2, 3, 4):
            run.metrics({"loss": 3.0 - step / 10}, step)
        run.artifact(plot)
        run.end("FINISHED")
        assert not tracker.flush(4)
        assert (tmp_path / "journal.jsonl").is_file()
        server = start_server(tmp_path, port)
        assert tracker.close(60)
        client = MlflowClient(uri)
        history = client.get_metric_history(run.run_id, "loss")
        assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.8), (3, 2.7), (4, 2.6)]
        assert [f.path for f in client.list_artifacts(run.run_id)] == ["plot.txt"]
        assert client.get_run(run.run_id).info.status == "FINISHED"
        assert any("training goes on" in line for line in said)
        assert not (tmp_path / "journal.jsonl").exists()
    finally:
        stop_server(server)
