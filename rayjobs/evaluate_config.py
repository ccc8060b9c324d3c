"""The evaluate command's configuration, and the checks that run before any forward pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from evaluation import TASKS
from image_data.layouts import LAYOUTS, open_layout
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from image_data.uri import parse_uri
from rayjobs.checkpoint import BACKBONE, load_config, local_directory
from rayjobs.configs import PretrainConfig, TrainConfig
from rayjobs.record import git_revision
from rayjobs.task_options import TaskOptions, chosen_tasks
from rayjobs.transfer import TaskConfigs, check_tasks

DOMAIN_SPLIT = (0.7, 0.0, 0.3)  # asrafulashiq/transfer_broad, of data sets without test images of their own

__all__ = ["EvaluateConfig", "EvaluateSetup", "Model", "prepare_evaluation"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Transfer of one or more checkpoints, measured on frozen features; several are also compared with each other.

    Attributes:
        checkpoint: folders (or URIs) with backbone.safetensors and config.json.
        names: names of the checkpoints in tables and plots; empty takes the folders' names.
        tasks: downstream tasks and analyses; frozen stands for all that need nothing but the checkpoint's own data.
        phase: test reports held-out images and novel classes; val is for choosing hyperparameters.
        image_size: side of the evaluation images in pixels; 0 takes the pretraining size.
        domains: further data sets of the task domains, as NAME=URI.
        use_gpu: extract features on GPUs.
        num_workers: feature-extraction actors when the images are streamed by Ray Data, and inversion tasks at once.
        cpus_per_worker: CPU cores per actor (or threads of this process).
        stream: memory, ray (Ray Data actor pool) or auto, as in pretraining.
        seed: seed of task lists and solvers; keep it the same for models that you compare.
        output: folder of result.json, plots and samples, one sub-folder per checkpoint. A finished evaluation that is
            found there is not repeated. Empty is results/evaluate/ and the name of the (first) checkpoint.
        json: also write the result to this file: {"metrics": ..., "protocol": ..., "record": ...}.
        experiment: MLflow experiment; empty logs nothing.
        options: options of the tasks.
        data: images; the default is what each checkpoint was pretrained on.
    """

    checkpoint: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("linear", "knn", "few_shot", "entropy", "uniformity")
    phase: Literal["val", "test"] = "test"
    image_size: int = 0
    domains: tuple[str, ...] = ()
    use_gpu: bool = False
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    stream: Literal["auto", "memory", "ray"] = "auto"
    seed: int = 0
    output: str = ""
    json: str = ""
    experiment: str = "evaluate"
    options: TaskOptions = field(default_factory=TaskOptions)  # pyright: ignore[reportInvalidTypeForm] - made of TASKS
    data: DataConfig = field(default_factory=lambda: DataConfig(data=()))


@dataclass(frozen=True)
class Model:
    """One checkpoint to be evaluated.

    Attributes:
        name: in tables and plots.
        location: folder or URI.
        pretrain: how it was pretrained.
        record: the run record of its pretraining.
        data: what it is evaluated on.
        settings: image size and where the images are read from.
        key: equal for evaluations that give the same numbers.
    """

    name: str
    location: str
    pretrain: PretrainConfig
    record: dict[str, Any]
    data: PreparedData
    settings: TrainConfig
    key: str


@dataclass(frozen=True)
class EvaluateSetup:
    """A checked evaluation.

    Attributes:
        config: what the user asked for.
        tasks: task name -> its config.
        models: the checkpoints, in the user's order.
        domains: further data sets by name.
        output: local folder of the results.
    """

    config: EvaluateConfig
    tasks: TaskConfigs
    models: tuple[Model, ...]
    domains: dict[str, PreparedData]
    output: Path


