"""Whole sweeps: submitted as a job, interrupted, killed and resumed, and on nodes that the sweep makes appear."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.commands import TINY, environment, mlflow_runs, results_of, run, start, wait_for
from tests.integration.fake_autoscaler import NodeType, autoscaling_cluster
from tests.integration.heads import ROOT
from tests.rayjobs.conftest import write_images

# Two trials at once on three CPUs.
COMMON = ["--tasks", "few_shot", "knn", "--cpus-per-worker", "1.5"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "tree")


def options(images: Path, folder: Path, name: str, *more: str) -> list[str]:
    return ["--data", f"folder:{images}", *TINY, *COMMON, "--name", name, "--output", str(folder / "results"), *more]


@pytest.mark.commands
def test_submitted_job_runs_a_sweep_and_confirms_the_winner(head, images, tmp_path):
    arguments = options(images, tmp_path, "job", "--methods", "supervised", "moco_v2", "--num-trials", "3")
    arguments += ["--epochs", "2", "--confirm", "2"]
    own = {name: environment(tmp_path)[name] for name in ("PRETRANSFER_CACHE", "MLFLOW_TRACKING_URI")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard]
    command += ["--working-dir", str(ROOT), "--runtime-env-json", json.dumps({"env_vars": own})]
    command += ["--", "python", "rayjobs/sweep.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    results = results_of(tmp_path / "results" / "job")
    assert len(results["trials"]) == 3
    assert {t["method"] for t in results["trials"]} == {"supervised", "moco_v2"}
    assert results["best"]["outcome"] == "finished"
    assert results["best"]["objective"] == max(t["objective"] for t in results["trials"] if t["objective"] is not None)
    assert len(results["baseline"]) == len(results["confirm"]) == 2
    assert all(row["transfer"]["test"]["metrics"]["few_shot/5way_5shot_acc"]["n"] == 600 for row in results["confirm"])
    assert {row["config"]["train"]["seed"] for row in results["confirm"]} == {1000, 1001}
    for words in ("Trials by validation", "Test split", "random init, 2 seeds"):
        assert words in done.stdout
    check_mlflow(tmp_path, results)


def check_mlflow(folder: Path, results: dict) -> None:
    runs = mlflow_runs(folder, results["name"])
    parent = next(r for r in runs if r.data.tags["kind"] == "sweep")
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    kinds = [r.data.tags["kind"] for r in children]
    assert (kinds.count("trial"), kinds.count("baseline"), kinds.count("confirm")) == (3, 2, 2)
    status = {"finished": "FINISHED", "pruned": "KILLED", "crashed": "FAILED", "diverged": "FAILED"}
    outcomes = {t["trial_id"]: t["outcome"] for t in results["trials"]}
    for child in children:
        if child.data.tags["kind"] == "trial":
            assert child.info.status == status[outcomes[child.data.tags["trial_id"]]]
    best = next(r for r in children if r.data.tags["trial_id"] == results["best"]["trial_id"])
    assert best.data.metrics["few_shot/5way_5shot_acc"] == results["best"]["objective"]
    assert {"images_per_second", "data_wait_percent", "pretext/loss"} <= set(best.data.metrics)
    assert best.data.params["batch_size"] == "32"
    assert parent.info.status == "FINISHED"
    assert "test/few_shot/5way_5shot_acc" in parent.data.metrics
    assert not any(name.startswith("test/") for name in best.data.metrics), "a trial must not see test data"


@pytest.mark.commands
def test_interrupted_and_killed_sweep_repeats_nothing_finished(head, images, tmp_path):
    arguments = options(images, tmp_path, "killed", "--methods", "supervised", "--num-trials", "4", "--epochs", "3")
    arguments += ["--no-prune"]
    variables = environment(tmp_path, RAY_ADDRESS=head.address)
    log = tmp_path / "interrupted.log"
    process = start("sweep", arguments, variables, log)
    wait_for(lambda: re.search(r"trial .*epoch 1", log.read_text()), process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()[-3000:]
    assert "--resume --name killed" in log.read_text()
    trials = [r for r in mlflow_runs(tmp_path, "killed") if r.data.tags["kind"] == "trial"]
    assert {r.info.status for r in trials} == {"KILLED"}
    first_names = {r.data.tags["trial_id"]: r.info.run_name for r in trials}

    resumed = ["--resume", "--name", "killed", "--output", str(tmp_path / "results")]
    log = tmp_path / "killed.log"
    process = start("sweep", resumed, variables, log)
    # The next trial starts in a later step than the end of the first, which is saved by then.
    wait_for(lambda: re.search(r"finished(.|\n)*trial +3/4 .*started", log.read_text()), process, log)
    process.kill()
    process.wait()
    saved, _ = re.split(r"trial +3/4 .*started", log.read_text())  # a later one may have ended just before the kill
    finished = set(re.findall(r"trial +\d/4 +(\S+) +finished", saved))
    before = {r.data.tags["trial_id"]: r for r in mlflow_runs(tmp_path, "killed") if r.info.status == "FINISHED"}

    text = run("sweep", resumed, variables, tmp_path / "resumed.log")
    results = results_of(tmp_path / "results" / "killed")
    assert [t["outcome"] for t in results["trials"]] == ["finished"] * 4
    runs = [r for r in mlflow_runs(tmp_path, "killed") if r.data.tags["kind"] == "trial"]
    assert len(runs) == 4, "a resumed trial continues its own run"
    names = {t["trial_id"]: t["name"] for t in results["trials"]}
    assert {r.data.tags["trial_id"]: r.info.run_name for r in runs} == names, "trials keep their numbers"
    assert first_names.items() <= names.items()
    assert all(r.info.status == "FINISHED" for r in runs)
    started = set(re.findall(r"trial +\d/4 +(\S+) +started", text))
    assert finished
    assert not finished & started, "a finished trial is not repeated"
    for after in [r for r in runs if r.data.tags["trial_id"] in before]:
        assert after.info.end_time == before[after.data.tags["trial_id"]].info.end_time
    assert "baseline" not in text.split("Objective")[1].split("Trials by")[0], "the baseline is not repeated"


@pytest.mark.cluster
def test_sweep_on_nodes_that_its_own_demand_adds(images, tmp_path):
    """The head offers no CPUs: each of two concurrent trials needs a node, which the autoscaler starts."""
    arguments = options(images, tmp_path, "grown", "--methods", "simsiam", "--num-trials", "2", "--epochs", "1")
    arguments += ["--cpus-per-worker", "1"]
    with autoscaling_cluster({"train": NodeType({"CPU": 1}, max_workers=2, labels={"role": "train"})}) as head:
        variables = environment(tmp_path, RAY_ADDRESS=head.address)
        text = run("sweep", arguments, variables, tmp_path / "log")
    results = results_of(tmp_path / "results" / "grown")
    assert [t["outcome"] for t in results["trials"]] == ["finished"] * 2, text[-3000:]
    first = re.search(r"trial +1/2 .*started(.|\n)*?finished", text)
    assert first
    assert "trial  2/2" in first[0], "both trials run at once, on a node each"
