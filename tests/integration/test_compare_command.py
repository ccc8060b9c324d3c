"""A whole comparison: interrupted, resumed, and its report written again."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from rayjobs.comparison import cell
from tests.integration.commands import TINY, environment, mlflow_runs, run, start, wait_for
from tests.rayjobs.conftest import write_images

SHOT = "few_shot/5way_5shot_acc"


def run_names(text: str, event: str) -> list[str]:
    return re.findall(rf"run +\d/4 +(\S+) +{event}", text)


@pytest.mark.commands
def test_interrupted_comparison_repeats_nothing_and_writes_its_table(head, tmp_path):
    images = write_images(tmp_path / "images")
    docs = tmp_path / "docs.md"
    arguments = ["--data", f"folder:{images}", *TINY, "--methods", "simsiam", "supervised", "--seeds", "2"]
    arguments += ["--epochs", "1", "--tasks", "few_shot", "knn", "entropy", "uniformity", "--cpus-per-worker", "3"]
    arguments += ["--name", "duel", "--output", str(tmp_path / "results"), "--write-docs", str(docs)]
    variables = environment(tmp_path, RAY_ADDRESS=head.address)
    log = tmp_path / "interrupted.log"
    process = start("compare", arguments, variables, log)
    wait_for(lambda: run_names(log.read_text(), "finished"), process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()[-3000:]
    assert f"--resume --name duel --output {tmp_path / 'results'}" in log.read_text()
    finished = run_names(log.read_text(), "finished")

    resume = ["--resume", "--name", "duel", "--output", str(tmp_path / "results")]
    text = run("compare", resume, variables, tmp_path / "resumed.log")
    assert not set(finished) & set(run_names(text, "started")), "a finished run is not repeated"
    assert not re.search(r"baseline +\d/2", text), "nor are the untrained backbones"

    folder = tmp_path / "results" / "duel"
    results = json.loads((folder / "comparison.json").read_text())
    check_results(results)
    report = (folder / "comparison.md").read_text()
    check_report(report, arguments)
    assert docs.read_text() == re.sub(r"!\[.*\n\n", "", report), "the copy has no picture beside it"
    assert (folder / "plots" / "few_shot_5way_5shot_acc.png").read_bytes().startswith(b"\x89PNG")
    check_mlflow(tmp_path, results)

    (folder / "comparison.md").unlink()
    docs.unlink()
    again = run("compare", resume, environment(tmp_path, RAY_ADDRESS="127.0.0.1:1"), tmp_path / "again.log")
    assert "All runs are finished" in again
    assert (folder / "comparison.md").read_text() == report
    assert docs.is_file()


def check_results(results: dict) -> None:
    assert [row["name"] for row in results["rows"]] == ["supervised", "simsiam", "random_init"]
    runs = {run["name"]: run for run in results["runs"]}
    assert set(runs) == {f"{m}-seed{s}" for m in ("supervised", "simsiam", "random_init") for s in (0, 1)}
    assert {run["outcome"] for run in runs.values()} == {"finished"}
    for row in results["rows"]:
        values = [runs[f"{row['name']}-seed{seed}"]["metrics"][SHOT]["value"] for seed in (0, 1)]
        assert row["cells"][SHOT] == cell(values)
        assert (row["images_per_second"] is None) == row["is_baseline"]
    assert results["protocol"]["few_shot"]["split"] == "novel_classes"
    assert results["methods"]["simsiam"]["config"]["train"]["batch_size"] == 32
    assert {run["pretext"].get("feature_spread", 1.0) > 0 for run in runs.values()} == {True}


def check_report(report: str, arguments: list[str]) -> None:
    assert "python rayjobs/compare.py " + " ".join(arguments) in report
    head = "| method | 5-way 1-shot | 5-way 5-shot | kNN top-1 | H_R | U | images/s | note |"
    for words in (head, "| random init |", "fingerprint", "seeds 0, 1", "resnet18", "torch ", "CPUs", "Published"):
        assert words in report


def check_mlflow(folder: Path, results: dict) -> None:
    runs = mlflow_runs(folder, "duel")
    parent = next(r for r in runs if r.data.tags["kind"] == "comparison")
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(r.info.run_name for r in children) == sorted(run["name"] for run in results["runs"])
    assert {r.info.status for r in runs} == {"FINISHED"}
    best = results["rows"][0]
    assert parent.data.metrics[f"{best['name']}/{SHOT}"] == pytest.approx(best["cells"][SHOT]["mean"])
    assert all(f"test/{SHOT}" in r.data.metrics for r in children)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"comparison.json", "comparison.md", "plots"} <= files
