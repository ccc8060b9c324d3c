"""Momentum update of the key encoder (MoCo, Eq. 2): ours against per-parameter loops.

Ours is `MomentumEncoder.update`, one multi-tensor operation in place. The others, on the same modules:

- `moco`: the loop of ``facebookresearch/moco: moco/builder.py``, which makes three new tensors per parameter (also
  solo-learn's);
- `lightly`: ``lightly.models.utils.update_momentum``.

On a CPU: one thread, CPU seconds. On a GPU: wall seconds. Sides alternate within each round, median of the per-round
ratios, first round left out. `gigabytes_per_second` of ours counts two reads and one write of 4 bytes per parameter:
the update can be no faster than memory. `largest_difference` is between the parameters after one update by each.

    python benchmarks/momentum_update.py [--quick] [--device cuda]

Goals: 2 x the loop of MoCo, 1.2 x lightly.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightly.models.utils import update_momentum
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from methods.backbones import build_backbone
from methods.momentum_encoder import MomentumEncoder

MOMENTUM = 0.999
GOALS = {"moco": 2.0, "lightly": 1.2}


@torch.no_grad()
def moco_update(online: nn.Module, slow: nn.Module) -> None:
    """``_momentum_update_key_encoder`` of the official code."""
    for p, p_slow in zip(online.parameters(), slow.parameters(), strict=True):
        p_slow.data = p_slow.data * MOMENTUM + p.data * (1.0 - MOMENTUM)


def _seconds(device: str, update: Callable[[], None], repeats: int) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    for _ in range(repeats):
        update()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - began) / repeats


def _perturbed(module: nn.Module) -> nn.Module:
    """Another set of weights: equal ones would hide a wrong update."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.device), alpha=0.01)
    return other


def run_case(args: argparse.Namespace, backbone: str) -> None:
    """Print one line per competitor."""
    torch.manual_seed(0)
    slow = build_backbone(backbone, "imagenet").to(args.device)
    online = _perturbed(slow)
    encoder = MomentumEncoder(slow)
    copies = {name: copy.deepcopy(slow).requires_grad_(False) for name in GOALS}
    sides: dict[str, Callable[[], None]] = {
        "ours": lambda: encoder.update(online, MOMENTUM),
        "moco": lambda: moco_update(online, copies["moco"]),
        "lightly": lambda: update_momentum(online, copies["lightly"], m=MOMENTUM),
    }
    for update in sides.values():
        update()
    difference = {
        name: max(float((a - b).abs().max()) for a, b in zip(encoder.parameters(), other.parameters(), strict=True))
        for name, other in copies.items()
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name, update in sides.items():
            seconds = _seconds(args.device, update, args.repeats)
            times[name] += [seconds] if i else []
    num_parameters = sum(p.numel() for p in slow.parameters())
    for name, goal in GOALS.items():
        record = {
            "benchmark": "momentum_update",
            "device": args.device,
            "case": f"{backbone}, against {name}",
            "ours_ms": round(1000 * statistics.median(times["ours"]), 3),
            "other_ms": round(1000 * statistics.median(times[name]), 3),
            "ratio": round(statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True)), 2),
            "goal": goal,
            "gigabytes_per_second": round(12 * num_parameters / statistics.median(times["ours"]) / 1e9, 1),
            "largest_difference": difference[name],
        }
        print(json.dumps(record), flush=True)


def main() -> None:
    """Parse the flags and run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=10, help="updates per round and side")
    parser.add_argument("--quick", action="store_true", help="5 rounds of 3 updates")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.repeats = 5, 3
    torch.set_num_threads(1)
    for backbone in args.backbones:
        run_case(args, backbone)


if __name__ == "__main__":
    main()
