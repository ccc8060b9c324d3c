"""The evaluate command's configuration, and the checks that run before any forward pass."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from evaluation import TASKS
from image_data.contracts import DataError
from image_data.layouts import LAYOUTS, open_layout
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from image_data.rendered.dataset import RenderedOptions
from image_data.uri import available_cpus, parse_uri
from rayjobs.checkpoint import load_config, local_directory
from rayjobs.configs import PretrainConfig, TrainConfig
from rayjobs.fine_tuning_runs import weights_hash
from rayjobs.record import git_revision
from rayjobs.task_data import TaskData, check_task_data, prepare_task_data
from rayjobs.task_options import DEFAULT_FROZEN, DOWNSTREAM_SUITE, TaskOptions, chosen_tasks
from rayjobs.transfer import TaskConfigs, check_task

DOMAIN_SPLIT = (0.7, 0.0, 0.3)  # asrafulashiq/transfer_broad, of data sets without test images of their own

__all__ = ["EvaluateConfig", "EvaluateSetup", "Model", "prepare_evaluation"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Transfer of one or more checkpoints, on frozen features and by fine-tuning; several are compared with each other.

    Attributes:
        checkpoint: folders (or URIs) with backbone.safetensors and config.json.
        names: names of the checkpoints in tables and plots; empty takes the folders' names.
        tasks: downstream tasks and analyses. frozen stands for all on frozen features that need nothing but the
            checkpoint's own data, downstream for all that fine-tune. Empty takes linear, knn, few_shot, entropy and
            uniformity, and of those that fine-tune the ones that the data have targets for.
        phase: test reports held-out images and novel classes; val is for choosing hyperparameters.
        image_size: side of the evaluation images in pixels; 0 takes the pretraining size.
        domains: further data sets of the task domains, as NAME=URI.
        task_data: images of single fine-tuning tasks, as TASK=URI (detection=voc:DIR).
        fine_tune_on: where tasks are fine-tuned: cluster (a Ray Train job of --num-workers workers; grids of small runs
            as one Ray task each), here (this process), or auto: a cluster where there are several workers or
            RAY_ADDRESS is set.
        use_gpu: extract features and fine-tune on GPUs.
        num_workers: workers of a fine-tuning run (or small runs at once), feature-extraction actors when the images are
            streamed by Ray Data, and inversion tasks at once.
        cpus_per_worker: CPU cores per worker or actor (or threads of this process); 0 takes 1, and all cores of this
            machine for what one process does here.
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
    tasks: tuple[str, ...] = ()
    phase: Literal["val", "test"] = "test"
    image_size: int = 0
    domains: tuple[str, ...] = ()
    task_data: tuple[str, ...] = ()
    fine_tune_on: Literal["auto", "here", "cluster"] = "auto"
    use_gpu: bool = False
    num_workers: int = 1
    cpus_per_worker: float = 0.0
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
        own_data: what it is evaluated on.
        weights: hash of the backbone's file.
        settings: image size and where the images are read from.
        key: equal for evaluations that give the same numbers.
    """

    name: str
    location: str
    pretrain: PretrainConfig
    record: dict[str, Any]
    own_data: TaskData
    weights: str
    settings: TrainConfig
    key: str

    @property
    def data(self) -> PreparedData:
        """The prepared images."""
        return self.own_data.prepared


@dataclass(frozen=True)
class EvaluateSetup:
    """A checked evaluation.

    Attributes:
        config: what the user asked for.
        tasks: task name -> its config.
        models: the checkpoints, in the user's order.
        domains: further data sets by name.
        task_data: images of single tasks.
        left_out: tasks of the default suite that the data have no targets for, with the reason.
        output: local folder of the results.
    """

    config: EvaluateConfig
    tasks: TaskConfigs
    models: tuple[Model, ...]
    domains: dict[str, PreparedData]
    task_data: dict[str, TaskData]
    left_out: dict[str, str]
    output: Path

    @property
    def fine_tunes(self) -> bool:
        """Whether any task trains the backbone."""
        return any(TASKS[name].needs == "fine_tuning" for name in self.tasks)

    @property
    def on_cluster(self) -> bool:
        """Whether what is fine-tuned is fine-tuned on a Ray cluster."""
        where = self.config.fine_tune_on
        if where == "auto":
            return self.fine_tunes and (self.config.num_workers > 1 or bool(os.environ.get("RAY_ADDRESS")))
        return self.fine_tunes and where == "cluster"


