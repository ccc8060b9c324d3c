"""The figures of an experiment's page, as plotly figures without colours of their own background (the page has a light
and a dark one).

Each function returns a figure as JSON-ready data, or says in one sentence why there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayjobs.comparison import Column
from rayjobs.comparison_report import LABELS
from rayjobs.experiment_runs import NOT_SETTINGS, ExperimentRun
from search_spaces.parameters import OWN_CHOICES, OWN_RANGES

__all__ = [
    "Figure",
    "accuracy_by_compute",
    "curves",
    "importance",
    "objective_values",
    "parallel_coordinates",
    "swept",
    "values_by_row",
]

# Distinct on white and on near-black; methods beyond the tenth repeat them with another marker and dash.
COLOURS = (
    *("#4c9be8", "#f28e2b", "#3fa65a", "#e15759", "#a07be0"),
    *("#b08968", "#e377c2", "#8c8c8c", "#b5a900", "#17a2b8"),
)
SYMBOLS, DASHES = ("circle", "square", "diamond"), ("solid", "dash", "dot")
SWEPT = ("learning_rate", "warmup_epochs", "temperature", "queue_size", "momentum", "projector_depth")
LEGEND_LINE = 20  # pixels
MOST_AXES = 9
LEAST_TRIALS = 4  # for an importance
MOST_NAMED_RUNS = 24  # legend entries of single runs; beyond, one entry per method


@dataclass(frozen=True)
class Figure:
    """A plotly figure, or the reason why there is none.

    Attributes:
        data: ``{"data": [...], "layout": {...}}``; None without a figure.
        caption: what it shows; or why it is not there.
        height: pixels.
    """

    data: dict[str, Any] | None
    caption: str
    height: int = 420


def _styles(runs: Sequence[ExperimentRun]) -> dict[str, tuple[str, str, str]]:
    """Method -> colour, marker and dash, in the order of first appearance."""
    labels = dict.fromkeys(run.label for run in runs)
    count = len(COLOURS)
    return {
        label: (COLOURS[i % count], SYMBOLS[i // count % 3], DASHES[i // count % 3]) for i, label in enumerate(labels)
    }


def values_by_row(rows: Sequence[Mapping[str, Any]], column: Column) -> Figure:
    """A metric of every row with its interval, best on top."""
    known = [row for row in rows if row["cells"].get(column.metric)]
    if not known:
        return Figure(None, f"No row has {column.heading}.")
    known.sort(key=lambda row: (column.sign or 1) * row["cells"][column.metric]["mean"])
    cells = [row["cells"][column.metric] for row in known]
    half = [cell["ci95"] or 0 for cell in cells]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [cell["mean"] for cell in cells],
        "y": [LABELS.get(row["name"], row["name"]) for row in known],
        "error_x": {"type": "data", "array": half, "thickness": 1.5, "width": 4, "color": "#8c8c8c"},
        "marker": {"size": 9, "color": ["#8c8c8c" if row["is_baseline"] else COLOURS[0] for row in known]},
        "hovertemplate": "%{y}: %{x:.2f}<extra></extra>",
    }
    layout = {"xaxis": {"title": {"text": column.heading}}, "yaxis": {"automargin": True}, "showlegend": False}
    return Figure({"data": [trace], "layout": layout}, "", 110 + 24 * len(known))


def objective_values(runs: Sequence[ExperimentRun], objective: Column, phase: str) -> dict[str, float]:
    """Run id -> objective, of the runs that have it."""
    found = {run.run_id: run.downstream(phase).get(objective.metric) for run in runs if run.outcome == "finished"}
    return {run_id: metric["value"] for run_id, metric in found.items() if metric and metric["value"] is not None}


def swept(runs: Sequence[ExperimentRun]) -> list[str]:
    """Hyperparameters that vary: within a method, or across methods where the search spaces know them."""
    known = {*SWEPT, *OWN_RANGES, *OWN_CHOICES}
    names = dict.fromkeys([*SWEPT, *(name for run in runs for name in run.params)])
    by_label: dict[str, list[ExperimentRun]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)

    def varies(name: str, members: Sequence[ExperimentRun]) -> bool:
        return len({run.params[name] for run in members if name in run.params}) > 1

    def counts(name: str) -> bool:
        within = any(varies(name, members) for members in by_label.values())
        return within or (name in known and varies(name, runs))

    skipped = {"method", *NOT_SETTINGS}
    return [name for name in names if name not in skipped and not name.startswith("data_") and counts(name)]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_logarithmic(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) >= 10 * min(numbers)


def _axis(name: str, texts: Sequence[str | None]) -> dict[str, Any]:
    """One axis of the parallel coordinates; "none" below the others holds runs whose method lacks the parameter."""
    numbers = [None if text is None else _number(text) for text in texts]
    known = [number for number in numbers if number is not None]
    is_numeric = len(known) == sum(text is not None for text in texts) and len(set(known)) > 4
    if not is_numeric:
        options = sorted(
            {text for text in texts if text is not None}, key=lambda t: (_number(t) is None, _number(t), t)
        )
        places = {option: i for i, option in enumerate(options)}
        values = [-1.0 if text is None else float(places[text]) for text in texts]
        ticks = {float(i): option for option, i in places.items()}
    else:
        is_log = _is_logarithmic(known)
        scaled = [None if n is None else math.log10(n) if is_log else n for n in numbers]
        low, high = (pick(s for s in scaled if s is not None) for pick in (min, max))
        values = [low - 0.15 * (high - low) if s is None else s for s in scaled]
        steps = [low + (high - low) * i / 4 for i in range(5)]
        ticks = {step: f"{10**step if is_log else step:.3g}" for step in steps}
    if None in texts:
        ticks[min(values)] = "none"
    return {"label": name, "values": values, "tickvals": list(ticks), "ticktext": list(ticks.values())}


def parallel_coordinates(runs: Sequence[ExperimentRun], objective: Column, phase: str) -> Figure:
    """Hyperparameters of the finished runs, coloured by the objective."""
    values = objective_values(runs, objective, phase)
    finished = [run for run in runs if run.run_id in values]
    names = swept(finished)[:MOST_AXES]
    if len(finished) < 2 or not names:
        return Figure(None, "Parallel coordinates need two finished runs whose hyperparameters differ.")
    dimensions = [_axis(name, [run.params.get(name) for run in finished]) for name in names]
    if len({run.label for run in finished}) > 1:
        dimensions.insert(0, _axis("method", [run.label for run in finished]))
    colours = [values[run.run_id] for run in finished]
    dimensions.append({"label": objective.heading, "values": colours})
    line = {"color": colours, "colorscale": "Viridis", "showscale": True, "reversescale": objective.sign < 0}
    line["colorbar"] = {"title": {"text": objective.heading}, "thickness": 12, "x": 1.04}
    trace = {"type": "parcoords", "dimensions": dimensions, "line": line, "labelangle": -20, "labelside": "top"}
    layout = {"margin": {"l": 130, "r": 70, "t": 90, "b": 30}}
    caption = (
        "One line per finished run. Drag along an axis to select, drag an axis to move it. Logarithmic where a value "
        'varies tenfold; "none": the method does not have this parameter.'
    )
    return Figure({"data": [trace], "layout": layout}, caption, 460)


def importance(runs: Sequence[ExperimentRun], objective: Column, phase: str) -> Figure:
    """Optuna's fANOVA importance of every hyperparameter that varies, per method and over all methods."""
    values = objective_values(runs, objective, phase)
    finished = [run for run in runs if run.run_id in values]
    groups = {label: [run for run in finished if run.label == label] for label in {run.label: None for run in finished}}
    if len(groups) > 1:
        groups = {"all methods": finished, **groups}
    traces, skipped = [], []
    for i, (label, members) in enumerate(groups.items()):
        found = _importances(members, [values[run.run_id] for run in members], label == "all methods")
        if isinstance(found, str):
            skipped.append(f"{label}: {found}")
            continue
        name = f"{label} ({len(members)} trials)"
        shown = dict(sorted(found.items(), key=lambda item: item[1]))
        colour = COLOURS[i % len(COLOURS)]
        traces.append(
            {"type": "bar", "orientation": "h", "x": list(shown.values()), "y": list(shown), "name": name}
            | {"marker": {"color": colour}, "hovertemplate": "%{y}: %{x:.2f}<extra>" + name + "</extra>"}
        )
    reasons = f"Not shown: {'; '.join(skipped)}." if skipped else ""
    if not traces:
        return Figure(None, reasons or "No finished run.")
    layout = {"barmode": "group", "xaxis": {"title": {"text": "share of the objective's variance"}}}
    layout["yaxis"] = {"automargin": True}
    bars = sum(len(trace["y"]) for trace in traces)
    caption = (
        f"Share of the variance of {objective.heading} that a parameter explains alone (fANOVA: a random forest fitted "
        f"to the finished trials, so rough below some twenty of them). {reasons}"
    )
    return Figure({"data": traces, "layout": layout}, caption, 150 + 26 * bars)


