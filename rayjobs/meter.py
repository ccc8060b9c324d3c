"""Means and curves of an epoch's monitors, kept on the device until someone asks."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from methods.collectives import all_reduce_mean

__all__ = ["Meter"]

CURVE_POINTS_PER_EPOCH = 10
FIRST_PROGRESS_SECONDS, PROGRESS_SECONDS = 2.0, 10.0  # within an epoch


class Meter:
    """Sums on the device; the host reads them once an epoch (and for the progress line every few seconds)."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.count = 0
        self._device = device
        self._every = max(1, steps // CURVE_POINTS_PER_EPOCH)
        self._points: list[tuple[int, Tensor, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._due = time.perf_counter() + FIRST_PROGRESS_SECONDS

    def add(self, step: int, loss: Tensor, metrics: dict[str, Tensor], lr: float) -> None:
        self.count += 1
        for name, value in {"loss": loss, **metrics}.items():
            self._sums[name] = self._sums.get(name, 0) + value
        if self.count % self._every == 0:
            self._points.append((step + 1, loss, lr))

    def is_due(self) -> bool:
        if time.perf_counter() < self._due:
            return False
        self._due = time.perf_counter() + PROGRESS_SECONDS
        return True

    def means(self) -> dict[str, float]:
        """Means over the epoch and over all workers."""
        names = sorted(self._sums)
        values = torch.stack([torch.as_tensor(self._sums[n], device=self._device).float() for n in names])
        means = (all_reduce_mean(values) / self.count).tolist()
        return dict(zip(names, means, strict=True))

    def curve(self) -> list[list[float]]:
        """[[step, loss, learning rate], ...] of this worker."""
        if not self._points:
            return []
        losses = torch.stack([loss for _, loss, _ in self._points]).tolist()
        return [[step, loss, lr] for (step, _, lr), loss in zip(self._points, losses, strict=True)]
