"""All code that talks to Ray Tune: the trial, the search algorithm, pruning, resuming, the driver's callback."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from ray import tune

from evaluation import Phase
from methods import METHODS
from methods.monitors import is_collapsed
from rayjobs.capacity import head_resource
from rayjobs.configs import PretrainConfig, with_parameters
from rayjobs.job import Job, run_job, worker_device
from rayjobs.optuna_search import PruneAwareOptunaSearch
from rayjobs.record import trial_record
from rayjobs.result_files import write_phases
from rayjobs.task_data import TaskData
from rayjobs.train_loop import TrainingDiverged, Worker
from rayjobs.transfer import TaskConfigs, TransferResult, evaluate_checkpoint
from rayjobs.tune_schedulers import ResumableASHA, ResumableFIFO
from search_spaces import SearchSpace, SpaceContext

__all__ = [
    "SweepPlan",
    "TrialEvents",
    "build_points_tuner",
    "build_tuner",
    "can_restore",
    "milestones",
    "restore_tuner",
    "run_label",
    "run_name",
    "trial_config",
]

REDUCTION_FACTOR = 2  # ASHA keeps the better half at each milestone


@dataclass(frozen=True)
class SweepPlan:
    """Everything a trial needs besides its sampled parameters; picklable, the same for all trials.

    Attributes:
        base: method -> configuration with the sweep's fixed settings.
        jobs: method -> job with record, data and probe.
        tasks: downstream tasks of the final evaluation of a trial.
        objective: the metric that Optuna optimises.
        direction: maximize or minimize.
        storage: absolute path or URI of the sweep's folder.
        name: name of the sweep.
        num_trials: trials to run.
        max_concurrent: trials at once.
        seed: seed of the sampler.
        prune: whether ASHA stops trials early.
        phases: "val" while searching; "test" only for the report.
        task_data: images of single tasks.
        folder: subfolder of Tune's own files.
        named_by_seed: runs are called by method and seed, not by method and number.
    """

    base: Mapping[str, PretrainConfig]
    jobs: Mapping[str, Job]
    tasks: TaskConfigs
    objective: str
    direction: str
    storage: str
    name: str
    num_trials: int
    max_concurrent: int
    seed: int
    prune: bool = True
    phases: tuple[Phase, ...] = ("val",)
    folder: str = "tune"
    named_by_seed: bool = False
    task_data: Mapping[str, TaskData] = field(default_factory=dict)


def milestones(epochs: int) -> tuple[int, ...]:
    """Epochs at which trials are compared: a quarter of the run but at least two epochs, then every doubling (ASHA
    rungs with factor 2). After the first epoch hardly anything is learned."""
    first = max(1, min(2, epochs - 1), epochs // 4)
    found = []
    while first < epochs:
        found.append(first)
        first *= REDUCTION_FACTOR
    return tuple(found)


def trial_config(plan: SweepPlan, sampled: Mapping[str, Any]) -> PretrainConfig:
    """The complete configuration of one sampled trial."""
    parameters = dict(sampled)
    method = parameters.pop("method", None) or next(iter(plan.base))
    return with_parameters(plan.base[method], parameters)


def run_label(config: PretrainConfig) -> str:
    """What a run is listed under: its method, or which untrained backbone it is."""
    if config.train.epochs:
        return config.method
    return "random_init_lab" if METHODS[config.method].color_space == "lab" else "random_init"


def run_name(plan: SweepPlan, config: PretrainConfig, number: int) -> str:
    """Readable name of the ``number``-th trial's run."""
    label = run_label(config)
    return f"{label}-seed{config.train.seed}" if plan.named_by_seed else f"{label}-{number:02d}"


class TuneReporter:
    """The loop's Reporter inside a Tune trial (one worker per trial); ``last`` is the newest report."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None] | None) -> None:
        """Report one epoch, with its checkpoint where there is one."""
        self.last = metrics
        if save is None:
            tune.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as directory:
            save(Path(directory))
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """The trial's newest checkpoint after a crash or a resumed sweep."""
        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as directory:
            yield Path(directory)

    def progress(self, metrics: dict[str, Any]) -> None:
        """Within an epoch a trial is silent: the driver shows epochs."""


