"""Weighted kNN against faiss's exact index and lightly's ``knn_predict``.

All sides get the same unit-length features and return one class per query (faiss: its neighbours with our votes). One
thread, CPU seconds, alternating rounds, median of the per-round ratios. Ours also reads the features once for their
lengths, and faiss copies them into its index; lightly gets the bank transposed beforehand and queries in batches of
256. Extra memory is the growth of the process's resident memory at its peak, each side in a process of its own.

    python benchmarks/knn.py [--quick]

Goals, k = 200: 0.95x faiss at 50,000 x 2048 (floor 0.7x); 3x lightly and 0.7x faiss at 100,000 x 128 (floors 1.5x and
0.4x).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from lightly.utils.benchmarking import knn_predict as lightly_predict
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.knn import Backend, knn_predict
from evaluation.neighbors import UnitRows

K, TEMPERATURE = 200, 0.07
# (images, dimensions, classes) -> other side -> (goal, floor)
CASES: dict[tuple[int, int, int], dict[str, tuple[float, float]]] = {
    (50_000, 2048, 100): {"faiss": (0.95, 0.7)},
    (100_000, 128, 100): {"lightly": (3, 1.5), "faiss": (0.7, 0.4)},
    (100_000, 128, 1000): {"lightly": (3, 1.5), "faiss": (0.7, 0.4)},
}


class Data:
    """Unit-length features around class centres, so far apart that neighbours are of several classes."""

    def __init__(self, num_images: int, dim: int, num_classes: int, num_queries: int) -> None:
        rng = np.random.default_rng(dim)
        centres = rng.normal(size=(num_classes, dim)).astype(np.float32)
        self.num_classes = num_classes
        self.labels = rng.integers(0, num_classes, num_images)
        self.bank = self._around(centres[self.labels], rng)
        self.queries = self._around(centres[rng.integers(0, num_classes, num_queries)], rng)

    @staticmethod
    def _around(centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        x = centres + 3 * rng.standard_normal(centres.shape, np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)


def one_thread() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    threadpool_limits(1)  # faiss multiplies with a BLAS that has threads of its own


def side(name: str, data: Data) -> Callable[[], np.ndarray]:
    """The predictions of one side, as a function."""
    if name == "lightly":
        bank, labels = torch.from_numpy(data.bank).T.contiguous(), torch.from_numpy(data.labels)

        def lightly() -> np.ndarray:
            batches = torch.from_numpy(data.queries).split(256)
            found = [lightly_predict(b, bank, labels, data.num_classes, K, TEMPERATURE)[:, 0] for b in batches]
            return torch.cat(found).numpy()

        return lightly
    backend: Backend = "faiss" if name == "faiss" else "blocks"

    def ours() -> np.ndarray:
        return knn_predict(
            UnitRows(data.bank, "train"),
            data.labels,
            UnitRows(data.queries, "val"),
            num_classes=data.num_classes,
            num_neighbors=K,
            temperature=TEMPERATURE,
            backend=backend,
        )

    return ours


def extra_memory_mb(name: str, case: tuple[int, int, int], num_queries: int) -> int:
    """Peak memory of one side above that of its inputs, in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_growth_mb, (name, case, num_queries))


def _peak_growth_mb(name: str, case: tuple[int, int, int], num_queries: int) -> int:
    one_thread()
    side(name, Data(1000, case[1], case[2], 10))()  # libraries and compiled code are loaded
    data = Data(*case, num_queries)
    run = side(name, data)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_kb("VmRSS")
    run()
    return (_status_kb("VmHWM") - before) // 1024


def _status_kb(key: str) -> int:
    """A line of this process's status; where there is none (not Linux), the peak since the start."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def run_case(case: tuple[int, int, int], num_queries: int, rounds: int) -> None:
    """Time all sides of one case and print a line for each other side."""
    data = Data(*case, num_queries)
    sides = {name: side(name, data) for name in ("ours", *CASES[case])}
    predicted = {name: run() for name, run in sides.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    memory = {name: extra_memory_mb(name, case, num_queries) for name in sides}
    images, dim, num_classes = case
    for other, (goal, floor) in CASES[case].items():
        ratios = [b / a for a, b in zip(seconds["ours"], seconds[other], strict=True)]
        line = {
            "benchmark": "knn",
            "case": f"{images:,} x {dim}, {num_classes} classes, {num_queries:,} queries, against {other}",
            "ours_s": round(statistics.median(seconds["ours"]), 3),
            "other_s": round(statistics.median(seconds[other]), 3),
            "ratio": round(statistics.median(ratios), 2),
            "goal": goal,
            "floor": floor,
            "same_votes": round(float(np.mean(predicted["ours"] == predicted[other])), 5),
            "extra_mb": memory["ours"],
            "other_extra_mb": memory[other],
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 queries and 3 rounds instead of 4,096 and 7")
    quick = parser.parse_args().quick
    one_thread()
    for case in CASES:
        run_case(case, *((512, 3) if quick else (4096, 7)))


if __name__ == "__main__":
    main()
