"""Sweep pretraining methods and hyperparameters, judged by downstream transfer.

On this machine:       python rayjobs/sweep.py
On a cluster:          ray job submit --working-dir . -- python rayjobs/sweep.py --output s3://bucket/sweeps --use-gpu
After an interruption: the same command with --resume
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the project folder takes the place of this one on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from image_data.prepare import prepare
from rayjobs.cli import EXIT_INTERRUPTED, flat_parse, make_console, plain, quiet_libraries, user_errors
from rayjobs.named_runs import (
    SWEEP,
    check_new_name,
    check_same_settings,
    check_shared,
    output_folder,
    resume_command,
    resumed_name,
    state_folder,
)
from rayjobs.sweep_config import SweepConfig, prepare_sweep, sweep_defaults
from search_spaces import search_space


def main(argv: list[str] | None = None) -> None:
    """Parse, check, run, report."""
    quiet_libraries()
    console = make_console()
    config = flat_parse(SweepConfig, sweep_defaults(), argv, __doc__ or "")
    with user_errors():
        config = _named(config)
        search_space(config.space)  # an unknown one is an error before the images are prepared
        console.print(f"[bold]Sweep {config.name}[/bold]")
        data = prepare(config.data, log=plain(console))
        setup = prepare_sweep(config, data)

    from rayjobs.cluster import check_resources, connect, shutdown
    from rayjobs.job import uses_memory
    from rayjobs.sweep_run import run_sweep
    from rayjobs.tracking import default_tracking_uri, tracking_summary
    from rayjobs.tune_session import Interrupted

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
        check_shared(config.output, "sweeps", cluster.is_multi_node)
    console.print(
        f"Objective {setup.objective} ({setup.direction}d) on validation data; "
        f"{config.num_trials} trials of {settings.epochs} epochs over {', '.join(setup.context.methods)}"
    )
    for method, reason in setup.left_out.items():
        console.print(f"[yellow]Left out: {method}.[/yellow] {reason}")
    try:
        run_sweep(setup, data, cluster, console)
    except Interrupted:
        console.print("\nInterrupted. Finished trials are kept. Continue with:")
        console.print(f"  {resume_command(SWEEP, config.output, config.name)}", soft_wrap=True)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        shutdown()
    console.print(f"\nResults    {output_folder(config.output, config.name)}")
    console.print(f"MLflow     {tracking_summary(default_tracking_uri())}   experiment {config.name}")


def _named(config: SweepConfig) -> SweepConfig:
    """Give the sweep its name: the user's, the newest unfinished one with --resume, else a new one from the time."""
    from rayjobs.sweep_run import stored_config, with_resume

    if not config.resume:
        name = config.name or f"{config.space}-{time.strftime('%Y%m%d-%H%M%S')}"
        check_new_name(SWEEP, config.output, name)
        return replace(config, name=name)
    name = resumed_name(SWEEP, config.output, config.name)
    stored = stored_config(state_folder(config.output, name))
    mine = replace(config, name=name, confirm=stored.confirm, resume=stored.resume)
    check_same_settings(SWEEP, name, mine, stored, sweep_defaults())
    return with_resume(config, stored)


if __name__ == "__main__":
    main()
