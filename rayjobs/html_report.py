"""An experiment as one HTML file that needs no network: style, scripts, plotly.js and pictures are inside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rayjobs.comparison import Column, column_groups, heading, marks
from rayjobs.comparison_report import LABELS, cell_texts
from rayjobs.experiment_runs import Experiment, ExperimentRun
from rayjobs.html_style import SCRIPT, STYLE
from rayjobs.orderings import HEADINGS, LEGEND, Judged, orderings_rows, orderings_summary
from rayjobs.report_figures import (
    Figure,
    accuracy_by_compute,
    curves,
    importance,
    objective_values,
    parallel_coordinates,
    swept,
    values_by_row,
)

if TYPE_CHECKING:
    from rayjobs.experiment_report import ExperimentReport
    from rayjobs.experiment_tables import ResultTable

__all__ = ["html_page"]

# The browser itself then refuses whatever would go over the network. plotly's WebGL figures compile functions.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
NO_PICTURES = ("checkpoint", "report", "plots")  # folders; "plots" holds what the page draws itself
MOST_PICTURES = 60
LARGEST_PICTURE = 1_200_000  # bytes; larger ones are scaled down
WIDEST_PICTURE = 1600  # pixels, of one that is scaled down
FAILED = ("diverged", "crashed", "interrupted")


def html_page(report: ExperimentReport) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    page = _Page()
    sections = [
        ("Results", _results(page, report)),
        ("The papers' orderings", _orderings(report.judged)),
        ("Hyperparameters", _hyperparameters(page, report)),
        ("Accuracy against compute", _compute(page, report)),
        ("Training curves", _curves(page, report)),
        ("Pictures", _pictures(report.experiment)),
        ("All runs", _all_runs(report)),
        ("Failed runs", _failures(report.experiment)),
        ("Protocol", _protocol(report.protocol)),
    ]
    shown = [(title, body) for title, body in sections if body]
    links = "".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, _ in shown)
    bodies = "".join(f'<section><h2 id="{_anchor(t)}">{escape(t)}</h2>{body}</section>' for t, body in shown)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.facts)
    name = escape(report.experiment.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><header><h1>{name}</h1><dl>{facts}</dl><nav>{links}</nav></header>"
        f"<main>{bodies}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-").replace("'", "")


class _Page:
    """Numbers the figures."""

    def __init__(self) -> None:
        self._count = 0

    def figure(self, figure: Figure, title: str = "") -> str:
        """A figure with its caption, or the caption alone where it says why there is none."""
        head = f"<h3>{escape(title)}</h3>" if title else ""
        caption = f'<p class="caption">{escape(figure.caption)}</p>' if figure.caption else ""
        if figure.data is None:
            return head + caption
        self._count += 1
        name = f"plot-{self._count}"
        data = json.dumps(figure.data).replace("</", "<\\/")
        return (
            f'<div>{head}<div class="plot" id="{name}" style="height:{figure.height}px"></div>'
            f'<script type="application/json" id="{name}-data">{data}</script>{caption}</div>'
        )


def _table(headings: Sequence[str], rows: Sequence[str], text_columns: Sequence[int] = (0,)) -> str:
    """A sortable table; ``text_columns`` are the columns that hold text."""
    head = "".join(
        f'<th scope="col"{" class=text" if i in text_columns else ""}><button>{escape(heading)}</button></th>'
        for i, heading in enumerate(headings)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(text: str, value: float | None = None, kind: str = "") -> str:
    number = "" if value is None else f' data-value="{value!r}"'
    return f"<td{number}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</td>"


def _results(page: _Page, report: ExperimentReport) -> str:
    if not report.tables:
        return "<p>No run with downstream metrics has finished yet.</p>"
    parts = []
    for table in report.tables:
        parts.append(f"<h3>{escape(table.title)}</h3>")
        for title, columns in column_groups(table.columns):
            parts.append(f"<p>{escape(title)}</p>" if title else "")
            parts.append(_result_table(table, columns))
        parts.append(f'<p class="legend">{escape(table.legend)}</p>')
        if report.objective is not None and table.phase == report.phase:
            figure = values_by_row(table.rows, report.objective)
            parts.append(page.figure(figure, f"{report.objective.heading} with its interval"))
    return "".join(parts)


def _result_table(table: ResultTable, columns: Sequence[Column]) -> str:
    texts = [cell_texts(table.rows, column) for column in columns]
    found = [marks(table.rows, column) for column in columns]
    lines = []
    for i, row in enumerate(table.rows):
        name: str = row["name"]
        cells = [_cell(LABELS.get(name, name))]
        for column, text, mark in zip(columns, texts, found, strict=True):
            number = (row["cells"].get(column.metric) or {}).get("mean")
            cells.append(_cell(text[i], number, "best" if mark.get(name) == "best" else ""))
        speed = (row["images_per_second"] or {}).get("mean")
        cells += [_cell(str(row["finished"])), _cell("" if speed is None else f"{speed:,.0f}", speed)]
        cells.append(_cell(", ".join(row["notes"]), kind="text wrap"))
        lines.append(f"<tr{' class=baseline' if row['is_baseline'] else ''}>{''.join(cells)}</tr>")
    headings = ["method", *(column.heading for column in columns), "seeds", "images/s", "note"]
    return _table(headings, lines, (0, len(headings) - 1))


def _orderings(judged: Sequence[Judged]) -> str:
    if not judged:
        return ""
    lines = []
    for row, item in zip(orderings_rows(judged), judged, strict=True):
        claim, source, published, measured, verdict = row
        cells = [_cell(claim, kind="text wrap long"), _cell(source, kind="text"), _cell(published)]
        cells += [_cell(measured, item.found.mean), _cell(verdict, kind=f"text {verdict}")]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = _table(HEADINGS, lines, (0, 1, 4))
    return f'<p>{escape(orderings_summary(judged))}</p>{table}<p class="legend">{escape(LEGEND)}</p>'


def _judged_runs(report: ExperimentReport) -> list[ExperimentRun]:
    """The runs that the figures show: a sweep's trials, else all that were trained or evaluated."""
    kinds = ("trial",) if report.experiment.kind == "sweep" else ("run", "evaluate", "pretrain")
    return report.experiment.of_kind(*kinds)


