"""export.py: what it writes and prints, what it refuses, the model registry."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from rayjobs import export
from rayjobs.checkpoint import save_checkpoint
from rayjobs.configs import config_hash
from rayjobs.export_config import ExportConfig, prepare_export
from rayjobs.exporters import FORMATS
from rayjobs.exporters.folder import PAGE
from rayjobs.exporters.registry import register_model
from rayjobs.tracking import Tracker
from tests.rayjobs.conftest import TinyBackbone
from tests.rayjobs.export_samples import altered, assert_same_features, negate, source_of


@pytest.fixture(scope="module")
def resnet18():
    return source_of("resnet18")


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


def test_a_registered_model_loads_and_gives_the_features(
    checkpoint, tiny_backbone, tmp_path, capsys, request, monkeypatch
):
    """Also where MLflow's own default is another store than the project's, as it is outside the project's folder."""
    import mlflow.onnx
    import mlflow.pyfunc
    from mlflow import MlflowClient

    tiny = source_of("resnet9", stem="small", network=TinyBackbone())
    save_checkpoint(tmp_path / "tiny", tiny.config, {"epoch": 3}, tiny.backbone)
    request.addfinalizer(lambda: mlflow.set_tracking_uri(None))
    monkeypatch.setattr("rayjobs.tracking.default_tracking_uri", lambda: f"sqlite:///{tmp_path / 'own.db'}")
    export.main(["--checkpoint", "tiny", "--register", "gratings", "--output", "out"])
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

    tracker = Tracker("export", tmp_path / "journal")
    assert register_model(tracker, "gratings", Path("out/onnx/model.onnx"), tiny) == "2"
    assert tracker.close()
    assert client.get_model_version("gratings", "2").run_id == version.run_id  # the same graph: the same run