def prepare_evaluation(config: EvaluateConfig, log: Callable[[str], None]) -> EvaluateSetup:
    """Check everything and prepare the data.

    Raises:
        ValueError: what is wrong, what is allowed, how to fix it.
    """
    if not config.checkpoint:
        raise ValueError("--checkpoint is missing: give the folder of a pretraining run, or several to compare them.")
    if config.json and not Path(config.json).expanduser().resolve().parent.is_dir():
        raise ValueError(f"--json {config.json}: the folder does not exist.")
    chosen_tasks(config.tasks, config.options)  # unknown names and idle options, before any data are prepared
    names = _names(config)
    found = [_opened(location) for location in config.checkpoint]
    data_configs = [config.data if config.data.data else pretrain.data for pretrain, _, _ in found]
    prepared: dict[str, PreparedData] = {}
    for chosen in data_configs:
        if _data_key(chosen) not in prepared:
            prepared[_data_key(chosen)] = prepare(chosen, log=log)
    data = [prepared[_data_key(chosen)] for chosen in data_configs]
    left_out: dict[str, str] = {}
    wanted, own_images = (config.tasks, config.task_data) if config.tasks else _default_suite(config, data, left_out)
    tasks = chosen_tasks(wanted, config.options)
    domains = _domains(config, tasks, log)
    task_data = prepare_task_data(own_images, tasks, data_configs[0], log)
    models = []
    for i, (pretrain, record, weights) in enumerate(found):
        check_task_data(tasks, [config.phase], data[i], task_data, _run_workers(config))
        settings = _settings(config, pretrain)
        further = {**domains, **{f"task {name}": own.prepared for name, own in task_data.items()}}
        key = _key(config, tasks, settings, data[i], further, weights)
        own = TaskData(data_configs[i], data[i])
        models.append(Model(names[i], config.checkpoint[i], pretrain, record, own, weights, settings, key))
    output = Path(config.output or f"results/evaluate/{names[0]}").expanduser()
    return EvaluateSetup(config, tasks, tuple(models), domains, task_data, left_out, output)


def _opened(location: str) -> tuple[PretrainConfig, dict[str, Any], str]:
    """Configuration, record and hash of the weights of a checkpoint."""
    with local_directory(location) as directory:
        return *load_config(directory), weights_hash(directory)


def _data_key(config: DataConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True, default=str)


def _default_suite(
    config: EvaluateConfig, data: Sequence[PreparedData], left_out: dict[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The usual frozen tasks and the fine-tuning tasks that the data allow, and TASK=URI of the tasks' own images.

    Notes why other tasks are left out. Pose gets rendered images of varying viewpoint where the checkpoint's are
    rendered ones of a fixed viewpoint, as the default images are.
    """
    own_images = list(config.task_data)
    given = {item.partition("=")[0] for item in own_images}
    for name in DOWNSTREAM_SUITE:
        if name in given:
            continue  # it has images of its own
        try:
            for own in data:
                check_task(name, getattr(config.options, name), config.phase, own, _run_workers(config))
        except ValueError as error:
            turned = _turned(data) if name == "pose" and isinstance(error, DataError) else ""
            if turned:
                own_images.append(f"pose={turned}")
            else:
                left_out[name] = str(error)
    return (*DEFAULT_FROZEN, *(name for name in DOWNSTREAM_SUITE if name not in left_out)), tuple(own_images)


def _run_workers(config: EvaluateConfig) -> int:
    """Workers of one fine-tuning run."""
    return 1 if config.fine_tune_on == "here" else config.num_workers


def _turned(data: Sequence[PreparedData]) -> str:
    """The rendered images of the (first) checkpoint with the viewpoint varying too; "" where none are rendered."""
    source = data[0].source
    if len(source) != 1 or not source[0].startswith("rendered:"):
        return ""
    uri = parse_uri(source[0])
    texture, color, _, light = uri.query.get("factors", RenderedOptions.factors)
    query = {**uri.query, "factors": f"{texture}{color}1{light}"}
    return "rendered:?" + "&".join(f"{key}={value}" for key, value in query.items())


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
    bad = [name for name in names if "/" in name or name in ("", ".", "..", "comparison", "runs")]
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
        cpus_per_worker=config.cpus_per_worker or _default_cpus(config),
        stream=config.stream,
    )


def _default_cpus(config: EvaluateConfig) -> float:
    """All cores where this process does everything by itself."""
    clustered = config.num_workers > 1 or config.fine_tune_on == "cluster" or config.stream == "ray"
    return 1.0 if clustered or os.environ.get("RAY_ADDRESS") else float(available_cpus())


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
