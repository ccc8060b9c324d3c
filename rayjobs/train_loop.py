"""The one train loop: any method, any number of workers, CPU or GPU, from Ray Train, from a Tune trial or plain.

The loop knows no Ray. A ``Reporter`` carries metrics and checkpoints out and the newest checkpoint back in; a stream
delivers ``ImageBatch``es. Every optimiser step sees one global batch, split over workers and micro-steps in a fixed
order, so that 1 process, N processes and gradient accumulation compute the same loss.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from image_data.contracts import ImageBatch
from image_data.stream import to_device
from methods import METHODS
from methods.backbones import build_backbone
from methods.batchnorm import average_running_statistics
from methods.collectives import all_reduce_mean
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.optimizers import build_optimizer, learning_rate, set_learning_rate
from rayjobs.checkpoint import load_config, load_state, save_checkpoint
from rayjobs.configs import PretrainConfig, config_hash, resolve_stem
from rayjobs.meter import Meter

__all__ = [
    "Reporter",
    "Stream",
    "TrainingDiverged",
    "Worker",
    "build_method",
    "feature_map_side",
    "method_context",
    "train",
]

GPU_CHECK_EVERY = 50  # steps between looks at the loss on a GPU, where each look waits for the device


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the message names the step."""


class Reporter(Protocol):
    """How results leave the loop; every rank calls ``report`` equally often."""

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None] | None) -> None: ...

    def latest(self) -> AbstractContextManager[Path | None]: ...

    def progress(self, metrics: dict[str, Any]) -> None: ...


class Stream(Protocol):
    """Batches of one worker."""

    steps_per_epoch: int
    wait_seconds: float

    def epoch(self, epoch: int) -> Iterator[ImageBatch]: ...


