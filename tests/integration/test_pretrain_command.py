"""Pretraining with two workers: a killed worker changes nothing; the result can be evaluated, also by Ray Data."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from ray._private.services import psutil  # Ray's own copy

from tests.integration.commands import TINY, environment, run, start, wait_for
from tests.rayjobs.conftest import write_images

pytestmark = pytest.mark.commands

BASE = ["--method", "exemplar_v2", "--queue-size", "64", "--num-workers", "2", "--cpus-per-worker", "1", *TINY]
BASE += ["--checkpoint-every", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "tree")


def train_workers(folder: Path) -> list[psutil.Process]:
    """Train workers of the cluster whose files are in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            is_worker = "RayTrainWorker" in " ".join(process.cmdline())
            if is_worker and any(str(folder) in file.path for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_worker_killed_mid_run_gives_the_same_weights(head, images, tmp_path):
    """Through Ray Data, the harder case: Ray Train must start the data anew at the epoch of the checkpoint."""
    variables = environment(tmp_path, RAY_ADDRESS=head.address)
    arguments = [*BASE, "--data", f"folder:{images}", "--stream", "ray", "--epochs", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("pretrain", [*arguments, "--output", str(whole)], variables, tmp_path / "whole.log")
    log = tmp_path / "killed.log"
    process = start("pretrain", [*arguments, "--output", str(killed)], variables, log)
    wait_for((killed / "train" / "epoch_00001").exists, process, log)
    victims = train_workers(head.folder)
    assert len(victims) >= 2, log.read_text()
    victims[-1].send_signal(signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()[-5000:]
    name = "backbone.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_evaluate_writes_metrics_protocol_and_record(head, images, tmp_path):
    variables = environment(tmp_path, RAY_ADDRESS=head.address)
    data = ["--data", f"folder:{images}", *TINY]
    random = ["--method", "moco_v2", *data, "--epochs", "0", "--output", str(tmp_path / "random")]
    run("pretrain", random, variables, tmp_path / "pretrain.log")
    arguments = ["--checkpoint", str(tmp_path / "random"), "--json"]
    few = ["--classification.iterations", "4", "--utility.iterations", "2", "--utility.labels", "20", "80"]
    run("evaluate", [*arguments, str(tmp_path / "memory.json"), *few], variables, tmp_path / "evaluate.log")
    streamed = [*arguments, str(tmp_path / "ray.json"), "--stream", "ray", "--tasks", "few_shot", "knn"]
    run("evaluate", streamed, variables, tmp_path / "streamed.log")
    result, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("memory", "ray"))
    assert {"metrics", "protocol", "record"} <= set(result)
    names = {"linear/top1", "knn/top1", "few_shot/5way_1shot_acc", "few_shot/5way_5shot_acc", "entropy/h_r"}
    names |= {"uniformity/normalized", "uniformity/raw", "classification/top1", "utility/u_n20"}
    assert names <= set(result["metrics"])
    assert set(result["metrics"]["knn/top1"]) == {"value", "ci95", "n"}
    assert result["protocol"]["few_shot"]["split"] == "novel_classes"
    assert result["record"]["data"]["rule"]
    for name, metric in other["metrics"].items():
        assert metric["value"] == pytest.approx(result["metrics"][name]["value"], abs=0.5), name
