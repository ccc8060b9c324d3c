"""The comparison as Markdown, as a table in the terminal, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rayjobs.comparison import Column, best_metrics, grouped_reasons
from rayjobs.trial_log import metric_text
from search_spaces.single_method import PUBLISHED

__all__ = ["markdown", "print_comparison", "save_plot"]

LABELS = {"random_init": "random init", "random_init_lab": "random init (L and ab encoders)"}
Results = Mapping[str, Any]


def markdown(results: Results, plot: str = "") -> str:
    """The whole report; ``plot`` is the path of the picture relative to the file, if it shows one."""
    parts = [
        f"# {results['name']}: every method with the same budget",
        f"```\n{results['command']}\n```",
        _facts(results),
        _markdown_table(results),
        _legend(results),
        f"![{_objective(results).heading} by method]({plot})" if plot else "",
        _changed(results),
        _not_in_the_table(results),
        _published(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(results: Results) -> str:
    """What was trained on what, and where the numbers come from."""
    train, data = results["settings"]["train"], results["data"]
    splits = data["splits"]
    sizes = ", ".join(f"{name} {s['images']:,} images of {s['classes']} classes" for name, s in splits.items())
    seeds = ", ".join(map(str, results["seeds"]))
    last = results["starts"][-1]
    hardware = last["hardware"]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    git = " and ".join(dict.fromkeys(start["git"] for start in results["starts"]))
    machine = f"{_count(hardware['cpus'], 'CPU')} ({hardware['machine']})"
    machine += f" and {_count(hardware['gpus'], 'GPU')}" if hardware["gpus"] else ", no GPU"
    lines = [
        f"Data: `{' '.join(data['source'])}`, fingerprint `{data['fingerprint']}`. Splits: {data['rule']}. "
        f"They hold: {sizes}.",
        f"Training: {train['backbone']} ({train['stem']} stem), {_count(train['epochs'], 'epoch')}, "
        f"batch {train['batch_size']}, {train['image_size']} px, {_count(train['num_workers'], 'worker')} per run, "
        f"seeds {seeds}; each method with its own published loss, views and optimiser.",
        f"Made {results['created'][:10]} in {_duration(results['seconds'])} on {machine}, up to "
        f"{_count(hardware['runs_at_once'], 'run')} at once; code {git}; {versions}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _count(number: float, word: str) -> str:
    return f"{number:g} {word}" if number == 1 else f"{number:g} {word}s"


def _columns(results: Results) -> list[Column]:
    return [Column(**column) for column in results["columns"]]


def _objective(results: Results) -> Column:
    return next(column for column in _columns(results) if column.metric == results["objective"])


def _label(row: Mapping[str, Any]) -> str:
    name: str = row["name"]
    return LABELS.get(name, name)


def _texts(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """A row's numbers and note."""
    cells = [_text(row["cells"][column.metric]) for column in columns]
    speed = row["images_per_second"]
    return [*cells, f"{speed['mean']:,.0f}" if speed else "", ", ".join(row["notes"])]


def _text(cell: Mapping[str, Any] | None) -> str:
    return metric_text({"value": cell["mean"], "ci95": cell["ci95"]}) if cell else ""