def _importances(runs: Sequence[ExperimentRun], values: Sequence[float], with_method: bool) -> dict[str, float] | str:
    """Parameter -> importance, or why there is none."""
    if len(runs) < LEAST_TRIALS:
        return f"{len(runs)} finished, at least {LEAST_TRIALS} are needed"
    if max(values) == min(values):
        return "the objective does not vary"
    names = [name for name in swept(runs) if all(name in run.params for run in runs)]
    columns = {name: [run.params[name] for run in runs] for name in names}
    columns |= {"method": [run.label for run in runs]} if with_method else {}
    columns = {name: texts for name, texts in columns.items() if len(set(texts)) > 1}
    if not columns:
        return "no hyperparameter varies"
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    spaces, points = {}, {}
    for name, texts in columns.items():
        spaces[name], points[name] = _distribution(texts)
    for i, value in enumerate(values):
        params = {name: point[i] for name, point in points.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _distribution(texts: Sequence[str]) -> tuple[Any, list[Any]]:
    """An Optuna distribution that holds the values, and the values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    numbers = [number for text in texts if (number := _number(text)) is not None]
    if len(numbers) < len(texts):
        return CategoricalDistribution(sorted(set(texts))), list(texts)
    return FloatDistribution(min(numbers), max(numbers), log=_is_logarithmic(numbers)), numbers


def accuracy_by_compute(runs: Sequence[ExperimentRun], objective: Column, phase: str) -> Figure:
    """Objective of every trained run against its time, or against the images that it has seen."""
    values = objective_values(runs, objective, phase)
    trained = [run for run in runs if run.run_id in values and run.device_seconds > 0]
    if not trained:
        return Figure(None, "No finished run has logged the time of its epochs.")
    unit = "GPU" if trained[0].uses_gpu else "CPU core"
    traces, times, seen = [], [], []
    for label, (colour, symbol, _) in _styles(runs).items():
        members = [run for run in trained if run.label == label]
        if not members:
            continue
        times.append([run.device_seconds for run in members])
        seen.append([run.images_seen for run in members])
        half = [run.downstream(phase)[objective.metric]["ci95"] or 0 for run in members]
        trace = {"type": "scatter", "mode": "markers", "name": label, "x": times[-1]}
        trace |= {"y": [values[run.run_id] for run in members], "text": [run.name for run in members]}
        trace |= {"marker": {"color": colour, "symbol": symbol, "size": 9}}
        trace["error_y"] = {"type": "data", "array": half, "thickness": 1, "width": 0, "color": colour}
        trace["hovertemplate"] = "%{text}: %{y:.2f} at %{x:,.0f}<extra></extra>"
        traces.append(trace)
    titles = [f"training time ({unit} seconds)", "images seen in training"]
    layout = {
        "xaxis": {"title": {"text": titles[0]}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": objective.heading}},
        "updatemenus": _buttons("x", {"time": (times, titles[0]), "images": (seen, titles[1])}),
    }
    caption = (
        "One point per run, bars: its interval over tasks or images. Time: training steps only, times GPUs (or CPU "
        "cores), beside whatever else ran on the machine."
    )
    return Figure({"data": traces, "layout": layout}, caption, 440 + LEGEND_LINE * max(0, len(traces) - 16))


def curves(runs: Sequence[ExperimentRun], metric: str, title: str, is_scaled: bool = False) -> Figure:
    """A metric by epoch, one line per run; many runs share one legend entry per method.

    Args:
        runs: the runs; those without the metric are left out.
        metric: name of the curve.
        title: of the vertical axis.
        is_scaled: show each method's curves between its own lowest and highest value, with a button for the values.
    """
    known = [run for run in runs if run.curves.get(metric)]
    if not known:
        return Figure(None, f"No run has logged {title}.")
    styles, traces, named = _styles(runs), [], set()
    is_grouped = len(known) > MOST_NAMED_RUNS
    for run in known:
        colour, symbol, dash = styles[run.label]
        points = run.curves[metric]
        trace = {"type": "scatter", "mode": "lines+markers", "name": run.label if is_grouped else run.name}
        trace |= {"x": [epoch for epoch, _ in points], "y": [value for _, value in points], "text": run.name}
        trace |= {"line": {"color": colour, "dash": dash, "width": 1.5}}
        trace |= {"marker": {"color": colour, "symbol": symbol, "size": 5}}
        trace["hovertemplate"] = f"{run.name}, epoch %{{x}}: %{{y:.3f}}<extra></extra>"
        if is_grouped:
            trace |= {"legendgroup": run.label, "showlegend": run.label not in named}
        named.add(run.label)
        traces.append(trace)
    layout: dict[str, Any] = {"xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero"}}
    layout["yaxis"] = {"title": {"text": title}}
    if is_scaled:
        plain, scaled = [trace["y"] for trace in traces], _scaled(known, metric)
        for trace, values in zip(traces, scaled, strict=True):
            trace["y"] = values
        layout["yaxis"]["title"]["text"] = f"{title}, scaled"
        layout["updatemenus"] = _buttons("y", {"scaled": (scaled, f"{title}, scaled"), "values": (plain, title)})
    names = len({run.label for run in known}) if is_grouped else len(known)
    return Figure({"data": traces, "layout": layout}, "", 350 + LEGEND_LINE * math.ceil(names / 3))


def _scaled(runs: Sequence[ExperimentRun], metric: str) -> list[list[float]]:
    """Each run's values between the lowest (0) and highest (1) of its method's runs."""
    bounds: dict[str, tuple[float, float]] = {}
    for run in runs:
        values = [value for _, value in run.curves[metric]]
        low, high = bounds.get(run.label, (math.inf, -math.inf))
        bounds[run.label] = (min(low, *values), max(high, *values))
    scaled = []
    for run in runs:
        low, high = bounds[run.label]
        scaled.append([(value - low) / (high - low) if high > low else 0.5 for _, value in run.curves[metric]])
    return scaled


def _buttons(axis: str, choices: Mapping[str, tuple[list[Any], str]]) -> list[dict[str, Any]]:
    """Buttons that exchange the numbers of an axis: label -> (one list per trace, title of the axis)."""
    buttons = [
        {"label": label, "method": "update", "args": [{axis: values}, {f"{axis}axis.title.text": title}]}
        for label, (values, title) in choices.items()
    ]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "y": 1.03, "xanchor": "left"}
    return [{**menu, "yanchor": "bottom", "showactive": False}]
