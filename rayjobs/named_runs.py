"""Sweeps and comparisons by name: where each lies, which one ``--resume`` means, and that no name is used twice."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayjobs.cli import differences
from rayjobs.places import resolve_output

__all__ = [
    "COMPARISON",
    "SWEEP",
    "RunKind",
    "check_new_name",
    "check_same_settings",
    "check_shared",
    "is_finished",
    "output_folder",
    "resume_command",
    "resumed_name",
    "state_folder",
]


@dataclass(frozen=True)
class RunKind:
    """A command whose runs have names.

    Attributes:
        word: what a run of it is called.
        command: its script in ``rayjobs``.
        state: file with the settings that it was started with.
        results: file that it writes at its end.
    """

    word: str
    command: str
    state: str
    results: str


SWEEP = RunKind("sweep", "sweep", "sweep.json", "results.json")
COMPARISON = RunKind("comparison", "compare", "started.json", "comparison.json")


def output_folder(output: str, name: str) -> str:
    """Absolute folder or URI of a run's checkpoints."""
    return f"{resolve_output(output)}/{name}"


def state_folder(output: str, name: str) -> Path:
    """Local folder of a run's state and report: its own folder, or ``results/NAME`` when that is a URI."""
    return Path(resolve_output("results" if "://" in output else output)) / name


def is_finished(kind: RunKind, folder: Path) -> bool:
    """Whether a run has written its results."""
    return (folder / kind.results).is_file()


def resumed_name(kind: RunKind, output: str, name: str) -> str:
    """The run that ``--resume`` continues: the named one, else the newest unfinished one.

    Raises:
        ValueError: there is none.
    """
    root = state_folder(output, "any").parent
    if not name:
        found = [p.parent for p in root.glob(f"*/{kind.state}") if not is_finished(kind, p.parent)]
        if not found:
            raise ValueError(
                f"--resume: no unfinished {kind.word} under {root}. Name one with --name, or drop --resume."
            )
        name = max(found, key=lambda folder: (folder / kind.state).stat().st_mtime).name
    if not (root / name / kind.state).is_file():
        raise ValueError(f"--resume: no {kind.word} named {name!r} under {root}. Check --name and --output.")
    return name


def check_new_name(kind: RunKind, output: str, name: str) -> None:
    """Raise ValueError when a name is in use: it needs --resume, or the new run another name."""
    folder = state_folder(output, name)
    for other in (SWEEP, COMPARISON):
        if (folder / other.state).exists():
            again = f"Continue it with {resume_command(other, output, name)}, or choose another --name."
            raise ValueError(f"A {other.word} named {name!r} exists in {folder}. {again}")


def check_same_settings(kind: RunKind, name: str, mine: Any, stored: Any, defaults: Any) -> None:
    """Raise ValueError when ``--resume`` comes with flags that differ from those that the run was started with."""
    changed = differences(mine, stored, defaults)
    if changed:
        raise ValueError(
            f"--resume continues {kind.word} {name!r} with the settings it was started with, but these flags differ: "
            f"{', '.join(changed)}. Drop them, or start a new {kind.word} under another --name."
        )


def check_shared(output: str, example: str, is_multi_node: bool) -> None:
    """Raise ValueError when checkpoints would lie where other nodes cannot read them."""
    if is_multi_node and "://" not in output and not Path(output).is_absolute():
        raise ValueError(
            f"--output {output} is a folder relative to this machine, but the cluster has several nodes. Give a "
            f"URI (s3://bucket/{example}) or the absolute path of a folder that all nodes mount."
        )


def resume_command(kind: RunKind, output: str, name: str) -> str:
    """The command that continues a run."""
    place = "" if output == "results" else f" --output {shlex.quote(output)}"
    return f"python rayjobs/{kind.command}.py --resume --name {shlex.quote(name)}{place}"