@dataclass(frozen=True)
class Worker:
    """This process's place: rank, number of workers, device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009


@dataclass
class _Training:
    """Everything that one step touches."""

    config: PretrainConfig
    worker: Worker
    method: Any
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    bad_step: Tensor

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs


Probe = Callable[[nn.Module, int], dict[str, float]]


def method_context(config: PretrainConfig, num_classes: int, num_images: int) -> MethodContext:
    """What the method is told about data and run."""
    train = config.train
    return MethodContext(
        num_classes=num_classes,
        num_images=num_images,
        global_batch_size=train.batch_size,
        world_size=train.num_workers,
        image_size=train.image_size,
        num_micro_steps=train.accumulate,
        feature_map_side=feature_map_side(train.backbone, resolve_stem(train), train.image_size),
    )


@lru_cache(maxsize=64)
def feature_map_side(backbone: str, stem: Literal["imagenet", "small"], image_size: int) -> int:
    """Side of the last feature map, found with one image (the meta device would load torch's compiler: 7 s)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = build_backbone(backbone, stem).eval()
        try:
            return int(module.forward_features(torch.zeros(1, 3, image_size, image_size)).shape[-1])
        except RuntimeError as error:
            raise ValueError(
                f"Images of {image_size} px are too small for {backbone} with the {stem} stem ({error}). Use larger "
                "images, the small stem or another backbone."
            ) from error


def build_method(config: PretrainConfig, context: MethodContext) -> Any:
    """The method with a freshly initialised backbone; the same weights for the same seed on every worker."""
    return METHODS[config.method].method(config.method_config, _fresh_backbone(config), context)


def _fresh_backbone(config: PretrainConfig) -> Any:
    """The backbone as training starts with it; seeds torch."""
    torch.manual_seed(config.train.seed)
    spec = METHODS[config.method]
    return build_backbone(
        config.train.backbone, resolve_stem(config.train), spec.zero_init_residual, color_space=spec.color_space
    )


def train(
    config: PretrainConfig,
    record: dict[str, Any],
    context: MethodContext,
    stream: Stream,
    worker: Worker,
    reporter: Reporter,
    probe: Probe | None = None,
    probe_epochs: Collection[int] = (),
) -> None:
    """Train from the newest checkpoint (or from scratch) to the last epoch.

    Args:
        config: the run.
        record: run record stored in every checkpoint.
        context: what the method knows of the data.
        stream: this worker's batches.
        worker: this process's place.
        reporter: where metrics and checkpoints go; reports carry ``epoch`` = epochs finished.
        probe: transfer metrics of the backbone, computed by rank 0 after each epoch in ``probe_epochs``.
        probe_epochs: epochs (counted from 1) after which ``probe`` runs.

    Raises:
        TrainingDiverged: NaN or infinite loss.
    """
    if config.train.epochs == 0:
        saver = _saver(config, record, _fresh_backbone(config), None)  # a method may not fit the data; nothing needs it
        reporter.report({"epoch": 0}, saver if worker.rank == 0 else None)
        return
    training = _prepare(config, context, stream, worker)
    start, last_metrics = _resume(training, reporter)
    if start >= config.train.epochs:
        reporter.report(last_metrics, None)
        return
    for epoch in range(start, config.train.epochs):
        metrics = _run_epoch(training, stream, epoch, reporter)
        finished = epoch + 1
        is_due = finished % config.train.checkpoint_every == 0 or finished == config.train.epochs
        is_probed = finished in probe_epochs
        if is_due or is_probed:
            # Per-device BatchNorm drifts apart; rank 0 speaks for all workers, and a resumed run starts from its state.
            average_running_statistics(training.method)
        if probe is not None and is_probed and worker.rank == 0:
            metrics |= _probed(training, probe, finished)
        saver = None
        if is_due and worker.rank == 0:
            state = _state(training, finished, metrics)
            saver = _saver(config, record | {"epoch": finished}, training.method.backbone, state)
        reporter.report(metrics, saver)


def _prepare(config: PretrainConfig, context: MethodContext, stream: Stream, worker: Worker) -> _Training:
    method = build_method(config, context).to(worker.device)
    method = method.to(memory_format=torch.channels_last).train()
    if config.train.compile:
        method.backbone.compile()
    wrapped: nn.Module = method
    if worker.world_size > 1:
        # Buffers are not broadcast: queues are identical on all ranks already, BatchNorm follows the method's own rule.
        wrapped = DistributedDataParallel(
            method,
            device_ids=[worker.device.index] if worker.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=getattr(method, "has_unused_parameters", False),
        )
    optimizer = build_optimizer(method, config.optimizer, config.train.batch_size)
    bad_step = torch.full((), -1, dtype=torch.int64, device=worker.device)
    return _Training(config, worker, method, wrapped, optimizer, stream.steps_per_epoch, bad_step)


def _resume(training: _Training, reporter: Reporter) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint; returns the epochs finished and the metrics reported then."""
    with reporter.latest() as directory:
        if directory is None:
            return 0, {}
        stored, _ = load_config(directory)
        if config_hash(stored) != config_hash(training.config):
            raise ValueError(
                f"The checkpoint to resume from was made with another configuration "
                f"({config_hash(stored)} there, {config_hash(training.config)} here). "
                "Resume with the same flags, or choose another --output."
            )
        state = load_state(directory)
    training.method.load_state_dict(state["method"])
    training.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return int(state["epoch"]), state["metrics"]


def _state(training: _Training, epoch: int, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": training.method.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": epoch,
        "metrics": metrics,
    }


def _saver(
    config: PretrainConfig, record: dict[str, Any], backbone: nn.Module, state: dict[str, Any] | None
) -> Callable[[Path], None]:
    return lambda directory: save_checkpoint(directory, config, record, backbone, state)


def _probed(training: _Training, probe: Probe, epoch: int) -> dict[str, float]:
    """Run the probe without leaving a trace in the training state."""
    rng = torch.get_rng_state()
    values = probe(training.method.backbone, epoch)
    torch.set_rng_state(rng)
    training.method.train()
    return values


def _run_epoch(training: _Training, stream: Stream, epoch: int, reporter: Reporter) -> dict[str, Any]:
    """One pass over the stream; returns the epoch's metrics."""
    meter = Meter(training.steps_per_epoch, training.worker.device)
    waited_before, began = stream.wait_seconds, time.perf_counter()
    for i, batch in enumerate(stream.epoch(epoch)):
        step = epoch * training.steps_per_epoch + i
        loss, metrics, lr = _step(training, batch, step, epoch)
        meter.add(step, loss, metrics, lr)
        _check(training, loss, step, is_last=i + 1 == training.steps_per_epoch)
        if meter.is_due() and i + 1 < training.steps_per_epoch:  # the epoch's own report follows the last step
            elapsed = time.perf_counter() - began
            reporter.progress(
                {
                    "epoch": epoch + (i + 1) / training.steps_per_epoch,
                    "step": step + 1,
                    "loss": float(loss),
                    "learning_rate": lr,
                    "images_per_second": (i + 1) * training.config.train.batch_size / elapsed,
                    "data_wait_percent": 100 * (stream.wait_seconds - waited_before) / elapsed,
                    "epoch_seconds": elapsed * training.steps_per_epoch / (i + 1),
                }
            )
    elapsed = time.perf_counter() - began
    if meter.count != training.steps_per_epoch:
        raise RuntimeError(f"The stream gave {meter.count} batches in epoch {epoch}, not {training.steps_per_epoch}.")
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * training.steps_per_epoch,
        **meter.means(),
        "images_per_second": meter.count * training.config.train.batch_size / elapsed,
        "data_wait_percent": 100 * (stream.wait_seconds - waited_before) / elapsed,
        "epoch_seconds": elapsed,
        "curve": meter.curve(),
    }


