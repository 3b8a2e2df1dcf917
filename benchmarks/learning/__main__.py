"""Command line of the learning benchmark; see the package's docstring and `--help`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from arbitor.errors import UserError
from arbitor.train.device import resolve_device
from benchmarks.common import RESULTS, commit, plotted
from benchmarks.learning import scale_votes, summary
from benchmarks.learning.contestants import ALL_CONTESTANTS, ATTEMPTS, CONTESTANTS, Contestant, Run
from benchmarks.learning.corpus import keep_to_one_text, load_texts
from benchmarks.learning.runner import Planner, run_all
from benchmarks.learning.sizes import SIZES, Size
from benchmarks.learning.sweep import plan, remaining, results_of
from benchmarks.learning.table import Row, Table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; exit code 0: all is there, 75: time ran out, 2: bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        return scale_votes_command(options) if options.scale_votes else sweep_command(options)
    except UserError as error:
        print(f"benchmarks.learning: error: {error}", file=sys.stderr)
        return 2


def sweep_command(options: argparse.Namespace) -> int:
    """The sweep over learning rates of the chosen contestants."""
    size = SIZES[options.size]
    contestants = _contestants(options.contestant, options.attempts)
    table = Table(options.results / f"learning-{size.name}.csv")
    replaced = {c.name for c in contestants} if options.force else set()
    rows: list[Row] = [row for row in table.rows() if row["contestant"] not in replaced]
    if options.plan:
        _print_plan(size, contestants, rows)
        return 0

    def record(run: Run, row: Row) -> None:
        table.put(row)
        rows[:] = [old for old in rows if table.identity(old) != table.identity(row)] + [row]
        left = sum(remaining(c, results_of(c.name, rows)) for c in contestants)
        print(_line(run, row) + f" ({left} more, without extended grids)", flush=True)

    complete = True
    if plan(contestants, rows):
        complete = _run(options, size, table, rows, lambda running: plan(contestants, rows, running), record)
    rows[:] = table.rows()
    print(summary.report(rows))
    _plot(rows, size, options.results / f"learning-{size.name}.png")
    return 0 if complete else 75


def scale_votes_command(options: argparse.Namespace) -> int:
    """Scale votes on against off, paired by seed."""
    size = SIZES[options.size]
    lr = scale_votes.best_full_lr(Table(options.results / f"learning-{size.name}.csv").rows())
    wanted = scale_votes.runs(lr, options.scale_lr)
    table = Table(options.results / f"scale-votes-{size.name}.csv", scale_votes.COLUMNS, scale_votes.KEY)
    done: list[Row] = [] if options.force else list(table.rows())

    def missing(running: set[Run]) -> list[Run]:
        have = {table.identity(row) for row in done}
        return [
            run
            for run in wanted
            if run not in running and table.identity(scale_votes.identify(run)) not in have
        ]

    def record(run: Run, row: Row) -> None:
        row = {**scale_votes.identify(run), **row}
        table.put(row)
        done.append(row)
        print(_line(run, row), flush=True)

    if options.plan:
        print(f"{len(missing(set()))} runs to do:", *missing(set()), sep="\n  ")
        return 0
    complete = _run(options, size, table, done, missing, record) if missing(set()) else True
    print(scale_votes.report(table.rows()))
    return 0 if complete else 75


def _run(
    options: argparse.Namespace,
    size: Size,
    table: Table,
    kept: Sequence[Row],
    planner: Planner,
    record: Callable[[Run, Row], None],
) -> bool:
    device = resolve_device(options.device)
    texts = load_texts(size, options.data, options.held_out)
    keep_to_one_text(table, texts, kept)
    provenance = {"text": texts.fingerprint, "commit": options.commit or commit()}
    print(f"{size.name}: {size.steps} steps of {size.batch} x {size.model.ctx} bytes on {device.name}")
    print(f"{texts.description} (text {texts.fingerprint})", flush=True)
    return run_all(
        planner,
        lambda run, row: record(run, {**row, **provenance}),
        size,
        texts,
        device=device.device.type,
        jobs=options.jobs or size.jobs,
        minutes=options.minutes,
    )


def _line(run: Run, row: Row) -> str:
    return (
        f"{run}: {float(row['held_out_bits_per_byte']):.4f} bits per byte,"
        f" {float(row['bytes_per_weight']):.2f} bytes a weight, {row['seconds']} s"
    )


def _print_plan(size: Size, contestants: Sequence[Contestant], rows: Sequence[Row]) -> None:
    ready = plan(contestants, rows)
    left = sum(remaining(c, results_of(c.name, rows)) for c in contestants)
    print(f"{left} runs are left if no grid is extended; {len(ready)} can start now:")
    for run in ready:
        print(f"  {run}")
    seconds = [float(row["seconds"]) for row in rows]
    if seconds:
        print(f"a finished run took {sum(seconds) / len(seconds):.0f} s on average")


def _plot(rows: Sequence[Row], size: Size, path: Path) -> None:
    if not rows:
        return
    seen = max(int(row["bytes_seen"]) for row in rows)
    devices = ", ".join(sorted({row["device"] for row in rows}))
    title = f"{int(rows[0]['trunk_weights']) / 1e6:.1f} M trunk weights, {seen / 1e6:.1f} MB seen, {devices}"
    print(plotted(path, lambda: summary.plot(rows, path, title)))


def _contestants(names: Sequence[str], attempts: bool) -> list[Contestant]:
    for name in names:
        if name not in ALL_CONTESTANTS:
            raise UserError(f"unknown contestant {name!r}; choose from {', '.join(ALL_CONTESTANTS)}")
    if names:
        return [c for name, c in ALL_CONTESTANTS.items() if name in names]
    return list((ATTEMPTS if attempts else CONTESTANTS).values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description="Train one model as trits and as float twins, sweep their learning rates, compare.",
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="cpu")
    add("--contestant", action="extend", nargs="+", default=[], help="only these; all by default")
    add("--attempts", action="store_true", help="all recorded attempts at other constants instead")
    add("--minutes", type=float, help="stop cleanly after this long; run again to go on")
    add("--jobs", type=int, help="worker processes that share the device")
    add("--data", action="extend", nargs="+", default=[], help="own text: files, folders, globs")
    add("--held-out", help="a path or a share of the data, as in `arbitor train`")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--commit", help="what to note as the commit where there is no git")
    add("--results", type=Path, default=RESULTS, help="folder of the CSV files and plots")
    add("--force", action="store_true", help="run again what is there already, and replace its rows")
    add("--plan", action="store_true", help="print what would run, and stop")
    add("--scale-votes", action="store_true", help="instead: scale votes on against off, paired")
    add("--scale-lr", type=float, action="extend", nargs="+", default=[], help="strengths to compare with 0")
    return parser


if __name__ == "__main__":
    sys.exit(main())
