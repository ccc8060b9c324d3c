"""``parquet:PATH?image=&label=&coarse=&group=&name=``: encoded images in a binary column of Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from image_data.contracts import DataError
from image_data.sources import Row, SourceIndex, build_index
from image_data.uri import SCHEMES, DataUri, FileInfo, Files

__all__ = ["ParquetSource"]

_BATCH_ROWS = 256  # rows held at a time


class ParquetSource:
    """A Parquet file, a folder of them, or a pattern.

    The image column holds bytes, or Hugging Face's struct with a field ``bytes``; whole-number labels get their names
    from Hugging Face's metadata where the file has it. ``name`` is a column that names images in reports.
    """

    def __init__(self, uri: DataUri) -> None:
        uri.check_keys(("image", "label", "coarse", "group", "name"))
        self._uri = uri
        self._files = Files(uri.path)
        self._image = uri.query.get("image", "image")
        self._infos = self._find_files()
        with self._files.open(self._infos[0].path) as file:
            self._class_names = self._check_schema(self._open_parquet(file, self._infos[0]).schema_arrow)

    def _find_files(self) -> list[FileInfo]:
        if self._files.is_dir():
            infos = [info for info in self._files.walk()[0] if info.name.lower().endswith((".parquet", ".pq"))]
        else:
            infos = self._files.glob()
        if not infos:
            raise DataError(f"{self._uri.text}: no Parquet file at {self._uri.path}; write {SCHEMES['parquet']}.")
        return infos

    def _open_parquet(self, file: Any, info: FileInfo) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self._uri.text}: {info.name} is not a readable Parquet file: {error}") from error

    def _columns(self) -> dict[str, str]:
        """Role to column, of the columns that are read for the index."""
        query = self._uri.query
        roles = {"label": query.get("label", "label")}
        return roles | {role: query[role] for role in ("coarse", "group", "name") if role in query}

    def _check_schema(self, schema: pa.Schema) -> dict[str, Sequence[str]]:
        """Class names by column, where the metadata has them."""
        missing = [column for column in (self._image, *self._columns().values()) if column not in schema.names]
        if missing:
            found = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(
                f"{self._uri.text}: no column {', '.join(missing)}; found: {found}. Name the columns: "
                "parquet:PATH?image=COLUMN&label=COLUMN."
            )
        kind = schema.field(self._image).type
        if not (_is_bytes(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
            raise DataError(
                f"{self._uri.text}: column {self._image} has type {kind}; it must hold the encoded image as binary, or "
                "a struct with a binary field 'bytes'."
            )
        return _hugging_face_names(schema)

    def listing(self) -> list[str]:
        return [f"{info.name}\t{info.size}\t{info.stamp}" for info in self._infos]

    def index(self) -> SourceIndex:
        roles = self._columns()
        values: dict[str, list[Any]] = {role: [] for role in roles}
        names: list[str] = []
        for info in self._infos:
            with self._files.open(info.path) as file:
                parquet = self._open_parquet(file, info)
                self._check_schema(parquet.schema_arrow)
                table = parquet.read(columns=list(dict.fromkeys(roles.values())))
            for role, column in roles.items():
                values[role] += self._name_classes(column, table.column(column).to_pylist())
            names += [f"{info.name}#{row}" for row in range(table.num_rows)]
        if "name" in values:
            names = [str(name) for name in values["name"]]
        return build_index(self._uri, names, values["label"], values.get("coarse"), values.get("group"))

    def _name_classes(self, column: str, values: list[Any]) -> list[Any]:
        known = self._class_names.get(column)
        if not known:
            return values
        return [known[value] if isinstance(value, int) and 0 <= value < len(known) else value for value in values]

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        start = 0
        for info in self._infos:
            with self._files.open(info.path) as file:
                parquet = self._open_parquet(file, info)
                for group in range(parquet.num_row_groups):
                    end = start + parquet.metadata.row_group(group).num_rows
                    if wanted[start:end].any():
                        yield from self._read_group(parquet, group, start, wanted)
                    start = end

    def _read_group(self, parquet: pq.ParquetFile, group: int, start: int, wanted: np.ndarray) -> Iterator[Row]:
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self._image]):
            column = batch.column(0)
            if pa.types.is_struct(column.type):
                column = column.field("bytes")
            for row in np.flatnonzero(wanted[start : start + len(column)]):
                data = column[int(row)].as_py()
                yield Row(start + int(row), data or b"", error="" if data is not None else "the image column is null")
            start += len(column)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _hugging_face_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Names of ClassLabel columns from the metadata that the ``datasets`` library writes."""
    raw = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(raw).get("info", {}).get("features", {}) if raw else {}
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("names")
    }
