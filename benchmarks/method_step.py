"""One optimiser step of every method: its share of backbone passes, and ours against the same step from lightly.

Same backbone architecture, widths, queue, batch and optimiser (SGD) on both sides; both run forward, backward, SGD and
what the method does after it. Cases:

- every method of ``METHODS``; `moco_v2` without ShuffleBN, the work that lightly's modules do, and `moco_v2 shuffled`,
  our default on one device, with BatchNorm groups and shuffled keys, which lightly's modules do not have;
- `share of backbone`: time of the backbone passes that the method cannot avoid (same precision, channels_last), over
  the time of our step; decoders (VAE) and heads are not part of the floor;
- against lightly where it has the method: fp32 against lightly in fp32, and bf16 autocast against lightly in fp32
  (goal) and in bf16 autocast (for information).

On a CPU: one thread, CPU seconds. On a GPU: wall seconds, also images per second. Sides alternate within each round,
median of the per-round ratios; compilation and the first step are left out.

    python benchmarks/method_step.py [--quick] [--methods moco_v2 byol]
    python benchmarks/method_step.py --device cuda --backbone resnet50 --image-size 224 --batch-size 256

Goals: 1.0 against lightly in fp32 (MoCo v2 and SimSiam 1.1), 1.5 in bf16 (1.9) on hardware with native bf16; 0.9 of
the time in the backbone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._lightly_steps import LIGHTLY, lightly_modules
from image_data import RECIPES
from methods import METHODS, Batch, MethodContext, Progress
from methods.backbones import build_backbone
from methods.optimizers import OptimizerConfig, build_optimizer

Step = Callable[[], None]
GOALS = {"fp32": 1.0, "bf16": 1.5, "share": 0.9}
HIGHER_GOALS = {("moco_v2", "fp32"): 1.1, ("simsiam", "fp32"): 1.1, ("moco_v2", "bf16"): 1.9, ("simsiam", "bf16"): 1.9}
LEARNING_RATE = 0.03
NUM_CLASSES = 10
SHUFFLED = "moco_v2 shuffled"
# Sets of views that take a pass of their own: (first view, number of views in one batch, with gradient).
_TWO = ((0, 2, True),)
_KEYS = ((0, 1, True), (1, 1, False))
_PAIR = ((0, 1, True), (1, 1, True))
_HIDDEN = ((0, 1, True), (0, 1, True))  # CAMtrast: x and x'
FLOORS: dict[str, tuple[tuple[int, int, bool], ...]] = {
    "moco_v1": _KEYS,
    "moco_v2": _KEYS,
    "exemplar_v1": _KEYS,
    "exemplar_v2": _KEYS,
    "simclr": _TWO,
    "supcon": _TWO,
    "amdim": _TWO,
    "simsiam": _PAIR,
    "byol": (*_PAIR, (0, 1, False), (1, 1, False)),
    "swav": ((0, 2, True), (2, 6, True)),
    "camtrast_moco": (*_HIDDEN, (0, 1, False)),
    "camtrast_contrast_only_moco": ((0, 1, True), (0, 1, False)),
    "camtrast_simsiam": _HIDDEN,
    "camtrast_cam_only": _HIDDEN,
    "camtrast_contrast_only_simsiam": _HIDDEN,
    "camtrast_code": (*_HIDDEN, (0, 1, True)),  # the second step needs x again, with the moved weights
}
ONE_PASS = ((0, 1, True),)


def _autocast(args: argparse.Namespace, precision: str) -> torch.autocast:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=precision == "bf16")


def _views(args: argparse.Namespace, method: str, channels_last: bool) -> list[Tensor]:
    """As many random views as the method takes, in their sizes."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sides = [RECIPES[name].side(args.image_size) for name in METHODS[method].views]
    shapes = [(args.batch_size, 3, side, side) for side in sides]
    return [torch.randn(shape, generator=generator).to(args.device, memory_format=layout) for shape in shapes]


