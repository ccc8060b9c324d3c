from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from image_data.contracts import DataError
from image_data.sources import RowSource, open_rows
from image_data.uri import map_ahead, parse_data, parse_uri
from image_data.webdataset import expand_braces
from tests.image_data.samples import picture, table, write_csv, write_folder, write_parquet, write_tars

ROWS = table({"cat": 7, "dog": 5, "eel": 4})
WRITERS = {
    "folder": write_folder,
    "csv": write_csv,
    "parquet": write_parquet,
    "webdataset": write_tars,
    "webdataset json": lambda root, rows: write_tars(root, rows, use_json=True),
}


def content(source: RowSource, wanted: np.ndarray | None = None) -> dict[str, tuple[str, bytes]]:
    """Last part of the name without suffix -> (class, bytes)."""
    index = source.index()
    rows = list(source.read(np.ones(len(index.names), bool) if wanted is None else wanted))
    assert [row.position for row in rows] == sorted(row.position for row in rows)
    assert not any(row.error for row in rows)
    stem = [Path(name).name.removesuffix(".png") for name in index.names]
    return {stem[r.position]: (index.class_names[index.labels[r.position]], r.data) for r in rows}


EXPECTED = {name.removesuffix(".png"): (label, data) for name, label, data in ROWS}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_images_and_labels(layout, tmp_path):
    source = open_rows(WRITERS[layout](tmp_path, ROWS))
    assert source.index().class_names == ("cat", "dog", "eel")
    assert content(source) == EXPECTED


@pytest.mark.parametrize("layout", WRITERS)
def test_only_wanted_rows_are_read(layout, tmp_path):
    source = open_rows(WRITERS[layout](tmp_path, ROWS))
    wanted = np.arange(len(ROWS)) % 5 == 2
    names = [Path(name).name.removesuffix(".png") for name in source.index().names]
    assert list(content(source, wanted)) == [names[i] for i in np.flatnonzero(wanted)]


@pytest.mark.parametrize("layout", WRITERS)
def test_listing_changes_with_the_content_and_does_not_tell_the_place(layout, tmp_path):
    uri = WRITERS[layout](tmp_path / "a", ROWS)
    before = open_rows(uri).listing()
    assert before == open_rows(uri).listing()
    assert str(tmp_path) not in "".join(before)
    changed = [(*ROWS[0][:2], picture(999)), *ROWS[1:]]
    assert open_rows(WRITERS[layout](tmp_path / "a", changed)).listing() != before


@pytest.mark.parametrize("layout", WRITERS)
def test_remote_file_systems(layout, tmp_path):
    local = WRITERS[layout](tmp_path, ROWS)
    base = f"memory://{tmp_path.name}-{layout.replace(' ', '-')}"
    fsspec.filesystem("memory").put(f"{tmp_path}/", f"{base}/", recursive=True)
    source = open_rows(local.replace(str(tmp_path), base))
    assert content(source) == EXPECTED
    assert source.listing() == open_rows(local.replace(str(tmp_path), base)).listing()


def test_numbers_as_classes_are_ordered_by_value(tmp_path):
    source = open_rows(write_parquet(tmp_path, [(str(i), i % 12, picture(0)) for i in range(24)]))
    assert source.index().class_names == tuple(str(i) for i in range(12))
    assert source.index().labels.tolist() == [i % 12 for i in range(24)]


# ---- folder


def test_folder_is_read_recursively_without_hidden_and_other_files(tmp_path):
    uri = write_folder(tmp_path, ROWS)
    (tmp_path / "cat" / "more").mkdir()
    (tmp_path / "cat" / "more" / "x.JPG").write_bytes(b"x")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("no image")
    names = open_rows(uri).index().names
    assert len(names) == len(ROWS) + 1
    assert "cat/more/x.JPG" in names
    assert list(names) == sorted(names)