def _markdown_table(results: Results) -> str:
    columns, rows = _columns(results), results["rows"]
    best = [best_metrics(rows, column) for column in columns]
    lines = ["| method | " + " | ".join(c.heading for c in columns) + " | images/s | note |"]
    lines.append("|---|" + "---:|" * (len(columns) + 1) + "---|")
    for row in rows:
        texts = _texts(row, columns)
        for i, names in enumerate(best):
            texts[i] = f"**{texts[i]}**" if row["name"] in names else texts[i]
        lines.append(f"| {_label(row)} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _legend(results: Results) -> str:
    """What the numbers are and how the notes are decided."""
    metrics = {column.metric for column in _columns(results)}
    sentences = [
        f"± is the half width of the 95 % t-interval over {len(results['seeds'])} seeds.",
        "Bold: the best mean of a column, and every mean whose interval meets the best one's.",
        "After the last epoch:",
    ]
    if any(m.startswith("few_shot/") for m in metrics):
        sentences.append("few-shot accuracy (%) on novel classes, which no training and no choice saw;")
    if metrics & {"linear/top1", "knn/top1"}:
        sentences.append("linear and kNN accuracy (%) on test images of the pretraining classes;")
    if "entropy/h_r" in metrics:
        sentences.append("H_R, representation entropy, and U, uniformity of unit-length features, of the pretraining")
        sentences.append("images: larger is more spread, which is not by itself better.")
    text = " ".join(sentences).removesuffix(";") + ("." if sentences[-1].endswith(";") else "")
    if _objective(results).sign:
        heading = _objective(results).heading
        text += (
            f" Notes compare {heading} with the untrained backbone of the same kind and seeds: below random init = the "
            "interval lies entirely on its worse side, not separated = the two intervals meet."
        )
    return f"{text} images/s: training speed in the last epoch, beside the other runs on the machine."


def _changed(results: Results) -> str:
    """Settings that are not the paper's, so that nobody takes the row for the published method."""
    lines = []
    for name, method in results["methods"].items():
        changes = [f"{key} {_number(a)} → {_number(b)}" for key, (a, b) in method["changed"].items()]
        lines += [f"- {name}: {', '.join(changes)}"] if changes else []
    if not lines:
        return ""
    return "Settings that differ from the papers', so that they fit this data and length:\n\n" + "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _not_in_the_table(results: Results) -> str:
    """Methods that could not run, and runs that failed, with the reason."""
    lines = [f"- left out, {names}: {reason}" for names, reason in grouped_reasons(results["left_out"])]
    for run in results["runs"]:
        if run["outcome"] != "finished":
            lines.append(f"- {run['name']} {run['outcome']}: {run['error']}")
    return "Not in the means:\n\n" + "\n".join(lines) if lines else ""


def _published(results: Results) -> str:
    lines = []
    for name in results["methods"]:
        if PUBLISHED.get(name):
            lines.append(f"- {name}: " + ", ".join(f"{value:g} ({what})" for what, value in PUBLISHED[name].items()))
    if not lines:
        return ""
    head = (
        "Published, for orientation only: linear top-1 (%) on ImageNet of a ResNet-50 after 200 epochs unless stated "
        "(sources: search_spaces/single_method.py). Other data and another scale: not comparable with the table.\n\n"
    )
    return head + "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{timedelta(seconds=round(seconds))} h"


def print_comparison(results: Results, console: Console) -> None:
    """The table, for the terminal."""
    columns, rows = _columns(results), results["rows"]
    best = [best_metrics(rows, column) for column in columns]
    table = Table(title="Test data, mean ± 95 % t-interval over seeds", title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in [*(column.heading for column in columns), "images/s"]:
        table.add_column(heading.replace("way ", "way\n"), justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in rows:
        texts = [escape(text) for text in _texts(row, columns)]
        for i, names in enumerate(best):
            texts[i] = f"[bold]{texts[i]}[/bold]" if row["name"] in names else texts[i]
        table.add_row(_label(row), *texts, style="cyan" if row["is_baseline"] else "")
    console.print()
    console.print(table)
    console.print(f"[dim]{len(results['seeds'])} seeds each. Bold: best, or its interval meets the best one's.[/dim]")
    failed = [run for run in results["runs"] if run["outcome"] != "finished"]
    for run in failed:
        console.print(f"[red]{run['name']} {run['outcome']}[/red]: {escape(str(run['error']))}", soft_wrap=True)


def save_plot(results: Results, folder: Path) -> Path | None:
    """The judged metric by method, sorted, with intervals; None when no run of any method finished."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    objective = _objective(results)
    known = [row for row in results["rows"] if row["cells"][objective.metric]]
    if all(row["is_baseline"] for row in known):
        return None
    known.sort(key=lambda row: (objective.sign or 1) * row["cells"][objective.metric]["mean"])
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(known) + 1.6), layout="constrained")
    for row in known:
        cell = row["cells"][objective.metric]
        style: dict[str, Any] = {"color": "black", "fmt": "s"} if row["is_baseline"] else {"color": "C0", "fmt": "o"}
        if "collapsed" in row["notes"]:
            style["markerfacecolor"] = "white"
        axis.errorbar(cell["mean"], _tick(row), xerr=cell["ci95"], capsize=3, **style)
        if row["name"] == "random_init":
            half = cell["ci95"] or 0.0
            axis.axvspan(cell["mean"] - half, cell["mean"] + half, color="black", alpha=0.12, linewidth=0)
    axis.margins(y=0.5 / len(known))
    train = results["settings"]["train"]
    axis.set_xlabel(f"{objective.heading} on test data (mean and 95 % t-interval over {len(results['seeds'])} seeds)")
    axis.set_title(
        f"{train['backbone']}, {_count(train['epochs'], 'epoch')}, {train['image_size']} px", fontsize="medium"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{objective.metric.replace('/', '_')}.png"
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def _tick(row: Mapping[str, Any]) -> str:
    return f"{_label(row)} (collapsed)" if "collapsed" in row["notes"] else _label(row)