def our_step(args: argparse.Namespace, case: str, precision: str) -> Step:
    """A training step as the train loop does it."""
    name = case.split()[0]
    spec = METHODS[name]
    changes: dict[str, Any] = {"queue_size": args.queue_size, "queue_start_epoch": 0, "cam_warmup_epochs": 0}
    changes |= {"shuffle_bn": case == SHUFFLED} if name == "moco_v2" else {}
    known = {f.name for f in fields(spec.config)}
    config = replace(spec.config, **{key: value for key, value in changes.items() if key in known})
    if name == "swav":
        config = replace(config, queue_size=0)  # lightly's step has none
    images = max(10 * args.queue_size, args.batch_size)
    context = MethodContext(NUM_CLASSES, images, args.batch_size, 1, args.image_size)
    torch.manual_seed(0)
    backbone = build_backbone(args.backbone, "imagenet", spec.zero_init_residual, spec.color_space)
    method = spec.method(config, backbone, context)
    method = method.to(args.device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(method, OptimizerConfig(learning_rate=LEARNING_RATE), 256)
    labels = torch.arange(args.batch_size, device=args.device)
    batch = Batch(_views(args, name, channels_last=True), labels % NUM_CLASSES, labels)
    progress = Progress(step=500, total_steps=1000, epoch=5, total_epochs=10)
    phases = getattr(method, "num_phases", lambda _: 1)(progress)

    def step() -> None:
        for phase in range(phases):
            optimizer.zero_grad(set_to_none=True)
            with _autocast(args, precision):
                loss = method(batch, replace(progress, phase=phase)).loss
            loss.backward()
            optimizer.step()
        method.after_step(progress)

    return step


def lightly_step(args: argparse.Namespace, case: str, precision: str) -> Step:
    """A training step from lightly's modules, in torch's default memory format."""
    modules, loss_fn = lightly_modules(args, case.split()[0])
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    views = _views(args, case.split()[0], channels_last=False)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(args, precision):
            loss = loss_fn(views)
        loss.backward()
        optimizer.step()

    return step


def backbone_step(args: argparse.Namespace, case: str, precision: str) -> Step:
    """The passes over the backbone that no implementation of the method avoids."""
    name = case.split()[0]
    backbone = build_backbone(args.backbone, "imagenet", color_space=METHODS[name].color_space)
    backbone = backbone.to(args.device, memory_format=torch.channels_last).train()
    views = _views(args, name, channels_last=True)
    if name == "rotation":
        views = [views[0].repeat(4, 1, 1, 1).contiguous(memory_format=torch.channels_last)]

    def step() -> None:
        for p in backbone.parameters():
            p.grad = None
        trained = []
        with _autocast(args, precision):
            for first, count, with_gradient in FLOORS.get(name, ONE_PASS):
                x = torch.cat(views[first : first + count]) if count > 1 else views[first]
                with torch.set_grad_enabled(with_gradient):
                    trained += [backbone(x)] if with_gradient else []
                    if not with_gradient:
                        backbone(x)
        sum(output.float().sum() for output in trained).backward()  # type: ignore[union-attr]

    return step


def _seconds(args: argparse.Namespace, step: Step, repeats: int) -> float:
    is_cuda = args.device == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if is_cuda else time.process_time
    began = clock()
    for _ in range(repeats):
        step()
    if is_cuda:
        torch.cuda.synchronize()
    return (clock() - began) / repeats


def compare(args: argparse.Namespace, ours: Step, other: Step) -> dict[str, float]:
    """Alternate both sides; the median of the per-round ratios other / ours."""
    times: list[tuple[float, float]] = []
    for i in range(args.rounds + 1):
        sides = (_seconds(args, ours, args.repeats), _seconds(args, other, args.repeats))
        times += [sides] if i else []  # the first round warms up
    ours_ms, other_ms = (1000 * statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    return {"ours_ms": round(ours_ms, 2), "other_ms": round(other_ms, 2), "ratio": round(ratio, 3)}


def has_native_bf16(device: str) -> bool:
    """Whether the matrix units of the device compute in bf16; otherwise bf16 is emulated and slow."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def run_case(args: argparse.Namespace, case: str, precision: str) -> None:
    """Print the lines of one method and precision."""
    record = {
        "benchmark": "method_step",
        "device": args.device,
        "backbone": args.backbone,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "queue_size": args.queue_size,
        "native_bf16": has_native_bf16(args.device),
    }
    ours = our_step(args, case, precision)
    sides: dict[str, tuple[Step, float | None]] = {}
    if case.split()[0] in LIGHTLY:
        goal = HIGHER_GOALS.get((case.split()[0], precision), GOALS[precision])
        sides[f"{case} {precision} vs lightly fp32"] = (lightly_step(args, case, "fp32"), goal)
        if precision == "bf16":
            sides[f"{case} bf16 vs lightly bf16"] = (lightly_step(args, case, "bf16"), None)
    sides[f"{case} {precision} share of backbone"] = (backbone_step(args, case, precision), GOALS["share"])
    for name, (other, goal) in sides.items():
        result: dict[str, Any] = {**record, "case": name, **compare(args, ours, other), "goal": goal}
        if args.device == "cuda":
            result["pairs_per_second"] = round(1000 * args.batch_size / result["ours_ms"])
        print(json.dumps(result), flush=True)


def main() -> None:
    """Parse the flags and run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backbone", choices=["resnet18", "resnet34", "resnet50"], default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--queue-size", type=int, default=65536)
    cases = [*METHODS, SHUFFLED]
    parser.add_argument("--methods", nargs="+", choices=cases, default=cases)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], help="default: bf16 only where native")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=1, help="steps per round and side")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 3
    if args.precisions is None:
        args.precisions = ["fp32", "bf16"] if has_native_bf16(args.device) else ["fp32"]
        if "bf16" not in args.precisions:
            print("bf16 left out: this device emulates it, up to a minute per step.", file=sys.stderr)
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    for case in args.methods:
        for precision in args.precisions:
            run_case(args, case, precision)


if __name__ == "__main__":
    main()