def test_link_to_an_outer_folder_does_not_hang(tmp_path):
    uri = write_folder(tmp_path, ROWS)
    os.symlink(tmp_path, tmp_path / "cat" / "loop")
    assert len(open_rows(uri).index().names) == len(ROWS)


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match=r"does not exist\. Expected:\n  PATH/cat/001\.jpg"):
        open_rows(f"folder:{tmp_path}/missing")
    with pytest.raises(DataError, match=r"no class folders .*found: nothing"):
        open_rows(f"folder:{tmp_path}")
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(DataError, match=r"no class folders .*found: a\.png"):
        open_rows(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="is a file, not a folder"):
        open_rows(f"folder:{tmp_path}/a.png")
    write_folder(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"outside of any class folder: a\.png"):
        open_rows(f"folder:{tmp_path}")
    (tmp_path / "a.png").unlink()
    (tmp_path / "fox").mkdir()
    (tmp_path / "gnu").mkdir()
    (tmp_path / "gnu" / "list.txt").write_text("")
    with pytest.raises(DataError, match="class folders without an image: fox, gnu"):
        open_rows(f"folder:{tmp_path}")


def test_folder_of_splits_is_recognised(tmp_path):
    for name in ("train", "val"):
        write_folder(tmp_path / name, ROWS)
    with pytest.raises(DataError, match=r"folders of splits \(train, val\).*SPLIT=folder:"):
        open_rows(f"folder:{tmp_path}")


def test_unreadable_file_is_an_error_of_its_row(tmp_path):
    source = open_rows(write_folder(tmp_path, ROWS))
    (tmp_path / "cat" / "cat-001.png").unlink()
    rows = list(source.read(np.ones(len(ROWS), bool)))
    assert [row.error for row in rows if row.error] == ["No such file or directory"]
    assert len(rows) == len(ROWS)


# ---- csv


