"""From data URIs to packed shards, once: split, verified, shuffled and cached.

The cache key is a fingerprint of the configuration and of the source's listing, so a changed file or option makes a new
entry. An entry appears by one rename when it is complete; concurrent callers wait for the one that builds it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import posixpath
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from image_data.contracts import DataError
from image_data.packing import Spool, verify, write_split
from image_data.plan import Images, plan_splits
from image_data.prepared import MANIFEST, PreparedData, SplitInfo
from image_data.sources import RowSource, SourceIndex, open_rows
from image_data.subset import SubsetConfig
from image_data.uri import DataUri, Files, available_cpus, parse_data

if TYPE_CHECKING:
    import ray.data

__all__ = ["DataConfig", "PreparedData", "SplitInfo", "cache_directory", "open_source", "prepare"]

_FORMAT = 2  # of the packed shards; a change makes new cache entries
_LISTED_ERRORS = 20
_PROGRESS_SECONDS = 30.0
_COLUMNS = ("image", "label", "index")
# Division option to the splits that a data set must bring itself for the option to have nothing left to do.
_DIVIDED_BY = {"class_split": ("novel_classes",), "image_split": ("val", "test")}


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are divided.

    Attributes:
        data: one URI, split by a seeded rule, or ``split=URI`` for any of train, val, test, val_classes, novel_classes.
            What is missing of val and test is then taken from train (from ``rendered:`` its own val and test). A data
            set with its own layout (``miniimagenet:DIR``) brings the splits that it has.
        class_split: shares of base, validation and novel classes; pretraining sees base classes only. "auto" is
            0.64/0.16/0.20 for one URI and no division for named splits and data sets with their own layout; None never
            divides. ``rendered:`` and data sets with novel classes of their own always have their own division.
        image_split: shares of train, val and test among the images of the base classes.
        subset: what pretraining sees of it.
        max_unreadable: unreadable images to skip; one more stops the run with their list.
        data_seed: of the divisions and of the order of the packed images.
        cache: folder or URI of packed data; "" is $PRETRANSFER_CACHE or ~/.cache/pretransfer.
    """

    data: tuple[str, ...] = ("rendered:",)
    class_split: tuple[float, float, float] | Literal["auto"] | None = "auto"
    image_split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    max_unreadable: int = 0
    data_seed: int = 0
    cache: str = ""


def cache_directory(config: DataConfig) -> str:
    """The folder or URI that holds packed data."""
    chosen = config.cache or os.environ.get("PRETRANSFER_CACHE") or "~/.cache/pretransfer"
    return chosen.rstrip("/") if "://" in chosen else os.path.abspath(os.path.expanduser(chosen))


def prepare(config: DataConfig, log: Callable[[str], None] = print, *, threads: int = 0) -> PreparedData:
    """Packs the images of a configuration, or finds them packed.

    The same configuration and source give the same shards, byte for byte. Safe to call from several processes at once.

    Args:
        config: which images.
        log: receives the splits' sizes, the rule and what was left out.
        threads: for reading, rendering and verifying; 0 is one per CPU.

    Raises:
        DataError: bad URI, layout or configuration, or more unreadable images than allowed.
    """
    sources = _open_sources(config, threads or available_cpus())
    fingerprint = _fingerprint(config, sources)
    root = cache_directory(config)
    directory = posixpath.join(root, fingerprint)
    prepared = PreparedData.find(directory)
    if prepared is None:
        # A remote cache is built here and uploaded, so its lock holds only on this machine; two machines that build at
        # once upload the same bytes.
        local = Path(cache_directory(DataConfig()) if "://" in root else root)
        local.mkdir(parents=True, exist_ok=True)
        with _locked(local / f".{fingerprint}.lock"):
            prepared = PreparedData.find(directory)
            if prepared is None:
                prepared = _build(config, sources, fingerprint, local, directory, log, threads or available_cpus())
    if len(prepared.skipped) > config.max_unreadable:
        raise _too_many_unreadable(prepared.skipped, config.max_unreadable, "")
    prepared.report(log)
    return prepared


