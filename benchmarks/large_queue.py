"""Contrast of a batch with a long queue (MoCo, Exemplar): ours against the naive formulation.

Both sides compute the loss and its gradient for q: B = 256, D = 128, tau = 0.07, 1,000 classes. Naive is MoCo's code:
one (B, 1 + K) matrix of the positive and the negative logits (same-class ones -inf), cross entropy, autograd; its queue
is always fp32. Ours reads the queue once in blocks, in fp32 or bf16 (`methods.losses.contrast`).

- `ratio`: time of naive over ours. All sides alternate within each round, median of the per-round ratios; CPU seconds
  with one thread, else wall seconds.
- `share_of_gemms`: time of the two matrix products alone (fp32, same blocks) over the time of ours.
- `extra_mb`, `other_extra_mb`: peak memory of one evaluation above its inputs. On a CPU each side runs in a process of
  its own that reads `ru_maxrss` before and after: the allocator cannot hand memory of one side to the other. These
  processes start before this one allocates anything, because a child's `ru_maxrss` begins with its parent's. On a GPU
  it is `torch.cuda.max_memory_allocated`.
- `same_image_share`: time of the monitor `FeatureQueue.same_image_rate` over the time of ours.
- `gradient_error`: |ours - naive| / |naive|.

    python benchmarks/large_queue.py [--quick] [--threads 2] [--device cuda]

Needs 8 GB of memory at K = 1,048,576. Goals: at least 2.5x at K = 65,536; 3x with at most 64 MB at K = 1,048,576 (on a
CPU); half of the time in the matrix products.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from methods.losses import contrast
from methods.queue import FeatureQueue

BATCH_SIZE, DIM, TEMPERATURE, NUM_CLASSES = 256, 128, 0.07, 1000
RATIO_GOALS = {65536: 2.5, 2**20: 3.0}
SHARE_GOAL, MEMORY_GOAL_MB = 0.5, 64
SIZES = [4096, 65536, 2**20]
# One block of the matrix products: logits of 8,192 keys on a CPU, of 65,536 on a GPU, as in methods.losses.
GEMM_BLOCKS = {"cpu": 8192, "cuda": 65536}


class Inputs(NamedTuple):
    """q (B, D) needs its gradient; labels are None in the cases without."""

    q_BD: Tensor
    k_BD: Tensor
    queue_KD: Tensor
    labels_B: Tensor | None
    queue_labels_K: Tensor | None


def make_inputs(num_keys: int, with_labels: bool, dtype: str, device: str) -> Inputs:
    """Random unit vectors. The queue is filled in pieces: a copy of it would hide what a side needs."""
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(BATCH_SIZE, DIM, generator=generator), dim=1).to(device) for _ in range(2))
    queue = torch.empty(num_keys, DIM, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, device=device)
    for piece in queue.split(4096):
        piece.copy_(F.normalize(torch.randn(len(piece), DIM, generator=generator), dim=1))
    labels = [torch.randint(0, NUM_CLASSES, (n,), generator=generator).to(device) for n in (BATCH_SIZE, num_keys)]
    return Inputs(q.requires_grad_(), k, queue, *(labels if with_labels else (None, None)))


def our_gradient(x: Inputs) -> Tensor:
    """Loss and gradient as the methods compute them."""
    loss = contrast(x.q_BD, x.k_BD, x.queue_KD, TEMPERATURE, x.labels_B, x.queue_labels_K).loss
    return torch.autograd.grad(loss, x.q_BD)[0]


def naive_gradient(x: Inputs) -> Tensor:
    """``facebookresearch/moco: moco/builder.py`` with the mask of Exemplar (Zhao et al., ICLR 2021, Eq. 2)."""
    positive = torch.einsum("nc,nc->n", x.q_BD, x.k_BD)[:, None]
    negative = torch.einsum("nc,kc->nk", x.q_BD, x.queue_KD)
    if x.labels_B is not None:
        negative = negative.masked_fill(x.labels_B[:, None] == x.queue_labels_K, -torch.inf)
    logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return torch.autograd.grad(F.cross_entropy(logits, target), x.q_BD)[0]


def gemms(x: Inputs) -> Tensor:
    """The work that no implementation avoids: the logits, and their weighted sum of keys."""
    q, total = x.q_BD.detach(), torch.zeros_like(x.q_BD)
    for keys in x.queue_KD.split(GEMM_BLOCKS[q.device.type]):
        total.addmm_((keys @ q.T).T, keys)
    return total


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_extra_memory(side: str, num_keys: int, with_labels: bool, dtype: str, device: str) -> None:
    """What the child processes do: one evaluation, its peak above the inputs in MB."""
    function = our_gradient if side == "ours" else naive_gradient
    function(make_inputs(512, with_labels, dtype, device))  # libraries and their threads allocate at the first call
    inputs = make_inputs(num_keys, with_labels, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _peak_bytes(device)
    function(inputs)
    print((_peak_bytes(device) - before) / 1e6)


def extra_memory_mb(args: argparse.Namespace, side: str, num_keys: int, with_labels: bool, dtype: str) -> float:
    """Peak memory of one evaluation, measured in a fresh process."""
    case = json.dumps([side, num_keys, with_labels, dtype, args.device])
    command = [sys.executable, __file__, "--threads", str(args.threads), "--memory-of", case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _seconds(args: argparse.Namespace, function: Callable[[], Any]) -> float:
    is_cuda = args.device == "cuda"
    clock = time.process_time if args.threads == 1 and not is_cuda else time.perf_counter
    if is_cuda:
        torch.cuda.synchronize()
    began = clock()
    function()
    if is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def time_sides(args: argparse.Namespace, num_keys: int, with_labels: bool) -> tuple[dict[str, list[float]], dict]:
    """Seconds of every side per round, and the error of our gradients."""
    inputs = {dtype: make_inputs(num_keys, with_labels, dtype, args.device) for dtype in ("fp32", "bf16")}
    queue = FeatureQueue(num_keys, 1).to(args.device)
    queue.index.random_(10 * num_keys)
    ids = torch.arange(BATCH_SIZE, device=args.device)
    sides = {
        "fp32": lambda: our_gradient(inputs["fp32"]),
        "bf16": lambda: our_gradient(inputs["bf16"]),
        "naive": lambda: naive_gradient(inputs["fp32"]),
        "gemms": lambda: gemms(inputs["fp32"]),
        "same_image": lambda: queue.same_image_rate(ids),
    }
    expected = sides["naive"]()  # this and the two below are the warm-up
    errors = {dtype: float((sides[dtype]() - expected).norm() / expected.norm()) for dtype in inputs}
    rounds = max(args.rounds // 3, 3) if num_keys >= 2**20 and args.device == "cpu" else args.rounds
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            times[name].append(_seconds(args, function))
    return times, errors


def run_case(args: argparse.Namespace, num_keys: int, with_labels: bool, memory: dict[str, float]) -> None:
    """Print the lines of one queue length: our fp32 and bf16 queues against naive."""
    times, errors = time_sides(args, num_keys, with_labels)

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    for dtype in ("fp32", "bf16"):
        record = {
            "benchmark": "large_queue",
            "device": args.device,
            "threads": args.threads,
            "case": f"K = {num_keys:,}, {'with' if with_labels else 'without'} labels, {dtype} queue, against naive",
            "ours_ms": round(1000 * statistics.median(times[dtype]), 2),
            "other_ms": round(1000 * statistics.median(times["naive"]), 2),
            "ratio": round(ratio("naive", dtype), 2),
            "goal": RATIO_GOALS.get(num_keys),
            "share_of_gemms": round(ratio("gemms", dtype), 3),
            "share_goal": SHARE_GOAL,
            "extra_mb": round(memory[dtype], 1),
            "extra_mb_goal": MEMORY_GOAL_MB if args.device == "cpu" and num_keys == 2**20 else None,
            "other_extra_mb": round(memory["naive"], 1),
            "same_image_share": round(ratio("same_image", dtype), 4),
            "gradient_error": float(f"{errors[dtype]:.1e}"),
        }
        print(json.dumps(record), flush=True)


def main() -> None:
    """Parse the flags and run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="queue lengths K")
    parser.add_argument("--rounds", type=int, default=9, help="a third of it, at least 3, at K = 1,048,576 on a CPU")
    parser.add_argument("--quick", action="store_true", help="3 rounds, without K = 1,048,576")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_extra_memory(*json.loads(args.memory_of))
        return
    if args.quick:
        args.rounds, args.sizes = 3, [size for size in args.sizes if size < 2**20]
    cases = [(num_keys, with_labels) for num_keys in args.sizes for with_labels in (True, False)]
    memory = {}
    for case in cases:  # all of it first, see above
        memory[case] = {dtype: extra_memory_mb(args, "ours", *case, dtype) for dtype in ("fp32", "bf16")}
        memory[case]["naive"] = extra_memory_mb(args, "naive", *case, "fp32")
    for case in cases:
        run_case(args, *case, memory[case])


if __name__ == "__main__":
    main()
