"""A packed split read by a real Ray cluster."""

from __future__ import annotations

import pyarrow.parquet as pq

from image_data.prepare import DataConfig, open_source, prepare
from tests.image_data.samples import table, write_folder


def test_ray_reads_every_packed_image_once(ray_cluster, tmp_path):
    uri = write_folder(tmp_path / "source", table({f"c{i}": 150 for i in range(5)}))
    config = DataConfig((uri,), class_split=None, cache=str(tmp_path / "cache"))
    info = prepare(config, list).split("train")
    packed = [row for file in info.files for row in pq.read_table(file).to_pylist()]
    got = sorted(open_source(config).take_all(), key=lambda row: row["index"])
    assert len(info.files) == 8
    assert [{k: row[k] for k in ("image", "label", "index")} for row in packed] == got
    assert set(open_source(config, columns=None).schema().names) == set(packed[0])
