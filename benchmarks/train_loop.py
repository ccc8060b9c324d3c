"""What Ray costs a training step: the same loop under Ray Train (and Ray Data) and bare, in one run.

Three sides train MoCo v2 (ResNet-18, views of 32 px of rendered images, one worker with one core) for the same epochs:

- bare: `train` in a plain process, images from the decoded store;
- train: the same under Ray Train, images from the decoded store;
- data: the same under Ray Train with images that Ray Data tasks decode and augment on another core.

Every side runs in a process of its own and times its epochs itself, from the first batch to the last step; starting
Ray, the first epoch (compiled kernels, first batches) and checkpoints are outside. The sides take turns; the ratio is
the median of the per-round ratios of the seconds per step.

    python benchmarks/train_loop.py [--quick]

Goal: at most 1.03 x the bare loop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from image_data.subset import SubsetConfig
from rayjobs.configs import TrainConfig, preset
from rayjobs.job import Job, run_job
from rayjobs.train_loop import Worker

GOAL = 1.03
STREAMS = {"train": "memory", "data": "ray"}


@dataclass(frozen=True)
class Plan:
    """How much of what is trained.

    Attributes:
        fraction: of the rendered training images.
        epochs: per side and round, the first of them not timed.
        rounds: turns of every side.
    """

    fraction: float
    epochs: int
    rounds: int


class Silent:
    """A reporter that keeps the metrics and drops the checkpoints."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def report(self, metrics: dict[str, Any], save: object) -> None:
        self.reports.append(metrics)

    def latest(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def progress(self, metrics: dict[str, Any]) -> None:
        pass


def make_job(data: PreparedData, config: DataConfig, epochs: int, stream: str) -> Job:
    """MoCo v2 as in a small sweep; one checkpoint, at the end."""
    train = TrainConfig(
        backbone="resnet18",
        stem="imagenet",
        image_size=32,
        batch_size=32,
        epochs=epochs,
        checkpoint_every=epochs,
        stream=stream,  # type: ignore[arg-type]
    )
    moco = preset("moco_v2", train, config)
    return Job(replace(moco, method_config=replace(moco.method_config, queue_size=512)), {}, data, probe_tasks={})


def bare(job: Job) -> list[dict[str, Any]]:
    """Train in a process of its own; the reports of its epochs."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_bare, job).result()


def _bare(job: Job) -> list[dict[str, Any]]:
    reporter = Silent()
    run_job(job, Worker(), reporter)
    return reporter.reports


def under_ray(job: Job) -> list[dict[str, Any]]:
    """Train under Ray Train; the reports of its epochs."""
    from rayjobs.ray_train import ProgressPoller, build_trainer, fit

    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ProgressPoller(reports.append) as poller:
        fit(build_trainer(job, folder, "run", board=poller.board))
    return [item for item in reports if item["kind"] == "report"]


def step_seconds(reports: list[dict[str, Any]]) -> float:
    """Median seconds per step over the epochs after the first."""
    steps = reports[0]["step"]
    return statistics.median(report["epoch_seconds"] / steps for report in reports[1:])


def main() -> None:
    """Run all sides and print one JSON line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, epochs and rounds")
    plan = Plan(0.2, 3, 1) if parser.parse_args().quick else Plan(0.3, 4, 3)
    config = DataConfig(data=("rendered:?image_size=64",), subset=SubsetConfig(fraction=plan.fraction))
    data = prepare(config, log=lambda text: print(text, file=sys.stderr))

    from rayjobs.cluster import connect, shutdown

    connect(2)
    times: dict[str, list[float]] = {"bare": [], **{side: [] for side in STREAMS}}
    waits: dict[str, list[float]] = {side: [] for side in times}
    try:
        for _ in range(plan.rounds):
            for side in times:
                job = make_job(data, config, plan.epochs, STREAMS.get(side, "memory"))
                reports = bare(job) if side == "bare" else under_ray(job)
                times[side].append(step_seconds(reports))
                waits[side].append(statistics.median(report["data_wait_percent"] for report in reports[1:]))
    finally:
        shutdown()
    for side in STREAMS:
        ratios = [ray / alone for ray, alone in zip(times[side], times["bare"], strict=True)]
        line = {
            "case": f"{side} against bare",
            "bare_ms_per_step": round(1e3 * statistics.median(times["bare"]), 2),
            "ray_ms_per_step": round(1e3 * statistics.median(times[side]), 2),
            "bare_data_wait_percent": round(statistics.median(waits["bare"]), 2),
            "ray_data_wait_percent": round(statistics.median(waits[side]), 2),
            "ratio": round(statistics.median(ratios), 3),
            "goal": f"at most {GOAL}",
            "met": statistics.median(ratios) <= GOAL,
            "rounds": [round(ratio, 3) for ratio in ratios],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