def prepare_evaluation(config: EvaluateConfig, log: Callable[[str], None]) -> EvaluateSetup:
    """Check everything and prepare the data.

    Raises:
        ValueError: what is wrong, what is allowed, how to fix it.
    """
    if not config.checkpoint:
        raise ValueError("--checkpoint is missing: give the folder of a pretraining run, or several to compare them.")
    if config.json and not Path(config.json).expanduser().resolve().parent.is_dir():
        raise ValueError(f"--json {config.json}: the folder does not exist.")
    if not config.tasks:
        raise ValueError(f"--tasks is empty; name at least one of {', '.join(TASKS)}.")
    tasks = chosen_tasks(config.tasks, config.options)
    names = _names(config)
    domains = _domains(config, tasks, log)
    prepared: dict[str, PreparedData] = {}
    models = []
    for name, location in zip(names, config.checkpoint, strict=True):
        with local_directory(location) as directory:
            pretrain, record = load_config(directory)
            weights = hashlib.sha256((Path(directory) / BACKBONE).read_bytes()).hexdigest()
        chosen = config.data if config.data.data else pretrain.data
        data_key = json.dumps(asdict(chosen), sort_keys=True, default=str)
        if data_key not in prepared:
            prepared[data_key] = prepare(chosen, log=log)
        data = prepared[data_key]
        check_tasks(tasks, config.phase, data)
        settings = _settings(config, pretrain)
        key = _key(config, tasks, settings, data, domains, weights)
        models.append(Model(name, location, pretrain, record, data, settings, key))
    output = Path(config.output or f"results/evaluate/{names[0]}").expanduser()
    return EvaluateSetup(config, tasks, tuple(models), domains, output)


def _names(config: EvaluateConfig) -> tuple[str, ...]:
    """Unique names: the user's, else the shortest end of each path that tells the checkpoints apart."""
    if config.names:
        if len(config.names) != len(config.checkpoint):
            raise ValueError(
                f"--names has {len(config.names)} names for {len(config.checkpoint)} checkpoints; give one for each."
            )
        names = config.names
    else:
        parts = [location.rstrip("/").split("/") for location in config.checkpoint]
        longest = max(map(len, parts))
        names = ()
        for depth in range(1, longest + 1):
            names = tuple("-".join(part[-depth:]).replace("://", "-") for part in parts)
            if len(set(names)) == len(names):
                break
    if len(set(names)) < len(names):
        raise ValueError(f"--checkpoint or --names holds something twice: {', '.join(names)}. Names must differ.")
    bad = [name for name in names if "/" in name or name in ("", ".", "..", "comparison")]
    if bad:
        raise ValueError(f"--names: {bad[0]!r} cannot be the name of a folder; give --names without '/'.")
    return names


def _domains(config: EvaluateConfig, tasks: TaskConfigs, log: Callable[[str], None]) -> dict[str, PreparedData]:
    if bool(config.domains) != ("domains" in tasks):
        raise ValueError(
            "--domains names the data sets of the task domains, and that task needs them: give both, for example "
            "--tasks domains --domains eurosat=eurosat:DIR dtd=dtd:DIR, or neither."
        )
    prepared = {}
    for item in config.domains:
        name, found, uri = item.partition("=")
        if not found or ":" in name or not name or name in prepared:
            raise ValueError(f"--domains {item}: write NAME=URI with different names, for example eurosat=eurosat:DIR.")
        # Under a split's name no classes are held out; test images that the data set does not name come from train.
        own = DataConfig(data=(f"train={uri}",), cache=config.data.cache, data_seed=config.data.data_seed)
        shares = own.image_split if _has_test(uri) else DOMAIN_SPLIT
        prepared[name] = prepare(replace(own, image_split=shares), log=log)
        missing = [split for split in ("train", "test") if split not in prepared[name].splits]
        if missing:
            raise ValueError(f"--domains {item}: the data has no split {' and '.join(missing)}; both are needed.")
    return prepared


def _has_test(uri: str) -> bool:
    """Whether a data set brings its own test images."""
    parsed = parse_uri(uri)
    return parsed.scheme == "rendered" or (parsed.scheme in LAYOUTS and "test" in open_layout(parsed, "train"))


def _settings(config: EvaluateConfig, pretrain: PretrainConfig) -> TrainConfig:
    return replace(
        pretrain.train,
        image_size=config.image_size or pretrain.train.image_size,
        use_gpu=config.use_gpu,
        num_workers=config.num_workers,
        cpus_per_worker=config.cpus_per_worker,
        stream=config.stream,
    )


def _key(
    config: EvaluateConfig,
    tasks: TaskConfigs,
    settings: TrainConfig,
    data: PreparedData,
    domains: dict[str, PreparedData],
    weights: str,
) -> str:
    """What the numbers depend on; where and with how many processes they are computed is left out."""
    record = {
        "tasks": {name: asdict(task) for name, task in tasks.items()},
        "phase": config.phase,
        "seed": config.seed,
        "image_size": settings.image_size,
        "data": data.content,
        "domains": {name: domain.content for name, domain in domains.items()},
        "weights": weights,
        "code": git_revision(),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]
