"""Pretrain one method with Ray Train: any number of workers, CPU or GPU.

python rayjobs/pretrain.py --method exemplar_v2 --data folder:PATH --epochs 200 --output runs/exemplar
python rayjobs/pretrain.py --method simsiam --help       shows that method's own options
python rayjobs/pretrain.py --recipe moco_v2_imagenet --data folder:IMAGENET    a paper's whole setting
"""

from __future__ import annotations

import dataclasses
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the project folder takes the place of this one on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console

from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from methods import METHODS, method_spec
from methods.monitors import is_collapsed
from methods.optimizers import OptimizerConfig, learning_rate
from rayjobs.capacity import Placement, placement
from rayjobs.cli import EXIT_INTERRUPTED, flat_parse, make_console, option_value, plain, quiet_libraries, user_errors
from rayjobs.configs import PretrainConfig, TrainConfig, preset
from rayjobs.job import Job, uses_memory, view_recipes
from rayjobs.places import resolve_output
from rayjobs.recipes import describe_recipe, recipe
from rayjobs.record import run_record
from rayjobs.sweep_config import checked_batch
from rayjobs.train_loop import TrainingDiverged, method_context

DEFAULT_METHOD = "moco_v2"


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the run goes.

    Attributes:
        method: pretraining method.
        recipe: a complete setting by name, METHOD_imagenet or METHOD_small, that the other flags change; empty starts
            from the method's preset.
        output: folder (or URI that all nodes reach) of the checkpoint; must be new, or hold a run to resume.
        resume: continue the run in --output from its newest checkpoint.
        experiment: MLflow experiment.
    """

    method: str = DEFAULT_METHOD
    recipe: str = ""
    output: str = "results/pretrain"
    resume: bool = False
    experiment: str = "pretrain"


def main(argv: list[str] | None = None) -> None:
    """Parse, check, train, copy the checkpoint, log."""
    quiet_libraries()
    console = make_console()
    arguments = sys.argv[1:] if argv is None else argv
    with user_errors():
        options, config = _parse(arguments)
        if not options.experiment:
            raise ValueError("--experiment is empty; give a name, or drop the flag for the experiment pretrain.")
        data = prepare(config.data, log=plain(console))
        _check(config, data)
        target = resolve_output(options.output)
        has_run = _check_target(options, target, config)

    from rayjobs.cluster import connect_for, shutdown

    with user_errors():
        cluster = connect_for(config.train, uses_ray_data=not uses_memory(config.train, data))
    if options.resume and not has_run:
        console.print(f"Nothing to resume in {target}: starting from epoch 0.")
    try:
        _run(options, config, data, placement(cluster), target, console)
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. Continue with the same command and --resume (run folder {target}).")
        sys.exit(EXIT_INTERRUPTED)
    except TrainingDiverged as error:
        console.print(f"[red]{error}[/red]")
        sys.exit(1)
    finally:
        shutdown()


def _parse(arguments: list[str]) -> tuple[Options, PretrainConfig]:
    """The method decides which options exist, a recipe what they are by default."""
    recipe_name = option_value(arguments, "recipe", "")
    base = recipe(recipe_name) if recipe_name else None
    name = option_value(arguments, "method", base.method if base else DEFAULT_METHOD)
    if base is not None and name != base.method:
        raise ValueError(
            f"--recipe {recipe_name} is for --method {base.method}, not {name}. Drop one of the two flags."
        )
    spec = method_spec(name)
    base = base or preset(name)
    fields: list[Any] = [
        ("options", Options, dataclasses.field(default=Options(method=name, recipe=recipe_name))),
        ("train", TrainConfig, dataclasses.field(default=base.train)),
        ("method_config", type(spec.config), dataclasses.field(default=base.method_config)),
        ("optimizer", OptimizerConfig, dataclasses.field(default=base.optimizer)),
        ("data", DataConfig, dataclasses.field(default=base.data)),
    ]
    kind = dataclasses.make_dataclass("Pretrain", fields, frozen=True)
    epilogue = f"\n\nMethods: {', '.join(METHODS)}\n\n{name}: {spec.summary}"
    if recipe_name:
        epilogue += f"\n\n{recipe_name}: {describe_recipe(recipe_name)}"
    parsed: Any = flat_parse(kind, None, arguments, (__doc__ or "") + epilogue)
    config = PretrainConfig(name, parsed.method_config, parsed.optimizer, parsed.train, parsed.data)
    return parsed.options, config


def _check(config: PretrainConfig, data: PreparedData) -> None:
    checked_batch(config.train, data)
    view_recipes(config)
    info = data.split("train")
    if config.train.epochs:
        context = method_context(config, len(info.class_names), info.num_images)
        METHODS[config.method].method.validate(config.method_config, context)
        steps = info.num_images // config.train.batch_size
        learning_rate(config.optimizer, config.train.batch_size, 0, steps * config.train.epochs, steps)


def _check_target(options: Options, target: str, config: PretrainConfig) -> bool:
    """Whether the folder holds an unfinished run; refuses to overwrite or to mix runs."""
    from pyarrow.fs import FileSystem, FileType, LocalFileSystem

    filesystem, path = FileSystem.from_uri(target) if "://" in target else (LocalFileSystem(), target)
    has_run = filesystem.get_file_info(f"{path}/train").type != FileType.NotFound
    has_result = filesystem.get_file_info(f"{path}/config.json").type != FileType.NotFound
    if (has_run or has_result) and not options.resume:
        state = "a finished" if has_result else "an unfinished"
        raise ValueError(
            f"--output {options.output} already holds {state} run. Continue it with --resume, or choose another folder."
        )
    return has_run


def _run(
    options: Options, config: PretrainConfig, data: PreparedData, where: Placement, target: str, console: Console
) -> None:
    from rayjobs.checkpoint import copy_checkpoint, local_directory
    from rayjobs.configs import config_hash, to_dict
    from rayjobs.ray_train import ProgressPoller, build_trainer, fit
    from rayjobs.tracking import Tracker, default_tracking_uri, tracking_summary
    from rayjobs.trial_log import collapse_text, flat_parameters, log_epoch

    record = run_record(config, data)
    job = Job(config, record, data, probe_tasks={}, placement=where)
    journal = Path(target if "://" not in target else resolve_output("results")) / "mlflow-pending.jsonl"
    tracker = Tracker(options.experiment, journal, log=plain(console))
    tags = {"key": target, "kind": "pretrain", "method": config.method, "config_hash": config_hash(config)}
    run = tracker.run(Path(target).name, tags)
    run.params(flat_parameters(config))
    run.json({"config": to_dict(config), "record": record}, "config.json")
    status = "FAILED"

    def show(item: dict[str, Any]) -> None:
        if item["kind"] == "report" and item["epoch"]:
            log_epoch(run, {k: v for k, v in item.items() if k != "kind"})
        _print_progress(item, config, console)

    try:
        with ProgressPoller(show) as poller:
            result = fit(build_trainer(job, target, "train", board=poller.board))
        assert result.checkpoint is not None
        last = result.metrics or {}
        if is_collapsed(last):
            run.tags({"collapsed": "true"})
        with local_directory(result.checkpoint.path) as directory:
            copy_checkpoint(directory, target)
            run.artifact(directory / "config.json", "checkpoint")
            run.artifact(directory / "backbone.safetensors", "checkpoint")
            tracker.flush()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.end(status)
        tracker.close(60)
    if is_collapsed(last):
        console.print(f"\n[yellow]{collapse_text(last)}[/yellow]")
    console.print(f"\nCheckpoint {target}", soft_wrap=True)
    console.print(f"MLflow     {tracking_summary(default_tracking_uri())}   experiment {options.experiment}")
    console.print(f"Evaluate   python rayjobs/evaluate.py --checkpoint {options.output}", soft_wrap=True)


def _print_progress(item: dict[str, Any], config: PretrainConfig, console: Console) -> None:
    if not item["epoch"]:
        return
    head = f"epoch {item['epoch']:>6.2f}/{config.train.epochs}  step {item['step']:>6}  loss {item['loss']:.4f}"
    rate = f"{item['images_per_second']:.0f} images/s  data wait {item['data_wait_percent']:.0f} %"
    seconds = int((config.train.epochs - item["epoch"]) * item["epoch_seconds"])
    console.print(f"{head}  {rate}  ETA {timedelta(seconds=seconds)}")


if __name__ == "__main__":
    main()
