"""Measure how well checkpoints transfer, on frozen features and by fine-tuning.

One checkpoint:         python rayjobs/evaluate.py --checkpoint results/pretrain --tasks linear knn few_shot
Several, compared:      python rayjobs/evaluate.py --checkpoint runs/supervised runs/moco --tasks few_shot cam
Across domains:         python rayjobs/evaluate.py --checkpoint runs/tiered --tasks few_shot
                            --data novel_classes=cifar_fs:DIR --image-size 32
By fine-tuning:         python rayjobs/evaluate.py --checkpoint runs/moco --tasks detection landmarks
                            --task-data detection=voc:VOCdevkit landmarks=mafl:DIR --detection.recipe voc07
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the project folder takes the place of this one on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation import Metric
from rayjobs.cli import EXIT_INTERRUPTED, flat_parse, make_console, plain, quiet_libraries, show_warnings, user_errors
from rayjobs.evaluate_config import EvaluateConfig, EvaluateSetup, prepare_evaluation
from rayjobs.number_text import metric_text, value_text

P_VALUES = ("/p_value", "/p_value_holm")


def main(argv: list[str] | None = None) -> None:
    """Parse, check, evaluate, compare, print, write."""
    quiet_libraries()
    console = make_console()
    show_warnings(console)
    config = flat_parse(EvaluateConfig, None, argv, __doc__ or "")
    with user_errors():
        setup = prepare_evaluation(config, plain(console))
    for task, reason in setup.left_out.items():
        console.print(f"[yellow]Not measured, {task}:[/yellow] {escape(reason)}", soft_wrap=True)
    from rayjobs.evaluate_run import compared, evaluate_models
    from rayjobs.result_files import write_files
    from rayjobs.tune_session import write_json

    finished = []
    try:
        for one in evaluate_models(setup, console):
            finished.append(one)
    except KeyboardInterrupt:
        console.print(
            f"\nInterrupted. What is finished is in {setup.output}; the same command goes on.", soft_wrap=True
        )
        sys.exit(EXIT_INTERRUPTED)
    metrics, files, left_out = compared(setup, finished)
    write_files(setup.output / "comparison", files, {})
    together = {m.name: {"value": m.value, "ci95": m.ci95, "n": m.n} for m in metrics}
    full = {"models": {one.model.name: one.full for one in finished}, "comparison": together}
    shown = finished[0].full if len(finished) == 1 else full
    write_json(setup.output / "evaluation.json", shown)
    if config.json:
        Path(config.json).expanduser().write_text(json.dumps(shown, indent=2))
    _print_models(setup, [(one.model.name, one.full["metrics"]) for one in finished], console)
    if metrics:
        _print_comparison(metrics, console)
    for task, reason in left_out.items():
        console.print(f"[yellow]Not compared, {task}:[/yellow] {reason}")
    for file in files:
        console.print(f"File       {setup.output / 'comparison' / file.name}", soft_wrap=True)
    console.print(f"Result     {setup.output / 'evaluation.json'}", soft_wrap=True)
    if config.experiment:
        _log(setup, finished, metrics, bool(files), console)


def _print_models(setup: EvaluateSetup, models: list[tuple[str, dict[str, Any]]], console: Console) -> None:
    """Metrics down, models across."""
    table = Table(title=f"{setup.config.phase} split", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for name, _ in models:
        table.add_column(name, justify="right", overflow="fold")
    for metric in models[0][1]:
        table.add_row(metric, *[metric_text(metrics.get(metric)) for _, metrics in models])
    table.caption = "± half width of the 95 % interval over tasks, images or fine-tuning seeds of one pretraining"
    console.print()
    console.print(table)


def _print_comparison(metrics: list[Metric], console: Console) -> None:
    """One line per difference, its p-value (after Holm's adjustment where there is one) beside it."""
    table = Table(title="Models compared, entry by entry on the same images and tasks", title_justify="left")
    table.add_column("metric, models", overflow="fold")
    for heading in ("difference", "p", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    values = {metric.name: metric for metric in metrics}
    for m in metrics:
        if m.name.endswith(P_VALUES):
            continue
        p = next((values[m.name + end] for end in reversed(P_VALUES) if m.name + end in values), None)
        count = "" if m.n is None else f"{m.n:,}"
        table.add_row(m.name, value_text(m.value, m.ci95), "" if p is None else f"{p.value:.3g}", count)
    console.print(table)


def _log(setup: EvaluateSetup, finished: list[Any], metrics: list[Metric], plots: bool, console: Console) -> None:
    """One MLflow run per model; several get a parent run with what they have in common."""
    from rayjobs.tracking import Tracker, default_tracking_uri, tracking_summary
    from rayjobs.trial_log import flat_parameters, log_transfer

    config = setup.config
    tracker = Tracker(config.experiment, setup.output / "mlflow-pending.jsonl", log=plain(console))
    parent = None
    if len(finished) > 1:
        key = "/".join(one.model.key for one in finished)
        parent = tracker.run(" vs ".join(one.model.name for one in finished)[:200], {"key": key, "kind": "evaluation"})
        parent.params(
            {"checkpoints": " ".join(config.checkpoint), "tasks": " ".join(setup.tasks), "phase": config.phase}
        )
        parent.metrics({f"comparison/{metric.name}": metric.value for metric in metrics})
        parent.artifact(setup.output / "evaluation.json")
        if plots:
            parent.artifact(setup.output / "comparison", "comparison")
    for one in finished:
        pretrain = one.model.pretrain
        tags = {
            "key": f"{one.model.location}/{one.model.key}",
            "kind": "evaluate",
            "method": one.full["info"]["method"],
        }
        name = " ".join(dict.fromkeys((pretrain.method, one.model.name)))  # not "supervised supervised"
        run = tracker.run(name, tags, parent)
        run.params({**flat_parameters(pretrain), "checkpoint": one.model.location, "phase": config.phase})
        log_transfer(run, {config.phase: one.full}, pretrain.train.epochs)
        run.json(one.full["record"], "record.json")
        run.artifact(one.folder, f"evaluation_{config.phase}")
        run.end("FINISHED")
    if parent is not None:
        parent.end("FINISHED")
    tracker.close(60)
    console.print(f"MLflow     {tracking_summary(default_tracking_uri())}   experiment {config.experiment}")


if __name__ == "__main__":
    main()