def _step(training: _Training, batch: ImageBatch, step: int, epoch: int) -> tuple[Tensor, dict[str, Tensor], float]:
    """One batch: an optimiser step, or one for each of the method's phases, then the method's own.

    The loss is the sum over the phases; each phase has monitors of its own names.
    """
    config, count = training.config, training.config.train.accumulate
    lr = learning_rate(config.optimizer, config.train.batch_size, step, training.total_steps, training.steps_per_epoch)
    set_learning_rate(training.optimizer, lr)
    share = Batch(*to_device(batch, training.worker.device))
    total, monitors = torch.zeros((), device=training.worker.device), {}
    progress = Progress(step, training.total_steps, epoch, config.train.epochs, 0, count)
    for phase in range(_num_phases(training.method, progress)):
        training.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for m in range(count):
            progress = replace(progress, phase=phase, micro_step=m)
            output = _forward_backward(training, share, progress)
            total += output.loss.detach() / count
            for name, value in output.metrics.items():
                sums[name] = sums.get(name, 0) + value.detach() / count
        training.optimizer.step()
        monitors |= sums
    training.method.after_step(progress)
    # The mean over workers, so that all of them see a bad loss in the same step.
    return all_reduce_mean(total), monitors, lr


def _num_phases(method: Any, progress: Progress) -> int:
    """Optimiser steps on this batch; one unless the method says otherwise."""
    return method.num_phases(progress) if hasattr(method, "num_phases") else 1


def _forward_backward(training: _Training, share: Batch, progress: Progress) -> StepOutput:
    """The forward and backward pass of one micro-step."""
    m, count = progress.micro_step, progress.num_micro_steps
    micro = share.labels.shape[0] // count
    part = slice(m * micro, (m + 1) * micro)
    images = Batch([v[part] for v in share.views], share.labels[part], share.index[part])
    is_last = m + 1 == count
    with _maybe_no_sync(training.wrapped, is_last), _autocast(training.config, training.worker.device):
        output = training.wrapped(images, progress)
        (output.loss / count).backward()
    return output


def _maybe_no_sync(wrapped: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Exchange gradients only in the last micro-step."""
    if isinstance(wrapped, DistributedDataParallel) and not is_last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def _autocast(config: PretrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    wanted = config.train.precision
    enabled = wanted == "bf16" or (wanted == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _check(training: _Training, loss: Tensor, step: int, is_last: bool) -> None:
    """Remember the first step with a bad loss on the device; look at it every step on a CPU, seldom on a GPU."""
    is_first_bad = (training.bad_step < 0) & ~torch.isfinite(loss)
    training.bad_step = torch.where(is_first_bad, step, training.bad_step)
    if training.worker.device.type == "cuda" and not is_last and step % GPU_CHECK_EVERY:
        return
    bad = int(training.bad_step)
    if bad >= 0:
        epoch = bad // training.steps_per_epoch
        raise TrainingDiverged(
            f"The loss of {training.config.method} became NaN or infinite in step {bad} (epoch {epoch}). "
            "Lower --learning-rate, raise --warmup-epochs, or use --precision fp32."
        )
