"""Typed, frozen configurations of the commands, and their JSON form.

A configuration is complete: together with the data fingerprint and the package versions it determines a run. It
serialises to JSON, and its hash is stored with every number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from image_data.prepare import DataConfig
from methods import METHODS, method_spec
from methods.optimizers import OptimizerConfig

__all__ = [
    "PretrainConfig",
    "TrainConfig",
    "config_hash",
    "from_dict",
    "preset",
    "resolve_stem",
    "to_dict",
    "with_parameters",
]

T = TypeVar("T")


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained, whatever the method.

    Attributes:
        backbone: resnet9, resnet18, resnet34, resnet50, or timm:NAME (needs timm).
        stem: imagenet (7x7 stride 2 and max-pool) or small (3x3, no pooling); auto takes small below 48 px.
        image_size: side of the square training views in pixels.
        batch_size: global batch: images per optimiser step over all workers and micro-steps.
        epochs: passes over the training split; 0 saves the randomly initialised backbone.
        seed: seed of initialisation, shuffling and augmentation.
        num_workers: data-parallel workers (DDP processes).
        use_gpu: one GPU per worker (nccl); without it workers run on the CPU (gloo).
        cpus_per_worker: CPU cores each worker computes with.
        accumulate: micro-steps per optimiser step, so that a large global batch fits few workers.
        precision: auto (bf16 autocast on GPUs, else fp32), fp32 or bf16.
        compile: torch.compile the backbone (GPU only; it does not pay on CPUs).
        stream: memory (decoded once, memory-mapped), ray (Ray Data) or auto: memory when the decoded split fits.
        memory_limit_gb: largest decoded training split that auto keeps in memory, in GiB.
        augmentation: fused (numba kernel) or torchvision (the slow reference, same random numbers).
        views: names of the view recipes, one per view; empty takes the method's own.
        checkpoint_every: epochs between checkpoints; the last epoch always has one.
        max_failures: how often a run may restart after a worker died.
    """

    backbone: str = "resnet18"
    stem: Literal["auto", "imagenet", "small"] = "auto"
    image_size: int = 64
    batch_size: int = 256
    epochs: int = 100
    seed: int = 0
    num_workers: int = 1
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    stream: Literal["auto", "memory", "ray"] = "auto"
    memory_limit_gb: float = 4.0
    augmentation: Literal["fused", "torchvision"] = "fused"
    views: tuple[str, ...] = ()
    checkpoint_every: int = 5
    max_failures: int = 3


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run: method, its hyperparameters, its optimiser, the training settings and the data."""

    method: str
    method_config: Any
    optimizer: OptimizerConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)


def preset(method: str, train: TrainConfig | None = None, data: DataConfig | None = None) -> PretrainConfig:
    """The paper's settings of a method of ``METHODS``; raises ValueError for an unknown name."""
    spec = method_spec(method)
    return PretrainConfig(method, spec.config, spec.optimizer, train or TrainConfig(), data or DataConfig())


def with_parameters(config: PretrainConfig, parameters: dict[str, Any]) -> PretrainConfig:
    """Set hyperparameters by name wherever the field lives: the method, its optimiser or the training settings.

    Raises:
        ValueError: a name that this method does not have (an option is never ignored).
    """
    parts: dict[str, dict[str, Any]] = {"method_config": {}, "optimizer": {}, "train": {}}
    for name, value in parameters.items():
        owner = next((part for part in parts if name in _field_names(getattr(config, part))), None)
        if owner is None:
            allowed = sorted(n for part in parts for n in _field_names(getattr(config, part)))
            raise ValueError(
                f"Method {config.method!r} has no hyperparameter {name!r}. It has: {', '.join(allowed)}. "
                "Remove the option or choose a method that has it."
            )
        parts[owner][name] = value
    changed = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()}
    return dataclasses.replace(config, **changed)


def resolve_stem(train: TrainConfig) -> Literal["imagenet", "small"]:
    """The stem that ``auto`` stands for: an ImageNet stem leaves a 1x1 map of a 32 px image."""
    if train.stem != "auto":
        return train.stem
    return "small" if train.image_size < 48 else "imagenet"


def _field_names(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config)}


def to_dict(config: Any) -> dict[str, Any]:
    """JSON-ready dictionary of a configuration (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Any) -> str:
    """First 12 hex digits of the SHA-256 of the canonical JSON form."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """Inverse of ``to_dict``; the method's config class is found by the method's name.

    Raises:
        ValueError: a key that the class does not have (a config of another version).
    """
    hints = typing.get_type_hints(kind)
    unknown = set(values) - {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {sorted(unknown)}: the file was written by another version.")
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if kind is PretrainConfig and name == "method_config":
            hint = type(METHODS[values["method"]].config)
        arguments[name] = _convert(hint, value)
    built: Any = kind(**arguments)
    return built


def _convert(hint: Any, value: Any) -> Any:
    """Rebuild tuples and nested dataclasses from their JSON form."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value)
    if origin is tuple and isinstance(value, list):
        inner = args[0] if args else Any
        return tuple(_convert(inner, item) for item in value)
    return value
