"""The comparison as Markdown, as a table in the terminal, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from rayjobs.comparison import Column, column_groups, grouped_reasons, heading, marks
from rayjobs.orderings import judge_all, orderings_markdown, orderings_summary, samples_of
from search_spaces.single_method import PUBLISHED

__all__ = [
    "LABELS",
    "MARKS_LEGEND",
    "cell_texts",
    "markdown",
    "markdown_tables",
    "metrics_legend",
    "print_comparison",
    "print_tables",
    "save_plot",
]

LABELS = {"random_init": "random init", "random_init_lab": "random init (L and ab encoders)"}
TIED = "†"
UNLIMITED = 10_000  # characters: to ask how wide a table wants to be
MARKS_LEGEND = (
    "Bold: the best mean of a column. †: not significantly worse (Welch's t-test over seeds against the best, "
    "two-sided, p > 0.05 after Holm's correction over the rows). One seed: no test, no †."
)
BOLD = "[bold]{}[/bold]"  # rich's markup; the texts are numbers and our own notes, without brackets
Results = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


def markdown(results: Results, plot: str = "") -> str:
    """The whole report; ``plot`` is the path of the picture relative to the file, if it shows one."""
    parts = [
        f"# {results['name']}: every method with the same budget",
        f"```\n{results['command']}\n```",
        _facts(results),
        markdown_tables(results["rows"], _columns(results)),
        _legend(results),
        f"![{_objective(results).heading} by method]({plot})" if plot else "",
        _orderings(results),
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
    """The stored metrics under today's headings."""
    return [Column(c["metric"], heading(c["metric"]), c["sign"]) for c in results["columns"]]


def _objective(results: Results) -> Column:
    return next(column for column in _columns(results) if column.metric == results["objective"])


def _label(row: Mapping[str, Any]) -> str:
    name: str = row["name"]
    return LABELS.get(name, name)


def cell_texts(rows: Rows, column: Column) -> list[str]:
    """``61.20 ± 0.75`` and the mark of a tie, one text per row; three decimals where the whole column is below 1."""
    cells = [row["cells"].get(column.metric) for row in rows]
    found = marks(rows, column)
    digits = 2 if any(abs(cell["mean"]) >= 1 for cell in cells if cell) else 3
    texts = []
    for row, cell in zip(rows, cells, strict=True):
        text = "" if cell is None else f"{cell['mean']:.{digits}f}"
        text += "" if cell is None or cell["ci95"] is None else f" ± {cell['ci95']:.{digits}f}"
        texts.append(text + TIED if found.get(row["name"]) == "tied" else text)
    return texts


def _lines(rows: Rows, columns: Sequence[Column], bold: str, with_rest: bool) -> list[list[str]]:
    """The cells of each row as text, the best of a column within ``bold`` ("**{}**"); then speed and note."""
    across = []
    for column in columns:
        found = marks(rows, column)
        texts = zip(cell_texts(rows, column), rows, strict=True)
        across.append([bold.format(text) if found.get(row["name"]) == "best" else text for text, row in texts])
    if with_rest:
        speeds = [row["images_per_second"] for row in rows]
        across.append([f"{speed['mean']:,.0f}" if speed else "" for speed in speeds])
        across.append([", ".join(row["notes"]) for row in rows])
    return [list(line) for line in zip(*across, strict=True)]


