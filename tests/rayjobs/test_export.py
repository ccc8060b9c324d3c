"""Every export format against the library it is for: what is refused, what is noticed."""

from __future__ import annotations

import pickle
import re
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from methods.backbones import BasicBlock, LabBackbone, ResNet9
from rayjobs import export
from rayjobs.configs import TrainConfig, config_hash, preset
from rayjobs.exporters import FORMATS
from rayjobs.exporters.contracts import Source
from rayjobs.exporters.folder import PAGE, ExportError, export_folder
from rayjobs.exporters.huggingface_format import huggingface_name
from tests.rayjobs.conftest import TinyBackbone
from tests.rayjobs.export_samples import add, altered, assert_same_features, negate, remove, source_of

KEEP_TENSORS = ("torchvision", "timm", "detectron2", "huggingface")


@pytest.fixture(scope="module")
def resnet18():
    return source_of("resnet18")


def features_of_page(folder: Path, images: torch.Tensor) -> list[np.ndarray]:
    """What the code of ``how_to_load.md`` gives, block by block, inside the folder."""
    names: dict = {"images": images}
    found = []
    with chdir(folder), torch.no_grad():
        for block in re.findall(r"```python\n(.*?)```", (folder / PAGE).read_text(), re.DOTALL):
            names.pop("features", None)
            exec(block, names)
            if "features" in names:
                found.append(np.asarray(names["features"]))
    return found


@pytest.mark.parametrize(
    ("name", "backbone"),
    [*((name, "resnet18") for name in KEEP_TENSORS), ("detectron2", "resnet50"), ("huggingface", "resnet50")],
)
def test_the_code_that_is_written_beside_the_weights_gives_the_same_features(name, backbone, tmp_path, resnet18):
    source = resnet18 if backbone == "resnet18" else source_of(backbone)
    exported = export_folder(name, FORMATS[name], source, tmp_path / name)
    assert exported.difference <= 1e-5
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = source.backbone(images)
    found = features_of_page(tmp_path / name, images)
    assert len(found) == (2 if name in ("torchvision", "timm") else 1)
    for features in found:
        assert_same_features(features, expected, 1e-5)
    page = (tmp_path / name / PAGE).read_text()
    assert config_hash(source.config) in page
    assert "| epochs | 3 |" in page


def test_timm_exports_the_models_of_timm_backbones(tmp_path):
    source = source_of("timm:test_resnet")
    export_folder("timm", FORMATS["timm"], source, tmp_path / "timm")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = source.backbone(images)
    for features in features_of_page(tmp_path / "timm", images):
        assert_same_features(features, expected, 1e-5)


@pytest.mark.parametrize(
    ("backbone", "method", "stem", "network"),
    [
        ("resnet9", "moco_v2", "imagenet", lambda: ResNet9("imagenet", width=8)),
        ("resnet9", "cmc", "small", lambda: LabBackbone(TinyBackbone(1), TinyBackbone(2))),
    ],
)
def test_onnx_takes_any_batch_and_image_size_and_knows_nothing_of_this_machine(
    backbone, method, stem, network, tmp_path
):
    import onnxruntime

    from methods.lab import _constant

    _constant.cache_clear()  # tracing must not leave its stand-ins for tensors where later images find them
    source = source_of(backbone, method, stem, network())
    exported = export_folder("onnx", FORMATS["onnx"], source, tmp_path / "onnx")
    assert exported.difference <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 64, 64), (5, 3, 65, 47), (2, 3, 40, 96)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = source.backbone.forward_features(images), source.backbone(images)
        for found, ours in zip(session.run(["features", "pooled"], {"images": images.numpy()}), expected, strict=True):
            assert found.shape == ours.shape
            assert_same_features(found, ours, 1e-4)
    assert_same_features(features_of_page(tmp_path / "onnx", images)[0], source.backbone(images).detach(), 1e-4)
    content = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert config_hash(source.config).encode() in content
    assert str(Path(export.__file__).parent).encode() not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("name", KEEP_TENSORS)
