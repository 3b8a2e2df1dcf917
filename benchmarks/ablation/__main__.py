"""Command line of the ablation; see the package's docstring and `--help`."""

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arbitor.config import STATES
from arbitor.errors import UserError
from arbitor.train.device import resolve_device
from benchmarks.ablation import stability, summary
from benchmarks.ablation.runner import run_all, visible_gpus
from benchmarks.ablation.sizes import SIZES
from benchmarks.ablation.training import COLUMNS, KEY, TIMED_COLUMNS, TIMED_KEY, Job, Run
from benchmarks.ablation.variants import chosen, config_of, variants_of
from benchmarks.common import RESULTS, commit, plotted
from benchmarks.counts import counts
from benchmarks.learning.corpus import Texts, load_texts
from benchmarks.learning.sizes import Size
from benchmarks.learning.table import Row, Table

# The best of the learning benchmark's sweep, which has half as many weights and bytes.
LRS = {"full": 0.025, "compact": 0.035, "lean": 0.15}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; exit code 0: all is there (or the run is stable), 1: not, 2: bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        if options.stability is not None:
            return stability.command(options.stability)
        return _ablation(options)
    except UserError as error:
        print(f"benchmarks.ablation: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.ablation: stopped; finished runs are recorded, run again to go on", file=sys.stderr)
        return 130


