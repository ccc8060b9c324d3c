"""The tracker on a real SQLite store: what is written can be read back, resumed runs are found again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rayjobs.tracking import Tracker, default_tracking_uri

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def make(store, tmp_path, name="sweep"):
    return Tracker(name, tmp_path / "journal.jsonl", uri=store, log=lambda _: None)


def test_run_round_trip(store, tmp_path):
    tracker = make(store, tmp_path)
    parent = tracker.run("parent", {"key": "p"})
    child = tracker.run("child", {"key": "p/0", "method": "moco_v2"}, parent)
    child.params({"temperature": 0.2, "views": ("a", "b")})
    child.metrics({"few_shot/5way_5shot_acc": 61.5}, step=3)
    child.curve("loss", [(1, 5.0), (2, 4.0), (3, 3.5)])
    child.json({"x": [1, 2]}, "config.json")
    artifact = tmp_path / "plot.txt"
    artifact.write_text("hello")
    child.artifact(artifact, "plots")
    child.end("FINISHED")
    parent.end("FINISHED")
    assert tracker.close(60)
    client = MlflowClient(store)
    run = client.get_run(child.run_id)
    assert run.data.params == {"temperature": "0.2", "views": "a b"}
    assert run.data.metrics["few_shot/5way_5shot_acc"] == 61.5
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert [(m.step, m.value) for m in client.get_metric_history(child.run_id, "loss")] == [(1, 5), (2, 4), (3, 3.5)]
    assert run.info.status == "FINISHED"
    assert {f.path for f in client.list_artifacts(child.run_id)} == {"config.json", "plots"}
    assert not (tmp_path / "journal.jsonl").exists()


def test_resumed_run_is_found_and_reopened(store, tmp_path):
    first = make(store, tmp_path, "resumed")
    run = first.run("trial", {"key": "t0"})
    run.params({"lr": 0.1})
    run.end("KILLED")
    assert first.close(60)
    second = make(store, tmp_path, "resumed")
    again = second.run("trial", {"key": "t0"})
    assert again.run_id == run.run_id
    again.params({"lr": 0.1, "new": 1})
    assert second.flush(60)
    stored = MlflowClient(store).get_run(run.run_id)
    assert stored.info.status == "RUNNING"
    assert stored.data.params == {"lr": "0.1", "new": "1"}
    again.end("FINISHED")
    assert second.close(60)
    assert MlflowClient(store).get_run(run.run_id).info.status == "FINISHED"


def test_a_killed_process_loses_no_write(store, tmp_path):
    """What waits is in the journal at once: a SIGKILL right after the calls loses nothing."""
    (tmp_path / "plot.txt").write_text("hello")
    script = f"""
import os, signal, threading
from rayjobs.tracking import Tracker
tracker = Tracker("journal", {str(tmp_path / "journal.jsonl")!r}, uri={store!r})
run = tracker.run("trial", {{"key": "t0"}})
written = threading.Event()
write = tracker._write
def stuck(kind, run_id, *arguments):
    write(kind, run_id, *arguments)
    if kind == "tags":
        written.set()
        signal.pause()  # the server took this write but never says so
tracker._write = stuck
run.metrics({{"early": 1.0}}, step=1)
run.tags({{"taken": "twice"}})
run.metrics({{"late": 4.0}}, step=2)
run.artifact({str(tmp_path / "plot.txt")!r})
run.end("FINISHED")
print(run.run_id, flush=True)
assert written.wait(60)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_id = killed.stdout.split()[-1]
    client = MlflowClient(store)
    assert client.get_run(run_id).info.status == "RUNNING"
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('["tags", "torn li')  # killed within a line
    later = make(store, tmp_path, "journal")
    assert later.close(60)
    run = client.get_run(run_id)
    assert run.data.metrics == {"early": 1.0, "late": 4.0}
    assert len(client.get_metric_history(run_id, "early")) == 1
    assert run.data.tags["taken"] == "twice"
    assert run.info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(run_id)] == ["plot.txt"]
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_resumed_run_stays_open_though_its_end_waits_in_the_journal(store, tmp_path):
    tracker = make(store, tmp_path, "reopened")
    run = tracker.run("trial", {"key": "t0"})
    assert tracker.close(60)
    (tmp_path / "journal.jsonl").write_text(json.dumps(["end", run.run_id, "FINISHED", 1_700_000_000_000]) + "\n")
    later = make(store, tmp_path, "reopened")
    later.run("trial", {"key": "t0"})
    assert later.close(60)
    assert MlflowClient(store).get_run(run.run_id).info.status == "RUNNING"


def test_refused_write_is_reported_and_does_not_block(store, tmp_path):
    said = []
    tracker = Tracker("refused", tmp_path / "j.jsonl", uri=store, log=said.append)
    run = tracker.run("trial", {"key": "t0"})
    run.metrics({"bad name !?#": 1.0})
    run.metrics({"good": 2.0})
    assert tracker.close(60)
    assert MlflowClient(store).get_run(run.run_id).data.metrics == {"good": 2.0}
    assert any("refused" in line for line in said)


def test_unreachable_server_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"does not answer.*make ui"):
        Tracker("x", tmp_path / "j", uri="http://127.0.0.1:9", log=lambda _: None)


def test_default_uri_honours_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert default_tracking_uri() == "http://somewhere:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert default_tracking_uri().startswith("sqlite:///")
