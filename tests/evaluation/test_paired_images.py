"""Paired comparison of models image by image: exact test by enumeration, coverage of the interval, the table."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from evaluation import Artifact, Metric, ModelResult
from evaluation.paired_images import compare_images, paired_difference


def cells(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-image results of two models with these counts."""
    a = np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither]).astype(np.uint8)
    b = np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither]).astype(np.uint8)
    return a, b


def model(name: str, right: np.ndarray | None) -> ModelResult:
    return ModelResult(name, "moco_v2", 10, {}, {} if right is None else {"linear/top1": right})


def mcnemar_by_enumeration(only_a: int, only_b: int) -> float:
    """Probability of every split of the differing images that is at most as likely as the one seen."""
    total = only_a + only_b
    ways = [math.comb(total, k) for k in range(total + 1)]
    return sum(w for w in ways if w <= ways[only_a]) / 2**total


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (30, 18)])
def test_p_value_is_mcnemars_exact_test(only_a: int, only_b: int) -> None:
    found = paired_difference(*cells(40, only_a, only_b, 20))
    assert found.p_value == pytest.approx(mcnemar_by_enumeration(only_a, only_b))
    assert (found.only_a, found.only_b, found.n) == (only_a, only_b, 60 + only_a + only_b)
    assert found.difference == pytest.approx(100 * (only_a - only_b) / found.n)


def test_interval_covers_the_planted_difference() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(600):
        cell = rng.choice(4, size=80, p=[0.6, 0.2, 0.1, 0.1])  # A is better by 10 points
        a, b = np.isin(cell, (0, 1)).astype(int), np.isin(cell, (0, 2)).astype(int)
        found = paired_difference(a, b)
        covered.append(abs(found.difference - 10) <= found.ci95)
    assert 0.93 <= np.mean(covered) <= 0.985


def test_interval_is_near_the_normal_one_for_many_images_and_never_empty() -> None:
    a, b = cells(5000, 700, 500, 3000)
    found = paired_difference(a, b)
    differences = a.astype(float) - b
    normal = 100 * 1.96 * differences.std() / math.sqrt(len(a))
    assert found.ci95 == pytest.approx(normal, rel=0.01)
    same = np.ones(50, np.uint8)
    assert paired_difference(same, same).ci95 > 0


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_difference(np.ones(4), np.ones(5))
    with pytest.raises(ValueError, match="1 where a model is right"):
        paired_difference(np.array([0.5, 1.0]), np.array([0, 1]))


def test_every_model_against_the_best_and_all_pairs_in_a_table() -> None:
    good, fair = cells(40, 20, 5, 35)
    poor = np.roll(fair, 7) & fair
    found = list(compare_images("linear/top1", [model("SL MLP", fair), model("moco", good), model("vae", poor)]))
    metrics = {item.name: item for item in found if isinstance(item, Metric)}
    pairs = [f"linear/top1/{name}_minus_moco" for name in ("sl_mlp", "vae")]
    assert set(metrics) == {pair + end for pair in pairs for end in ("", "/p_value")}
    assert metrics[pairs[0]].value == pytest.approx(-15)
    assert metrics[f"{pairs[0]}/p_value"].value == pytest.approx(mcnemar_by_enumeration(20, 5))
    (table,) = (item for item in found if isinstance(item, Artifact))
    assert table.name == "linear/top1_pairs.csv"
    rows = list(csv.DictReader(io.StringIO(table.data.decode())))
    assert [(row["model_a"], row["model_b"]) for row in rows] == [
        ("SL MLP", "moco"),
        ("SL MLP", "vae"),
        ("moco", "vae"),
    ]
    p = sorted(float(row["p"]) for row in rows)
    holm = sorted(float(row["p_holm"]) for row in rows)
    expected = [min(1, 3 * p[0]), min(1, max(3 * p[0], 2 * p[1])), min(1, max(3 * p[0], 2 * p[1], p[2]))]
    np.testing.assert_allclose(holm, expected, rtol=1e-4)


def test_models_without_results_are_left_out_with_a_warning() -> None:
    a, b = cells(5, 3, 1, 2)
    with pytest.warns(RuntimeWarning, match="no per-image results of lost"):
        found = list(compare_images("linear/top1", [model("one", a), model("lost", None), model("two", b)]))
    assert [item.name for item in found] == [
        "linear/top1/two_minus_one",
        "linear/top1/two_minus_one/p_value",
        "linear/top1_pairs.csv",
    ]
    assert list(compare_images("linear/top1", [model("one", a)])) == []


def test_names_that_read_alike_stay_apart() -> None:
    a, b = cells(5, 3, 1, 2)
    found = list(compare_images("linear/top1", [model("m 1", a), model("m/1", b), model("M_1", b)]))
    names = [item.name for item in found]
    assert len(set(names)) == len(names) == 5
