"""Measure how well a checkpoint transfers.

python rayjobs/evaluate.py --checkpoint results/pretrain --tasks linear knn few_shot entropy uniformity --json out.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a script: the project folder takes the place of this one on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from evaluation import TASKS, Features, Metric
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from rayjobs.checkpoint import load_config, local_directory
from rayjobs.cli import EXIT_INTERRUPTED, flat_parse, make_console, plain, quiet_libraries, user_errors
from rayjobs.configs import PretrainConfig
from rayjobs.job import uses_memory
from rayjobs.record import data_record, git_revision, package_versions
from rayjobs.transfer import TransferResult, check_tasks, task_configs


@dataclass(frozen=True)
class EvaluateConfig:
    """Frozen-feature transfer of one checkpoint.

    Attributes:
        checkpoint: folder (or URI) with backbone.safetensors and config.json.
        tasks: downstream tasks.
        phase: test reports held-out images and novel classes; val is for choosing hyperparameters.
        image_size: side of the evaluation images in pixels; 0 takes the pretraining size.
        use_gpu: extract features on GPUs.
        num_workers: feature-extraction actors when the images are streamed by Ray Data.
        cpus_per_worker: CPU cores per actor (or threads of this process).
        stream: memory, ray (Ray Data actor pool) or auto, as in pretraining.
        seed: seed of task lists and solvers; keep it the same for models that you compare.
        json: file for the result: {"metrics": ..., "protocol": ..., "record": ...}.
        experiment: MLflow experiment; empty logs nothing.
        data: images; the default is what the checkpoint was pretrained on.
    """

    checkpoint: str = ""
    tasks: tuple[str, ...] = ("linear", "knn", "few_shot", "entropy", "uniformity")
    phase: Literal["val", "test"] = "test"
    image_size: int = 0
    use_gpu: bool = False
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    stream: Literal["auto", "memory", "ray"] = "auto"
    seed: int = 0
    json: str = ""
    experiment: str = "evaluate"
    data: DataConfig = field(default_factory=lambda: DataConfig(data=()))


def main(argv: list[str] | None = None) -> None:
    """Parse, check, evaluate, print, write."""
    quiet_libraries()
    console = make_console()
    config = flat_parse(EvaluateConfig, None, argv, __doc__ or "")
    with user_errors():
        if not config.checkpoint:
            raise ValueError("--checkpoint is missing: give the folder of a pretraining run.")
        if config.json and not Path(config.json).resolve().parent.is_dir():
            raise ValueError(f"--json {config.json}: the folder does not exist.")
        tasks = task_configs(config.tasks)
        with local_directory(config.checkpoint) as directory:
            pretrain, record = load_config(directory)
        data = prepare(config.data if config.data.data else pretrain.data, log=plain(console))
        check_tasks(tasks, config.phase, data)
    settings = _settings(config, pretrain)
    try:
        with local_directory(config.checkpoint) as directory:
            result = _evaluate(config, settings, tasks, data, str(directory), console)
    except KeyboardInterrupt:
        console.print("\nInterrupted; nothing was written.")
        sys.exit(EXIT_INTERRUPTED)
    full = {**result.to_json(), "record": _record(config, record, data)}
    if config.json:
        Path(config.json).write_text(json.dumps(full, indent=2))
    _print_table(config, result, console)
    if config.experiment:
        _log(config, pretrain, full, console)


def _settings(config: EvaluateConfig, pretrain: PretrainConfig) -> Any:
    return replace(
        pretrain.train,
        image_size=config.image_size or pretrain.train.image_size,
        use_gpu=config.use_gpu,
        num_workers=config.num_workers,
        cpus_per_worker=config.cpus_per_worker,
        stream=config.stream,
    )


def _evaluate(
    config: EvaluateConfig, settings: Any, tasks: dict[str, Any], data: PreparedData, directory: str, console: Console
) -> TransferResult:
    from rayjobs.checkpoint import load_backbone
    from rayjobs.job import set_threads, worker_device
    from rayjobs.transfer import evaluate_backbone

    set_threads(settings)
    backbone, _, _ = load_backbone(directory)

    def show(metric: Metric) -> None:
        console.print(f"  {metric.name:<28} {_text(metric)}")

    needed = {split for name, task in tasks.items() for split in TASKS[name].splits(task, config.phase)}
    streamed = [name for name in needed if not uses_memory(settings, data, name)]
    if not streamed:
        device = worker_device(settings)
        return evaluate_backbone(
            backbone.to(device), tasks, config.phase, data, settings, device, config.seed, on_metric=show
        )
    from rayjobs.cluster import connect_for, shutdown
    from rayjobs.feature_pass import ray_features

    with user_errors():
        connect_for(settings, uses_ray_data=True)
    try:

        def features(split: str) -> Features:
            console.print(f"  features of {split}: {data.split(split).num_images} images")
            return ray_features(directory, data.split(split), settings)

        device = worker_device(replace(settings, use_gpu=False))
        return evaluate_backbone(
            backbone, tasks, config.phase, data, settings, device, config.seed, features=features, on_metric=show
        )
    finally:
        shutdown()


def _record(config: EvaluateConfig, pretrain_record: dict[str, Any], data: PreparedData) -> dict[str, Any]:
    return {
        "checkpoint": config.checkpoint,
        "pretraining": pretrain_record,
        "data": data_record(data),
        "versions": package_versions(),
        "git": git_revision(),
        "seed": config.seed,
        "phase": config.phase,
    }


def _text(metric: Metric) -> str:
    interval = "" if metric.ci95 is None else f" ± {metric.ci95:.2f}"
    count = "" if metric.n is None else f"   n = {metric.n}"
    return f"{_value(metric)}{interval}{count}"


def _value(metric: Metric) -> str:
    """Two decimals beside an interval; four digits for the rest, learning rates among them."""
    return f"{metric.value:.4g}" if metric.ci95 is None else f"{metric.value:.2f}"


def _print_table(config: EvaluateConfig, result: TransferResult, console: Console) -> None:
    table = Table()
    for name in ("metric", "value", "± 95 %", "n"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric in result.metrics:
        interval = "" if metric.ci95 is None else f"{metric.ci95:.2f}"
        table.add_row(metric.name, _value(metric), interval, "" if metric.n is None else str(metric.n))
    console.print(f"\n{config.checkpoint}, {config.phase} split", markup=False, soft_wrap=True)
    console.print(table)


def _log(config: EvaluateConfig, pretrain: PretrainConfig, full: dict[str, Any], console: Console) -> None:
    from rayjobs.tracking import Tracker, default_tracking_uri, tracking_summary
    from rayjobs.trial_log import flat_parameters, log_transfer

    tracker = Tracker(config.experiment, Path("results") / "mlflow-pending.jsonl", log=plain(console))
    key = f"{config.checkpoint}/{config.phase}/{full['record']['data']['fingerprint']}/{config.seed}"
    name = f"{pretrain.method} {Path(config.checkpoint).name}"
    run = tracker.run(name, {"key": key, "kind": "evaluate", "method": pretrain.method})
    run.params({**flat_parameters(pretrain), "checkpoint": config.checkpoint, "phase": config.phase})
    log_transfer(run, {config.phase: full}, pretrain.train.epochs)
    run.json(full["record"], "record.json")
    run.end("FINISHED")
    tracker.close(60)
    console.print(f"MLflow     {tracking_summary(default_tracking_uri())}   experiment {config.experiment}")


if __name__ == "__main__":
    main()
