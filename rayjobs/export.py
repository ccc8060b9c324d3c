"""Export a pretrained backbone to other libraries, and check that each gives the same features.

All that it can be:     python rayjobs/export.py --checkpoint results/pretrain
Some, and where to:     python rayjobs/export.py --checkpoint results/pretrain --formats timm onnx --output exported
MLflow's registry too:  python rayjobs/export.py --checkpoint results/pretrain --formats onnx --register my-backbone
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the project folder takes the place of this one on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console

from rayjobs.cli import EXIT_INTERRUPTED, flat_parse, make_console, plain, quiet_libraries, user_errors
from rayjobs.export_config import REGISTRY_FORMAT, ExportConfig, ExportSetup, prepare_export
from rayjobs.exporters import FORMATS
from rayjobs.exporters.folder import PAGE, Exported, ExportError, export_folder
from rayjobs.exporters.onnx_format import FILE
from rayjobs.exporters.registry import register_model
from rayjobs.tracking import Tracker, tracking_summary

EXIT_FAILED = 1


def main(argv: list[str] | None = None) -> None:
    """Parse, check, write, verify, register, print."""
    quiet_libraries()
    console = make_console()
    epilogue = "\n\n" + "\n\n".join(f"{name}: {form.summary}." for name, form in FORMATS.items())
    config = flat_parse(ExportConfig, None, argv, (__doc__ or "") + epilogue)
    with user_errors():
        setup = prepare_export(config)
        tracker = _tracker(setup, console) if config.register else None
    try:
        _export(setup, console)
        if tracker is not None:
            _register(setup, tracker, console)
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. Formats that are finished are in {setup.output}.", soft_wrap=True)
        sys.exit(EXIT_INTERRUPTED)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    finally:
        if tracker is not None:
            tracker.close(60)


def _tracker(setup: ExportSetup, console: Console) -> Tracker:
    """Opened before anything is written: a store that does not answer is an error of the user's."""
    return Tracker(setup.config.experiment, setup.output / "mlflow-pending.jsonl", log=plain(console))


def _export(setup: ExportSetup, console: Console) -> None:
    for name in setup.formats:
        exported = export_folder(name, FORMATS[name], setup.source, setup.output / name)
        console.print(f"{name:<12} {_measured(name, exported)}   {exported.folder / PAGE}", soft_wrap=True)
    for name, reason in setup.left_out.items():
        console.print(f"[yellow]Not written, {name}:[/yellow] {reason}", soft_wrap=True)


def _measured(name: str, exported: Exported) -> str:
    size = f"{exported.num_bytes / 2**20:.1f} MiB"
    return f"features differ by {exported.difference:.1e} (allowed {FORMATS[name].tolerance:.0e})   {size:>10}"


def _register(setup: ExportSetup, tracker: Tracker, console: Console) -> None:
    """The graph of the export, or one that is written and verified for the registry alone."""
    with tempfile.TemporaryDirectory(prefix="export-") as temporary:
        folder = setup.output / REGISTRY_FORMAT
        if REGISTRY_FORMAT not in setup.formats:
            folder = Path(temporary) / REGISTRY_FORMAT
            export_folder(REGISTRY_FORMAT, FORMATS[REGISTRY_FORMAT], setup.source, folder)
        name = setup.config.register
        version = register_model(tracker, name, folder / FILE, setup.source)
    console.print(f"Registered   {name} version {version}   load: mlflow.onnx.load_model('models:/{name}/{version}')")
    console.print(f"MLflow       {tracking_summary(tracker.uri)}   experiment {setup.config.experiment}")


if __name__ == "__main__":
    main()
