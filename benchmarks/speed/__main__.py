"""Command line of the speed benchmark; see the package's docstring and `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from arbitor.errors import UserError
from arbitor.train.device import resolve_device
from benchmarks.common import RESULTS, commit, plotted, slug
from benchmarks.learning.table import Table
from benchmarks.speed import goals, parity
from benchmarks.speed.plot import plot
from benchmarks.speed.table import COLUMNS, KEY, add_setting, measured, row_of, setting_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the contestants, or measure goals; exit code 1: parity is broken, 2: bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        device = resolve_device(options.device)
        if options.goal:
            plan = goals.planned(options.goal, options.predict, options.predictions)
            parity.check(device.device)
            goals.measure(plan, device, options.results / f"goals-{slug(device.device)}.csv")
            return 0
        setting = setting_of(options)
        table = Table(options.results / f"speed-{slug(device.device)}.csv", COLUMNS, KEY)
        parity.check(device.device)
        for name, timing in measured(options.contestants, setting):
            row = row_of(name, setting, timing, options.commit or commit())
            table.put(row)
            print(
                f"{name}: {timing.ms_per_step:.1f} ms a step, {int(row['bytes_per_second']):,} bytes/s, "
                f"peak {timing.peak_bytes / 1e6:,.0f} MB, {timing.share_of_peak:.1%} of the matmul peak",
                flush=True,
            )
    except UserError as error:
        print(f"benchmarks.speed: error: {error}", file=sys.stderr)
        return 2
    except parity.ParityError as error:
        print(f"benchmarks.speed: no figures, since the layers are wrong: {error}", file=sys.stderr)
        return 1
    print(f"written to {table.path}")
    picture = table.path.with_suffix(".png")
    print(plotted(picture, lambda: plot(table.rows(), {"bytes_per_second": "bytes/s of training"}, picture)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Time training with trits beside a dense twin, or measure the goals.",
    )
    add_setting(parser)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    add("--goal", nargs="+", default=[], choices=goals.GOALS, help="measure these goals instead")
    add("--predict", nargs="+", default=[], metavar="GOAL/CLAUSE=FIGURE", help="predictions of goals")
    add("--predictions", type=Path, default=goals.PREDICTIONS, help="a CSV file with more of them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
