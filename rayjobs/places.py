"""Where results and the default MLflow store live: beside the user, never in a folder that Ray deletes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PROJECT_ROOT", "home", "resolve_output"]

PROJECT_ROOT = Path(__file__).resolve().parent.parent
JOB_HOME = "pretransfer"


def home() -> Path:
    """The project folder; for a submitted job, whose working directory is a temporary copy, ``~/pretransfer``."""
    if "runtime_resources" in PROJECT_ROOT.parts:
        return Path.home() / JOB_HOME
    return PROJECT_ROOT


def resolve_output(output: str) -> str:
    """An output option as an absolute path or URI; relative paths start at the caller's folder, or the job's home."""
    if "://" in output:
        return output.rstrip("/")
    path = Path(output).expanduser()
    if path.is_absolute():
        return str(path)
    base = home() if home() != PROJECT_ROOT else Path.cwd()
    return str((base / path).resolve())