def open_source(
    data: str | Sequence[str] | DataConfig | PreparedData,
    split: str = "train",
    columns: Sequence[str] | None = _COLUMNS,
) -> ray.data.Dataset:
    """A split as a Ray Dataset of encoded images.

    Args:
        data: one URI, several, a configuration, or what ``prepare`` made.
        split: its name.
        columns: of the shards: ``image``, ``label``, ``index``, ``name``, ``height``, ``width``, ``coarse`` and
            further targets (of ``rendered:``, ``celeba:``); None for all.
    """
    import ray.data

    if isinstance(data, str):
        data = (data,)
    if not isinstance(data, (DataConfig, PreparedData)):
        data = DataConfig(data=tuple(data))
    prepared = prepare(data) if isinstance(data, DataConfig) else data
    files = list(prepared.split(split).files)
    context = ray.data.DataContext.get_current()
    configured = context.use_datasource_v2
    # The new reader neither divides small sets nor streams them (Ray 2.60); the choice is made in this call.
    context.use_datasource_v2 = False
    try:
        selected = None if columns is None else list(columns)
        return ray.data.read_parquet(files, columns=selected, override_num_blocks=len(files))
    finally:
        context.use_datasource_v2 = configured


def _open_sources(config: DataConfig, threads: int) -> dict[str, RowSource]:
    """Sources by split; the key "" stands for one that the rule divides."""
    from image_data.layouts import LAYOUTS, open_layout
    from image_data.rendered_source import open_rendered

    sources: dict[str, RowSource] = {}
    uris = parse_data(config.data)
    for name, uri in uris.items():
        if uri.scheme != "rendered" and uri.scheme not in LAYOUTS:
            sources[name] = open_rows(uri)
            continue
        opened = open_rendered(uri, name, threads) if uri.scheme == "rendered" else open_layout(uri, name)
        if name in ("", "train"):
            _check_division(config, uri, opened)
        sources |= {split: source for split, source in opened.items() if split == name or split not in uris}
    return sources


def _check_division(config: DataConfig, uri: DataUri, opened: Mapping[str, RowSource]) -> None:
    """Options of a division that a data set does not follow, since it divides itself, are not silently ignored."""
    standard = DataConfig()
    fixed = [option for option, needed in _DIVIDED_BY.items() if all(split in opened for split in needed)]
    for option in fixed if uri.scheme != "rendered" else _DIVIDED_BY:
        value = getattr(config, option)
        if value != getattr(standard, option):
            hint = "; the options of rendered: say how many classes and instances it has"
            raise DataError(
                f"{option}={value} has no effect on {uri.text}, which divides itself. Leave it at "
                f"{getattr(standard, option)}{hint if uri.scheme == 'rendered' else ''}."
            )


