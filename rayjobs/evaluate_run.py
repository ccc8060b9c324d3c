"""One evaluation from the checked configuration to the files: every checkpoint by itself, then all together."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from evaluation import TASKS, Artifact, Features, Metric, ModelResult, Output
from evaluation.fine_tuning import Run
from rayjobs.checkpoint import load_backbone, local_directory
from rayjobs.cli import user_errors
from rayjobs.evaluate_config import EvaluateSetup, Model
from rayjobs.fine_tuning_runs import RunsPlan, fine_tuning_of
from rayjobs.job import set_threads, uses_memory, worker_device
from rayjobs.number_text import value_text
from rayjobs.record import data_record, git_revision, package_versions
from rayjobs.result_files import read_samples, write_files
from rayjobs.transfer import (
    FeatureAccess,
    TransferResult,
    compare_models,
    evaluate_backbone,
    local_features,
    pretraining_info,
    split_key,
)
from rayjobs.tune_session import write_json

__all__ = ["RESULT", "Evaluated", "compared", "evaluate_models", "metric_line"]

RESULT, PARTIAL = "result.json", "partial.json"
RUNS = "runs"  # results and checkpoints of fine-tuning runs; those from random weights are shared by all checkpoints
PROGRESS_SECONDS = 15.0  # at least, between two lines of progress within a task


class Evaluated:
    """One finished evaluation.

    Attributes:
        model: the checkpoint.
        full: ``{"metrics", "protocol", "record", "info", "key"}``, what ``result.json`` holds.
        samples: values behind the metrics.
        folder: where its files are.
    """

    def __init__(self, model: Model, full: dict[str, Any], samples: Mapping[str, Any], folder: Path) -> None:
        self.model, self.full, self.samples, self.folder = model, full, samples, folder

    def result(self) -> ModelResult:
        """As a task's ``compare`` sees it."""
        metrics = {name: Metric(name, m["value"], m["ci95"], m["n"]) for name, m in self.full["metrics"].items()}
        info = self.full["info"]
        return ModelResult(self.model.name, info["method"], info["num_classes"], metrics, self.samples)


def evaluate_models(setup: EvaluateSetup, console: Console) -> Iterator[Evaluated]:
    """Evaluate the checkpoints one after the other; each is on disk before the next begins."""
    set_threads(setup.models[0].settings)
    with _cluster(setup) as on_cluster:
        for model in setup.models:
            folder = setup.output / model.name
            stored = _stored(folder, model)
            if len(setup.models) > 1:
                console.print(f"\n[bold]{model.name}[/bold]  {model.location}", soft_wrap=True)
            if stored is not None:
                console.print(f"  evaluated before with these settings: {folder / RESULT}", soft_wrap=True)
                yield Evaluated(model, stored, read_samples(folder), folder)
                continue
            result, info = _evaluate(setup, model, folder, console, on_cluster)
            full = {**result.to_json(), "record": _record(setup, model), "info": info, "key": model.key}
            write_files(folder, result.artifacts, result.samples)
            write_json(folder / RESULT, full)
            (folder / PARTIAL).unlink(missing_ok=True)
            yield Evaluated(model, full, result.samples, folder)


def _stored(folder: Path, model: Model) -> dict[str, Any] | None:
    path = folder / RESULT
    stored = json.loads(path.read_text()) if path.is_file() else None
    return stored if stored is not None and stored.get("key") == model.key else None


def _evaluate(
    setup: EvaluateSetup, model: Model, folder: Path, console: Console, on_cluster: bool
) -> tuple[TransferResult, dict[str, Any]]:
    """One model; what is known so far is written as it comes, so that an interruption loses one task at most."""
    config = setup.config
    known: dict[str, Any] = {}
    folder.mkdir(parents=True, exist_ok=True)

    def keep(output: Output) -> None:
        if isinstance(output, Metric):
            console.print(f"  {metric_line(output)}")
            known[output.name] = {"value": output.value, "ci95": output.ci95, "n": output.n}
            write_json(folder / PARTIAL, {"metrics": known})
        elif isinstance(output, Artifact):
            write_files(folder, [output], {})
            console.print(f"  {folder / output.name}", soft_wrap=True, highlight=False)

    with local_directory(model.location) as directory:
        backbone, _, _ = load_backbone(directory)
        device = worker_device(replace(model.settings, use_gpu=False) if on_cluster else model.settings)
        backbone = backbone.to(device)
        # What other nodes load: a URI is theirs to read too, a copy of it on this machine is not.
        reachable = model.location if "://" in model.location else str(Path(directory).resolve())
        access = _access(setup, model, backbone, device, reachable, console)
        info = pretraining_info(model.pretrain, model.record)
        known_to_tasks = {**info, **_helpers(setup, reachable, on_cluster, console)}
        plan = RunsPlan(
            checkpoint=reachable,
            pretrain=model.pretrain,
            weights=model.weights,
            settings=model.settings,
            data=model.own_data,
            task_data=setup.task_data,
            storage=str((setup.output / RUNS).resolve()),
            on_cluster=setup.on_cluster,
        )
        result = evaluate_backbone(
            backbone,
            setup.tasks,
            config.phase,
            model.data,
            model.settings,
            device,
            config.seed,
            access=access,
            info=known_to_tasks,
            on_output=keep,
            fine_tuning=fine_tuning_of(plan, partial(_say_run, known_to_tasks["on_progress"])),
        )
    return result, info


