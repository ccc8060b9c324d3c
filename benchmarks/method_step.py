"""One optimiser step of MoCo v2 and SimSiam: ours against the same step built from lightly's modules.

Same backbone architecture, widths, queue, batch and optimiser on both sides; both run forward, backward, SGD and (MoCo)
the momentum update and the queue write. Cases:

- `moco_v2`: without ShuffleBN, the work that lightly's modules do; `moco_v2 shuffled`: our default on one device, with
  BatchNorm groups and shuffled keys, which lightly's modules do not have;
- `simsiam`;
- fp32 against lightly in fp32, and bf16 autocast against lightly in fp32 (goal) and in bf16 autocast (for information);
- `share of backbone`: time of the backbone passes that the method cannot avoid (same precision, channels_last), over
  the time of our step.

On a CPU: one thread, CPU seconds. On a GPU: wall seconds, also images per second. Sides alternate within each round,
median of the per-round ratios; compilation and the first step are left out.

    python benchmarks/method_step.py [--quick]
    python benchmarks/method_step.py --device cuda --backbone resnet50 --image-size 224 --batch-size 256

Goals: 1.1 in fp32; 1.9 in bf16 on hardware with native bf16; 0.9 of the time in the backbone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimSiamPredictionHead, SimSiamProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from methods import METHODS, Batch, MethodContext, Progress
from methods.backbones import build_backbone
from methods.optimizers import build_optimizer, set_learning_rate

Step = Callable[[], None]
GOALS = {"fp32": 1.1, "bf16": 1.9, "share": 0.9}
TOTAL_STEPS = 1000
LEARNING_RATE = 0.03
OUR_METHODS = {"moco_v2": "moco_v2", "moco_v2 shuffled": "moco_v2", "simsiam": "simsiam"}


def _autocast(args: argparse.Namespace, precision: str) -> torch.autocast:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=precision == "bf16")


def _views(args: argparse.Namespace, channels_last: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.randn(shape, generator=generator).to(args.device, memory_format=layout) for _ in range(2)]


def our_step(args: argparse.Namespace, case: str, precision: str) -> Step:
    """A training step as the train loop does it."""
    spec = METHODS[OUR_METHODS[case]]
    config = spec.config
    if "moco" in case:
        config = replace(config, queue_size=args.queue_size, shuffle_bn="shuffled" in case)
    context = MethodContext(10, 10 * args.queue_size, args.batch_size, 1, args.image_size)
    torch.manual_seed(0)
    method = spec.method(config, build_backbone(args.backbone, "imagenet", spec.zero_init_residual), context)
    method = method.to(args.device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(method, spec.optimizer, 256)
    batch = Batch(
        _views(args, channels_last=True),
        torch.zeros(args.batch_size, dtype=torch.int64, device=args.device),
        torch.arange(args.batch_size, device=args.device),
    )
    progress = Progress(0, TOTAL_STEPS, 0, 1)

    def step() -> None:
        set_learning_rate(optimizer, LEARNING_RATE)
        optimizer.zero_grad(set_to_none=True)
        with _autocast(args, precision):
            loss = method(batch, progress).loss
        loss.backward()
        optimizer.step()
        method.after_step(progress)

    return step


def _torchvision_backbone(args: argparse.Namespace) -> tuple[nn.Module, int]:
    backbone = getattr(torchvision.models, args.backbone)()
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone.to(args.device).train(), width


def _lightly_moco(args: argparse.Namespace) -> tuple[list[nn.Module], Callable[[list[Tensor]], Tensor]]:
    """MoCo v2 as in lightly's documentation."""
    (backbone, width), (backbone_m, _) = _torchvision_backbone(args), _torchvision_backbone(args)
    head = MoCoProjectionHead(width, width, 128).to(args.device)
    head_m = MoCoProjectionHead(width, width, 128).to(args.device)
    deactivate_requires_grad(backbone_m)
    deactivate_requires_grad(head_m)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(args.queue_size, 128)).to(args.device)

    def loss(views: list[Tensor]) -> Tensor:
        update_momentum(backbone, backbone_m, m=0.999)
        update_momentum(head, head_m, m=0.999)
        query = head(backbone(views[0]))
        with torch.no_grad():
            key = head_m(backbone_m(views[1]))
        return criterion(query, key)

    return [backbone, head], loss


def _lightly_simsiam(args: argparse.Namespace) -> tuple[list[nn.Module], Callable[[list[Tensor]], Tensor]]:
    """SimSiam as in lightly's documentation, with the widths of ours."""
    backbone, width = _torchvision_backbone(args)
    projector = SimSiamProjectionHead(width, width, 2048).to(args.device)
    predictor = SimSiamPredictionHead(2048, 512, 2048).to(args.device)
    criterion = NegativeCosineSimilarity()

    def loss(views: list[Tensor]) -> Tensor:
        z_1, z_2 = (projector(backbone(view)) for view in views)
        p_1, p_2 = predictor(z_1), predictor(z_2)
        return 0.5 * (criterion(p_1, z_2.detach()) + criterion(p_2, z_1.detach()))

    return [backbone, projector, predictor], loss


def lightly_step(args: argparse.Namespace, case: str, precision: str) -> Step:
    """A training step from lightly's modules, in torch's default memory format."""
    torch.manual_seed(0)
    modules, loss_fn = _lightly_moco(args) if "moco" in case else _lightly_simsiam(args)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    views = _views(args, channels_last=False)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(args, precision):
            loss = loss_fn(views)
        loss.backward()
        optimizer.step()

    return step


def backbone_step(args: argparse.Namespace, case: str, precision: str) -> Step:
    """The passes no implementation avoids: MoCo trains one view and encodes the other, SimSiam trains both."""
    backbone = build_backbone(args.backbone, "imagenet").to(args.device, memory_format=torch.channels_last).train()
    views = _views(args, channels_last=True)

    def step() -> None:
        for p in backbone.parameters():
            p.grad = None
        with _autocast(args, precision):
            outputs = [backbone(views[0])]
            if "moco" in case:
                with torch.no_grad():
                    backbone(views[1])
            else:
                outputs.append(backbone(views[1]))
        sum(output.float().sum() for output in outputs).backward()  # type: ignore[union-attr]

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
    sides = {f"{case} {precision} vs lightly fp32": (lightly_step(args, case, "fp32"), GOALS[precision])}
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
    parser.add_argument("--cases", nargs="+", choices=list(OUR_METHODS), default=list(OUR_METHODS))
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
    for case in args.cases:
        for precision in args.precisions:
            run_case(args, case, precision)


if __name__ == "__main__":
    main()
