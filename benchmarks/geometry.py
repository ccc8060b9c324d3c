"""Statistics of all pairs of features in one pass, against separate passes, pdist and the matrix product alone; memory.

One thread, CPU seconds, alternating rounds in one process, median of the per-round ratios. All sides get the same
features: non-negative, as pooled ReLU outputs are; those that need unit length get them so.

* separate: uniformity, vMF-kernel entropy and nearest-neighbour entropy one by one, each over chunks of 512 rows
  against all; our pass also gives the uniformity of raw features;
* pdist: uniformity alone, as ``SsnL/align_uniform`` computes it (needs N^2 x 2 bytes, several times);
* product: the products of the upper triangle in the same blocks, which nothing can avoid (the ratio is its share).

With --large also 50,176 images: seconds, share of the product, and the peak memory beyond the features of the pair
statistics and of the entropy with its ranks (sampled every 5 ms from /proc, so Linux only).

    python benchmarks/geometry.py [--quick] [--large]

Goals (floors) at 2048 dimensions: 5x (3x) separate passes, 5x (3x) pdist, 0.9 (0.8) of the product, 256 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.entropy import feature_spectrum
from evaluation.pair_statistics import BLOCK, pair_statistics

T = 2.0
CHUNK = 512
GOALS = {"separate": (5, 3), "pdist": (5, 3), "product": (0.9, 0.8)}
MEMORY_LIMIT_MB = 256


def synthetic_features(num_images: int, dim: int) -> np.ndarray:
    """Non-negative features (N, dim) in 100 classes, of length 15 or so at 2048 dimensions."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, dim)).astype(np.float32) * 0.3
    x = rng.standard_normal(size=(num_images, dim), dtype=np.float32)
    x *= 0.4
    x += centres[np.arange(num_images) % 100]
    return np.maximum(x, 0, out=x)


def separate_passes(z: Tensor) -> tuple[float, float, float]:
    """Uniformity, vMF-kernel entropy and KoLeo of unit rows, each from its own products."""
    n = len(z)
    kernel_sum, log_densities, log_distances = 0.0, 0.0, 0.0
    for start in range(0, n, CHUNK):
        kernel = (z[start : start + CHUNK] @ z.T).mul_(2 * T).sub_(2 * T).exp_()
        kernel_sum += float(kernel.sum(dtype=torch.float64)) - len(kernel)
    for start in range(0, n, CHUNK):
        kernel = (z[start : start + CHUNK] @ z.T).mul_(2 * T).sub_(2 * T).exp_()
        log_densities += float(((kernel.sum(dim=1).double() - 1) / (n - 1)).log().sum())
    for start in range(0, n, CHUNK):
        products = z[start : start + CHUNK] @ z.T
        products.diagonal(start).fill_(-1)
        nearest = (2 - 2 * products.amax(dim=1)).clamp_(min=0).sqrt_()
        log_distances += float((nearest + 1e-8).log().double().sum())
    return -math.log(kernel_sum / (n * (n - 1))), -log_densities / n, log_distances / n


def pdist_uniformity(z: Tensor) -> float:
    """Uniformity of unit rows from the list of all distances."""
    return -float(torch.pdist(z).square().mul(-T).exp().mean().log())


def triangle_product(x: Tensor) -> None:
    """The matrix products that the pass cannot avoid."""
    buffer = torch.empty(BLOCK * BLOCK)
    for i in range(0, len(x), BLOCK):
        left = x[i : i + BLOCK]
        for j in range(i, len(x), BLOCK):
            right = x[j : j + BLOCK]
            torch.mm(left, right.T, out=buffer[: len(left) * len(right)].view(len(left), len(right)))


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def run_ratios(num_images: int, dim: int, rounds: int) -> list[dict]:
    """One line per competitor."""
    x = synthetic_features(num_images, dim)
    z = torch.nn.functional.normalize(torch.from_numpy(x))
    sides: dict[str, Callable[[], object]] = {
        "separate": lambda: separate_passes(z),
        "pdist": lambda: pdist_uniformity(z),
        "product": lambda: triangle_product(torch.from_numpy(x)),
    }
    pair_statistics(x[: 2 * BLOCK])
    ours, others = [], {name: [] for name in sides}
    for _ in range(rounds):
        ours.append(cpu_seconds(lambda: pair_statistics(x)))
        for name, side in sides.items():
            others[name].append(cpu_seconds(side))
    found, expected = pair_statistics(x), separate_passes(z)
    values = (found.uniformity, found.vmf_entropy, found.koleo)
    return [
        {
            "benchmark": "geometry",
            "case": f"{num_images:,} x {dim}, against {name}",
            "ours_s": round(statistics.median(ours), 3),
            "other_s": round(statistics.median(others[name]), 3),
            "ratio": round(statistics.median(b / a for a, b in zip(ours, others[name], strict=True)), 2),
            "goal": GOALS[name][0],
            "floor": GOALS[name][1],
            "largest_difference": float(f"{max(abs(a - b) for a, b in zip(values, expected, strict=True)):.1e}"),
        }
        for name in sides
    ]


class PeakMemory:
    """Context manager that samples the resident memory of this process."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    @property
    def extra_mb(self) -> float:
        """Largest amount beyond the start, in MB."""
        return (self.peak - self.start) / 1e6

    def _sample(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run_memory(num_images: int, dim: int) -> list[dict]:
    """Time and extra memory of both analyses of a whole training set."""
    x = synthetic_features(num_images, dim)
    pair_statistics(x[:BLOCK])  # what libraries allocate once is not counted
    feature_spectrum(x[:64])
    lines = []
    product_s = cpu_seconds(lambda: triangle_product(torch.from_numpy(x)))
    analyses: dict[str, Callable[[], object]] = {
        "pair statistics": lambda: pair_statistics(x),
        "entropy and ranks": lambda: feature_spectrum(x),
    }
    for name, analysis in analyses.items():
        with PeakMemory() as memory:
            seconds = cpu_seconds(analysis)
        lines.append(
            {
                "benchmark": "geometry",
                "case": f"{num_images:,} x {dim}, {name}",
                "ours_s": round(seconds, 2),
                "extra_mb": round(memory.extra_mb, 1),
                "limit_mb": MEMORY_LIMIT_MB,
                "features_mb": round(x.nbytes / 1e6),
            }
        )
    lines[0] |= {"other_s": round(product_s, 2), "ratio": round(product_s / lines[0]["ours_s"], 2), "goal": 0.9}
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,536 instead of 6,144 images, 8,192 for --large")
    parser.add_argument("--large", action="store_true", help="also time and memory at 50,176 images: minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = run_ratios(*((1536, 2048, 3) if arguments.quick else (6144, 2048, 7)))
    for line in lines:
        print(json.dumps(line), flush=True)
    if arguments.large:
        for line in run_memory(8192 if arguments.quick else 50_176, 2048):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
