"""What the layouts of the twelve domains share: folders of classes, and lists of images with their classes."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Mapping, Sequence

from image_data.contracts import DataError
from image_data.layouts.layout import (
    Layout,
    ListedSource,
    describe_folder,
    find_images,
    layout_error,
    list_images,
    read_text,
)
from image_data.sources import RowSource
from image_data.uri import DataUri, Files, some

__all__ = ["VAL_OPTION", "Rows", "find_folder", "folder_source", "listed_sources", "option", "read_table"]

# (image, class) per split; the image's name is relative to one folder.
Rows = dict[str, list[tuple[str, str]]]

VAL_OPTION = {
    "val": "own: the validation list is val; or train: it joins train, as in the 12-domain protocol, and "
    "val is taken from train by the seeded rule, unless its share is 0",
}


def option(uri: DataUri, key: str, allowed: Sequence[str]) -> str:
    """Value of a query key; the first allowed one where it is not given.

    Raises:
        DataError: another value.
    """
    value = uri.query.get(key, allowed[0])
    if value not in allowed:
        raise DataError(f"{uri.text}: {key}={value}: choose {' or '.join(allowed)}.")
    return value


def find_folder(layout: Layout, uri: DataUri, files: Files, candidates: Sequence[str], inside: str = "") -> str:
    """The first of some folders that is there, relative to the layout's.

    Args:
        layout: the expected one.
        uri: the user's.
        files: of the layout's folder.
        candidates: relative to it.
        inside: where the layout's folder itself has an entry of this name, it is the folder that is looked for.

    Raises:
        DataError: none is there.
    """
    if inside and inside in files.names():
        return ""
    for folder in candidates:
        if files.is_dir(posixpath.join(files.root, folder)):
            return folder
    raise layout_error(layout, uri, f"there is no folder {' or '.join(candidates)} (found: {describe_folder(files)}).")


def folder_source(
    layout: Layout, uri: DataUri, files: Files, folders: Sequence[str], depth: int = 1, origin: str = ""
) -> ListedSource:
    """The images of folders of classes.

    Args:
        layout: the expected one.
        uri: the user's.
        files: of the layout's folder.
        folders: relative to it; together they are one split, and no class is in two of them.
        depth: levels of folders that make a class, such as 2 for <alphabet>/<character>.
        origin: how the split was made.

    Raises:
        DataError: no images, images outside of the class folders, or a class in two folders.
    """
    infos, home = [], {}
    for folder in folders:
        for info in list_images(layout, uri, files, folder):
            parts = info.name.split("/")
            if len(parts) <= depth:
                raise layout_error(layout, uri, f"the image {info.name} lies outside of the class folders in {folder}.")
            label = "/".join(parts[:depth])
            if home.setdefault(label, folder) != folder:
                raise layout_error(layout, uri, f"the class {label} is in {home[label]} and in {folder}.")
            infos.append(info)
    names = [info.name for info in infos]
    labels = ["/".join(name.split("/")[:depth]) for name in names]
    return ListedSource(uri, files, infos, names, labels, origin=origin)


def listed_sources(
    layout: Layout,
    uri: DataUri,
    files: Files,
    folder: str,
    rows: Rows,
    origin: str,
    *,
    class_names: Sequence[str] | None = None,
    places: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
) -> dict[str, RowSource]:
    """Sources of some lists; ``val=train`` in the URI joins the validation images to train.

    Args:
        layout: the expected one.
        uri: the user's.
        files: of the layout's folder.
        folder: where the images are, relative to it.
        rows: by split; an image may be in one of them only.
        origin: where the lists are from.
        class_names: as for ``ListedSource``.
        places: image -> its folder, where there are several; one that is not listed is in none.
        groups: image -> its group.

    Raises:
        DataError: an empty list, an image in two, or no image that is there.
    """
    home: dict[str, str] = {}
    for split, own in rows.items():
        if not own:
            raise layout_error(layout, uri, f"no image is listed for {split}.")
        for name, _ in own:
            if home.setdefault(name, split) != split:
                raise layout_error(layout, uri, f"{name} is listed for {home[name]} and for {split}.")
    joined = dict(rows)
    if "val" in rows and option(uri, "val", ("own", "train")) == "train":
        joined["train"] = rows["train"] + rows["val"]
        del joined["val"]
    sources: dict[str, RowSource] = {}
    for split, own in joined.items():
        names = [name for name, _ in own]
        paths = [f"{folder if places is None else places.get(name, folder)}/{name}" for name in names]
        infos = find_images(files, paths)
        if not any(infos):
            raise layout_error(layout, uri, f"none of the {len(names)} images listed for {split} is there: {paths[0]}.")
        sources[split] = ListedSource(
            uri,
            files,
            infos,
            names,
            [label for _, label in own],
            class_names=class_names,
            groups=None if groups is None else [groups[name] for name in names],
            origin=origin
            + (", with those of val" if split == "train" and "val" in rows and "val" not in joined else ""),
        )
    return sources


def read_table(layout: Layout, uri: DataUri, files: Files, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file as column -> value.

    Raises:
        DataError: the file or one of the columns is not there, or a row is too short.
    """
    reader = csv.DictReader(io.StringIO(read_text(layout, uri, files, name)))
    found = [column.strip() for column in reader.fieldnames or []]
    missing = [column for column in columns if column not in found]
    if missing:
        raise layout_error(layout, uri, f"{name} has no column {some(missing, 5)}; it has {some(found, 12) or 'none'}.")
    reader.fieldnames = found
    rows = []
    for number, row in enumerate(reader, 2):
        if any(row[column] is None for column in columns):
            raise layout_error(layout, uri, f"line {number} of {name} has too few values.")
        rows.append({column: row[column].strip() for column in columns})
    if not rows:
        raise layout_error(layout, uri, f"{name} lists no image.")
    return rows
