"""Many small linear classifiers trained by SGD at once, step for step as one ``nn.Linear`` per task would be.

The weights of a task stay in the span of their start and of the support features, and so does their momentum:
``W = a W_0 + C^T X`` and ``V = v W_0 + U^T X``. Every step of SGD (momentum, dampening, weight decay on weights and
bias) is therefore a step of C and U, which see features only through inner products of images, and of the two numbers a
and v. The bias is the weight of a further feature that is 1 for all images. The feature dimension appears once, all
learning rates of a grid share the products, and the updates are those of ``torch.optim.SGD`` in exact arithmetic.

Legend: T tasks, n support images, M all images of a task, K classes, R learning rates, X features with their 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from evaluation.episodes import Episodes
from evaluation.few_shot import gather_tasks

__all__ = ["SgdSettings", "TaskDraws", "correct_queries", "draw_tasks"]

BLOCK_FLOATS = 400_000  # state of the tasks that are trained together: 1.6 MB, about an L2 cache


class SgdSettings(NamedTuple):
    """How each classifier is trained; the learning rate is given apart.

    Attributes:
        epochs: passes over the support images.
        batch_size: images per step; the last batch of an epoch may be smaller.
        momentum: of SGD.
        dampening: of the momentum, as in ``torch.optim.SGD`` (not at the first step).
        weight_decay: of weights and bias.
    """

    epochs: int
    batch_size: int
    momentum: float
    dampening: float
    weight_decay: float


class TaskDraws(NamedTuple):
    """What is random about t tasks.

    Attributes:
        order: int64 (t, epochs, n), the support images' order in each epoch.
        bias: float32 (t, K), at the start.
        weight: float32 (t, K, D), at the start.
    """

    order: np.ndarray
    bias: np.ndarray
    weight: np.ndarray


def draw_tasks(key: tuple[int, ...], tasks: range, num_ways: int, num_support: int, dim: int, epochs: int) -> TaskDraws:
    """Orders and starts, one generator per task: fewer tasks are a prefix, and the orders do not depend on ``dim``.

    The start is that of ``nn.Linear``: uniform in +- 1 / sqrt(dim), weights and bias.

    Args:
        key: seeds the generators, together with the number of the task.
        tasks: numbers of the tasks.
        num_ways: K.
        num_support: n.
        dim: D.
        epochs: of training.
    """
    order = np.empty((len(tasks), epochs, num_support), dtype=np.int64)
    bias = np.empty((len(tasks), num_ways), dtype=np.float32)
    weight = np.empty((len(tasks), num_ways, dim), dtype=np.float32)
    images = np.tile(np.arange(num_support), (epochs, 1))
    for i, task in enumerate(tasks):
        rng = np.random.default_rng(np.random.SeedSequence([*key, task]))
        order[i] = rng.permuted(images, axis=1)
        rng.random(out=bias[i], dtype=np.float32)
        rng.random(out=weight[i], dtype=np.float32)
    bound = 1 / np.sqrt(np.float32(dim))
    for start in (bias, weight):
        start *= 2 * bound
        start -= bound
    return TaskDraws(order, bias, weight)


def correct_queries(
    x: Tensor, episodes: Episodes, rates: tuple[float, ...], settings: SgdSettings, key: tuple[int, ...]
) -> np.ndarray:
    """Correctly classified queries int64 (T, R) of each task under each learning rate; -1 where training diverged.

    Args:
        x: features (N, D), float32 or float64; the precision of everything.
        episodes: the task list.
        rates: learning rates.
        settings: of SGD.
        key: seeds the starts and the orders.
    """
    num_ways, num_queries = episodes.query.shape[1:]
    labels = torch.arange(num_ways, device=x.device).repeat_interleave(num_queries)
    correct = []
    for scores in query_scores(x, episodes, rates, settings, key):
        right = (scores.argmax(dim=2) == labels[None, :, None]).sum(dim=1)
        finite = torch.isfinite(scores).all(dim=2).all(dim=1)
        correct.append(torch.where(finite, right, -1).cpu())
    return torch.cat(correct).numpy()


def query_scores(
    x: Tensor, episodes: Episodes, rates: tuple[float, ...], settings: SgdSettings, key: tuple[int, ...]
) -> Iterator[Tensor]:
    """Scores (t, N Q, K, R) of the queries after training, a block of tasks at a time; arguments as above."""
    num_tasks, num_ways, num_shots = episodes.support.shape
    num_support = num_ways * num_shots
    support_labels = torch.arange(num_ways, device=x.device).repeat_interleave(num_shots)
    per_task = num_support * (3 * num_ways * len(rates) + 2 * num_support)
    block = max(1, BLOCK_FLOATS // per_task)
    for start in range(0, num_tasks, block):
        part = episodes.part(start, start + block)
        numbers = range(start, start + len(part.support))
        draws = draw_tasks(key, numbers, num_ways, num_support, x.shape[1], settings.epochs)
        products, initial = _task_products(x, part, draws)
        coefficients, start_share = _train(
            products[:, :, :num_support], initial[:, :num_support], support_labels, draws.order, rates, settings
        )
        scores = torch.bmm(products[:, :, num_support:].transpose(1, 2), coefficients)
        scores = scores.view(len(numbers), -1, num_ways, len(rates))
        yield scores + initial[:, num_support:, :, None] * start_share


def _task_products(x: Tensor, episodes: Episodes, draws: TaskDraws) -> tuple[Tensor, Tensor]:
    """Inner products (t, n, M) of support images with all images, and all images' scores (t, M, K) at the start."""
    num_tasks, num_ways, num_shots = episodes.support.shape
    num_support = num_ways * num_shots
    num_images = num_support + num_ways * episodes.query.shape[2]
    weight = torch.from_numpy(draws.weight).to(x)
    products = x.new_empty(num_tasks, num_support, num_images)
    initial = x.new_empty(num_tasks, num_images, num_ways)
    for tasks, gathered in gather_tasks(x, episodes):
        torch.bmm(gathered[:, :num_support], gathered.transpose(1, 2), out=products[tasks])
        torch.bmm(gathered, weight[tasks].transpose(1, 2), out=initial[tasks])
    products += 1  # the further feature of the bias
    initial += torch.from_numpy(draws.bias).to(x)[:, None]
    return products, initial


