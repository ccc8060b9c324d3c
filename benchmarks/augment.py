"""Two augmented views of an image on one core: ours against the official MoCo v2 recipe and against albumentations.

All sides carry out the MoCo v2 recipe (crop 0.2-1, jitter p 0.8, gray p 0.2, blur p 0.5, flip) twice per image and end
with one batch per view. `jpeg 500 -> 224` starts from JPEG bytes, decoded once per image; the `memory` cases start from
a uint8 array, as a decoded store delivers.

- official: Pillow and torchvision v1 transforms, normalised float32 batches (`facebookresearch/moco: main_moco.py`);
- albumentations: uint8 batches, OpenCV decoding, area interpolation (the antialiased one);
- ours: uint8 batches; normalisation is left to the training device.

CPU seconds of one process, one thread, sides alternate within each round, median of the per-round ratios.

    python benchmarks/augment.py [--quick]

Goals: official x 4 from JPEG and x 10 from memory, albumentations x 1.3, half of the speed of decoding alone.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"  # before the libraries load

import argparse
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, ImageBuffer
from image_data.views import RECIPES, ViewMaker

Side = Callable[[], object]
JPEG_BYTES = 93_000  # of a 500 px ImageNet photograph
GOALS = {"official jpeg": 4.0, "official memory": 10.0, "albumentations": 1.3, "decode only": 0.5}


def natural_image(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A picture with a photograph's 1/f spectrum and correlated channels, uint8 (H, W, 3)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None, :] * width)
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / np.maximum(frequency, 1.0)
    mixed = np.einsum(
        "cd,dhw->chw",
        np.array([[1, 0.3, 0.1], [1, 0, -0.3], [1, -0.3, 0.2]]),
        np.fft.irfft2(spectrum, s=(height, width)),
    )
    mixed = mixed / mixed.std() * 55.0 + 120.0
    return np.ascontiguousarray(mixed.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """JPEG bytes at the quality that comes closest to `JPEG_BYTES`."""
    encoded = [simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420") for quality in range(60, 98, 2)]
    return min(encoded, key=lambda data: abs(len(data) - JPEG_BYTES))


class PillowBlur:
    """The official recipe's Gaussian blur."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def official_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """MoCo v2's transform of one view."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([PillowBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def albumentations_transform(size: int) -> A.Compose:
    """The same recipe in albumentations, uint8."""
    return A.Compose(
        [
            A.RandomResizedCrop((size, size), scale=(0.2, 1.0), interpolation=cv2.INTER_AREA),
            A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
            A.HorizontalFlip(p=0.5),
            A.ToTensorV2(),
        ]
    )


def official_side(load: Callable[[int], Image.Image], num_images: int, size: int) -> Side:
    transform = official_transform(size)

    def make() -> list[torch.Tensor]:
        pairs = [(transform(image), transform(image)) for image in map(load, range(num_images))]
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    return make


def albumentations_side(load: Callable[[int], np.ndarray], num_images: int, size: int) -> Side:
    transform = albumentations_transform(size)

    def make() -> list[torch.Tensor]:
        pairs = [
            (transform(image=image)["image"], transform(image=image)["image"]) for image in map(load, range(num_images))
        ]
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    return make


def image_buffer(sides: list[tuple[int, int]]) -> ImageBuffer:
    """An empty buffer for images of these (height, width)."""
    heights, widths = np.array(sides, dtype=np.int32).T
    num_bytes = heights.astype(np.int64) * widths * 3
    return ImageBuffer(
        np.zeros(num_bytes.sum(), np.uint8), np.cumsum(num_bytes) - num_bytes, heights.copy(), widths.copy()
    )


def decode_side(files: list[bytes], images: ImageBuffer) -> Side:
    ends = np.append(images.offsets[1:], len(images.pixels))

    def decode() -> None:
        for data, start, end in zip(files, images.offsets, ends, strict=True):
            simplejpeg.decode_jpeg(data, buffer=images.pixels[start:end])

    return decode


def fused_side(images: ImageBuffer, size: int, decode: Side | None = None) -> Side:
    make_views = ViewMaker((RECIPES["moco_v2"],) * 2, size, seed=0)
    index = np.arange(len(images.offsets))
    epoch = 0

    def make() -> list[np.ndarray]:
        nonlocal epoch
        epoch += 1
        if decode is not None:
            decode()
        return make_views(images, epoch, index)

    return make


def measure(sides: dict[str, Side], rounds: int, num_images: int) -> dict[str, list[float]]:
    """CPU milliseconds per image of every side in every round; the first, unrecorded round warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(rounds + 1):
        for name, side in sides.items():
            start = time.process_time()
            side()
            if round_number:
                times[name].append((time.process_time() - start) * 1e3 / num_images)
    return times


def report(case: str, times: dict[str, list[float]]) -> None:
    """One JSON line per competitor."""
    ours = times["ours"]
    for other in (name for name in times if name != "ours"):
        ratio = statistics.median(theirs / mine for theirs, mine in zip(times[other], ours, strict=True))
        kind = other if other != "official" else f"official {case.split()[0]}"
        line = {
            "benchmark": "augment",
            "case": f"two views, {case}, against {other}",
            "ours_ms": round(statistics.median(ours), 4),
            "other_ms": round(statistics.median(times[other]), 4),
            "ratio": round(ratio, 2),
            "goal": GOALS[kind],
        }
        print(json.dumps(line), flush=True)


def jpeg_case(rounds: int, num_images: int) -> None:
    """From encoded 500 px images to 224 px views."""
    rng = np.random.default_rng(0)
    sides = [(375, 500) if i % 3 else (500, 375) for i in range(num_images)]
    files = [encode_jpeg(natural_image(height, width, rng)) for height, width in sides]
    images = image_buffer(sides)
    decode = decode_side(files, images)
    times = measure(
        {
            "ours": fused_side(images, 224, decode),
            "official": official_side(lambda i: Image.open(io.BytesIO(files[i])).convert("RGB"), num_images, 224),
            "albumentations": albumentations_side(
                lambda i: cv2.imdecode(np.frombuffer(files[i], np.uint8), cv2.IMREAD_COLOR_RGB), num_images, 224
            ),
            "decode only": decode,
        },
        rounds,
        num_images,
    )
    report("jpeg 500 -> 224", times)


def memory_case(size: int, rounds: int, num_images: int) -> None:
    """From a decoded uint8 array to views of the same side."""
    rng = np.random.default_rng(0)
    arrays = [natural_image(size, size, rng) for _ in range(num_images)]
    images = image_buffer([(size, size)] * num_images)
    images.pixels[:] = np.stack(arrays).ravel()
    times = measure(
        {
            "ours": fused_side(images, size),
            "official": official_side(lambda i: Image.fromarray(arrays[i]), num_images, size),
            "albumentations": albumentations_side(lambda i: arrays[i], num_images, size),
        },
        rounds,
        num_images,
    )
    report(f"memory {size} -> {size}", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rounds = 3 if quick else 9
    jpeg_case(rounds, 8 if quick else 32)
    for size in (32, 64, 84):
        memory_case(size, rounds, 32 if quick else 256)


if __name__ == "__main__":
    main()
