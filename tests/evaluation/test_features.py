"""The feature pass: what the backbone computes, in stable order, leaving the backbone as it was."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.features import (
    FeatureCache,
    FeatureExtractor,
    assemble_features,
    extract_features,
    feature_batches,
    frozen,
)
from evaluation.metric import EvaluationContext, Features, get_features
from image_data.contracts import ImageBatch

NAMES = ("a", "b", "c")


class TinyBackbone(nn.Module):
    """Convolution, BatchNorm, dropout and pooling: everything that behaves differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.conv(x)).relu()).mean(dim=(2, 3))


def make_backbone() -> TinyBackbone:
    torch.manual_seed(0)
    backbone = TinyBackbone()
    with torch.no_grad():
        backbone(torch.randn(8, 3, 8, 8))  # running statistics that are not the initial ones
    backbone.drop.eval()  # a mixed state that must be restored as it is
    return backbone


def images(n: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)


def batches(x: np.ndarray, index: np.ndarray, size: int = 7) -> Iterator[ImageBatch]:
    for start in range(0, len(index), size):
        rows = index[start : start + size]
        yield ImageBatch([np.ascontiguousarray(x[rows])], rows % 3, rows, 0)


def expected_features(backbone: nn.Module, x: np.ndarray) -> np.ndarray:
    """The plain way: torchvision's normalisation written out, whole set at once."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad(), frozen(backbone):
        return backbone((torch.from_numpy(x) / 255 - mean) / std).numpy()


def test_features_are_the_eval_mode_output_in_index_order() -> None:
    backbone, x = make_backbone(), images()
    shuffled = np.random.default_rng(1).permutation(20)
    found = extract_features(backbone, batches(x, shuffled), NAMES)
    np.testing.assert_allclose(found.features, expected_features(backbone, x), atol=1e-6)
    np.testing.assert_array_equal(found.labels, np.arange(20) % 3)
    assert (found.features.dtype, found.labels.dtype, found.class_names) == (np.float32, np.int64, NAMES)


def test_backbone_is_left_as_it_was() -> None:
    backbone, x = make_backbone(), images()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    strides = {name: value.stride() for name, value in backbone.named_parameters()}
    extract_features(backbone, batches(x, np.arange(20)), NAMES)
    assert (backbone.training, backbone.norm.training, backbone.drop.training) == (True, True, False)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert {name: value.stride() for name, value in backbone.named_parameters()} == strides
    assert all(p.requires_grad and p.grad is None for p in backbone.parameters())


def test_modes_are_restored_after_an_error() -> None:
    backbone = make_backbone()

    def failing_reader() -> Iterator[ImageBatch]:
        assert not backbone.norm.training
        raise RuntimeError("reader failed")
        yield

    with pytest.raises(RuntimeError, match="reader failed"):
        extract_features(backbone, failing_reader(), NAMES)
    assert (backbone.training, backbone.norm.training, backbone.drop.training) == (True, True, False)


def test_autocast_returns_float32_close_to_full_precision() -> None:
    backbone, x = make_backbone(), images()
    found = extract_features(backbone, batches(x, np.arange(20)), NAMES, autocast=True)
    expected = expected_features(backbone, x)
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, expected, atol=0.03)
    assert np.abs(found.features - expected).max() > 1e-6


def test_read_only_batches_are_accepted(recwarn: pytest.WarningsRecorder) -> None:
    backbone, x = make_backbone().eval(), images()
    expected = FeatureExtractor(backbone)(x)
    x.setflags(write=False)
    np.testing.assert_array_equal(FeatureExtractor(backbone)(x), expected)
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_wrong_images_and_backbones_are_refused() -> None:
    backbone = make_backbone().eval()
    for wrong in (images().astype(np.float32), images()[0], images().transpose(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"expected uint8 \(B, 3, H, W\)"):
            FeatureExtractor(backbone)(wrong)
    with pytest.raises(ValueError, match=r"expected \(B, D\)"):
        FeatureExtractor(nn.Identity())(images())


def test_assembly_refuses_repeated_missing_and_unnamed() -> None:
    part = (np.zeros((3, 2), np.float32), np.array([0, 1, 2]), np.array([4, 0, 4]))
    with pytest.raises(ValueError, match="1 of 3 images were delivered twice"):
        assemble_features([part], NAMES)
    with pytest.raises(ValueError, match="no images"):
        assemble_features([], NAMES)
    with pytest.raises(ValueError, match="labels run from 0 to 2, but there are 2 class names"):
        assemble_features([(part[0], part[1], np.arange(3))], NAMES[:2])


def test_a_pass_over_views_leaves_the_backbone_as_it_was() -> None:
    backbone, x = make_backbone().train(), images()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    parts = list(feature_batches(backbone, batches(x, np.arange(20))))
    assert [batch.features.shape[0] for batch in parts] == [len(b.index) for b in batches(x, np.arange(20))]
    found = extract_features(backbone, batches(x, np.arange(20)), NAMES)
    np.testing.assert_array_equal(np.concatenate([batch.features for batch in parts]), found.features)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_context_guards_the_phase() -> None:
    passes = []

    def features(split: str) -> Features:
        passes.append(split)
        return extract_features(make_backbone(), batches(images(), np.arange(20)), NAMES)

    context = EvaluationContext(FeatureCache(features), "val", seed=3)
    first = get_features(context, "train")
    assert get_features(context, "train") is first
    assert get_features(context, "val_classes") is not first
    assert passes == ["train", "val_classes"]
    with pytest.raises(ValueError, match="phase 'val'"):
        get_features(context, "test")
    assert passes == ["train", "val_classes"]


def test_a_diverged_backbone_is_named() -> None:
    backbone = make_backbone()
    with torch.no_grad():
        backbone.norm.running_mean[0] = float("nan")
    context = EvaluationContext(
        lambda split: extract_features(backbone, batches(images(), np.arange(20)), NAMES), "val"
    )
    with pytest.raises(ValueError, match=r"20 of 20 feature vectors .* pretraining diverged"):
        get_features(context, "train")


def test_cache_keeps_one_record_per_split() -> None:
    calls: list[str] = []

    def extract(split: str) -> Features:
        calls.append(split)
        return Features(np.zeros((1, 1), np.float32), np.zeros(1, np.int64), ("a",))

    cache = FeatureCache(extract)
    assert cache("train") is cache("train")
    cache("val")
    assert calls == ["train", "val"]