def _train(
    gram: Tensor, initial: Tensor, labels: Tensor, order: np.ndarray, rates: tuple[float, ...], settings: SgdSettings
) -> tuple[Tensor, Tensor]:
    """Run SGD.

    At the start of an epoch everything is brought into that epoch's order, so that batches are neighbouring rows.

    Args:
        gram: (t, n, n), with the 1 of the bias.
        initial: scores of the support images at the start, (t, n, K).
        labels: of the support images, (n,).
        order: (t, epochs, n).
        rates: R learning rates.
        settings: of SGD.

    Returns:
        C (t, n, K R), and a (R,).
    """
    num_tasks, n, num_ways = initial.shape
    targets = one_hot(labels, num_ways).to(gram)
    orders = torch.from_numpy(order).to(gram.device).transpose(0, 1)  # (epochs, t, n)
    back = orders.argsort(dim=2)
    offset = n * torch.arange(num_tasks, device=gram.device)[:, None]
    state = _State(gram, num_ways, rates, settings)
    position = torch.arange(n, device=gram.device).expand(num_tasks, n)  # row of each image in the state
    for now, inverse in zip(orders, back, strict=True):
        state.reorder((position.gather(1, now) + offset).reshape(-1))
        position = inverse
        rows = (now + offset).reshape(-1)
        square = (
            gram.reshape(-1, n).index_select(0, rows).view(num_tasks, n, n).gather(2, now[:, None].expand(-1, n, -1))
        )
        start_scores = initial.reshape(-1, num_ways).index_select(0, rows).view(num_tasks, n, num_ways, 1)
        wanted = targets[now][..., None]
        for first in range(0, n, settings.batch_size):
            batch = slice(first, first + settings.batch_size)
            state.step(square[:, batch], start_scores[:, batch], wanted[:, batch], batch)
    state.reorder((position + offset).reshape(-1))
    return state.weights, state.start_share


class _State:
    """C and U (t, n, K R), a and v (R,), and one step of SGD on them.

    The rates are innermost: a softmax over neighbouring numbers of 5 classes takes several times as long.
    """

    def __init__(self, gram: Tensor, num_ways: int, rates: tuple[float, ...], settings: SgdSettings) -> None:
        self.settings, self.num_ways = settings, num_ways
        self.rates = torch.tensor(rates, dtype=gram.dtype, device=gram.device)
        self.columns = self.rates.repeat(num_ways)
        self.weights = gram.new_zeros(*gram.shape[:2], len(self.columns))
        self.velocity = torch.zeros_like(self.weights)
        self.start_share = torch.ones_like(self.rates)
        self.start_velocity = torch.zeros_like(self.start_share)
        self.share = 1.0  # of a gradient that enters the momentum: 1 at the first step, then 1 - dampening

    def reorder(self, rows: Tensor) -> None:
        """Take rows of the flattened (t n)."""
        shape = self.weights.shape
        self.weights = self.weights.view(-1, shape[2]).index_select(0, rows).view(shape)
        self.velocity = self.velocity.view(-1, shape[2]).index_select(0, rows).view(shape)

    def step(self, gram: Tensor, start_scores: Tensor, targets: Tensor, batch: slice) -> None:
        """One batch: its rows of the Gram (t, B, n), of the start's scores and of the targets (t, B, K, 1)."""
        num_tasks, size, _ = gram.shape
        scores = torch.bmm(gram, self.weights).view(num_tasks, size, self.num_ways, -1)
        gradient = torch.softmax(scores + start_scores * self.start_share, dim=2).sub_(targets)
        decay = self.share * self.settings.weight_decay
        self.velocity.mul_(self.settings.momentum).add_(self.weights, alpha=decay)
        self.velocity[:, batch].add_(gradient.view(num_tasks, size, -1), alpha=self.share / size)
        self.weights.addcmul_(self.velocity, self.columns, value=-1)
        self.start_velocity = self.settings.momentum * self.start_velocity + decay * self.start_share
        self.start_share = self.start_share - self.rates * self.start_velocity
        self.share = 1 - self.settings.dampening
