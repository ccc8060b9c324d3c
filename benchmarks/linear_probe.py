"""Linear probe on cached features against running the backbone in every epoch.

ResNet-18 in eval mode on 64 px images that are already in memory, one view each, so decoding and augmentation are in
neither side. Cases:

- `cached probe`: ours is one pass of the feature extractor and 30 epochs of the probe on what it returned, for one
  learning rate. The other side is MoCo's script: in every epoch the fp32 backbone (torchvision's layout) and then
  autograd through one linear layer with torch.optim.SGD. One such epoch is run per round and counted 30 times: its
  epochs do the same work.
- `rates at once`: one epoch of the read-off on the fly with the 9 learning rates of MoCo's recipe in the same pass,
  against 9 runs with one rate each (one is run and counted 9 times).

On a CPU: one thread, CPU seconds. On a GPU: wall seconds, and our pass in bf16. Sides alternate, median of the ratios.

    python benchmarks/linear_probe.py [--quick] [--device cuda]

Goal of the cached probe: 2 x epochs = 60 (with a bf16 pass on hardware that has it), floor 25.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.features import FeatureExtractor, assemble_features
from evaluation.linear import LinearConfig, fit_probes
from evaluation.linear_recipes import LINEAR_RECIPES, LinearHeads
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from methods.backbones import build_backbone

EPOCHS, NUM_CLASSES, IMAGE_SIZE, BATCH_SIZE = 30, 100, 64, 256
GOAL, FLOOR = 2 * EPOCHS, 25
CLASS_NAMES = tuple(f"class {c}" for c in range(NUM_CLASSES))


class Bench:
    """Images, labels and the frozen backbone of both sides."""

    def __init__(self, num_images: int, device: str) -> None:
        rng = np.random.default_rng(0)
        self.device = device
        self.images = rng.integers(0, 256, (num_images, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        self.labels = np.arange(num_images) % NUM_CLASSES
        self.backbone = build_backbone("resnet18", stem="imagenet").eval().to(device)
        self.extractor = FeatureExtractor(self.backbone, device, autocast=device != "cpu")
        self.mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1)

    def batches(self) -> Iterator[slice]:
        """Rows of each batch."""
        return (slice(start, start + BATCH_SIZE) for start in range(0, len(self.images), BATCH_SIZE))

    def cached(self) -> None:
        """One pass, then all epochs of the probe."""
        parts = (
            (self.extractor(self.images[b]), self.labels[b], np.arange(len(self.labels))[b]) for b in self.batches()
        )
        found = assemble_features(parts, CLASS_NAMES)
        config = LinearConfig(epochs=EPOCHS, batch_size=BATCH_SIZE)
        generator = torch.Generator().manual_seed(0)
        fit_probes(found.features, found.labels, NUM_CLASSES, config, (0.1,), generator, self.device)

    def online_epoch(self) -> None:
        """One epoch as MoCo's script runs it."""
        layer = nn.Linear(self.backbone.num_features, NUM_CLASSES).to(self.device)
        optimizer = torch.optim.SGD(layer.parameters(), 30.0, momentum=0.9)
        for rows in self.batches():
            loss = cross_entropy(layer(self._features(rows)), self._targets(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def readoff_epoch(self) -> None:
        """One epoch of the read-off with all rates of MoCo's recipe, on the same fp32 pass as the other side."""
        recipe = LINEAR_RECIPES["moco"]
        generator = torch.Generator().manual_seed(0)
        rates, dim = recipe.rates(labels_used=False), self.backbone.num_features
        heads = LinearHeads(recipe, rates, dim, NUM_CLASSES, generator, self.device)
        for rows in self.batches():
            heads.step(self._features(rows), self._targets(rows), 1.0)

    @torch.no_grad()
    def _features(self, rows: slice) -> Tensor:
        x = torch.from_numpy(self.images[rows]).to(self.device).float().div_(255)
        return self.backbone((x - self.mean) / self.std)

    def _targets(self, rows: slice) -> Tensor:
        return torch.from_numpy(self.labels[rows]).to(self.device)


def seconds(run: Callable[[], None], device: str) -> float:
    """CPU seconds of a call, on a GPU wall seconds until it has finished."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    case: str, ours: Callable[[], None], other: Callable[[], None], times: int, rounds: int, device: str
) -> dict:
    """Alternate both sides; the other one counts ``times`` times."""
    for side in (ours, other):  # warm-up
        side()
    our_s, other_s = [], []
    for _ in range(rounds):
        our_s.append(seconds(ours, device))
        other_s.append(times * seconds(other, device))
    return {
        "benchmark": "linear_probe",
        "case": case,
        "ours_s": round(statistics.median(our_s), 3),
        "other_s": round(statistics.median(other_s), 3),
        "other_s_is": f"measured once per round, x {times}",
        "ratio": round(statistics.median(b / a for a, b in zip(our_s, other_s, strict=True)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 images and 1 round instead of 2,048 and 5")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_images, rounds = (256, 1) if args.quick else (2048, 5)
    bench = Bench(num_images, args.device)
    name = f"ResNet-18 {IMAGE_SIZE} px, {num_images:,} images, {NUM_CLASSES} classes"
    probe = compare(
        f"cached probe, {EPOCHS} epochs: {name}", bench.cached, bench.online_epoch, EPOCHS, rounds, args.device
    )
    print(json.dumps(probe | {"goal": GOAL, "floor": FLOOR}), flush=True)
    num_rates = len(LINEAR_RECIPES["moco"].grid)
    rates = compare(
        f"{num_rates} rates at once: {name}", bench.readoff_epoch, bench.online_epoch, num_rates, rounds, args.device
    )
    print(json.dumps(rates | {"goal": None}), flush=True)


if __name__ == "__main__":
    main()
