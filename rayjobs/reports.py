"""The sweep's final table and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evaluation import TASKS

__all__ = ["mean_interval", "print_report", "save_plots"]

# Hyperparameters in the table of trials, by the short name that stands there.
SHOWN = {
    "temperature": "tau",
    "queue_size": "K",
    "momentum": "m",
    "projector_depth": "depth",
    "learning_rate": "lr",
    "warmup_epochs": "warm-up",
}


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and Student-t half width of its 95 % interval over seeds; no interval for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def print_report(results: Mapping[str, Any], console: Console) -> None:
    """Trials by objective, then the winner against random initialisation on the test split."""
    console.print()
    console.print(_trial_table(results))
    outcomes = [t["outcome"] for t in results["trials"]]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in sorted(set(outcomes)))
    console.print(f"[dim]{len(outcomes)} trials: {counts}. Split: {results['rule']}[/dim]", highlight=False)
    collapsed = [t["name"] for t in results["trials"] if t.get("collapsed")]
    if collapsed:
        console.print(
            f"[yellow]{len(collapsed)} collapsed[/yellow] (the features of all images nearly the same; in MLflow: "
            f"tags.collapsed = 'true'): {', '.join(collapsed)}"
        )
    if "best" not in results:
        console.print("[red]No trial finished: see the runs' error.txt in MLflow.[/red]")
        return
    console.print()
    console.print(_test_table(results))


def _trial_table(results: Mapping[str, Any]) -> Table:
    objective = results["objective"]
    names = _metric_names(results)
    table = Table(title=f"Trials by validation {objective}", title_justify="left")
    table.add_column("trial", no_wrap=True)
    table.add_column("hyperparameters", overflow="fold")
    for name in names:
        table.add_column(_heading(name), justify="right", no_wrap=True)
    sign = -1 if results["direction"] == "maximize" else 1
    finished = sorted((t for t in results["trials"] if t["outcome"] == "finished"), key=lambda t: sign * t["objective"])
    for i, trial in enumerate(finished):
        cells = [_cell(trial["transfer"]["val"]["metrics"].get(name)) for name in names]
        table.add_row(trial["name"], _parameters(trial), *cells, style="bold" if i == 0 else "")
    for trial in results["trials"]:
        if trial["outcome"] != "finished":
            note = f"[dim]{trial['outcome']} after epoch {int(trial['epoch'])}[/dim]"
            table.add_row(f"[dim]{trial['name']}[/dim]", _parameters(trial), note, *[""] * (len(names) - 1))
    table.add_section()
    for trial in results["baseline"]:
        cells = [_cell(trial["transfer"]["val"]["metrics"].get(name)) for name in names]
        table.add_row(trial["name"], "no pretraining", *cells, style="cyan")
    return table


def _metric_names(results: Mapping[str, Any]) -> list[str]:
    """The tasks' main metrics, the objective first; what else they yield is in MLflow and results.json."""
    main = {name for spec in TASKS.values() for name in spec.metrics}
    known = [name for name in results["baseline"][0]["transfer"]["val"]["metrics"] if name in main]
    return [results["objective"], *[name for name in known if name != results["objective"]]]


def _heading(name: str) -> str:
    """A metric's name on as many lines as keep its column narrow."""
    return name.replace("/", "/\n").replace("_acc", "").replace("way_", "way\n")


def _parameters(trial: Mapping[str, Any]) -> str:
    values = trial["sampled"]
    shown = {short: values[k] for k, short in SHOWN.items() if k in values}
    text = " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    return f"{text} [yellow]collapsed[/yellow]".strip() if trial.get("collapsed") else text


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return ""
    text = f"{metric['value']:.2f}"
    return text if metric.get("ci95") is None else f"{text}±{metric['ci95']:.2f}"


def _test_table(results: Mapping[str, Any]) -> Table:
    """Rows: the winner (its own checkpoint), its retrained seeds, random initialisation; on the test split."""
    table = Table(title="Test split: novel classes and held-out images, not seen by any choice above")
    table.title_justify = "left"
    table.add_column("model", no_wrap=True)
    names = _metric_names(results)
    for name in names:
        table.add_column(_heading(name), justify="right", no_wrap=True)
    best = results["best"]
    table.add_row(f"{best['name']} (winner)", *[_cell(results["test"]["metrics"][n]) for n in names], style="bold")
    if results.get("confirm"):
        rows = results["confirm"]
        table.add_row(f"{best['method']}, {len(rows)} new seeds", *_over_seeds(rows, names), style="bold")
    rows = results["baseline"]
    label = "random init" if len(rows) == 1 else f"random init, {len(rows)} seeds"
    if len(rows) == 1:
        cells = [_cell(rows[0]["transfer"]["test"]["metrics"].get(n)) for n in names]
    else:
        cells = _over_seeds(rows, names)
    table.add_row(label, *cells, style="cyan")
    table.caption = "± half width of the 95 % interval: over tasks or images in one model, over seeds (t) in several"
    return table


def _over_seeds(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        mean, half = mean_interval([row["transfer"]["test"]["metrics"][name]["value"] for row in rows])
        cells.append(_cell({"value": mean, "ci95": half}))
    return cells


def save_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Objective of every finished trial beside the baseline, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    finished = [t for t in results["trials"] if t["outcome"] == "finished"]
    if not finished:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    objective = results["objective"]
    finished.sort(key=lambda t: t["objective"])
    metrics = [t["transfer"]["val"]["metrics"][objective] for t in finished]
    methods = sorted({t["method"] for t in results["trials"]})
    colours = {m: plt.get_cmap("tab10")(i % 10) for i, m in enumerate(methods)}
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(finished) + 1.6), layout="constrained")
    for trial, metric in zip(finished, metrics, strict=True):
        axis.errorbar(
            metric["value"], trial["name"], xerr=metric["ci95"], fmt="o", color=colours[trial["method"]], capsize=3
        )
    axis.margins(y=0.5 / len(finished))
    for trial in results["baseline"]:
        value = trial["transfer"]["val"]["metrics"][objective]["value"]
        axis.axvline(value, color="black", linestyle="--", label="random initialisation")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[:1], labels[:1], loc="best")
    axis.set_xlabel(f"{objective} on validation data (95 % interval)")
    path = folder / "objective_by_trial.png"
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return [path]
