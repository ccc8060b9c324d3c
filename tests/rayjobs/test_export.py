"""Every export format against the library it is for; what is refused, what is noticed, the command."""

from __future__ import annotations

import io
import pickle
import re
from contextlib import chdir, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from methods.backbones import BasicBlock, LabBackbone, ResNet9, build_backbone
from rayjobs import export
from rayjobs.checkpoint import save_checkpoint
from rayjobs.configs import TrainConfig, config_hash, preset
from rayjobs.export_config import ExportConfig, prepare_export
from rayjobs.exporters import FORMATS
from rayjobs.exporters.contracts import Source
from rayjobs.exporters.folder import PAGE, ExportError, export_folder
from rayjobs.exporters.huggingface_format import huggingface_name
from tests.rayjobs.conftest import TinyBackbone

KEEP_TENSORS = ("torchvision", "timm", "detectron2", "huggingface")


def randomised(network: nn.Module) -> nn.Module:
    """Weights and statistics of BatchNorm as training leaves them: not one and zero, which could be forgotten."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.fill_(7)
    return network.eval()


def source_of(name: str, method: str = "moco_v2", stem: str = "imagenet", network: nn.Module | None = None) -> Source:
    torch.manual_seed(0)
    train = TrainConfig(backbone=name, stem=stem, image_size=64, epochs=3)
    if network is None:
        network = build_backbone(name, train.stem)
    assert network is not None
    return Source(randomised(network), preset(method, train), {"epoch": 3})


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


def assert_same_features(found: np.ndarray, expected: torch.Tensor, tolerance: float) -> None:
    assert np.abs(found - expected.numpy()).max() <= tolerance * float(expected.abs().max())


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


class Altered:
    """A backbone whose stored tensors differ from those it computes with."""

    def __init__(self, backbone, state):
        self._backbone, self._state = backbone, state

    def state_dict(self):
        return self._state

    def __getattr__(self, name):
        return getattr(self._backbone, name)


def altered(form, change):
    """The format, but what it writes has been changed."""

    def write(source, folder):
        state = {name: tensor.clone() for name, tensor in source.backbone.state_dict().items()}
        change(state)
        return form.write(replace(source, backbone=Altered(source.backbone, state)), folder)

    return replace(form, write=write)


def negate(name):
    return lambda state: state[name].neg_()


def remove(name):
    return lambda state: state.pop(name)


def add(name):
    return lambda state: state.update({name: torch.ones(64)})


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


@pytest.fixture
def checkpoint(tmp_path, monkeypatch, resnet18):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    save_checkpoint(tmp_path / "secret_place", resnet18.config, {"epoch": 3}, resnet18.backbone)
    return "secret_place"


def test_the_command_writes_prints_and_refuses_to_overwrite(checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", checkpoint, "--formats", "torchvision", "timm", "--output", "out"]
    export.main(arguments)
    shown = capsys.readouterr().out
    assert re.search(r"torchvision +features differ by 0\.0e\+00 \(allowed 1e-05\)", shown)
    assert f"{tmp_path}/out/timm/{PAGE}" in shown
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == [
        "config.json",
        PAGE,
        PAGE,
        "model.safetensors",
        "resnet18.pth",
        "resnet18.safetensors",
    ]
    for path in files:
        assert b"secret_place" not in path.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments)
    assert stopped.value.code == 2
    assert "Replace it with --overwrite" in " ".join(capsys.readouterr().err.split())
    export.main([*arguments, "--overwrite"])


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


def test_a_failed_verification_ends_the_command(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FORMATS, "timm", altered(FORMATS["timm"], negate("conv1.weight")))
    with pytest.raises(SystemExit) as stopped:
        export.main(["--checkpoint", checkpoint, "--formats", "torchvision", "timm", "--output", "out"])
    assert stopped.value.code == 1
    assert "timm: 1 of 120 tensors are changed: conv1.weight" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["torchvision"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "nowhere"], "the folder does not exist"),
        (["--checkpoint", "secret_place", "--formats", "onxx"], "onxx is unknown. Did you mean onnx?"),
        (["--checkpoint", "secret_place", "--output", "s3://bucket/x"], "give a local folder"),
        (["--checkpoint", "secret_place", "--register", "a/b"], "cannot be the name of a registered model"),
        (["--checkpoint", "secret_place", "--register", "a", "--experiment", ""], "--experiment is empty"),
        (["--checkpoint", "small", "--formats", "onnx", "timm"], "timm cannot express this backbone (resnet9, small"),
        (["--checkpoint", "secret_place", "--formats", "timm", "--output", "mine"], "is not an export"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(checkpoint, tmp_path, capsys, arguments, words):
    small = source_of("resnet9", stem="small")
    save_checkpoint(tmp_path / "small", small.config, {}, small.backbone)
    (tmp_path / "mine" / "timm").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "results").exists()
    assert list((tmp_path / "mine" / "timm").iterdir()) == []


def test_missing_packages_are_named_with_the_command_or_left_out(checkpoint, monkeypatch, capsys):
    from rayjobs.exporters import contracts

    real = contracts.find_spec
    monkeypatch.setattr(contracts, "find_spec", lambda name: None if name in ("timm", "onnxscript") else real(name))
    for arguments, words in (
        (["--formats", "timm"], "--formats timm: it needs timm: install with `pip install timm`."),
        (["--formats", "torchvision", "--register", "a"], "install with `pip install onnxscript`."),
    ):
        with pytest.raises(SystemExit):
            export.main(["--checkpoint", checkpoint, *arguments])
        assert words in " ".join(capsys.readouterr().err.split())
    setup = prepare_export(ExportConfig(checkpoint))
    assert setup.formats == ("torchvision", "detectron2", "huggingface")
    assert set(setup.left_out) == {"timm", "onnx"}
    assert "pip install onnxscript" in setup.left_out["onnx"]


def test_without_formats_all_that_the_backbone_allows(checkpoint, tmp_path):
    small = source_of("resnet9", stem="small")
    save_checkpoint(tmp_path / "small", small.config, {}, small.backbone)
    assert prepare_export(ExportConfig("secret_place")).formats == tuple(FORMATS)
    setup = prepare_export(ExportConfig("small"))
    assert setup.formats == ("onnx",)
    assert "resnet9 is not one of" in setup.left_out["huggingface"]


def test_help_names_every_format(capsys):
    shown = io.StringIO()
    with pytest.raises(SystemExit), redirect_stdout(shown):
        export.main(["--help"])
    text = shown.getvalue() + capsys.readouterr().out
    assert all(name in text for name in FORMATS)


def test_a_registered_model_loads_and_gives_the_features(checkpoint, tiny_backbone, tmp_path, capsys):
    import mlflow.onnx
    import mlflow.pyfunc
    from mlflow import MlflowClient

    tiny = source_of("resnet9", stem="small", network=TinyBackbone())
    save_checkpoint(tmp_path / "tiny", tiny.config, {"epoch": 3}, tiny.backbone)
    arguments = ["--checkpoint", "tiny", "--register", "gratings", "--output", "out", "--overwrite"]
    export.main(arguments)
    assert "gratings version 1" in capsys.readouterr().out
    client = MlflowClient()
    version = client.get_model_version("gratings", "1")
    assert version.tags == tiny.provenance()
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["config_hash"] == config_hash(tiny.config)
    assert client.get_experiment(run.info.experiment_id).name == "export"

    model = mlflow.pyfunc.load_model("models:/gratings/1")
    signature = model.metadata.signature
    assert [(s.name, s.type, s.shape) for s in signature.inputs] == [("images", np.dtype("float32"), (-1, 3, -1, -1))]
    assert [(s.name, s.shape) for s in signature.outputs] == [("features", (-1, 16, -1, -1)), ("pooled", (-1, 16))]
    images = torch.randn(3, 3, 48, 80)
    with torch.no_grad():
        expected = tiny.backbone(images)
    assert_same_features(model.predict(images.numpy())["pooled"], expected, 1e-4)
    assert model.input_example["images"].shape == (1, 3, 64, 64)
    assert model.predict(model.input_example)["pooled"].shape == (1, 16)
    assert not list(tmp_path.glob("out/mlflow-pending*"))

    export.main(arguments)
    assert "gratings version 2" in capsys.readouterr().out