def run_trial(sampled: dict[str, Any], plan: SweepPlan) -> None:
    """One trial: pretrain with the sampled parameters, then measure the transfer on validation data."""
    sampled = sampled.get("point", sampled)
    config = trial_config(plan, sampled)
    job = plan.jobs[config.method]
    job = replace(job, config=config, record=trial_record(job.record, config, sampled))
    try:
        checkpoint, last = _pretrain(job, plan)
    except TrainingDiverged as error:
        # Restarting would diverge again in the same step: the trial ends here, as failed.
        tune.report({"epoch": 0, "diverged": str(error)})
        return
    trial_id = tune.get_context().get_trial_id()
    known: dict[str, Any] = {"task_data": plan.task_data, "storage": f"{plan.storage}/{plan.folder}-runs/{trial_id}"}
    with _as_directory(checkpoint) as directory:
        known["location"] = _location(checkpoint)
        results = {
            phase: evaluate_checkpoint(directory, plan.tasks, phase, job.data, config.train, **known)
            for phase in plan.phases
        }
    report = final_report(results, config.train.epochs + 1, plan.objective, checkpoint, last)
    files = write_phases(results, f"{plan.storage}/{plan.folder}-files/{trial_id}")
    tune.report({**report, "files": files})


def _pretrain(job: Job, plan: SweepPlan) -> tuple[str, dict[str, Any]]:
    """Train; returns the path of the last checkpoint and the metrics of the last epoch.

    One worker runs in this process. Several are a nested Ray Train run, named after the trial so that a restored trial
    continues it.
    """
    if job.config.train.num_workers == 1:
        reporter = TuneReporter()
        run_job(job, Worker(0, 1, worker_device(job.config.train)), reporter)
        return tune.get_checkpoint().path, reporter.last
    from ray.tune.integration.ray_train import TuneReportCallback

    from rayjobs.ray_train import build_trainer, fit

    trial_id = tune.get_context().get_trial_id()
    trainer = build_trainer(job, f"{plan.storage}/train", f"train-{trial_id}", [TuneReportCallback()])
    result = fit(trainer)
    assert result.checkpoint is not None
    return result.checkpoint.path, result.metrics or {}


@contextmanager
def _as_directory(path: str) -> Iterator[str]:
    """A checkpoint of this trial as a local folder."""
    from rayjobs.checkpoint import local_directory

    with local_directory(_location(path)) as directory:
        yield str(directory)


def _location(path: str) -> str:
    """A checkpoint's path as Ray reports it, as a path or URI that every node reads."""
    return path if "://" in path or os.path.isabs(path) else f"s3://{path}"


def final_report(
    results: Mapping[str, TransferResult], epoch: int, objective: str, checkpoint: str, last: Mapping[str, Any]
) -> dict[str, Any]:
    """The last report of a trial, which Tune keeps: transfer metrics with intervals and protocol, and how the last
    epoch went."""
    pretext = {name: float(value) for name, value in last.items() if isinstance(value, int | float)}
    first = next(iter(results.values()))
    return {
        "epoch": epoch,
        "objective": first.value(objective),
        "transfer": {phase: result.to_json() for phase, result in results.items()},
        "checkpoint_path": checkpoint,
        "pretext": pretext,
        "collapsed": is_collapsed(pretext),
    }


