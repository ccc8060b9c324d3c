"""Compare pretraining methods on the same budget: several seeds each, judged on test data beside untrained backbones.

On this machine:        python rayjobs/compare.py
Some methods, longer:   python rayjobs/compare.py --methods supervised moco_v2 simsiam --epochs 50 --seeds 5
After an interruption:  python rayjobs/compare.py --resume
What has been run:      python rayjobs/compare.py --experiment NAME
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the project folder takes the place of this one on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console

from image_data.prepare import prepare
from image_data.prepared import PreparedData
from rayjobs.cli import EXIT_INTERRUPTED, flat_parse, make_console, plain, quiet_libraries, user_errors
from rayjobs.compare_config import (
    CompareConfig,
    CompareSetup,
    check_report_only,
    compare_defaults,
    prepare_comparison,
)
from rayjobs.comparison import grouped_reasons
from rayjobs.configs import from_dict
from rayjobs.named_runs import (
    COMPARISON,
    check_new_name,
    check_same_settings,
    check_shared,
    resume_command,
    resumed_name,
    state_folder,
)


def main(argv: list[str] | None = None) -> None:
    """Parse, check, run, report."""
    quiet_libraries()
    console = make_console()
    arguments = sys.argv[1:] if argv is None else argv
    config = flat_parse(CompareConfig, compare_defaults(), arguments, __doc__ or "")
    if config.experiment:
        with user_errors():
            _report_only(config, console)
        return
    with user_errors():
        config = _named(config)
        console.print(f"[bold]Comparison {config.name}[/bold]")
        if config.resume and _rewritten(config, console):
            return
        data = prepare(config.data, log=plain(console))
        setup = _setup(config, data)

    from rayjobs.cluster import check_resources, connect, shutdown
    from rayjobs.compare_run import run_comparison
    from rayjobs.job import uses_memory
    from rayjobs.tune_session import Interrupted

    settings = config.train
    with user_errors():
        cluster = connect()
        streamed = not uses_memory(settings, data)
        check_resources(
            cluster, settings.num_workers, settings.cpus_per_worker, float(settings.use_gpu), uses_ray_data=streamed
        )
        check_shared(config.output, "comparisons", cluster.is_multi_node)
    _announce(setup, console)
    try:
        run_comparison(setup, data, cluster, console, shlex.join(["python", "rayjobs/compare.py", *arguments]))
    except Interrupted:
        console.print("\nInterrupted. Finished runs are kept. Continue with:")
        console.print(f"  {resume_command(COMPARISON, config.output, config.name)}", soft_wrap=True)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        shutdown()
    _say_where(config, console)


def _report_only(config: CompareConfig, console: Console) -> None:
    """Report an experiment that has been run, or runs: no images, no cluster."""
    from rayjobs.experiment_report import report_experiment

    check_report_only(config)
    report_experiment(config.experiment, config.output, console, config.write_docs)


def _write_page(config: CompareConfig, console: Console) -> None:
    """The page of a comparison that has printed its table; the results stand even where MLflow is away."""
    from rayjobs.experiment_report import report_experiment

    try:
        report_experiment(config.name, config.output, console, is_shown=False)
    except ValueError as error:
        console.print(f"No page: {error}", soft_wrap=True, markup=False)
        again = f"python rayjobs/compare.py --experiment {shlex.quote(config.name)}"
        console.print(f"Later: {again}", soft_wrap=True, markup=False)


def _named(config: CompareConfig) -> CompareConfig:
    """Give the comparison its name: the user's, the newest unfinished one with --resume, else one from the time."""
    if not config.resume:
        name = config.name or f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
        check_new_name(COMPARISON, config.output, name)
        return replace(config, name=name)
    from rayjobs.compare_run import read_started

    name = resumed_name(COMPARISON, config.output, config.name)
    stored = from_dict(CompareConfig, read_started(replace(config, name=name))["config"])
    mine = replace(config, name=name, resume=stored.resume, write_docs=stored.write_docs)
    check_same_settings(COMPARISON, name, mine, stored, compare_defaults())
    return replace(stored, resume=True, write_docs=config.write_docs or stored.write_docs)


def _rewritten(config: CompareConfig, console: Console) -> bool:
    """Write the report of a finished comparison again, without a cluster; False when something is left to run."""
    from rayjobs.compare_run import stored_results, write_report
    from rayjobs.comparison_report import print_comparison

    results = stored_results(config)
    if results is None:
        return False
    console.print("All runs are finished: the report is written again.")
    write_report(results, config)
    print_comparison(results, console)
    _say_where(config, console)
    return True


def _setup(config: CompareConfig, data: PreparedData) -> CompareSetup:
    if not config.resume:
        return prepare_comparison(config, data)
    from rayjobs.compare_run import resumed_setup

    return resumed_setup(config, data)


def _announce(setup: CompareSetup, console: Console) -> None:
    config = setup.config
    count = len(setup.base) * config.seeds
    console.print(
        f"{', '.join(setup.base)}: {len(setup.base)} x {config.seeds} seeds = {count} runs, --epochs "
        f"{config.train.epochs}; and {len(setup.baselines) * config.seeds} untrained backbones. Judged on test data."
    )
    for methods, reason in grouped_reasons(setup.left_out):
        console.print(f"[yellow]Left out, {methods}:[/yellow] {reason}")


def _say_where(config: CompareConfig, console: Console) -> None:
    from rayjobs.tracking import default_tracking_uri, tracking_summary

    console.print(f"\nReport     {state_folder(config.output, config.name) / 'comparison.md'}", soft_wrap=True)
    if config.write_docs:
        console.print(f"Copy       {config.write_docs}", soft_wrap=True)
    _write_page(config, console)
    console.print(f"MLflow     {tracking_summary(default_tracking_uri())}   experiment {config.name}")


if __name__ == "__main__":
    main()
