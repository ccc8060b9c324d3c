"""Paired comparison: scipy's bootstrap and permutation test, p-values under the null, power, and the files."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from scipy import stats

from evaluation import Artifact, Metric, ModelResult, few_shot
from evaluation.few_shot import FewShotConfig
from evaluation.paired import SEED, compare_samples, holm, model_pairs, paired_differences

NAME = "few_shot/5way_5shot_acc"


def model(name: str, *values: np.ndarray, names: tuple[str, ...] = (NAME,)) -> ModelResult:
    return ModelResult(name, "supervised", 64, {}, dict(zip(names, values, strict=True)))


def accuracies(num_models: int, num_tasks: int = 100, gap: float = 0.0, seed: int = 0) -> list[np.ndarray]:
    """Percentages of 75 queries: tasks of different difficulty, model i better by i gaps."""
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(0.4, 0.8, size=num_tasks)
    return [rng.binomial(75, np.clip(difficulty + i * gap, 0, 1)) / 0.75 for i in range(num_models)]


def metrics_of(models: list[ModelResult]) -> dict[str, Metric]:
    return {m.name: m for m in compare_samples("few_shot", (NAME,), models) if isinstance(m, Metric)}


def test_interval_is_scipys_percentile_bootstrap_draw_for_draw() -> None:
    d = accuracies(2, 40, gap=0.05)
    ours = paired_differences((d[1] - d[0])[None], resamples=2000)
    rng = np.random.default_rng(np.random.SeedSequence(SEED).spawn(2)[0])
    theirs = stats.bootstrap((d[1] - d[0],), np.mean, n_resamples=2000, method="percentile", rng=rng)
    assert (ours.low[0], ours.high[0]) == pytest.approx(tuple(theirs.confidence_interval))


@pytest.mark.parametrize("gap", [0.0, 0.05])
def test_p_value_is_scipys_exact_permutation_test(gap: float) -> None:
    """All 2^12 flips against 10,000 random ones: 5 standard errors of a proportion."""
    a, b = accuracies(2, 12, gap=gap, seed=3)
    options = {"permutation_type": "samples", "n_resamples": np.inf, "alternative": "two-sided"}
    exact = stats.permutation_test((a, b), lambda x, y, axis: np.mean(x - y, axis=axis), vectorized=True, **options)
    ours = paired_differences((a - b)[None]).p_value[0]
    p = float(exact.pvalue)
    assert ours == pytest.approx(p, abs=5 * (p * (1 - p) / 10_000) ** 0.5 + 2e-4)


def test_t_test_is_scipys() -> None:
    pairs = [accuracies(2, 30, gap=gap, seed=seed) for gap, seed in ((0.0, 1), (0.03, 2))]
    ours = paired_differences(np.stack([a - b for a, b in pairs]), resamples=100).t_p_value
    assert ours == pytest.approx([stats.ttest_rel(a, b).pvalue for a, b in pairs])


def test_p_values_are_uniform_under_the_null_and_small_where_models_differ() -> None:
    """400 comparisons of equal models: Kolmogorov-Smirnov; models 3 points apart on 300 tasks: nearly always found."""
    null = np.stack([a - b for a, b in (accuracies(2, 60, seed=s) for s in range(400))])
    found = paired_differences(null, resamples=999)
    assert stats.kstest(found.p_value, "uniform").pvalue > 0.01
    covered = (found.low <= 0) & (found.high >= 0)
    assert 0.91 < covered.mean() < 0.98
    apart = np.stack([a - b for a, b in (accuracies(2, 300, gap=0.03, seed=s) for s in range(20))])
    assert (paired_differences(apart, resamples=999).p_value < 0.05).mean() > 0.9


def test_pairing_finds_what_two_intervals_hide() -> None:
    """Difficulty varies by 12 points, the models by 2: their intervals overlap, the difference's is clear of zero."""
    a, b = accuracies(2, 600, gap=0.02)
    half_widths = [1.96 * x.std(ddof=1) / np.sqrt(600) for x in (a, b)]
    assert abs(b.mean() - a.mean()) < sum(half_widths)
    found = metrics_of([model("b", b), model("a", a)])
    assert found[f"{NAME}/b_minus_a"].value == pytest.approx((b - a).mean())
    assert found[f"{NAME}/b_minus_a/p_value"].value < 0.001


def test_p_is_never_zero_and_equal_models_have_p_one() -> None:
    d = np.stack([np.full(50, 3.0), np.zeros(50), np.tile([1.0, -1.0], 25)])
    found = paired_differences(d)
    assert found.p_value == pytest.approx([1 / 10_001, 1.0, 1.0])
    assert found.t_p_value == pytest.approx([0.0, 1.0, 1.0])
    np.testing.assert_array_equal([found.low[0], found.high[0], found.low[1], found.high[1]], [3, 3, 0, 0])