def _hyperparameters(page: _Page, report: ExperimentReport) -> str:
    if report.objective is None:
        return ""
    if report.experiment.kind == "comparison":
        return "<p>Every method has one setting here, so there is nothing to choose from. A sweep varies them.</p>"
    runs = _judged_runs(report)
    parallel = parallel_coordinates(runs, report.objective, report.phase)
    weights = importance(runs, report.objective, report.phase)
    return page.figure(parallel, "Parallel coordinates") + page.figure(weights, "Importance")


def _compute(page: _Page, report: ExperimentReport) -> str:
    if report.objective is None:
        return ""
    return page.figure(accuracy_by_compute(_judged_runs(report), report.objective, report.phase))


def _curves(page: _Page, report: ExperimentReport) -> str:
    runs = _judged_runs(report)
    probes = dict.fromkeys(name for run in runs for name in run.curves if name.startswith("probe/"))
    found = {
        "Pretext loss": ("pretext/loss", "pretext loss", True),
        "Feature spread: about 1 is healthy, 0 collapsed": ("pretext/feature_spread", "feature spread", False),
    }
    for name in probes:
        metric = heading(name.removeprefix("probe/"))
        found[f"Probe while training: {metric}"] = (name, metric, False)
    known = {title: of for title, of in found.items() if any(run.curves.get(of[0]) for run in runs)}
    if not known:
        return ""
    figures = "".join(page.figure(curves(runs, *of), title) for title, of in known.items())
    note = (
        "A click on a name in a legend hides or shows it, a double click shows it alone. Losses of different methods "
        "have different scales; scaled, those of each method lie between its lowest (0) and its highest (1)."
    )
    return f'<p class="caption">{note}</p><div class="pair">{figures}</div>'


