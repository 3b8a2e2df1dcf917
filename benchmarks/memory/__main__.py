"""Command line of the memory benchmark; see the package's docstring and `--help`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from arbitor.config import STATES
from arbitor.errors import UserError
from arbitor.train.device import resolve_device
from benchmarks.common import RESULTS, commit, plotted, slug
from benchmarks.learning.table import Table
from benchmarks.speed import parity
from benchmarks.speed import table as speed
from benchmarks.speed.plot import plot

OF_SPEED = ("bytes_per_second", "ms_per_step", "share_of_peak")  # says nothing after so few steps
COLUMNS = (
    *(name for name in speed.COLUMNS if name not in OF_SPEED),
    *("weights", "kept_bytes", "kept_per_weight", "peak_per_weight"),
)
FIGURES = {
    "peak_per_weight": "bytes a weight at the peak of a step",
    "kept_per_weight": "kept between two steps",
}
STEPS, WARMUP = 3, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every contestant; exit code 1: parity is broken, 2: bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Bytes that training with trits and its twins needs."
    )
    speed.add_setting(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.set_defaults(state=None, steps=STEPS)
    options = parser.parse_args(arguments)
    states = STATES if options.state is None else (options.state,)
    try:
        device = resolve_device(options.device)
        options.state = states[0]
        base = dataclasses.replace(speed.setting_of(options), warmup=WARMUP)
        parity.check(device.device)
        table = Table(options.results / f"memory-{slug(device.device)}.csv", COLUMNS, speed.KEY)
        for contestant in options.contestants:
            for state in states if contestant == "trits" else states[:1]:
                setting = dataclasses.replace(base, state=state)
                for name, timing in speed.measured([contestant], setting):
                    table.put(_row(speed.row_of(name, setting, timing, options.commit or commit()), timing))
                    print(
                        f"{name}{f' {state}' if name == 'trits' else ''}: "
                        f"{timing.kept_bytes / timing.weights:.2f} bytes a weight kept, "
                        f"{timing.peak_bytes / timing.weights:.2f} at the peak "
                        f"({timing.peak_bytes / 1e6:,.0f} MB at batch {setting.batch} x {setting.ctx})",
                        flush=True,
                    )
    except UserError as error:
        print(f"benchmarks.memory: error: {error}", file=sys.stderr)
        return 2
    except parity.ParityError as error:
        print(f"benchmarks.memory: no figures, since the layers are wrong: {error}", file=sys.stderr)
        return 1
    print(f"written to {table.path}")
    picture = table.path.with_suffix(".png")
    print(plotted(picture, lambda: plot(table.rows(), FIGURES, picture)))
    return 0


def _row(row: dict[str, str], timing: speed.Timing) -> dict[str, str]:
    return {name: figure for name, figure in row.items() if name not in OF_SPEED} | {
        "weights": str(timing.weights),
        "kept_bytes": str(timing.kept_bytes),
        "kept_per_weight": format(timing.kept_bytes / timing.weights, ".4f"),
        "peak_per_weight": format(timing.peak_bytes / timing.weights, ".4f"),
    }


if __name__ == "__main__":
    sys.exit(main())
