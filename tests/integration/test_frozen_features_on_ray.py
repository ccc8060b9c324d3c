"""Passes of the frozen backbone and inversions on a real cluster give what this process gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.inversion import InversionConfig, invert_in_groups
from methods.backbones import build_backbone
from rayjobs.checkpoint import save_checkpoint
from rayjobs.configs import TrainConfig, preset
from rayjobs.record import run_record
from rayjobs.transfer import local_features
from tests.rayjobs.conftest import write_images


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A checkpoint of a random ResNet-9, its data and settings."""
    from image_data.prepare import DataConfig, prepare

    root = tmp_path_factory.mktemp("frozen")
    config = DataConfig((f"folder:{write_images(root / 'tree', 4, 30)}",), class_split=None, cache=str(root / "cache"))
    data = prepare(config, log=lambda _: None)
    settings = TrainConfig(backbone="resnet9", stem="small", image_size=24, batch_size=32, epochs=0, num_workers=2)
    torch.manual_seed(0)
    backbone = build_backbone("resnet9", "small").eval()
    run = preset("supervised", settings, config)
    save_checkpoint(root / "checkpoint", run, run_record(run, data), backbone)
    return str(root / "checkpoint"), backbone, data, settings


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pool_of_actors_gives_the_views_of_one_process_in_order(ray_cluster, prepared, shuffle):
    from rayjobs.feature_pass import ray_view_features

    checkpoint, backbone, data, settings = prepared
    local = local_features(backbone, data, settings, "val", 3, torch.device("cpu"))
    options = {"epoch": 2, "batch_size": 40}
    passed = list(
        ray_view_features(checkpoint, data.split("train"), settings, "light", seed=3, shuffle=shuffle, **options)
    )
    index = np.concatenate([batch.index for batch in passed])
    assert [len(batch.index) for batch in passed] == [40, 40, len(index) - 80]
    expected = list(local.view_features("train", "light", shuffle=False, **options))
    order = np.argsort(index)
    np.testing.assert_array_equal(index[order], np.concatenate([batch.index for batch in expected]))
    if not shuffle:
        np.testing.assert_array_equal(order, np.arange(len(index)))
    found = np.concatenate([batch.features for batch in passed])[order]
    np.testing.assert_allclose(found, np.concatenate([batch.features for batch in expected]), rtol=1e-4, atol=1e-5)


def test_inversions_on_the_cluster_equal_those_in_one_process(ray_cluster, prepared):
    from rayjobs.inversion_tasks import invert_on_cluster

    checkpoint, backbone, *_ = prepared
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 24, 24), dtype=np.uint8)
    config, rows, lines = InversionConfig(num_images=3, iterations=2), [7, 1, 4], []
    found = dict(invert_on_cluster(checkpoint, images, rows, config, 5, on_progress=lines.append))
    expected = dict(invert_in_groups(backbone, images, rows, config, 5))
    assert sorted(found) == [0, 1, 2]
    for position, inversion in expected.items():
        np.testing.assert_allclose(found[position].losses, inversion.losses, rtol=1e-3)
    assert lines[-1] == "inversion: 3 of 3 images done"