def _fingerprint(config: DataConfig, sources: Mapping[str, RowSource]) -> str:
    """Key of the cache; without paths, so that nodes with other mount points agree."""
    uris: dict[str, DataUri] = parse_data(config.data)
    record = {
        "format": _FORMAT,
        "uris": {name: [uri.scheme, sorted(uri.query.items())] for name, uri in uris.items()},
        "class_split": config.class_split,
        "image_split": config.image_split,
        # An option of its default value that came later does not make new entries of data prepared before.
        "subset": {k: v for k, v in asdict(config.subset).items() if k != "num_categories" or v},
        "data_seed": config.data_seed,
        "listing": {name: _hash("\n".join(source.listing())) for name, source in sources.items()},
    }
    return _hash(json.dumps(record, sort_keys=True))[:16]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; the kernel drops it when the process dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    config: DataConfig,
    sources: Mapping[str, RowSource],
    fingerprint: str,
    local: Path,
    directory: str,
    log: Callable[[str], None],
    threads: int,
) -> PreparedData:
    """Packs into a temporary folder and moves it into place; the caller holds the lock."""
    prefix = f".{fingerprint}.building-"
    for leftover in local.glob(f"{prefix}*"):  # of a killed build
        shutil.rmtree(leftover)
    work = local / f"{prefix}{uuid.uuid4().hex[:8]}"
    work.mkdir()
    try:
        log(f"preparing {' '.join(config.data)} (once; cached in {directory})")
        prepared = _pack(config, sources, fingerprint, work, log, threads)
        (work / MANIFEST).write_text(prepared.to_json())
        _publish(work, directory)
        return PreparedData.load(directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"no space left in {local} for packed images; free some or set the cache folder."
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, directory: str) -> None:
    """Makes the finished folder appear in the cache, the manifest last."""
    if "://" not in directory:
        if os.path.exists(directory):  # incomplete: somebody removed files
            shutil.rmtree(directory)
        os.rename(work, directory)
        return
    files = Files(directory)
    for path in sorted(work.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        files.put(str(path), posixpath.join(files.root, path.name))


def _pack(
    config: DataConfig,
    sources: Mapping[str, RowSource],
    fingerprint: str,
    work: Path,
    log: Callable[[str], None],
    threads: int,
) -> PreparedData:
    """Writes the shards of all splits into a folder."""
    indices = {name: source.index() for name, source in sources.items()}
    images, rule = plan_splits(config, indices)
    spools = [Spool(work / f"spool-{i}", len(index.names)) for i, index in enumerate(indices.values())]
    try:
        skipped = _fill(config, sources, indices, images, spools, log, threads)
        splits = {}
        content = []
        for name, own in images.items():
            packed = write_split(work, name, own, spools, config.data_seed)
            content.append(f"{name} {packed.content}")
            splits[name] = SplitInfo(
                name,
                tuple(packed.files),
                packed.num_images,
                own.class_names,
                packed.class_counts,
                packed.num_bytes,
                packed.decoded_bytes,
                own.coarse_names,
            )
    finally:
        for i, spool in enumerate(spools):
            spool.close()
            (work / f"spool-{i}").unlink()
    return PreparedData(
        str(work), fingerprint, _hash("\n".join(content))[:16], rule, splits, skipped, tuple(config.data)
    )


def _fill(
    config: DataConfig,
    sources: Mapping[str, RowSource],
    indices: Mapping[str, SourceIndex],
    images: Mapping[str, Images],
    spools: Sequence[Spool],
    log: Callable[[str], None],
    threads: int,
) -> tuple[tuple[str, str], ...]:
    """Reads and verifies every image that a split wants; returns (name, reason) of the unreadable ones."""
    skipped: list[tuple[str, str]] = []
    total = sum(len(own.names) for own in images.values())
    done, reported = 0, time.monotonic()
    for number, (name, source) in enumerate(sources.items()):
        wanted = np.zeros(len(indices[name].names), bool)
        for own in images.values():
            wanted[own.position[own.source == number]] = True
        for verified in verify(source.read(wanted), threads):
            done += 1
            if not verified.error:
                spools[number].add(verified)
            else:
                skipped.append((indices[name].names[verified.row.position], verified.error))
                if len(skipped) >= config.max_unreadable + _LISTED_ERRORS:  # enough to show; stop early
                    raise _too_many_unreadable(skipped, config.max_unreadable, f" among the first {done:,}")
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                log(f"  {done:,} of {total:,} images")
    if len(skipped) > config.max_unreadable:
        raise _too_many_unreadable(skipped, config.max_unreadable, "")
    return tuple(skipped)


def _too_many_unreadable(skipped: Sequence[tuple[str, str]], limit: int, where: str) -> DataError:
    lines = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:_LISTED_ERRORS])
    return DataError(
        f"{len(skipped)} unreadable images{where}; the limit is max_unreadable={limit}. Repair or remove them, or "
        f"set the limit higher to skip them:{lines}"
    )
