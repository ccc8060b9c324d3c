from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from image_data import prepare as prepare_module
from image_data.contracts import DataError
from image_data.packing import MIN_SHARDS
from image_data.prepare import DataConfig, PreparedData, open_source, prepare
from image_data.subset import SubsetConfig
from tests.image_data.samples import picture, table, write_csv, write_folder, write_parquet, write_tars

CLASSES = {f"class{i:02d}": 20 + i for i in range(10)}
ROWS = table(CLASSES)
BYTES = {(label, data) for _, label, data in ROWS}


def silent(_: str) -> None:
    """No log."""


def make(tmp_path: Path, *data: str, **options) -> PreparedData:
    return prepare(DataConfig(data=data, cache=str(tmp_path / "cache"), **options), silent, threads=2)


def rows(prepared: PreparedData, split: str) -> list[dict]:
    return [row for file in prepared.split(split).files for row in pq.read_table(file).to_pylist()]


def members(prepared: PreparedData) -> dict[str, set[tuple[str, bytes]]]:
    """Split -> {(class, bytes)}."""
    return {
        name: {(info.class_names[row["label"]], row["image"]) for row in rows(prepared, name)}
        for name, info in prepared.splits.items()
    }


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "source", ROWS)


# ---- the rule


def test_one_uri_is_divided_by_class_and_by_image(tmp_path, folder):
    prepared = make(tmp_path, folder)
    split = members(prepared)
    assert list(split) == ["train", "val", "test", "val_classes", "novel_classes"]
    assert set.union(*split.values()) == BYTES
    assert sum(len(own) for own in split.values()) == len(BYTES)
    classes = {name: {label for label, _ in own} for name, own in split.items()}
    assert [len(classes[name]) for name in split] == [6, 6, 6, 2, 2]
    assert classes["train"] == classes["val"] == classes["test"]
    assert not classes["train"] & classes["val_classes"]
    assert not (classes["train"] | classes["val_classes"]) & classes["novel_classes"]
    for name in ("val", "test"):
        assert all(2 <= count <= 3 for count in prepared.split(name).class_counts)


def test_record_describes_the_shards(tmp_path, folder):
    prepared = make(tmp_path, folder)
    for name, info in prepared.splits.items():
        own = rows(prepared, name)
        labels = [row["label"] for row in own]
        assert info.name == name
        assert info.num_images == len(own)
        assert [row["index"] for row in own] == list(range(len(own)))
        assert info.class_counts == tuple(labels.count(i) for i in range(len(info.class_names)))
        assert min(info.class_counts) > 0
        assert info.num_bytes == sum(len(row["image"]) for row in own)
        assert info.decoded_bytes == sum(3 * row["height"] * row["width"] for row in own) == 240 * len(own)
        assert {row["name"].split("/")[0] for row in own} == set(info.class_names)
        assert labels != sorted(labels)
    assert prepared.split("train").class_names == prepared.split("val").class_names
    assert "0.64/0.16/0.2 into 6 base, 2 val_classes and 2 novel_classes" in prepared.rule
    assert "0.8/0.1/0.1 into train, val and test, image by image (seed 0)" in prepared.rule


def test_without_class_split(tmp_path, folder):
    prepared = make(tmp_path, folder, class_split=None, image_split=(0.5, 0.25, 0.25))
    assert list(prepared.splits) == ["train", "val", "test"]
    assert len(prepared.split("train").class_names) == 10
    assert abs(prepared.split("train").num_images - 0.5 * len(ROWS)) <= 5
    with pytest.raises(DataError, match=r"has no split 'novel_classes'; it has train, val, test.*novel_classes=URI"):
        prepared.split("novel_classes")
    with pytest.raises(DataError, match="has no split 'valid'"):
        prepared.split("valid")


