"""The run record: what, besides the configuration, is needed to believe and to repeat a number."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from image_data.prepared import PreparedData
from rayjobs.configs import PretrainConfig, config_hash
from rayjobs.job import view_recipes
from rayjobs.places import PROJECT_ROOT

__all__ = ["data_record", "git_revision", "package_versions", "run_record", "trial_record"]

PACKAGES = ("torch", "torchvision", "ray", "optuna", "mlflow", "numba", "numpy", "pillow", "simplejpeg", "scikit-learn")


def run_record(config: PretrainConfig, data: PreparedData) -> dict[str, Any]:
    """Everything of the run record that is known when a run starts."""
    return {
        **_of_config(config),
        "data": data_record(data),
        "versions": package_versions(),
        "git": git_revision(),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "workers": config.train.num_workers,
            "gpu": config.train.use_gpu,
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def trial_record(record: Mapping[str, Any], config: PretrainConfig, sampled: Mapping[str, Any]) -> dict[str, Any]:
    """The record of one trial: that of its method's fixed settings, with what the sampled parameters change."""
    return {**record, **_of_config(config), "parameters": dict(sampled)}


def _of_config(config: PretrainConfig) -> dict[str, Any]:
    """What follows from the configuration; views in full, since a recipe's name may mean something else tomorrow."""
    return {
        "config_hash": config_hash(config),
        "method": config.method,
        "seed": config.train.seed,
        "views": [recipe.to_json() for recipe in view_recipes(config)],
    }


def data_record(data: PreparedData) -> dict[str, Any]:
    """Which images and labels: fingerprint, split rule, sizes, class names, skipped files."""
    splits = {
        name: {"images": info.num_images, "classes": len(info.class_names), "class_names": list(info.class_names)}
        for name, info in data.splits.items()
    }
    return {
        "source": list(data.source),
        "fingerprint": data.fingerprint,
        "content": data.content,
        "rule": data.rule,
        "splits": splits,
        "skipped": [list(item) for item in data.skipped],
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    return {name: metadata.version(name) for name in PACKAGES}


def git_revision() -> str:
    """Commit of the checkout, with "+changes" when the tree differs; "unknown" outside a checkout (a job's upload)."""
    if not (PROJECT_ROOT / ".git").exists():
        return os.environ.get("PRETRANSFER_GIT_REVISION", "unknown")
    command = ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