def _ablation(options: argparse.Namespace) -> int:
    size = SIZES[options.size]
    if options.steps is not None:
        if options.steps < 1:
            raise UserError(f"--steps must be at least 1, got {options.steps}")
        size = dataclasses.replace(size, steps=options.steps)
    if options.seconds is not None and not 0 < options.seconds <= 86_400:
        raise UserError(f"--seconds must be above 0 and at most a day, got {options.seconds:g}")
    if options.seconds and options.steps is not None:
        raise UserError("give --steps or --seconds, which decides on the steps")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    lr = LRS[options.state] if options.lr is None else options.lr
    if not 0 < lr <= 100:
        raise UserError(f"--lr must be above 0 and at most 100 (trits per step), got {lr}")
    variants = chosen(size.model, options.variants)
    seeds = _seeds(options.seeds)
    limit = options.seconds or 0.0
    seen = 0 if limit else size.bytes_seen
    runs = [Run(variant.name, seed, lr, options.state, seen, limit) for seed in seeds for variant in variants]
    stem = f"ablation-{size.name}-timed" if limit else f"ablation-{size.name}"
    columns, key = (TIMED_COLUMNS, TIMED_KEY) if limit else (COLUMNS, KEY)
    table = Table(options.results / f"{stem}.csv", columns, key)
    rows = [] if options.force else table.rows()
    have = {table.identity(row) for row in rows}
    missing = [run for run in runs if table.identity(run.identify()) not in have]
    if options.plan:
        print(_plan(size, options.variants, missing, rows))
        return 0
    failures = _train(options, size, table, missing) if missing else []
    rows = table.rows()
    if rows:
        print(summary.report(rows, variants_of(size.model)))
        _plot(rows, size, options.results / f"{stem}.png")
    for line in failures:
        print(f"benchmarks.ablation: failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def _train(options: argparse.Namespace, size: Size, table: Table, runs: Sequence[Run]) -> list[str]:
    for run in runs:  # a width that cannot be solved for ends the command here, before anything is trained
        config_of(variants_of(size.model)[run.variant], size)
    device = resolve_device(options.device)
    texts = load_texts(size, options.data, options.held_out)
    _refuse_short(texts, size)
    _refuse_other_text(texts, table, runs)
    jobs = options.jobs or (len(visible_gpus()) if device.is_cuda else 1)
    length = f"{options.seconds:g} s" if options.seconds else f"{size.steps} steps"
    print(f"{size.name}: {len(runs)} runs of {length}, steps of {size.batch} x {size.model.ctx} bytes")
    print(f"{jobs} at a time on {device.name}; {texts.description} (text {texts.fingerprint})", flush=True)

    def record(run: Run, row: dict[str, str]) -> None:
        table.put(row)
        print(
            f"{run}: {float(row['held_out_bits_per_byte']):.4f} bits per byte, {row['seconds']} s, "
            f"{summary.bytes_per_second(row):,.0f} bytes/s",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as scratch:
        paths = [str(Path(scratch, f"{part}.npy")) for part in ("train", "held_out")]
        for path, array in zip(paths, (texts.train, texts.held_out), strict=True):
            np.save(path, array)
        job = Job(
            size=size,
            train_path=paths[0],
            held_out_path=paths[1],
            text=texts.fingerprint,
            device=device.device.type,
            threads=max(1, (os.cpu_count() or 1) // jobs),
            commit=options.commit or commit(),
        )
        return run_all(runs, record, job, jobs)


def _refuse_short(texts: Texts, size: Size) -> None:
    """Raise UserError if a run would read the text more than about once."""
    if len(texts.train) < size.bytes_seen:
        raise UserError(
            f"the text has {len(texts.train) / 1e6:.1f} MB and a run reads {size.bytes_seen / 1e6:.1f} MB; "
            "give more with --data, or fewer --steps"
        )


def _refuse_other_text(texts: Texts, table: Table, runs: Sequence[Run]) -> None:
    """Raise UserError if rows that stay are of another text; they could not be compared with new ones."""
    replaced = {table.identity(run.identify()) for run in runs}
    others = {row["text"] for row in table.rows() if table.identity(row) not in replaced} - {
        texts.fingerprint
    }
    if others:
        raise UserError(
            f"{table.path} has rows of another text ({min(others)}, this is {texts.fingerprint}); give that "
            "text, another --results folder, or --force for all variants and seeds"
        )


def _plan(size: Size, names: str | None, missing: Sequence[Run], rows: Sequence[Row]) -> str:
    """Sizes and their reasons, the runs that are missing, and how long one took."""
    lines = []
    for variant in chosen(size.model, names):
        config = config_of(variant, size)
        sizes = counts(config)
        width = f", {variant.solved} {getattr(config, variant.solved)}" if variant.solved else ""
        lines.append(
            f"{variant.name}: {sizes.total / 1e6:.2f} M trits, {sizes.active / 1e6:.2f} M active, "
            f"{sizes.work / 1e6:.2f} M of work at most{width}\n    {variant.reason}"
        )
    lines.append(f"{len(missing)} runs to do: {', '.join(map(str, missing)) or 'none'}")
    if rows:
        seconds = [float(row["seconds"]) for row in rows]
        lines.append(f"a finished run took {sum(seconds) / len(seconds):.0f} s on average")
    return "\n".join(lines)


def _plot(rows: Sequence[Row], size: Size, path: Path) -> None:
    devices = ", ".join(sorted({row["device"] for row in rows}))
    active = int(rows[0]["active_trit_weights"]) / 1e6
    title = f"{size.name}: {active:.1f} M active trits, {devices}"
    print(plotted(path, lambda: summary.plot(rows, variants_of(size.model), path, title)))


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise UserError(f"--seeds must be numbers from 0 on with commas between them, got {text!r}")
    return seeds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description="Train the model without, with one, and with all of its parts at equal active weights.",
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="arb-small")
    add("--variants", metavar="A,B", help="only these; all by default (see --plan)")
    add("--seeds", default="0,1", help="default: 0,1")
    add("--lr", type=float, help="peak, trits per step, of all variants; default: of the state")
    add("--state", choices=STATES, default="full")
    add("--steps", type=int, help="steps instead of the size's")
    add("--seconds", type=float, help="of training for each run, in place of equally many steps")
    add("--jobs", type=int, help="processes at a time; by default one a GPU, or one")
    add("--data", action="extend", nargs="+", default=[], help="own text: files, folders, globs")
    add("--held-out", help="a path or a share of the data, as in `arbitor train`")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--results", type=Path, default=RESULTS, help="folder of the CSV and the plot")
    add("--commit", help="what to note as the commit where there is no git")
    add("--force", action="store_true", help="run again what is there already, and replace its rows")
    add("--plan", action="store_true", help="print sizes, reasons and what would run, and stop")
    add("--stability", type=Path, metavar="RUN", help="instead: judge the folder of an `arbitor train` run")
    return parser


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # so that a time limit ends the processes as well
    sys.exit(main())
