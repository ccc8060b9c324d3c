"""Wrong use of the commands: one paragraph, exit code 2, before any worker starts."""

from __future__ import annotations

import pytest

from rayjobs import compare, evaluate, pretrain, sweep
from tests.rayjobs.conftest import write_images


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    """Whatever reaches Ray in these tests has passed a check that should have stopped it."""
    import rayjobs.cluster

    def refuse(*_, **__):
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(rayjobs.cluster, "connect", refuse)
    monkeypatch.setenv("PRETRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def fails(capsys, command, arguments, *expected):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for words in expected:
        assert words in text, text


def folder(path):
    return ["--data", f"folder:{path}", "--class-split", "0.4", "0.3", "0.3"]


def test_wrong_flag(capsys):
    fails(capsys, sweep, ["--num-trails", "3"], "--num-trails", "--num-trials")


def test_unknown_space(capsys, image_folder):
    fails(capsys, sweep, ["--space", "moco_v3", *folder(image_folder)], "moco_v3", "moco_v2")


def test_unknown_method(capsys):
    fails(capsys, pretrain, ["--method", "moco_v9", "--data", "rendered:"], "moco_v9", "moco_v2", "simsiam")


def test_method_without_the_option(capsys):
    fails(capsys, pretrain, ["--method", "supervised", "--temperature", "0.1"], "--temperature")


def test_missing_folder(capsys, tmp_path):
    fails(capsys, pretrain, ["--data", f"folder:{tmp_path}/nowhere"], "nowhere")


def test_empty_class(capsys, tmp_path):
    root = write_images(tmp_path / "tree", 6, 4)
    (root / "class_99").mkdir()
    fails(capsys, pretrain, ["--data", f"folder:{root}"], "class_99")


def test_queue_larger_than_the_data(capsys, image_folder):
    arguments = ["--method", "moco_v2", "--queue-size", "65536", "--batch-size", "32", *folder(image_folder)]
    fails(capsys, pretrain, arguments, "65536", "queue")


def test_queue_not_a_multiple_of_the_batch(capsys, image_folder):
    arguments = ["--method", "moco_v2", "--queue-size", "100", "--batch-size", "32", *folder(image_folder)]
    fails(capsys, pretrain, arguments, "100", "multiple")


def test_a_published_warmup_longer_than_the_run(capsys, image_folder):
    arguments = ["--method", "byol", "--epochs", "5", "--batch-size", "32", *folder(image_folder)]
    fails(capsys, pretrain, arguments, "warmup_epochs=10", "5 epochs")


def test_views_that_do_not_fit_the_method(capsys, image_folder):
    common = ["--batch-size", "32", *folder(image_folder)]
    fails(capsys, pretrain, ["--method", "cmc", "--views", "simclr", *common], "lab", "cmc")
    fails(capsys, pretrain, ["--method", "simsiam", "--views", "cmc", "cmc", *common], "to_lab", "moco_v2")
    fails(capsys, pretrain, ["--method", "simsiam", "--views", "light", *common], "2 view(s)", "--views light light")
    augmented = ["--method", "camtrast_contrast_only_moco", "--second-view", "augmented"]
    fails(capsys, pretrain, [*augmented, *common], "2 view(s)", "--views light light")


def test_batch_larger_than_the_data(capsys, image_folder):
    fails(
        capsys, pretrain, ["--method", "supervised", "--batch-size", "4096", *folder(image_folder)], "4096", "at most"
    )


def test_batch_not_divisible_over_workers(capsys, image_folder):
    arguments = ["--method", "supervised", "--batch-size", "32", "--num-workers", "3", *folder(image_folder)]
    fails(capsys, pretrain, arguments, "32", "3", "multiple")


def test_too_few_classes_for_five_way(capsys, tmp_path):
    root = write_images(tmp_path / "tree", 8, 24)
    fails(capsys, sweep, ["--data", f"folder:{root}"], "5-way", "val_classes")


def test_too_few_images_per_class(capsys, tmp_path):
    root = write_images(tmp_path / "tree", 18, 8)
    fails(capsys, sweep, ["--batch-size", "16", *folder(root)], "20 images per class", "min_per_class")


def test_unknown_objective(capsys, image_folder):
    fails(capsys, sweep, ["--objective", "linear/top9", *folder(image_folder)], "linear/top9", "linear/top1")


def test_unknown_view(capsys, image_folder):
    arguments = ["--method", "supervised", "--batch-size", "32", "--views", "fancy", *folder(image_folder)]
    fails(capsys, pretrain, arguments, "fancy", "moco_v2")


def test_confirm_with_one_seed(capsys, image_folder):
    fails(capsys, sweep, ["--confirm", "1", *folder(image_folder)], "--confirm", "interval")


def test_output_in_use(capsys, image_folder, tmp_path):
    (tmp_path / "run" / "train").mkdir(parents=True)
    arguments = [
        "--method",
        "supervised",
        "--batch-size",
        "32",
        "--output",
        str(tmp_path / "run"),
        *folder(image_folder),
    ]
    fails(capsys, pretrain, arguments, "unfinished run", "--resume")


def test_resume_of_nothing(capsys, tmp_path):
    fails(capsys, sweep, ["--resume", "--output", str(tmp_path)], "no unfinished sweep")
    fails(capsys, sweep, ["--resume", "--name", "gone", "--output", str(tmp_path)], "no sweep named 'gone'")


def test_sweep_name_in_use(capsys, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "sweep.json").write_text("{}")
    fails(capsys, sweep, ["--name", "taken", "--output", str(tmp_path)], "taken", "--resume")


def test_checkpoint_missing(capsys, tmp_path):
    fails(capsys, evaluate, [], "--checkpoint is missing")
    fails(capsys, evaluate, ["--checkpoint", str(tmp_path / "gone")], "gone", "config.json")
    (tmp_path / "half").mkdir()
    fails(capsys, evaluate, ["--checkpoint", str(tmp_path / "half")], "not a checkpoint", "backbone.safetensors")


def test_unknown_task(capsys, tmp_path):
    fails(capsys, evaluate, ["--checkpoint", str(tmp_path), "--tasks", "linear", "karate"], "karate", "few_shot")


@pytest.mark.parametrize("command", [sweep, compare, pretrain, evaluate])
def test_help_names_every_option(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--data", "--seed", "--use-gpu", "--num-workers"):
        assert flag in text


def test_a_method_that_cannot_run_is_an_error_when_named(capsys, image_folder):
    arguments = ["--methods", "camtrast_moco", "--image-size", "32", "--batch-size", "32", *folder(image_folder)]
    fails(capsys, sweep, arguments, "camtrast_moco", "single location", "small stem")


SMALL = ["--image-size", "32", "--batch-size", "32"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sedes", "3"], ("--sedes", "--seeds")),
        (["--seeds", "1"], ("--seeds is 1", "at least 2", "interval")),
        (["--epochs", "0"], ("--epochs is 0", "at least 1")),
        (["--methods", "supervised", "moco_v9"], ("moco_v9", "'moco_v", "The methods are", "simsiam")),
        (["--methods", "camtrast_moco"], ("camtrast_moco cannot run", "single location", "small stem")),
        (["--views", "moco_v1"], ("--views moco_v1", "views of its paper")),
        (["--tasks", "karate"], ("karate", "few_shot")),
        (["--tasks"], ("--tasks is empty", "at least one")),
        (["--write-docs", "table.txt"], ("table.txt", ".md")),
        (["--write-docs", "gone/table.md"], ("gone", "does not exist")),
        (["--batch-size", "4096"], ("4096", "at most")),
    ],
)
def test_comparisons_that_cannot_run(capsys, image_folder, arguments, expected):
    fails(capsys, compare, [*SMALL, *folder(image_folder), *arguments], *expected)


def test_resume_of_no_comparison(capsys, tmp_path):
    fails(capsys, compare, ["--resume", "--output", str(tmp_path)], "no unfinished comparison")
    fails(capsys, compare, ["--resume", "--name", "gone", "--output", str(tmp_path)], "no comparison named 'gone'")


@pytest.mark.parametrize("state", ["started.json", "sweep.json"])
def test_comparison_name_in_use(capsys, tmp_path, state):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / state).write_text("{}")
    script = "compare.py" if state == "started.json" else "sweep.py"
    arguments = ["--name", "taken", "--output", str(tmp_path)]
    for command in (compare, sweep):
        fails(capsys, command, arguments, "taken", script, "--resume", "choose another --name")
