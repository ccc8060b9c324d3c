"""What users read: numbers, warnings, errors."""

from __future__ import annotations

import pickle
import warnings

import pytest
from rich.console import Console

from rayjobs.cli import show_warnings, user_errors
from rayjobs.compare_config import CompareConfig
from rayjobs.configs import from_dict, to_dict
from rayjobs.number_text import metric_text, value_text
from rayjobs.task_options import TaskOptions, chosen_tasks


@pytest.mark.parametrize(
    ("value", "ci95", "text"),
    [
        (61.2, 0.75, "61.20 ± 0.75"),
        (100.0, 0.0, "100.00 ± 0.00"),
        (0.01234, 0.0045, "0.0123 ± 0.0045"),
        (2.5, 0.0999, "2.500 ± 0.100"),
        (3e-9, 1e-9, "0.000000 ± 0.000000"),
        (0.000123456, None, "0.0001235"),
        (200.0, None, "200"),
    ],
)
def test_a_number_has_the_digits_that_its_interval_can_tell_apart(value, ci95, text):
    assert value_text(value, ci95) == text
    assert metric_text({"value": value, "ci95": ci95, "n": 3}) == text


def test_no_metric_is_no_text():
    assert metric_text(None) == ""


def test_a_tree_in_an_error_stays_a_tree(capsys):
    long = "word " * 60
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise ValueError(f"no such thing: {long}\nExpected:\n  DIR/a.csv      the first\n  DIR/b.csv      the second")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-3:] == ["Expected:", "  DIR/a.csv      the first", "  DIR/b.csv      the second"]
    assert max(map(len, lines)) <= 120


def test_a_warning_is_said_once_on_one_line(capsys):
    with warnings.catch_warnings():
        show_warnings(Console(width=60))
        for _ in range(2):
            warnings.warn("the grid [a, b] is too narrow, " + "x " * 50, RuntimeWarning, stacklevel=1)
        warnings.warn("not ours", ImportWarning, stacklevel=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Warning: the grid [a, b] is too narrow")


def test_task_options_survive_a_pickle_and_json():
    config = CompareConfig(tasks=("few_shot",), options=TaskOptions())
    assert pickle.loads(pickle.dumps(config.options)) == config.options
    assert from_dict(CompareConfig, to_dict(config)) == config


def test_options_of_a_task_that_is_not_run_are_refused():
    from dataclasses import replace

    from evaluation.knn import KnnConfig

    options = replace(TaskOptions(), knn=KnnConfig(num_neighbors=5))
    assert chosen_tasks(("knn",), options)["knn"].num_neighbors == 5
    with pytest.raises(ValueError, match="Options of knn were given, but --tasks is linear"):
        chosen_tasks(("linear",), options)
    with pytest.raises(ValueError, match="Unknown task karate"):
        chosen_tasks(("karate",), options)
