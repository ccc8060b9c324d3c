"""Images per second of the rendered data set on one core, all targets and PNG encoding included.

CPU seconds of one process and one thread; compilation and the first images are left out; median of the rounds.

    python benchmarks/render.py [--quick]

Goal: 150 images/s at 64 px.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from image_data.rendered.dataset import RenderedOptions, rendered_rows, split_size

GOALS = {64: 150.0}
SIZES = (32, 64, 128, 224)


def rate(size: int, factors: str) -> float:
    """Images per CPU second over all base classes, one instance of two images each."""
    options = RenderedOptions(size, instances_per_class=(1, 1, 1), images_per_instance=2, factors=factors)
    start = time.process_time()
    images = sum(1 for _ in rendered_rows(options, "train"))
    seconds = time.process_time() - start
    assert images == split_size(options, "train")
    return images / seconds


def main() -> None:
    """Prints one JSON line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round per case")
    rounds = 1 if parser.parse_args().quick else 5
    cases = [(size, factors) for size in SIZES for factors in ("1111", "0000")]
    start = time.process_time()
    next(rendered_rows(RenderedOptions(32), "train"))
    compiled = time.process_time() - start
    rates: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            rates[case].append(rate(*case))
    for size, factors in cases:
        value = statistics.median(rates[size, factors])
        line = {"benchmark": "render", "case": f"{size} px, factors {factors}", "images_per_second": round(value, 1)}
        goal = GOALS.get(size)
        if goal is not None:
            line |= {"goal": goal, "ratio": round(value / goal, 2)}
        print(json.dumps(line))
    print(json.dumps({"benchmark": "render", "case": "first image (compiles or loads)", "seconds": round(compiled, 2)}))


if __name__ == "__main__":
    main()