def test_named_splits_keep_what_they_are_given(tmp_path):
    uris = {
        "train": write_csv(tmp_path, table({"a": 30, "b": 20}), "train.csv"),
        "val_classes": write_csv(tmp_path, table({"c": 8, "d": 9}, start=100), "val.csv"),
        "novel_classes": write_csv(tmp_path, table({"e": 7}, start=200), "test.csv"),
    }
    prepared = make(tmp_path, *(f"{name}={uri}" for name, uri in uris.items()))
    assert prepared.split("train").class_counts == (24, 16)
    assert prepared.split("val").class_counts == prepared.split("test").class_counts == (3, 2)
    assert prepared.split("val_classes").class_names == ("c", "d")
    assert prepared.split("novel_classes").class_counts == (7,)
    assert "train, val_classes, novel_classes as given" in prepared.rule


def test_only_missing_splits_are_taken_from_train(tmp_path):
    train = write_folder(tmp_path / "a", table({"x": 50, "y": 50}))
    val = write_folder(tmp_path / "b", table({"x": 5}, start=500))
    prepared = make(tmp_path, f"train={train}", f"val={val}")
    assert prepared.split("train").class_counts == (45, 45)
    assert prepared.split("test").class_counts == (5, 5)
    assert prepared.split("val").class_names == ("x", "y")
    assert prepared.split("val").class_counts == (5, 0)
    assert list(make(tmp_path, f"novel_classes={val}").splits) == ["novel_classes"]