class TrialEvents(tune.Callback):
    """Hands Tune's events on the driver to one listener (display and MLflow)."""

    def __init__(self, listener: Any) -> None:
        self._listener = listener

    def __getstate__(self) -> dict[str, Any]:
        return {"_listener": None}  # Tune pickles its callbacks; the listener holds threads and is set again on restore

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.trial_started(trial.trial_id, trial.config.get("point", trial.config))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict, **info: Any) -> None:
        self._listener.trial_reported(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.trial_ended(trial.trial_id, trial.last_result, error=None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Tune stores the exception after this call.
        self._listener.trial_ended(trial.trial_id, trial.last_result, error="")


def _scheduler(plan: SweepPlan, epochs: int) -> Any:
    rungs = milestones(epochs)
    if not plan.prune or not rungs:
        return ResumableFIFO()
    return ResumableASHA(
        time_attr="epoch",
        metric="proxy",
        mode="max",
        max_t=epochs + 2,  # a trial's last report has epoch + 1; reaching max_t would stop it before
        grace_period=rungs[0],
        reduction_factor=REDUCTION_FACTOR,
    )


def _sampler(seed: int) -> optuna.samplers.TPESampler:
    """TPE over the joint space, aware of running trials and of parameters that only some methods have."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)


def build_tuner(plan: SweepPlan, space: SearchSpace, context: SpaceContext, listener: Any) -> tune.Tuner:
    """A fresh sweep."""
    epochs = next(iter(plan.base.values())).train.epochs
    sample: Any = space.sample
    search = PruneAwareOptunaSearch(
        proxy="proxy",
        space=partial(sample, context=context),
        metric="objective",
        mode=plan.direction[:3],
        points_to_evaluate=space.presets(context)[: plan.num_trials] if space.presets else None,
        sampler=_sampler(plan.seed),
    )
    return tune.Tuner(
        _trainable(plan),
        tune_config=tune.TuneConfig(
            num_samples=plan.num_trials,
            max_concurrent_trials=plan.max_concurrent,
            search_alg=search,
            scheduler=_scheduler(plan, epochs),
            reuse_actors=True,  # a new process costs seconds of imports
        ),
        run_config=_run_config(plan, listener),
    )


def build_points_tuner(plan: SweepPlan, points: list[dict[str, Any]], listener: Any) -> tune.Tuner:
    """Fixed settings instead of a search: the random-initialisation baseline, the confirmation seeds."""
    return tune.Tuner(
        _trainable(plan),
        param_space={"point": tune.grid_search(points)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=plan.max_concurrent,
            metric="objective",
            mode="max",
            scheduler=ResumableFIFO(),
            reuse_actors=True,
        ),
        run_config=_run_config(plan, listener),
    )


def _run_config(plan: SweepPlan, listener: Any) -> tune.RunConfig:
    return tune.RunConfig(
        name=plan.folder,
        storage_path=plan.storage,
        verbose=0,
        callbacks=[TrialEvents(listener)],
        failure_config=tune.FailureConfig(max_failures=next(iter(plan.base.values())).train.max_failures),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
    )


def can_restore(plan: SweepPlan) -> bool:
    """Whether an earlier start left a search to continue."""
    return tune.Tuner.can_restore(f"{plan.storage}/{plan.folder}")


def restore_tuner(plan: SweepPlan, listener: Any, retry_crashed: bool = False) -> tune.Tuner:
    """An interrupted sweep: finished trials stay, unfinished (and crashed) ones go on from their last checkpoint."""
    folder = f"{plan.storage}/{plan.folder}"
    tuner = tune.Tuner.restore(folder, _trainable(plan), resume_unfinished=True, resume_errored=retry_crashed)
    # The listener holds threads and cannot be pickled with the experiment.
    local: Any = tuner._local_tuner
    local.get_run_config().callbacks = [TrialEvents(listener)]
    scheduler = local._tune_config.scheduler
    if isinstance(scheduler, ResumableASHA):
        for trial_id, values in stored_milestones(folder).items():
            scheduler.recall(trial_id, values)
    return tuner


def stored_milestones(folder: str) -> dict[str, dict[int, float]]:
    """Trial -> epoch -> the pruning metric, from the reports that Tune stored."""
    found = {}
    for trial_id, reports in tune.ExperimentAnalysis(folder).trial_dataframes.items():
        if "proxy" in reports:
            known = reports.dropna(subset=["proxy"])
            found[trial_id] = dict(zip(known["epoch"].astype(int), known["proxy"], strict=True))
    return found


def _trainable(plan: SweepPlan) -> Any:
    settings = next(iter(plan.base.values())).train
    trainable = tune.with_parameters(run_trial, plan=plan)
    if settings.num_workers > 1:
        return tune.with_resources(trainable, head_resource())
    resources: dict[str, float] = {"CPU": settings.cpus_per_worker}
    if settings.use_gpu:
        resources["GPU"] = 1
    selector = next(iter(plan.jobs.values())).placement.train
    if selector is None:
        return tune.with_resources(trainable, resources)
    return tune.with_resources(trainable, tune.PlacementGroupFactory([resources], bundle_label_selector=[selector]))
