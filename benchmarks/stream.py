"""Delivered two-view batches, wall clock, two workers: our streams against torch's DataLoader with the official recipe.

All sides deliver MoCo v2 batches of the same JPEG images to the process that would train:

- DataLoader(2 worker processes, persistent): Pillow, torchvision v1 transforms, normalised float32 batches
  (`facebookresearch/moco: main_moco.py`);
- ray: `RayDataStream` on a local Ray with 2 CPUs, uint8 batches out of shared memory, then `to_device` on the CPU;
- memory: `MemoryStream` with 2 threads from the decoded store, then `to_device`.

Each round runs every side for some epochs, one after the other. The time counts from the first delivered batch to the
last one, for all sides alike: starting worker processes, compiled kernels and Ray is reported apart (`start_s`), as is
decoding the store once. The ratio is the median of the per-round ratios.

    python benchmarks/stream.py [--quick]

Goal: 3 x the DataLoader.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAY_DATA_DISABLE_PROGRESS_BARS"):
    os.environ[variable] = "1"  # before the libraries load
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DATA_LOG_LEVEL="ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from augment import encode_jpeg, natural_image, official_transform
from PIL import Image

from image_data.prepared import SplitInfo
from image_data.store import DecodedStore
from image_data.stream import ImageStream, MemoryStream, to_device
from image_data.views import RECIPES

WORKERS = 2
GOAL = 3.0


@dataclass(frozen=True)
class Case:
    """Images and views of one comparison.

    Attributes:
        name: shown in the result.
        side: longer side of the JPEG images in pixels.
        view: side of the views.
        num_images: per epoch.
        batch_size: of each side.
        epochs: timed together in a round.
    """

    name: str
    side: int
    view: int
    num_images: int
    batch_size: int
    epochs: int


CASES = (
    Case("jpeg 500 -> 224", 500, 224, 512, 64, 3),
    Case("jpeg 96 -> 64", 96, 64, 2048, 128, 3),
)
QUICK = (Case("jpeg 500 -> 224", 500, 224, 128, 32, 2), Case("jpeg 96 -> 64", 96, 64, 512, 64, 2))


def make_images(case: Case) -> list[bytes]:
    """JPEG bytes of pictures with a photograph's spectrum."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(case.num_images):
        height, width = (case.side * 3 // 4, case.side) if i % 3 else (case.side, case.side * 3 // 4)
        pixels = natural_image(height, width, rng)
        images.append(encode_jpeg(pixels) if case.side > 256 else simplejpeg.encode_jpeg(pixels, quality=90))
    return images


def write_split(images: list[bytes], directory: str) -> SplitInfo:
    """The images as 8 packed shards."""
    shapes = [simplejpeg.decode_jpeg_header(data)[:2] for data in images]
    files = []
    for rows in np.array_split(np.arange(len(images)), 8):
        columns = {
            "image": pa.array([images[i] for i in rows], pa.binary()),
            "label": pa.array(np.zeros(len(rows), np.int64)),
            "index": pa.array(rows, pa.int64()),
            "height": pa.array([shapes[i][0] for i in rows], pa.int32()),
            "width": pa.array([shapes[i][1] for i in rows], pa.int32()),
        }
        files.append(f"{directory}/train-{len(files):05d}.parquet")
        pq.write_table(pa.table(columns), files[-1], compression="none")
    decoded = sum(3 * height * width for height, width in shapes)
    return SplitInfo(
        name="train",
        files=tuple(files),
        num_images=len(images),
        class_names=("all",),
        class_counts=(len(images),),
        num_bytes=sum(map(len, images)),
        decoded_bytes=decoded,
    )


class OfficialImages(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Two views of each image by the official recipe."""

    def __init__(self, images: list[bytes], size: int) -> None:
        self._images, self._transform = images, official_transform(size)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(io.BytesIO(self._images[index])) as file:
            image = file.convert("RGB")
        return self._transform(image), self._transform(image)


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def loader_batches(case: Case, images: list[bytes]) -> Iterator[Any]:
    """Every batch of the DataLoader, epoch after epoch."""
    loader = torch.utils.data.DataLoader(
        OfficialImages(images, case.view),
        batch_size=case.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        worker_init_fn=one_thread,
    )
    for _ in range(case.epochs):
        yield from loader


def stream_batches(case: Case, stream: ImageStream) -> Iterator[Any]:
    """Every batch of a stream, on the device."""
    for epoch in range(case.epochs):
        for batch in stream.epoch(epoch):
            yield to_device(batch, "cpu", channels_last=False)
    stream.close()


def measure(make: Callable[[], Iterator[Any]], images_per_batch: int) -> tuple[float, float]:
    """Seconds until the first batch, and milliseconds per image from there to the last one."""
    start = time.perf_counter()
    batches = make()
    next(batches)
    first = time.perf_counter()
    count = sum(1 for _ in batches)
    return first - start, (time.perf_counter() - first) / (count * images_per_batch) * 1e3


def sides(
    case: Case, images: list[bytes], split: SplitInfo, store: DecodedStore
) -> dict[str, Callable[[], Iterator[Any]]]:
    """What makes the batches, by name."""
    from image_data.ray_stream import RayDataStream

    recipe = (RECIPES["moco_v2"],) * 2
    settings: dict[str, Any] = {"image_size": case.view, "batch_size": case.batch_size}
    return {
        "dataloader": lambda: loader_batches(case, images),
        "ray": lambda: stream_batches(case, RayDataStream(split, recipe, num_epochs=case.epochs, **settings)),
        "memory": lambda: stream_batches(case, MemoryStream(store, recipe, threads=WORKERS, **settings)),
    }


def run_case(case: Case, rounds: int, directory: str) -> None:
    """Measure one case and print a JSON line per stream."""
    images = make_images(case)
    split = write_split(images, directory)
    began = time.perf_counter()
    store = DecodedStore.open(split, directory, threads=WORKERS)
    decode_seconds = time.perf_counter() - began
    starts: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, make in sides(case, images, split, store).items():
            start, per_image = measure(make, case.batch_size)
            starts.setdefault(name, []).append(start)
            times.setdefault(name, []).append(per_image)
    for name in ("ray", "memory"):
        pairs = zip(times["dataloader"], times[name], strict=True)
        line = {
            "benchmark": "stream",
            "case": f"{case.name}, {name}, {WORKERS} workers",
            "ours_ms": round(statistics.median(times[name]), 3),
            "other_ms": round(statistics.median(times["dataloader"]), 3),
            "ratio": round(statistics.median(other / ours for other, ours in pairs), 2),
            "goal": GOAL,
            "start_s": round(starts[name][0], 1),
            "restart_s": round(statistics.median(starts[name][1:] or starts[name]), 2),
            "other_start_s": round(statistics.median(starts["dataloader"]), 2),
        }
        if name == "memory":
            line["decode_once_s"] = round(decode_seconds, 2)
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    import ray

    environment = {"PYTHONPATH": sys.path[0], "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": environment},
    )
    for case in QUICK if quick else CASES:
        with tempfile.TemporaryDirectory() as directory:
            run_case(case, rounds=2 if quick else 5, directory=directory)
    ray.shutdown()


if __name__ == "__main__":
    main()
