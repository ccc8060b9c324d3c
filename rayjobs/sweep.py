"""Sweep pretraining methods and hyperparameters, judged by downstream transfer.

On this machine:       python rayjobs/sweep.py
On a cluster:          ray job submit --working-dir . -- python rayjobs/sweep.py --output s3://bucket/sweeps --use-gpu
After an interruption: the same command with --resume
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the project folder takes the place of this one on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from image_data.prepare import prepare
from rayjobs.cli import EXIT_INTERRUPTED, differences, flat_parse, make_console, plain, quiet_libraries, user_errors
from rayjobs.sweep_config import SweepConfig, prepare_sweep, sweep_defaults


def main(argv: list[str] | None = None) -> None:
    """Parse, check, run, report."""
    quiet_libraries()
    console = make_console()
    config = flat_parse(SweepConfig, sweep_defaults(), argv, __doc__ or "")
    with user_errors():
        config = _named(config)
        _check_folder(config)
        console.print(f"[bold]Sweep {config.name}[/bold]")
        data = prepare(config.data, log=plain(console))
        setup = prepare_sweep(config, data)

    from rayjobs.cluster import check_resources, connect, shutdown
    from rayjobs.job import uses_memory
    from rayjobs.sweep_run import SweepInterrupted, run_sweep, sweep_folder
    from rayjobs.tracking import default_tracking_uri, tracking_summary

    settings = config.train
    with user_errors():
        cluster = connect()
        check_resources(
            cluster,
            settings.num_workers,
            settings.cpus_per_worker,
            float(settings.use_gpu),
            uses_ray_data=not uses_memory(settings, data),
        )
        _check_shared(config, cluster.is_multi_node)
    console.print(
        f"Objective {setup.objective} ({setup.space.direction}d) on validation data; "
        f"{config.num_trials} trials of {settings.epochs} epochs over {', '.join(setup.context.methods)}"
    )
    for method, reason in setup.left_out.items():
        console.print(f"[yellow]Left out: {method}.[/yellow] {reason}")
    try:
        run_sweep(setup, data, cluster, console)
    except SweepInterrupted:
        console.print("\nInterrupted. Finished trials are kept. Continue with:")
        console.print(f"  {_resume_command(config)}", soft_wrap=True)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        shutdown()
    console.print(f"\nResults    {sweep_folder(config)}")
    console.print(f"MLflow     {tracking_summary(default_tracking_uri())}   experiment {config.name}")


def _named(config: SweepConfig) -> SweepConfig:
    """Give the sweep its name: the user's, the newest unfinished one with --resume, else a new one from the time."""
    from dataclasses import replace

    from rayjobs.sweep_run import is_finished, state_folder, stored_config, with_resume

    if not config.resume:
        return config if config.name else replace(config, name=f"{config.space}-{time.strftime('%Y%m%d-%H%M%S')}")
    root = state_folder(replace(config, name="any")).parent
    name = config.name
    if not name:
        found = sorted(p.parent for p in root.glob("*/sweep.json") if not is_finished(p.parent))
        if not found:
            raise ValueError(f"--resume: no unfinished sweep under {root}. Name one with --name, or drop --resume.")
        name = max(found, key=lambda p: (p / "sweep.json").stat().st_mtime).name
    if not (root / name / "sweep.json").is_file():
        raise ValueError(f"--resume: no sweep named {name!r} under {root}. Check --name and --output.")
    stored = stored_config(root / name)
    changed = differences(
        replace(config, name=name, confirm=stored.confirm, resume=stored.resume), stored, sweep_defaults()
    )
    if changed:
        raise ValueError(
            f"--resume continues sweep {name!r} with the settings it was started with, but these flags differ: "
            f"{', '.join(changed)}. Drop them, or start a new sweep under another --name."
        )
    return with_resume(config, stored)


def _check_folder(config: SweepConfig) -> None:
    """A name that is in use needs --resume or another name."""
    from rayjobs.sweep_run import state_folder

    folder = state_folder(config)
    if not config.resume and (folder / "sweep.json").exists():
        raise ValueError(
            f"A sweep named {config.name!r} exists in {folder}. Continue it with --resume --name {config.name}, or "
            "choose another --name."
        )


def _check_shared(config: SweepConfig, is_multi_node: bool) -> None:
    """Checkpoints must be readable from every node."""
    if is_multi_node and "://" not in config.output and not Path(config.output).is_absolute():
        raise ValueError(
            f"--output {config.output} is a folder relative to this machine, but the cluster has several nodes. Give a "
            "URI (s3://bucket/sweeps) or the absolute path of a folder that all nodes mount."
        )


def _resume_command(config: SweepConfig) -> str:
    output = "" if config.output == SweepConfig().output else f" --output {config.output}"
    return f"python rayjobs/sweep.py --resume --name {config.name}{output}"


if __name__ == "__main__":
    main()