def markdown_tables(rows: Rows, columns: Sequence[Column]) -> str:
    """The rows in one table, or in one per group of columns; speed and notes stand in the first."""
    parts = []
    for title, group in column_groups(columns):
        is_first = not parts
        headings = [column.heading for column in group] + (["images/s", "note"] if is_first else [])
        lines = [f"{title}:\n"] if title else []
        lines.append("| method | " + " | ".join(headings) + " |")
        lines.append("|---|" + "---:|" * len(group) + ("---:|---|" if is_first else ""))
        for row, texts in zip(rows, _lines(rows, group, "**{}**", is_first), strict=True):
            lines.append(f"| {_label(row)} | " + " | ".join(texts) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def metrics_legend(columns: Sequence[Column], phase: str = "test") -> str:
    """What the columns hold, in one paragraph."""
    tasks = {column.metric.split("/")[0] for column in columns}
    classes = "novel classes, which no training and no choice saw" if phase == "test" else "classes kept for validation"
    images = f"{'test' if phase == 'test' else 'validation'} images of the pretraining classes"
    told = [
        ({"few_shot"}, f"few-shot accuracy (%) on {classes}"),
        ({"few_shot_rfs"}, "5 copies: the same with five augmented copies of each support image"),
        ({"few_shot_finetune"}, "SGD: the same with a linear classifier trained on each task"),
        ({"concept_generalization"}, "concept gen.: accuracy (%) of logistic regression among those classes"),
        ({"linear", "knn"}, f"linear and kNN accuracy (%) on {images}"),
        ({"linear_readoff"}, "read-off with views: a linear layer trained on augmented views, the same images"),
        ({"few_shot_finetune"}, "base classes: as linear top-1, the base accuracy of few-shot papers"),
        (
            {"entropy", "uniformity"},
            "H_R, representation entropy, and U, uniformity of unit-length features, of the pretraining images: larger "
            "is more spread, which is not by itself better",
        ),
        ({"alignment"}, "alignment, squared distance of two views of an image (or images of a class) on the sphere"),
        (
            {"class_geometry"},
            "φ, distance between classes over spread within them; Π, how evenly new classes mix with old ones (1: "
            "perfectly); R, mean absolute correlation of two features",
        ),
        ({"feature_plots"}, "silhouette of the unseen classes, -1 to 1"),
        (
            {"cam"},
            "CAM area, share of pixels above half of a class activation map's range; CAM entropy, of the map as a "
            "distribution over pixels; CAM mass, share of the map in its highest tenth of pixels",
        ),
    ]
    parts = [text for names, text in told if names & tasks]
    return f"After the last epoch: {'; '.join(parts)}." if parts else ""


def _legend(results: Results) -> str:
    """What the numbers are and how the marks and notes are decided."""
    sentences = [
        f"± is the half width of the 95 % t-interval over {len(results['seeds'])} seeds.",
        MARKS_LEGEND,
        metrics_legend(_columns(results)),
    ]
    if _objective(results).sign:
        judged = _objective(results).heading
        sentences.append(
            f"Notes compare {judged} with the untrained backbone of the same kind and seeds: below random init = the "
            "interval lies entirely on its worse side, not separated = the two intervals meet."
        )
    sentences.append("images/s: training speed in the last epoch, beside the other runs on the machine.")
    return " ".join(sentence for sentence in sentences if sentence)


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


def _orderings(results: Results) -> str:
    text = orderings_markdown(judge_all(samples_of(results["runs"])))
    return f"## The papers' orderings\n\n{text}" if text else ""


def print_comparison(results: Results, console: Console) -> None:
    """The table, for the terminal."""
    print_tables(
        results["rows"], _columns(results), "Test data, mean ± 95 % t-interval over seeds", console, with_seeds=False
    )
    console.print(f"[dim]{len(results['seeds'])} seeds each. {MARKS_LEGEND}[/dim]")
    judged = judge_all(samples_of(results["runs"]))
    if judged:
        console.print(f"[dim]The papers' orderings. {orderings_summary(judged)}[/dim]")
    failed = [run for run in results["runs"] if run["outcome"] != "finished"]
    for run in failed:
        console.print(f"[red]{run['name']} {run['outcome']}[/red]: {escape(str(run['error']))}", soft_wrap=True)


def print_tables(rows: Rows, columns: Sequence[Column], title: str, console: Console, with_seeds: bool = True) -> None:
    """The rows in one table, or in one per group of columns, for the terminal; speed and notes stand in the first.

    Args:
        rows: as ``build_row`` makes them.
        columns: the metrics.
        title: stands above the first table.
        console: the terminal; where it is too narrow for the notes they follow as lines.
        with_seeds: show each row's number of finished runs.
    """
    for i, (part, group) in enumerate(column_groups(columns)):
        heads = [title if i == 0 else "", part]
        table = _terminal_table(rows, group, ". ".join(filter(None, heads)), with_seeds, i == 0, with_notes=i == 0)
        is_wide = Measurement.get(console, console.options.update_width(UNLIMITED), table).maximum > console.width
        if i == 0 and is_wide:
            table = _terminal_table(rows, group, ". ".join(filter(None, heads)), with_seeds, True, with_notes=False)
        console.print()
        console.print(table)
        if i == 0 and is_wide:
            _print_notes(rows, console)


def _terminal_table(
    rows: Rows, group: Sequence[Column], title: str, with_seeds: bool, with_speed: bool, with_notes: bool
) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in group:
        table.add_column(column.heading.replace("way ", "way\n"), justify="right", no_wrap=True)
    for name in (["seeds"] if with_seeds else []) + (["images/s"] if with_speed else []):
        table.add_column(name, justify="right", no_wrap=True)
    if with_notes:
        table.add_column("note", no_wrap=True)
    for row, texts in zip(rows, _lines(rows, group, BOLD, with_speed), strict=True):
        seeds = [str(row["finished"])] if with_seeds else []
        cells = texts[: len(group)] + seeds + texts[len(group) :]
        shown = cells if with_notes or not with_speed else cells[:-1]
        table.add_row(_label(row), *shown, style="cyan" if row["is_baseline"] else "")
    return table


def _print_notes(rows: Rows, console: Console) -> None:
    """Each note once, with the rows that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for note in row["notes"]:
            about.setdefault(note, []).append(_label(row))
    for note, names in about.items():
        console.print(f"{note}: {', '.join(names)}", markup=False)


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