def test_class_split_of_named_splits_where_it_is_asked_for(tmp_path):
    parts = [{label: count // n for label, count in CLASSES.items()} for n in (1, 4)]
    uris = [write_folder(tmp_path / str(i), table(p, start=1000 * i)) for i, p in enumerate(parts)]
    data = (f"train={uris[0]}", f"test={uris[1]}")
    prepared = make(tmp_path, *data, class_split=(0.5, 0.2, 0.3), image_split=(0.9, 0.1, 0.0))
    assert [len(prepared.split(name).class_names) for name in prepared.splits] == [5, 5, 5, 2, 3]
    novel = prepared.split("novel_classes")
    assert novel.class_counts == tuple(CLASSES[name] + CLASSES[name] // 4 for name in novel.class_names)
    with pytest.raises(DataError, match=r"class_split=.*novel_classes=URI are both given"):
        make(tmp_path, data[0], f"novel_classes={uris[1]}", class_split=(0.5, 0.2, 0.3))


def test_label_spaces_are_checked(tmp_path):
    first = write_folder(tmp_path / "a", table({"x": 10, "y": 10}))
    second = write_folder(tmp_path / "b", table({"y": 5, "z": 5}))
    with pytest.raises(DataError, match="val has classes that train does not have: z"):
        make(tmp_path, f"train={first}", f"val={second}")
    with pytest.raises(DataError, match="novel_classes has classes that train has too: y"):
        make(tmp_path, f"train={first}", f"novel_classes={second}")
    numbers = [write_folder(tmp_path / name, table({"0": 10, "1": 10})) for name in "cd"]
    prepared = make(tmp_path, f"train={numbers[0]}", f"novel_classes={numbers[1]}")
    assert "classes of novel_classes are numbers" in prepared.rule


def test_groups_do_not_leak(tmp_path):
    groups = [f"{label}-{i % 7}" for i, (_, label, _) in enumerate(ROWS)]
    group_of = {data: group for (_, _, data), group in zip(ROWS, groups, strict=True)}
    prepared = make(tmp_path, write_parquet(tmp_path / "p", ROWS, group=groups) + "&group=group")
    where: dict[str, set[str]] = {}
    for name, own in members(prepared).items():
        for _, data in own:
            where.setdefault(group_of[data], set()).add(name)
    assert len(where) == 70
    assert all(len(names) == 1 for names in where.values())
    assert "group by group" in prepared.rule


def test_group_over_base_and_held_out_classes_is_refused(tmp_path):
    uri = write_parquet(tmp_path / "p", ROWS, group=[i % 40 for i in range(len(ROWS))]) + "&group=group"
    with pytest.raises(DataError, match=r"groups have images of several classes.*class_split=None"):
        make(tmp_path, uri)
    assert make(tmp_path, uri, class_split=None).split("train").num_images > 0


def test_too_few_classes_for_the_class_split(tmp_path):
    with pytest.raises(DataError, match=r"2 classes \(x, y\) are too few.*class_split=None"):
        make(tmp_path, write_folder(tmp_path / "s", table({"x": 9, "y": 9})))


def test_bad_image_split(tmp_path, folder):
    with pytest.raises(DataError, match=r"image_split=\(0\.8, 0\.1, 0\.2\) \(sum 1\.1\)"):
        make(tmp_path, folder, image_split=(0.8, 0.1, 0.2))


# ---- rendered

RENDERED = "rendered:?image_size=32&classes=10&instances=2,1,1&held_out_instances=1&images_per_instance=2"


def test_rendered_data_keeps_its_own_splits_and_targets(tmp_path):
    from image_data.rendered.dataset import parse_options, rendered_rows

    prepared = make(tmp_path, RENDERED)
    options = parse_options(dict(part.split("=") for part in RENDERED.partition("?")[2].split("&")))
    assert {name: info.num_images for name, info in prepared.splits.items()} == {
        "train": 24, "val": 12, "test": 12, "val_classes": 4, "novel_classes": 4
    }  # fmt: skip
    for name, info in prepared.splits.items():
        rendered = {row["name"]: row for row in rendered_rows(options, name)}
        packed = rows(prepared, name)
        assert {row["name"].removeprefix(f"{name}/") for row in packed} == set(rendered)
        for row in packed:
            expected = rendered[row["name"].removeprefix(f"{name}/")]
            for column in ("image", "label", "coarse", "mask", "depth", "pose", "instance", "height"):
                assert row[column] == expected[column], column
            for column in ("rotation", "box", "landmarks", "depth_scale"):
                assert np.allclose(np.array(row[column]), np.array(expected[column]), atol=1e-4), column
            assert info.class_names[row["label"]].split("/")[0] == info.coarse_names[row["coarse"]]
    assert make(tmp_path, RENDERED).fingerprint != make(tmp_path, RENDERED + "&seed=1").fingerprint
    assert "from the renderer" in prepared.rule


def test_subsets_of_rendered_data_render_only_what_they_need(tmp_path, monkeypatch):
    from image_data.rendered import dataset

    made = []
    render = dataset.render
    monkeypatch.setattr(dataset, "render", lambda *args: made.append(1) or render(*args))
    prepared = make(tmp_path, RENDERED, subset=SubsetConfig(fraction=0.25))
    assert prepared.split("train").class_counts == (1,) * 6
    assert len(made) == sum(info.num_images for info in prepared.splits.values()) == 6 + 12 + 12 + 4 + 4


def test_rendered_train_brings_its_own_val_and_test(tmp_path):
    prepared = make(tmp_path, f"train={RENDERED}")
    instances = [{row["instance"] for row in rows(prepared, name)} for name in ("train", "val", "test")]
    assert [len(own) for own in instances] == [12, 6, 6]
    assert not instances[0] & instances[1] | instances[0] & instances[2] | instances[1] & instances[2]
    assert list(prepared.splits) == ["train", "val", "test"]
    seed = f"{RENDERED}&seed=1"
    mixed = make(tmp_path, f"val={seed}", f"train={RENDERED}")  # what is named wins
    assert members(mixed)["val"] == members(make(tmp_path, f"train={seed}"))["val"] != members(prepared)["val"]


@pytest.mark.parametrize("options", [{"class_split": None}, {"image_split": (0.5, 0.3, 0.2)}])
def test_division_without_effect_on_rendered_data_is_refused(tmp_path, options):
    with pytest.raises(DataError, match=f"{next(iter(options))}=.* has no effect on rendered:"):
        make(tmp_path, "rendered:", **options)


def test_rendered_has_no_path(tmp_path):
    with pytest.raises(DataError, match="has no path"):
        make(tmp_path, "rendered:somewhere")


# ---- subsets


def test_fraction_shrinks_train_only(tmp_path, folder):
    whole = make(tmp_path, folder)
    part = make(tmp_path, folder, subset=SubsetConfig(fraction=0.5))
    assert part.split("train").class_counts == tuple(-(-n // 2) for n in whole.split("train").class_counts)
    whole_members, part_members = members(whole), members(part)
    assert part_members["train"] < whole_members["train"]
    assert all(part_members[name] == whole_members[name] for name in whole_members if name != "train")
    assert "train cut to 0.5 of every class's images (seed 0)" in part.rule


def test_chosen_classes_define_the_label_space_of_val_and_test(tmp_path, folder):
    whole = make(tmp_path, folder)
    chosen = whole.split("train").class_names[1:4:2]
    part = make(tmp_path, folder, subset=SubsetConfig(classes=chosen[::-1]))
    for name in ("train", "val", "test"):
        assert part.split(name).class_names == chosen
        assert {label for label, _ in members(part)[name]} == set(chosen)
    assert part.split("novel_classes").class_names == whole.split("novel_classes").class_names
    held_out = whole.split("novel_classes").class_names[0]
    with pytest.raises(DataError, match=f"{held_out} belong to novel_classes"):
        make(tmp_path, folder, subset=SubsetConfig(classes=(held_out,)))
    with pytest.raises(DataError, match="did you mean class0"):
        make(tmp_path, folder, subset=SubsetConfig(classes=("clas01",)))


def test_rare_classes_are_left_out_everywhere(tmp_path, folder):
    prepared = make(tmp_path, folder, subset=SubsetConfig(min_per_class=25))
    names = {name for info in prepared.splits.values() for name in info.class_names}
    assert names == {label for label, count in CLASSES.items() if count >= 25}
    assert "5 of 10 classes left out (fewer than 25 images)" in prepared.rule
    with pytest.raises(DataError, match="the largest has 29 images"):
        make(tmp_path, folder, subset=SubsetConfig(min_per_class=99))


def test_coarse_labels(tmp_path, folder):
    kinds = [f"kind{int(label[-1]) % 2}" for _, label, _ in ROWS]
    uri = write_parquet(tmp_path / "p", ROWS, kind=kinds) + "&coarse=kind"
    fine, coarse = (make(tmp_path, uri, subset=SubsetConfig(labels=level)) for level in ("fine", "coarse"))
    assert fine.split("train").coarse_names == ("kind0", "kind1")
    for row in rows(fine, "novel_classes"):
        name = fine.split("novel_classes").class_names[row["label"]]
        assert fine.split("novel_classes").coarse_names[row["coarse"]] == f"kind{int(name[-1]) % 2}"
    assert coarse.split("train").class_names == ("kind0", "kind1")
    assert all(row["label"] == row["coarse"] for row in rows(coarse, "train"))
    assert [{d for _, d in own} for own in members(fine).values()] == [
        {d for _, d in own} for own in members(coarse).values()
    ]
    with pytest.raises(DataError, match=r"no coarse labels in the data.*coarse=COLUMN"):
        make(tmp_path, folder, subset=SubsetConfig(labels="coarse"))


# ---- determinism and cache


def digest(prepared: PreparedData) -> dict[str, str]:
    files = [file for info in prepared.splits.values() for file in info.files]
    return {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path, folder):
    config = DataConfig(data=(folder,), cache=str(tmp_path / "a"))
    first = prepare(config, silent, threads=1)
    second = prepare(dataclasses.replace(config, cache=str(tmp_path / "b")), silent, threads=3)
    other = prepare(dataclasses.replace(config, data_seed=1), silent)
    assert digest(first) == digest(second)
    assert (first.fingerprint, first.content) == (second.fingerprint, second.content)
    assert first.content != other.content
    assert members(first)["train"] != members(other)["train"]


def test_layout_and_order_of_files_do_not_change_splits(tmp_path):
    mixed = [ROWS[i] for i in np.random.default_rng(0).permutation(len(ROWS))]
    first = make(tmp_path, write_parquet(tmp_path / "p", ROWS))
    second = make(tmp_path, write_parquet(tmp_path / "q", mixed, files=3))
    assert first.fingerprint != second.fingerprint
    assert first.content == second.content
    third = make(tmp_path, write_csv(tmp_path / "c", mixed))
    assert third.content == first.content


def test_second_call_reads_nothing(tmp_path, folder, monkeypatch):
    first = make(tmp_path, folder)
    monkeypatch.setattr(prepare_module, "_build", None)
    assert make(tmp_path, folder) == first
    assert PreparedData.load(first.directory) == first


@pytest.mark.parametrize(
    "options",
    [
        {"data_seed": 1},
        {"image_split": (0.7, 0.2, 0.1)},
        {"class_split": (0.5, 0.2, 0.3)},
        {"subset": SubsetConfig(fraction=0.5)},
    ],
)
def test_fingerprint_depends_on_the_configuration(tmp_path, folder, options):
    assert make(tmp_path, folder, **options).fingerprint != make(tmp_path, folder).fingerprint


def test_fingerprint_depends_on_the_content(tmp_path, folder):
    first = make(tmp_path, folder)
    file = tmp_path / "source" / "class00" / "class00-000.png"
    file.write_bytes(picture(12345))
    second = make(tmp_path, folder)
    assert second.fingerprint != first.fingerprint
    assert second.content != first.content
    file.rename(file.with_name("renamed.png"))
    assert make(tmp_path, folder).fingerprint not in (first.fingerprint, second.fingerprint)


def test_record_moves_with_its_folder(tmp_path, folder):
    first = make(tmp_path, folder)
    moved = tmp_path / "moved"
    os.rename(first.directory, moved)
    second = PreparedData.load(str(moved))
    assert second.content == first.content
    assert rows(second, "train")
    assert PreparedData.from_json(second.to_json(), first.directory) == first
    assert json.loads(second.to_json())["source"] == [folder]


def test_leftovers_of_a_killed_run_are_removed_and_not_used(tmp_path, folder):
    first = make(tmp_path, folder)
    cache = tmp_path / "cache"
    before = digest(first)
    leftover = cache / f".{first.fingerprint}.building-dead"
    os.rename(first.directory, leftover)
    (leftover / "spool-0").write_bytes(b"half")
    assert digest(make(tmp_path, folder)) == before
    assert not leftover.exists()
    Path(first.split("val").files[0]).unlink()  # an entry that somebody damaged
    assert digest(make(tmp_path, folder)) == before
    assert sorted(p.name for p in cache.iterdir()) == [f".{first.fingerprint}.lock", first.fingerprint]


def test_failed_run_leaves_nothing(tmp_path, folder):
    (tmp_path / "source" / "class00" / "class00-000.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="unreadable"):
        make(tmp_path, folder)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_threads_that_prepare_at_once_build_once(tmp_path, folder, monkeypatch):
    built, results = [], []
    build = prepare_module._build
    monkeypatch.setattr(prepare_module, "_build", lambda *args: built.append(1) or build(*args))
    threads = [threading.Thread(target=lambda: results.append(make(tmp_path, folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert results == [results[0]] * 4


def test_processes_that_prepare_at_once_agree(tmp_path, folder):
    code = "import sys; from image_data.prepare import *; print(prepare(DataConfig((sys.argv[1],)), list).to_json())"
    environment = os.environ | {"PRETRANSFER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, folder]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    again = prepare(DataConfig((folder,), cache=str(tmp_path / "b")), silent)
    assert again.to_json() == outputs[0].strip()
    assert digest(again) == digest(PreparedData.load(str(tmp_path / "cache" / again.fingerprint)))


def test_remote_cache(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("PRETRANSFER_CACHE", str(tmp_path / "local"))
    cache = f"memory://cache-{tmp_path.name}"
    config = DataConfig(data=(folder,), cache=cache)
    first = prepare(config, silent)
    assert first.directory == f"{cache}/{first.fingerprint}"
    assert prepare(config, silent) == first
    local = prepare(dataclasses.replace(config, cache=str(tmp_path / "b")), silent)
    for mine, theirs in zip(first.split("train").files, local.split("train").files, strict=True):
        assert fsspec.open(mine).open().read() == Path(theirs).read_bytes()
    assert [p for p in (tmp_path / "local").iterdir() if p.is_dir()] == []


def test_default_cache_folder(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("PRETRANSFER_CACHE", str(tmp_path / "from-environment"))
    assert prepare(DataConfig(data=(folder,)), silent).directory.startswith(str(tmp_path / "from-environment"))


# ---- unreadable images


def test_unreadable_images_are_skipped_up_to_the_limit(tmp_path, folder):
    whole = make(tmp_path, folder, class_split=None)
    broken = {"class01/class01-003.png": b"", "class04/class04-007.png": ROWS[0][2][:60]}
    for name, data in broken.items():
        (tmp_path / "source" / name).write_bytes(data)
    with pytest.raises(
        DataError, match=r"(?s)2 unreadable images.*max_unreadable=1.*class01-003\.png: empty.*class04-007"
    ):
        make(tmp_path, folder, class_split=None, max_unreadable=1)
    lines: list[str] = []
    config = DataConfig(data=(folder,), cache=str(tmp_path / "cache"), class_split=None, max_unreadable=2)
    prepared = prepare(config, lines.append)
    assert {name for name, _ in prepared.skipped} == set(broken)
    assert "2 unreadable images left out: class01/class01-003.png (empty" in lines[-1]
    assert sum(info.num_images for info in prepared.splits.values()) == len(ROWS) - 2
    for name in prepared.splits:
        assert [row["index"] for row in rows(prepared, name)] == list(range(prepared.split(name).num_images))
    left = {data for own in members(prepared).values() for _, data in own}
    assert left == {data for own in members(whole).values() for _, data in own} - {
        data for name, _, data in ROWS if name in ("class01-003.png", "class04-007.png")
    }
    with pytest.raises(DataError, match="2 unreadable images"):  # the cache does not hide them
        make(tmp_path, folder, class_split=None, max_unreadable=0)


def test_many_unreadable_images_stop_early_with_a_short_list(tmp_path):
    uri = write_tars(tmp_path / "t", [(name, label, b"no image") for name, label, _ in ROWS])
    with pytest.raises(DataError) as caught:
        make(tmp_path, uri, max_unreadable=5)
    message = str(caught.value)
    assert message.startswith("25 unreadable images among the first ")
    assert message.count("not an image in a known format (8 bytes") == 20


def test_split_without_a_readable_image(tmp_path):
    uri = write_folder(tmp_path / "s", [("a.png", "x", b"broken")])
    with pytest.raises(DataError, match="no image of train could be read"):
        make(tmp_path, f"train={uri}", max_unreadable=10)


# ---- shards


def test_shards_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("image_data.packing.ROW_GROUP_ROWS", 50)
    uri = write_parquet(tmp_path / "p", table({f"c{i}": 130 for i in range(5)}))
    prepared = make(tmp_path, uri, class_split=None, image_split=(0.9, 0.1, 0.0))
    files = [pq.ParquetFile(file) for file in prepared.split("train").files]
    assert len(files) == MIN_SHARDS
    sizes = [file.metadata.num_rows for file in files]
    assert sum(sizes) == prepared.split("train").num_images == 585
    assert max(sizes) - min(sizes) <= 1
    for file in files:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        assert all(group.num_rows <= 50 for group in groups)
        assert groups[0].column(0).path_in_schema == "image"
        assert groups[0].column(0).compression == "UNCOMPRESSED"
    assert [file.schema_arrow for file in files] == [files[0].schema_arrow] * MIN_SHARDS
    assert len(prepared.split("val").files) == 1


def test_large_splits_get_more_shards(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("image_data.packing.SHARD_BYTES", 4000)
    info = make(tmp_path, folder).split("train")
    assert len(info.files) == -(-info.num_bytes // 4000)
    assert rows(make(tmp_path, folder), "train")[-1]["index"] == info.num_images - 1


# ---- Ray


def test_open_source_chooses_the_first_reader(tmp_path, folder, monkeypatch):
    import ray.data

    calls = []
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "use_datasource_v2", True)
    monkeypatch.setattr(
        ray.data, "read_parquet", lambda files, **options: calls.append((files, options, context.use_datasource_v2))
    )
    config = DataConfig((folder,), cache=str(tmp_path / "cache"))
    open_source(config, "val")
    open_source(prepare(config, silent), columns=None)
    assert context.use_datasource_v2
    prepared = prepare(config, silent)
    val, train = (list(prepared.split(name).files) for name in ("val", "train"))
    assert calls == [
        (val, {"columns": ["image", "label", "index"], "override_num_blocks": len(val)}, False),
        (train, {"columns": None, "override_num_blocks": len(train)}, False),
    ]


def test_importing_the_package_is_light():
    code = "import sys, image_data, image_data.prepare; print({'ray', 'torch', 'numba'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
