"""A small image set on disk and a plain reporter, for tests of the jobs without Ray."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from image_data.prepare import DataConfig, prepare
from methods.backbones import LabBackbone


def write_images(root: Path, num_classes: int = 18, per_class: int = 24, side: int = 32) -> Path:
    """Classes are oriented coloured gratings: easy to learn, no two images equal."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    for c in range(num_classes):
        folder = root / f"class_{c:02d}"
        folder.mkdir(parents=True)
        angle, colour = np.pi * c / num_classes, rng.uniform(0.3, 1.0, 3)
        for i in range(per_class):
            phase = rng.uniform(0, 2 * np.pi)
            wave = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
            pixels = wave[..., None] * colour + rng.normal(0, 0.05, (side, side, 3))
            Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


class PlainReporter:
    """Keeps reports in memory and checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.reports: list[dict] = []

    def report(self, metrics, save):
        self.reports.append(metrics)
        if save is not None:
            save(self.folder / f"epoch_{int(metrics['epoch']):05d}")

    @contextmanager
    def latest(self):
        found = sorted(self.folder.glob("epoch_*"))
        yield found[-1] if found else None

    def progress(self, metrics):
        pass


class TinyBackbone(nn.Module):
    """A backbone of the contract that is small enough for many runs; 16 px images give a 4x4 map."""

    num_features = 16

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())

    @property
    def stages(self):
        return [self.stem, self.body]

    def forward_features(self, x):
        return self.body(self.stem(x))

    def forward(self, x):
        return self.forward_features(x).mean(dim=(2, 3))


@pytest.fixture
def tiny_backbone(monkeypatch):
    """Runs of this process use ``TinyBackbone`` whatever their configuration names."""
    import rayjobs.checkpoint
    import rayjobs.train_loop

    def build(*_, color_space="rgb", **__):
        return TinyBackbone() if color_space == "rgb" else LabBackbone(TinyBackbone(1), TinyBackbone(2))

    monkeypatch.setattr(rayjobs.train_loop, "build_backbone", build)
    monkeypatch.setattr(rayjobs.checkpoint, "build_backbone", build)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture(scope="session")
def data_config(image_folder, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return DataConfig(data=(f"folder:{image_folder}",), class_split=(0.4, 0.3, 0.3), cache=cache)


@pytest.fixture(scope="session")
def data(data_config):
    return prepare(data_config, log=lambda _: None)