@pytest.mark.parametrize(
    "change",
    [negate("layer3.0.downsample.0.weight"), negate("layer2.1.bn1.running_mean"), remove("layer1.0.bn2.bias")],
)
def test_a_changed_or_missing_tensor_is_noticed_and_nothing_is_kept(name, change, tmp_path, resnet18):
    with pytest.raises(ExportError, match=f"^{name}: "):
        export_folder(name, altered(FORMATS[name], change), resnet18, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", KEEP_TENSORS)
def test_a_tensor_without_a_place_is_noticed(name, tmp_path, resnet18):
    with pytest.raises(ExportError, match=f"^{name}: "):
        export_folder(name, altered(FORMATS[name], add("layer1.0.bn3.bias")), resnet18, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_wrong_tensor_behind_a_zero_is_noticed(tmp_path):
    source = source_of("resnet18")
    for module in source.backbone.modules():
        if isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)  # as zero_init_residual starts
            nn.init.zeros_(module.bn2.bias)
            module.bn2.running_mean.zero_()
    hidden = altered(FORMATS["torchvision"], negate("layer4.1.conv1.weight"))
    with pytest.raises(ExportError, match=r"1 of 120 tensors are changed: layer4\.1\.conv1\.weight"):
        export_folder("torchvision", hidden, source, tmp_path / "torchvision")


def test_wrong_features_are_noticed_where_the_format_keeps_no_tensors(tmp_path, resnet18):
    """timm's files stand for the graph, so that nothing need be traced."""
    form = altered(FORMATS["timm"], negate("layer2.1.bn1.running_mean"))
    blind = replace(form, tolerance=1e-4, load=lambda *a: replace(form.load(*a), tensors=None))
    with pytest.raises(ExportError, match=r"differ from the backbone's by .* allowed is 0\.0001"):
        export_folder("onnx", blind, resnet18, tmp_path / "onnx")
    broken = altered(FORMATS["timm"], lambda state: state["bn1.bias"].fill_(float("nan")))
    blind = replace(broken, load=lambda *a: replace(broken.load(*a), tensors=None))
    with pytest.raises(ExportError, match="by nan of the largest"):
        export_folder("onnx", blind, resnet18, tmp_path / "onnx")


def test_an_earlier_export_stays_until_the_new_one_is_verified(tmp_path, resnet18):
    folder = tmp_path / "torchvision"
    export_folder("torchvision", FORMATS["torchvision"], resnet18, folder)
    before = (folder / "resnet18.pth").read_bytes()
    with pytest.raises(ExportError):
        export_folder("torchvision", altered(FORMATS["torchvision"], negate("conv1.weight")), resnet18, folder)
    assert (folder / "resnet18.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["torchvision"]


def test_detectron2_finds_the_place_of_every_tensor_in_a_whole_detector(tmp_path):
    from evaluation.detection.convert import detectron_name
    from evaluation.detection.detectron import get_cfg

    # isort: split
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    source = source_of("resnet50")
    export_folder("detectron2", FORMATS["detectron2"], source, tmp_path / "d2")
    content = pickle.loads((tmp_path / "d2" / "resnet50.pkl").read_bytes())
    assert {type(array) for array in content["model"].values()} == {np.ndarray}
    config = get_cfg()  # the default: Faster R-CNN R50-C4, whose last stage is part of the region heads
    config.MODEL.DEVICE = "cpu"
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.BACKBONE.FREEZE_AT = 0
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    detector = build_model(config)
    DetectionCheckpointer(detector).load(str(tmp_path / "d2" / "resnet50.pkl"))
    theirs = detector.state_dict()
    for name, tensor in source.backbone.state_dict().items():
        place = detectron_name(name)
        place = f"roi_heads.{place}" if place.startswith("res5") else f"backbone.{place}"
        assert torch.equal(theirs[place], tensor), name


def test_the_image_processor_cuts_pictures_as_the_evaluation_does(tmp_path, resnet18):
    from torchvision.transforms import v2
    from transformers import AutoImageProcessor

    export_folder("huggingface", FORMATS["huggingface"], resnet18, tmp_path / "hf")
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((120, 100), Image.Resampling.BICUBIC)
    found = AutoImageProcessor.from_pretrained(tmp_path / "hf")(picture, return_tensors="pt")["pixel_values"][0]
    steps = [v2.ToImage(), v2.Resize(70), v2.CenterCrop(64), v2.ToDtype(torch.float32, scale=True)]
    expected = v2.Compose([*steps, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])(picture)  # 70 = round(64 * 92 / 84)
    assert found.shape == (3, 64, 64)
    assert (found - expected).abs().max() < 2.5 / 255 / 0.22


def test_names_of_hugging_face():
    assert huggingface_name("bn1.running_var") == "embedder.embedder.normalization.running_var"
    assert huggingface_name("layer2.0.downsample.0.weight") == "encoder.stages.1.layers.0.shortcut.convolution.weight"
    assert huggingface_name("layer4.2.bn3.bias") == "encoder.stages.3.layers.2.layer.2.normalization.bias"
    with pytest.raises(ValueError, match=r"fc\.weight is not a tensor of a ResNet"):
        huggingface_name("fc.weight")


@pytest.mark.parametrize(
    ("backbone", "method", "stem", "expressed", "words"),
    [
        ("resnet9", "moco_v2", "auto", {"onnx"}, "resnet9 is not one of resnet18"),
        ("resnet18", "moco_v2", "small", {"onnx"}, "no ResNet with the small stem"),
        ("resnet18", "cmc", "imagenet", {"onnx"}, "half-width encoders of L and ab"),
        ("timm:test_resnet", "moco_v2", "imagenet", {"timm", "onnx"}, "is a model of timm"),
    ],
)
def test_formats_say_what_they_cannot_express(backbone, method, stem, expressed, words):
    train = TrainConfig(backbone=backbone, stem=stem)
    source = Source(None, preset(method, train), {})
    refusals = {name: form.refusal(source) for name, form in FORMATS.items()}
    assert {name for name, reason in refusals.items() if not reason} == expressed
    assert words in refusals["torchvision"]


def test_provenance_stands_in_the_header_of_safetensors(tmp_path, resnet18):
    from safetensors import safe_open

    export_folder("huggingface", FORMATS["huggingface"], resnet18, tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        header = file.metadata()
    assert header == {
        "format": "pt",
        "method": "moco_v2",
        "backbone": "resnet18",
        "stem": "imagenet",
        "image_size": "64",
        "epochs": "3",
        "config_hash": config_hash(resnet18.config),
    }