def _pictures(experiment: Experiment) -> str:
    """PNG artifacts: all of the runs that hold others together, and those of one run per method."""
    shared = [run for run in (experiment.parent, *experiment.shared) if run is not None]
    one_each = {run.label: run for run in reversed(experiment.runs) if run.outcome == "finished"}
    found: dict[str, list[tuple[ExperimentRun, str]]] = {}
    for run in [*shared, *reversed(one_each.values())]:
        for path in experiment.store.list_files(run.run_id, ".png", NO_PICTURES):
            found.setdefault(path.removeprefix("evaluation_test/"), []).append((run, path))
    parts, count, total = [], 0, sum(len(items) for items in found.values())
    for title, items in found.items():
        figures = []
        for run, path in items:
            if count == MOST_PICTURES:
                break
            with experiment.store.file(run.run_id, path) as file:
                if file is not None:
                    source, caption = _data_uri(file.read_bytes()), escape(run.name)
                    figures.append(
                        f'<figure><img src="{source}" alt="{escape(title)}, {caption}">'
                        f"<figcaption>{caption}</figcaption></figure>"
                    )
                    count += 1
        if figures:
            parts.append(f'<h3>{escape(title)}</h3><div class="pictures">{"".join(figures)}</div>')
    if not parts:
        return ""
    note = "Of the whole experiment, and of the first finished run of each method. A click enlarges."
    note += f" {total - count} further pictures are in MLflow." if total > count else ""
    return f'<p class="caption">{note}</p>' + "".join(parts)


def _data_uri(data: bytes) -> str:
    """A picture inside the page; a large one scaled down."""
    kind = "png"
    if len(data) > LARGEST_PICTURE:
        from PIL import Image

        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((WIDEST_PICTURE, 4 * WIDEST_PICTURE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _all_runs(report: ExperimentReport) -> str:
    """Every run with its objective and the hyperparameters that vary."""
    runs, objective = report.experiment.runs, report.objective
    names = swept(_judged_runs(report))[:8] if report.experiment.kind != "comparison" else []
    values = {} if objective is None else objective_values(runs, objective, report.phase)
    headings = ["run", "kind", "outcome", "seed", *([objective.heading] if objective else []), "minutes", *names]
    lines = []
    for run in runs:
        outcome = f"{run.outcome}, collapsed" if run.tags.get("collapsed") == "true" else run.outcome
        cells = [_cell(run.name), _cell(run.kind, kind="text")]
        cells.append(_cell(outcome, kind=f"text {'failed' if run.outcome in FAILED else ''}".strip()))
        cells.append(_cell(str(run.seed)))
        if objective:
            value = values.get(run.run_id)
            cells.append(_cell("" if value is None else f"{value:.2f}", value))
        cells.append(_cell(f"{run.seconds / 60:.1f}", run.seconds))
        cells += [_cell(_short(run.params.get(name, ""))) for name in names]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _table(headings, lines, (0, 1, 2))


def _short(text: str) -> str:
    """A hyperparameter's value; floats of samplers have many digits."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def _failures(experiment: Experiment) -> str:
    failed = [run for run in experiment.runs if run.outcome in FAILED]
    if not failed:
        return ""
    items = "".join(
        f'<li><strong>{escape(run.name)}</strong> <span class="failed">{run.outcome}</span> {escape(run.error)}</li>'
        for run in failed
    )
    return f"<ul>{items}</ul>"


def _protocol(protocol: Mapping[str, Any]) -> str:
    """How the metrics were computed, as it was stored with them."""
    return "".join(
        f"<details><summary>{escape(phase)} phase</summary><pre>{escape(json.dumps(value, indent=2))}</pre></details>"
        for phase, value in protocol.items()
    )