def test_csv_with_other_columns_root_and_groups(tmp_path):
    write_folder(tmp_path / "pictures", ROWS)
    lines = ["\ufeffpath;ignored,kind,family,photo"]
    lines += [f"{label}/{name},{label},animal,{i // 2}" for i, (name, label, _) in enumerate(ROWS)]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    uri = f"csv:{tmp_path}/list.csv?root={tmp_path}/pictures&image=path%3Bignored&label=kind&coarse=family&group=photo"
    source = open_rows(uri)
    assert content(source) == EXPECTED
    assert source.index().coarse_names == ("animal",)
    assert source.index().groups == [str(i // 2) for i in range(len(ROWS))]


def test_csv_errors(tmp_path):
    uri = write_csv(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"no column kind .*has: filename, label"):
        open_rows(f"{uri}?label=kind")
    with pytest.raises(DataError, match="there is no file"):
        open_rows(f"csv:{tmp_path}/none.csv")
    with pytest.raises(DataError, match=r"folder of images /nowhere does not exist"):
        open_rows(f"{uri}?root=/nowhere")
    with open(tmp_path / "train.csv", "a") as file:
        file.write("missing.png,cat\n")
    rows = list(open_rows(uri).read(np.ones(len(ROWS) + 1, bool)))
    assert [(row.position, row.error) for row in rows if row.error] == [(len(ROWS), "no such file")]
    with open(tmp_path / "train.csv", "a") as file:
        file.write("missing.png,dog\n")
    with pytest.raises(DataError, match=r"more than once: missing\.png"):
        open_rows(uri)
    (tmp_path / "train.csv").write_text("filename,label\ncat-000.png,\n")
    with pytest.raises(DataError, match=r"cat-000\.png has no label"):
        open_rows(uri).index()
    (tmp_path / "train.csv").write_bytes(b"filename,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="not UTF-8"):
        open_rows(uri)
    (tmp_path / "train.csv").write_text("filename,label\n")
    with pytest.raises(DataError, match="no images found"):
        open_rows(uri).index()


# ---- parquet


def test_parquet_coarse_labels_groups_and_row_names(tmp_path):
    kinds = ["pet" if row[1] != "eel" else "fish" for row in ROWS]
    uri = write_parquet(tmp_path, ROWS, kind=kinds, photo=[i // 3 for i in range(len(ROWS))])
    index = open_rows(f"parquet:{tmp_path}?coarse=kind&group=photo").index()
    assert index.coarse is not None
    assert [index.coarse_names[i] for i in index.coarse] == kinds
    assert index.groups == [str(i // 3) for i in range(len(ROWS))]
    assert index.names[0] == "part-0.parquet#0"
    assert len(set(index.names)) == len(ROWS)
    assert open_rows(uri).index().names == [row[0] for row in ROWS]


def test_parquet_by_pattern_and_single_file(tmp_path):
    write_parquet(tmp_path, ROWS, files=3)
    assert len(open_rows(f"parquet:{tmp_path}/part-?.parquet").index().names) == len(ROWS)
    assert len(open_rows(f"parquet:{tmp_path}/part-[01].parquet?name=file").index().names) == 10
    assert len(open_rows(f"parquet:{tmp_path}/part-2.parquet").index().names) == 6


def test_parquet_batches_smaller_than_a_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("image_data.parquet_source._BATCH_ROWS", 2)
    assert content(open_rows(write_parquet(tmp_path, ROWS))) == EXPECTED


def test_parquet_as_hugging_face_writes_it(tmp_path):
    features = {"label": {"_type": "ClassLabel", "names": ["zebra", "ant"]}, "image": {"_type": "Image"}}
    whole = pa.table({"image": [{"bytes": picture(i), "path": None} for i in range(4)], "label": [0, 1, 1, 0]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(whole.replace_schema_metadata(metadata), tmp_path / "data.parquet")
    source = open_rows(f"parquet:{tmp_path}")
    index = source.index()
    assert [index.class_names[i] for i in index.labels] == ["zebra", "ant", "ant", "zebra"]
    assert [row.data for row in source.read(np.ones(4, bool))] == [picture(i) for i in range(4)]


def test_parquet_errors(tmp_path):
    with pytest.raises(DataError, match="no Parquet file"):
        open_rows(f"parquet:{tmp_path}")
    write_parquet(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"no column fine; found: image \(binary\), label \(string\)"):
        open_rows(f"parquet:{tmp_path}?label=fine")
    with pytest.raises(DataError, match="column file has type string"):
        open_rows(f"parquet:{tmp_path}?image=file")
    with pytest.raises(DataError, match=r"unknown option lable; parquet: has image, label"):
        open_rows(f"parquet:{tmp_path}?lable=x")
    (tmp_path / "part-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"part-0\.parquet is not a readable Parquet file"):
        open_rows(f"parquet:{tmp_path}")


def test_parquet_rows_without_image_or_with_odd_labels(tmp_path):
    pq.write_table(pa.table({"image": [picture(0), None], "label": ["a", "b"]}), tmp_path / "x.parquet")
    rows = list(open_rows(f"parquet:{tmp_path}").read(np.ones(2, bool)))
    assert [row.error for row in rows] == ["", "the image column is null"]
    for label, message in (([None, "b"], "x.parquet#0 has no label"), ([[1], [2]], "must be text"), ([0.5, 1], "0.5")):
        pq.write_table(pa.table({"image": [picture(0)] * 2, "label": label}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=message):
            open_rows(f"parquet:{tmp_path}").index()


# ---- webdataset


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_braces():
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    with pytest.raises(DataError, match="backwards"):
        expand_braces("{3..1}")


def test_webdataset_with_json_keys_and_wildcards(tmp_path):
    write_tars(tmp_path, ROWS, use_json=True)
    index = open_rows(f"webdataset:{tmp_path}/shard-*.tar?label=kind&coarse=label&group=label").index()
    assert index.class_names == ("c", "d", "e")
    assert index.coarse_names == ("cat", "dog", "eel")
    assert index.groups is not None
    assert set(index.groups) == {"cat", "dog", "eel"}


def test_webdataset_compressed_and_with_further_members(tmp_path):
    members = {"s/1.seg.png": b"mask", "s/1.jpg": b"one", "s/1.cls": b"7\n", "s/2.cls": b"10", "s/2.JPG": b"two"}
    write_tar(tmp_path / "x.tar.gz", members, "w:gz")
    source = open_rows(f"webdataset:{tmp_path}/x.tar.gz")
    assert source.index().class_names == ("7", "10")
    assert [row.data for row in source.read(np.ones(2, bool))] == [b"one", b"two"]


def test_webdataset_errors(tmp_path):
    uri = f"webdataset:{tmp_path}/x.tar"
    with pytest.raises(DataError, match="there is no tar shard"):
        open_rows(uri)
    write_tar(tmp_path / "x.tar", {"1.jpg": b"a", "1.txt": b"b"})
    with pytest.raises(DataError, match=r"sample x\.tar/1 has no label: neither a member \.cls .*found: \.jpg\)"):
        open_rows(uri).index()
    write_tar(tmp_path / "x.tar", {"1.cls": b"a"})
    with pytest.raises(DataError, match=r"no image \(found: \.cls\)"):
        open_rows(uri).index()
    write_tar(tmp_path / "x.tar", {"1.jpg": b"a", "1.png": b"a", "1.cls": b"a"})
    with pytest.raises(DataError, match=r"several images .*\?image="):
        open_rows(uri).index()
    assert open_rows(f"{uri}?image=png").index().class_names == ("a",)
    write_tar(tmp_path / "x.tar", {"1.jpg": b"a", "1.json": b"{broken"})
    with pytest.raises(DataError, match="unreadable label"):
        open_rows(uri).index()
    (tmp_path / "x.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match=r"x\.tar is not a readable tar"):
        open_rows(uri).index()


# ---- uri


def test_uri_parts():
    uri = parse_uri("parquet:s3://bucket/a b/*.parquet?image=img&label=f%26g")
    assert (uri.scheme, uri.path, uri.query) == (
        "parquet",
        "s3://bucket/a b/*.parquet",
        {"image": "img", "label": "f&g"},
    )
    assert parse_uri("webdataset:x-????.tar").path == "x-????.tar"
    assert parse_uri("webdataset:x-??.tar?label=cls").query == {"label": "cls"}
    assert parse_uri("rendered:") == parse_uri("rendered:")
    assert parse_uri("rendered:?image_size=32").query == {"image_size": "32"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("imagenet22k:x",), r"(?s)one of.*rendered:.*folder:.*parquet:.*csv:.*webdataset:.*miniimagenet:DIR"),
        (("/data/images",), "folder:/data/images"),
        (("folder:",), "has no path"),
        ((), "no data given"),
        (("train=folder:a", "train=folder:b"), "given twice"),
        (("train=folder:a", "folder:b"), "either one URI"),
        (("validation=folder:a",), "no split 'validation'; the names are train, val, test"),
    ],
)
def test_bad_data_is_explained(data, message):
    with pytest.raises(DataError, match=message):
        parse_data(data)


def test_unknown_file_system_is_explained():
    with pytest.raises(DataError, match="nosuch://"):
        open_rows("folder:nosuch://bucket/x")


def test_s3_without_its_fsspec_driver_is_read_through_pyarrow(tmp_path, monkeypatch):
    def no_driver(path):
        if path.startswith("s3://"):
            raise ImportError("Install s3fs to access S3")
        return url_to_fs(path)

    url_to_fs = fsspec.core.url_to_fs
    local = SimpleNamespace(
        from_uri=lambda uri: (pyarrow.fs.LocalFileSystem(), uri.replace("s3://bucket", str(tmp_path)))
    )
    monkeypatch.setattr(fsspec.core, "url_to_fs", no_driver)
    monkeypatch.setattr(pyarrow.fs, "FileSystem", local)
    for layout, write in WRITERS.items():
        source = open_rows(write(tmp_path / layout, ROWS).replace(str(tmp_path), "s3://bucket"))
        assert content(source) == EXPECTED
        assert all("\t" in line and not line.endswith("\t") for line in source.listing())
    with pytest.raises(DataError, match="needs a package that is not installed"):
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda path: no_driver("s3://"))
        open_rows("folder:abfs://container/x")


def test_named_splits():
    parsed = parse_data(("train=folder:a=b", "novel_classes=csv:c?label=d"))
    assert {name: uri.path for name, uri in parsed.items()} == {"train": "a=b", "novel_classes": "c"}


def test_map_ahead_keeps_order_and_bounds_the_work():
    started, most = 0, 0
    lock = threading.Lock()

    def items():
        nonlocal started, most
        for i in range(200):
            with lock:
                started += 1
                most = max(most, started)
            yield i

    for expected, result in enumerate(map_ahead(lambda i: i * i, items(), threads=3, window=8)):
        assert result == expected**2
        with lock:
            started -= 1
    assert most <= 9


def test_map_ahead_raises_where_the_result_would_have_been():
    results = map_ahead(lambda i: 10 // (3 - i), range(9), threads=2, window=4)
    assert [next(results) for _ in range(3)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(results)