def test_sign_follows_the_order_of_the_models() -> None:
    a, b = accuracies(2, 200, gap=0.1)
    forward, backward = metrics_of([model("a", a), model("b", b)]), metrics_of([model("b", b), model("a", a)])
    assert forward[f"{NAME}/a_minus_b"].value == -backward[f"{NAME}/b_minus_a"].value < -5


def test_resamples_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = accuracies(2, 31, gap=0.01)
    whole = paired_differences((a - b)[None], resamples=500)
    monkeypatch.setattr("evaluation.paired.BLOCK_ENTRIES", 31 * 77)
    for first, second in zip(whole, paired_differences((a - b)[None], resamples=500), strict=True):
        np.testing.assert_array_equal(first, second)


def test_holm_is_its_definition() -> None:
    p = np.array([0.04, 0.001, 0.03, 0.5])
    np.testing.assert_allclose(holm(p), [0.09, 0.004, 0.09, 0.5])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1.0, 1.0])


def test_every_pair_of_four_models_and_best_against_each_of_five() -> None:
    assert model_pairs(np.arange(4.0)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert model_pairs(np.array([1.0, 5.0, 2.0, 5.0, 0.0])) == [(1, 0), (1, 2), (1, 3), (1, 4)]


def test_metrics_and_files() -> None:
    names = (NAME, "few_shot/5way_1shot_acc")
    values = [accuracies(3, 80, gap=0.05, seed=seed) for seed in (1, 2)]
    titles = ("MoCo v2", "SL|MLP", "moco-V2")
    models = [model(title, values[0][i], values[1][i], names=names) for i, title in enumerate(titles)]
    outputs = list(compare_samples("few_shot", names, models))
    found = {m.name: m for m in outputs if isinstance(m, Metric)}
    pairs = ("moco_v2_minus_sl_mlp", "moco_v2_minus_moco-v2", "sl_mlp_minus_moco-v2")
    expected = [f"{name}/{pair}{end}" for name in names for pair in pairs for end in ("", "/p_value", "/p_value_holm")]
    assert list(found) == expected
    files = {a.name: a.data for a in outputs if isinstance(a, Artifact)}
    assert list(files) == ["few_shot/paired.csv", "few_shot/paired.md", "few_shot/paired.png"]
    rows = list(csv.DictReader(io.StringIO(files["few_shot/paired.csv"].decode())))
    assert [row["second"] for row in rows[:2]] == ["SL|MLP", "moco-V2"]
    for row, pair in zip(rows, pairs, strict=False):
        metric = found[f"{NAME}/{pair}"]
        low, high = float(row["low"]), float(row["high"])
        assert metric.value == float(row["difference"])
        assert metric.ci95 == pytest.approx(max(high - metric.value, metric.value - low))
        assert metric.n == 80
    lines = files["few_shot/paired.md"].decode().splitlines()
    assert len([line for line in lines if line.startswith("| few_shot/")]) == 6
    assert "SL\\|MLP" in lines[2]
    assert files["few_shot/paired.png"].startswith(b"\x89PNG")


def test_equal_labels_of_different_models_are_numbered() -> None:
    found = metrics_of([model("A b", *accuracies(1)), model("a_b", *accuracies(1, seed=1)), model("!", *accuracies(1))])
    assert [name for name in found if "/p_" not in name] == [
        f"{NAME}/a_b_minus_a_b_2",
        f"{NAME}/a_b_minus_model",
        f"{NAME}/a_b_2_minus_model",
    ]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({NAME: np.ones(99)}, r"different or impossible lengths \(a \(100,\), b \(99,\)\); .* same num_tasks"),
        ({NAME: np.full(100, np.nan)}, "accuracies of b are NaN or infinite"),
    ],
)
def test_lists_that_cannot_be_paired_are_refused(samples: dict, message: str) -> None:
    models = [model("a", *accuracies(1)), ModelResult("b", "moco", 64, {}, samples)]
    with pytest.raises(ValueError, match=message):
        list(compare_samples("few_shot", (NAME,), models))


def test_models_without_samples_are_left_out_with_a_warning() -> None:
    models = [model("a", *accuracies(1)), ModelResult("old", "moco", 64, {}, {}), model("b", *accuracies(1, seed=1))]
    with pytest.warns(RuntimeWarning, match="no accuracies of single tasks of old; evaluate them again"):
        found = metrics_of(models)
    assert found == metrics_of([models[0], models[2]])


def test_one_model_is_not_compared_and_the_task_asks_for_its_own_metrics() -> None:
    assert list(compare_samples("few_shot", (NAME,), [model("a", *accuracies(1))])) == []
    config = FewShotConfig(shots=(5,))
    outputs = list(few_shot.compare(config, [model("a", *accuracies(1)), model("b", *accuracies(1, seed=1))]))
    assert [output.name for output in outputs][:2] == [f"{NAME}/a_minus_b", f"{NAME}/a_minus_b/p_value"]
