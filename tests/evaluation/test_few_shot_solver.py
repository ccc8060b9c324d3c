"""The batched solver against scikit-learn at tolerance 1e-10, and where its fast iteration gives up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation.few_shot_solver import DualSolution, _inverse, solve_dual, solve_newton

DTYPES = {torch.float32: 2e-4, torch.float64: 1e-6}


def problems(num_tasks: int = 6, ways: int = 5, shots: int = 3, dim: int = 40, unit: bool = True) -> torch.Tensor:
    """Features (T, n, D) in float64, classes overlapping."""
    generator = torch.Generator().manual_seed(ways * 100 + shots)
    centres = torch.randn(num_tasks, ways, 1, dim, generator=generator, dtype=torch.float64)
    x = centres + torch.randn(num_tasks, ways, shots, dim, generator=generator, dtype=torch.float64)
    x = x.flatten(1, 2)
    return x / x.norm(dim=2, keepdim=True) if unit else x


def labels_of(ways: int, shots: int) -> torch.Tensor:
    return torch.arange(ways).repeat_interleave(shots)


def solve(x: torch.Tensor, labels: torch.Tensor, c: float, dtype: torch.dtype = torch.float64) -> DualSolution:
    x = x.to(dtype)
    return solve_dual(c * x @ x.transpose(1, 2), labels, int(labels.max()) + 1)


def sklearn_optimum(x: torch.Tensor, labels: torch.Tensor, c: float) -> tuple[np.ndarray, np.ndarray]:
    model = LogisticRegression(C=c, tol=1e-10, max_iter=50_000).fit(x.numpy(), labels.numpy())
    return model.coef_, model.intercept_ - model.intercept_.mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (5, 5), (3, 4), (20, 1)])
def test_weights_equal_scikit_learn(ways: int, shots: int, dtype: torch.dtype) -> None:
    x, labels = problems(ways=ways, shots=shots), labels_of(ways, shots)
    solution = solve(x, labels, 1.0, dtype)
    assert solution.num_newton == 0
    weights = solution.coefficients.double().transpose(1, 2) @ x
    for task in range(len(x)):
        expected_weight, expected_intercept = sklearn_optimum(x[task], labels, 1.0)
        np.testing.assert_allclose(weights[task], expected_weight, atol=DTYPES[dtype])
        np.testing.assert_allclose(solution.intercept[task], expected_intercept, atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_five_copies_of_five_shots_equal_scikit_learn(spread: float, dtype: torch.dtype) -> None:
    """125 support images, copies close together or not, as protocol A' has them; float32 needs no slow method."""
    plain = problems(num_tasks=3, shots=5, dim=64)
    noise = torch.randn(3, 25, 5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (plain[:, :, None] + spread * noise).flatten(1, 2)
    x = x / x.norm(dim=2, keepdim=True)
    labels = torch.arange(5).repeat_interleave(25)
    solution = solve(x, labels, 1.0, dtype)
    assert dtype == torch.float64 or solution.num_newton == 0
    weights = solution.coefficients.double().transpose(1, 2) @ x
    for task in range(len(x)):
        expected_weight, expected_intercept = sklearn_optimum(x[task], labels, 1.0)
        np.testing.assert_allclose(weights[task], expected_weight, atol=DTYPES[dtype])
        np.testing.assert_allclose(solution.intercept[task], expected_intercept, atol=DTYPES[dtype])


@pytest.mark.parametrize("n", [1, 40, 41, 81, 125])
def test_inverse_in_halves_is_the_inverse(n: int) -> None:
    x = torch.randn(3, n, 2 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    system = torch.eye(n, dtype=torch.float64) + x @ x.transpose(1, 2) / n
    np.testing.assert_allclose(_inverse(system), torch.linalg.inv(system), atol=1e-12)


def test_unbalanced_labels_need_the_free_intercept() -> None:
    x = problems(ways=3, shots=4)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
    solution = solve(x, labels, 1.0)
    assert solution.intercept.abs().max() > 0.1
    for task in range(len(x)):
        np.testing.assert_allclose(solution.intercept[task], sklearn_optimum(x[task], labels, 1.0)[1], atol=1e-6)


@pytest.mark.parametrize(("c", "unit"), [(1000.0, True), (1.0, False)])
def test_newton_takes_over_where_the_fixed_hessian_fails(c: float, unit: bool) -> None:
    x, labels = problems(ways=4, shots=3, unit=unit), labels_of(4, 3)
    solution = solve(x, labels, c)
    assert solution.num_newton > 0
    assert solution.residual.max() < 1e-9
    weights = c * solution.coefficients.transpose(1, 2) @ x
    for task in range(len(x)):
        expected_weight, expected_intercept = sklearn_optimum(x[task], labels, c)
        np.testing.assert_allclose(weights[task], expected_weight, atol=2e-5 * np.abs(expected_weight).max())
        np.testing.assert_allclose(solution.intercept[task], expected_intercept, atol=1e-4)


def test_only_failing_tasks_go_to_newton() -> None:
    x, labels = problems(num_tasks=4), labels_of(5, 3)
    x[2] *= 100
    solution = solve(x, labels, 1.0)
    assert solution.num_newton == 1
    alone = solve(x[:2], labels, 1.0)
    assert alone.num_newton == 0
    np.testing.assert_allclose(solution.coefficients[:2], alone.coefficients, atol=1e-8)


def test_newton_agrees_with_the_dual_iteration() -> None:
    x, labels = problems(), labels_of(5, 3)
    gram = x @ x.transpose(1, 2)
    fast, exact = solve_dual(gram, labels, 5), solve_newton(gram, labels, 5)
    assert exact.residual.max() < 1e-9
    np.testing.assert_allclose(fast.coefficients, exact.coefficients, atol=1e-8)
    np.testing.assert_allclose(fast.intercept, exact.intercept, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_singular_gram_is_allowed(dtype: torch.dtype) -> None:
    """Equal support images and zero features: the optimum still exists."""
    x, labels = problems(), labels_of(5, 3)
    x[:, 1] = x[:, 0]
    x[:, 4] = 0
    x[0] = 0
    solution = solve(x, labels, 1.0, dtype)
    assert solution.residual.max() < 1e-5
    np.testing.assert_allclose(solution.intercept[0], 0, atol=1e-6)
    weights = solution.coefficients.double().transpose(1, 2) @ x
    np.testing.assert_allclose(weights[3], sklearn_optimum(x[3], labels, 1.0)[0], atol=DTYPES[dtype])
