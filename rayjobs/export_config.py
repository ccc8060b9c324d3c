"""The export command's configuration, and the checks that run before anything is written."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from rayjobs.checkpoint import load_backbone, local_directory
from rayjobs.exporters import FORMATS
from rayjobs.exporters.contracts import Source
from rayjobs.exporters.folder import PAGE
from rayjobs.places import resolve_output

__all__ = ["REGISTRY_FORMAT", "ExportConfig", "ExportSetup", "prepare_export"]

REGISTRY_FORMAT = "onnx"  # a registered model is this graph: it loads without our code and without pickle


@dataclass(frozen=True)
class ExportConfig:
    """A pretrained backbone in the formats of other libraries, each read back and compared with the original.

    Attributes:
        checkpoint: folder (or URI) with backbone.safetensors and config.json.
        formats: any of torchvision, timm, detectron2, huggingface, onnx; empty takes all that the backbone and the
            installed packages allow.
        output: local folder that gets one sub-folder per format.
        overwrite: replace sub-folders of an earlier export.
        register: also add the backbone to MLflow's model registry under this name; empty does not.
        experiment: MLflow experiment of the registered model.
    """

    checkpoint: str = ""
    formats: tuple[str, ...] = ()
    output: str = "results/export"
    overwrite: bool = False
    register: str = ""
    experiment: str = "export"


@dataclass(frozen=True)
class ExportSetup:
    """A checked export.

    Attributes:
        config: what the user asked for.
        source: the checkpoint.
        formats: what will be written.
        left_out: format -> why it is not written, where the user named none.
        output: local folder.
    """

    config: ExportConfig
    source: Source
    formats: tuple[str, ...]
    left_out: dict[str, str]
    output: Path


def prepare_export(config: ExportConfig) -> ExportSetup:
    """Load the checkpoint and check that every format can be written.

    Raises:
        ValueError: what is wrong, what is allowed, how to fix it.
    """
    _check_options(config)
    with local_directory(config.checkpoint) as directory:
        source = Source(*load_backbone(directory))
    refused = {name: form.refusal(source) for name, form in FORMATS.items()}
    possible = [name for name, reason in refused.items() if not reason]
    for name in config.formats:
        if refused[name]:
            raise ValueError(
                f"--formats {name} cannot express this backbone ({source.name}, {source.stem} stem): {refused[name]}. "
                f"Formats that can: {', '.join(possible)}."
            )
    missing = {name: FORMATS[name].missing() for name in (config.formats or possible)}
    if config.register and REGISTRY_FORMAT not in missing:
        missing[REGISTRY_FORMAT] = FORMATS[REGISTRY_FORMAT].missing()
    for name in {*config.formats, *([REGISTRY_FORMAT] if config.register else [])}:
        if missing[name]:
            flag = f"--formats {name}" if name in config.formats else f"--register writes {name}, and"
            raise ValueError(f"{flag}: {missing[name]}.")
    formats = config.formats or tuple(name for name in possible if not missing[name])
    left_out = {} if config.formats else {n: r for n in FORMATS if (r := refused[n] or missing[n])}
    if not formats:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"No format can be written:\n{reasons}")
    output = Path(resolve_output(config.output))
    for name in formats:
        _check_folder(output / name, config.overwrite)
    return ExportSetup(config, source, tuple(dict.fromkeys(formats)), left_out, output)


def _check_options(config: ExportConfig) -> None:
    if not config.checkpoint:
        raise ValueError("--checkpoint is missing: give the folder of a pretraining run.")
    for name in config.formats:
        if name not in FORMATS:
            close = difflib.get_close_matches(name, FORMATS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"--formats {name} is unknown.{hint} Choose from: {', '.join(FORMATS)}.")
    if "://" in config.output:
        raise ValueError(f"--output {config.output}: give a local folder; copy it to a remote place afterwards.")
    if config.register and not config.experiment:
        raise ValueError("--experiment is empty, and --register needs one; give a name or drop the flag.")
    bad = [character for character in "/:'\"" if character in config.register]
    if bad or config.register != config.register.strip() or config.register in (".", ".."):
        raise ValueError(
            f"--register {config.register!r} cannot be the name of a registered model; use letters, digits, - and _."
        )


def _check_folder(folder: Path, overwrite: bool) -> None:
    """An earlier export is replaced on request; anything else is never deleted."""
    if not folder.exists():
        return
    if not (folder / PAGE).is_file():
        raise ValueError(f"{folder} exists and is not an export (no {PAGE}). Move it, or choose another --output.")
    if not overwrite:
        raise ValueError(f"{folder} already holds an export. Replace it with --overwrite, or choose another --output.")