def _say_run(say: Callable[[str], None], run: Run, metrics: Mapping[str, Any]) -> None:
    """Progress of a fine-tuning run."""
    done, total = int(metrics["iteration"]), run.problem.schedule.iterations
    left = metrics["seconds"] / max(1, done) * (total - done)
    eta = f", {left:.0f} s left" if done < total else ""
    say(f"{run.task} {run.name}: iteration {done:,} of {total:,}, loss {metrics['loss']:.4g}{eta}")


def _access(
    setup: EvaluateSetup,
    model: Model,
    backbone: torch.nn.Module,
    device: torch.device,
    directory: str,
    console: Console,
) -> FeatureAccess:
    """Features of each split where its images are: in this process, or in a pool of Ray actors."""
    config, settings = setup.config, model.settings
    local = local_features(backbone, model.data, settings, config.phase, config.seed, device)

    def features(split: str) -> Features:
        if uses_memory(settings, model.data, split):
            return local.features(split)
        from rayjobs.feature_pass import ray_features

        console.print(f"  features of {split}: {model.data.split(split).num_images:,} images")
        return ray_features(directory, model.data.split(split), settings)

    def view_features(split: str, recipe: str, **options: Any) -> Any:
        if uses_memory(settings, model.data, split):
            return local.view_features(split, recipe, **options)
        from rayjobs.feature_pass import ray_view_features

        return ray_view_features(directory, model.data.split(split), settings, recipe, seed=config.seed, **options)

    def domain_features(split: str, name: str) -> Features:
        data = setup.domains[name]
        if uses_memory(settings, data, split):
            return local_features(backbone, data, settings, config.phase, config.seed, device).features(split)
        from rayjobs.feature_pass import ray_features

        return ray_features(directory, data.split(split), settings)

    domains = {name: partial(domain_features, name=name) for name in setup.domains}
    return FeatureAccess(features, view_features, domains)


def _helpers(setup: EvaluateSetup, directory: str, on_cluster: bool, console: Console) -> dict[str, Any]:
    """How tasks with minutes of work per image show their progress and reach the cluster."""

    said = 0.0

    def say(line: str) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            console.print(f"  [dim]{escape(line)}[/dim]", soft_wrap=True, highlight=False)

    if not on_cluster or "inversion" not in setup.tasks:
        return {"on_progress": say}
    from rayjobs.inversion_tasks import invert_on_cluster

    config = setup.config
    resources = {"num_cpus": setup.models[0].settings.cpus_per_worker, "num_gpus": float(config.use_gpu)}
    return {
        "on_progress": say,
        "inversion_executor": partial(invert_on_cluster, directory, on_progress=say, **resources),
    }


@contextmanager
def _cluster(setup: EvaluateSetup) -> Iterator[bool]:
    """A Ray cluster where it streams images or fine-tunes tasks, or where several inversions run at once."""
    streamed = _is_streamed(setup)
    if not streamed and not setup.on_cluster and not ("inversion" in setup.tasks and setup.config.num_workers > 1):
        yield False
        return
    from rayjobs.cluster import connect_for, shutdown

    with user_errors():
        connect_for(setup.models[0].settings, uses_ray_data=streamed)
    try:
        yield True
    finally:
        shutdown()


def _is_streamed(setup: EvaluateSetup) -> bool:
    """Whether any split that a task reads comes through Ray Data."""
    frozen = {name: task for name, task in setup.tasks.items() if TASKS[name].needs != "fine_tuning"}
    splits = {split for name, task in frozen.items() for split in TASKS[name].splits(task, setup.config.phase)}
    streamed = [
        not uses_memory(model.settings, model.data, split) for model in setup.models for split in sorted(splits)
    ]
    settings = setup.models[0].settings
    streamed += [not uses_memory(settings, data, split) for data in setup.domains.values() for split in data.splits]
    return any(streamed)


def _record(setup: EvaluateSetup, model: Model) -> dict[str, Any]:
    return {
        "checkpoint": model.location,
        "pretraining": model.record,
        "data": data_record(model.data),
        "domains": {name: data_record(data) for name, data in setup.domains.items()},
        "task_data": {name: data_record(own.prepared) for name, own in setup.task_data.items()},
        "versions": package_versions(),
        "git": git_revision(),
        "cpus": os.cpu_count(),
        "seed": setup.config.seed,
        "phase": setup.config.phase,
    }


def compared(setup: EvaluateSetup, evaluated: list[Evaluated]) -> tuple[list[Metric], list[Artifact], dict[str, str]]:
    """What the tasks say of all models together; nothing for a single one."""

    def same_images(task: str) -> bool:
        if task == "domains" or task in setup.task_data:
            return True  # the same further data sets for all models
        split = TASKS[task].protocol(setup.tasks[task], setup.config.phase)["split"]
        return len({split_key(model.data.split(split)) for model in setup.models}) == 1

    return compare_models(setup.tasks, [one.result() for one in evaluated], same_images)


def metric_line(metric: Metric) -> str:
    """Name, value, interval and sample count on one line."""
    count = "" if metric.n is None else f"   n = {metric.n:,}"
    return f"{metric.name:<36} {value_text(metric.value, metric.ci95)}{count}"
