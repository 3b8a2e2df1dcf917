"""Command line of the comparison on digits; see the package's docstring and `--help`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from arbitor.config import RunConfig, override, preset
from arbitor.data.holding_out import spelled_number
from arbitor.data.images import OWN_SHARE, Geometry, ImageCorpus, default_geometry, open_images
from arbitor.errors import UserError
from arbitor.train.device import resolve_device
from arbitor.train.task import CaptionTask
from benchmarks.common import RESULTS, commit, provenance, slug
from benchmarks.learning.contestants import Run, build
from benchmarks.learning.table import Row, Table
from benchmarks.learning.training import train_on

COLUMNS = (
    *("contestant", "lr", "seed", "steps", "batch", "image_patch", "trunk_weights", "bytes_per_weight"),
    *("images", "held_out", "split", "captions_right", "held_out_bits_per_byte", "seconds"),
    *("commit", "device", "torch", "date"),
)
SETTINGS = (
    "steps",
    "batch",
    "image_patch",
    "images",
    "held_out",
    "split",
)  # rows that differ are not compared
KEY = ("contestant", "lr", "seed", *SETTINGS)
RATES = {"trits-full": (0.025, 0.05, 0.1), "dense-adamw": (0.001, 0.002, 0.004)}
SEEDS = (0, 1, 2)
GOAL_RATIO = 0.98


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; exit code 0: all is there, 75: time ran out, 2: bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        return compare(options)
    except UserError as error:
        print(f"benchmarks.digits: error: {error}", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace) -> int:
    """All runs of the chosen contestants that the table does not hold."""
    deadline = time.monotonic() + options.minutes * 60
    data = [str(options.data)] if options.data else []
    device = resolve_device(options.device)
    geometry = default_geometry(data)
    if not geometry:
        raise UserError(f"{options.data} holds no IDX files; this comparison is of digits")
    if options.image_patch:
        geometry["image_patch"] = options.image_patch
    config = override(preset("tiny"), steps=options.steps, batch=options.batch, **geometry)
    square = Geometry(size=geometry["image_size"], channels=geometry["image_channels"])
    corpus = open_images(data, options.held_out, square)
    print(corpus.description)
    name = options.data.name if options.data else "sklearn"
    table = Table(options.results / f"digits-{name}-{slug(device.device)}.csv", COLUMNS, KEY)
    asked = settings(config, corpus, split_of(options.held_out, corpus))
    contestants = options.contestant or list(RATES)
    for contestant in contestants:
        while (run := next_run(contestant, mine(table.rows(), asked))) is not None:
            if time.monotonic() > deadline:
                print("time ran out; the same command goes on")
                return 75
            row = measure(run, config, corpus, asked["split"], device.device, options.commit or commit())
            table.put(row)
            print(
                f"{run}: {100 * float(row['captions_right']):.2f} % right in {row['seconds']} s", flush=True
            )
    print(summary(mine(table.rows(), asked)))
    return 0


def split_of(held_out: str | None, corpus: ImageCorpus) -> str:
    """Which images are held out, in words.

    "share 0.1" is spread evenly over all, "last 1000" are the last ones, "t10k" the files of MNIST's own
    split; anything else is the name of the file or folder that was given.
    """
    if held_out is None:
        return "t10k" if "(the t10k files)" in corpus.description else f"share {float(OWN_SHARE):g}"
    number = spelled_number(held_out)
    if number is None:
        return Path(held_out).name
    return f"share {number:g}" if number < 1 else f"last {number:.0f}"


def settings(config: RunConfig, corpus: ImageCorpus, split: str) -> dict[str, str]:
    """The columns of a row that all compared runs share."""
    return {
        "steps": str(config.train.steps),
        "batch": str(config.train.batch),
        "image_patch": str(config.model.image_patch),
        "images": str(len(corpus.train)),
        "held_out": str(len(corpus.held_out)),
        "split": split,
    }


def mine(rows: Sequence[Row], asked: Row) -> list[Row]:
    """The rows of runs of this length, batch and patch, on as many images, held out in the same way."""
    return [row for row in rows if asked.items() <= row.items()]


def next_run(contestant: str, rows: Sequence[Row]) -> Run | None:
    """The next run of a contestant: every rate with the first seed, then the best rate with the others."""
    done = {(float(r["lr"]), int(r["seed"])) for r in rows if r["contestant"] == contestant}
    wanted = [(lr, SEEDS[0]) for lr in RATES[contestant]]
    if all(pair in done for pair in wanted):
        wanted = [(best_rate(contestant, rows), seed) for seed in SEEDS]
    missing = next((pair for pair in wanted if pair not in done), None)
    return None if missing is None else Run(contestant, *missing)


def best_rate(contestant: str, rows: Sequence[Row]) -> float:
    """The rate whose first seed is best: by the share right, then by bits per byte."""
    first = [r for r in rows if r["contestant"] == contestant and int(r["seed"]) == SEEDS[0]]
    best = max(first, key=lambda r: (float(r["captions_right"]), -float(r["held_out_bits_per_byte"])))
    return float(best["lr"])


def measure(
    run: Run, config: RunConfig, corpus: ImageCorpus, split: str, device: torch.device, from_commit: str
) -> dict[str, str]:
    """Train and evaluate one run, whose images are held out as `split` says; its row."""
    task = CaptionTask(override(config, seed=run.seed), corpus)
    trainee = build(run, config.model, device)
    began = time.perf_counter()
    train_on(trainee, task, config.train.steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    result = task.evaluate(trainee.model, None, None)
    weights = trainee.trunk_weights()
    return {
        "contestant": run.contestant,
        "lr": format(run.lr, "g"),
        "seed": str(run.seed),
        **settings(config, corpus, split),
        "trunk_weights": str(weights),
        "bytes_per_weight": format(trainee.trunk_bytes() / weights, ".4f"),
        "captions_right": format(result.captions_right or 0.0, ".5f"),
        "held_out_bits_per_byte": format(result.bits_per_byte, ".5f"),
        "seconds": format(seconds, ".1f"),
        **provenance(device, from_commit),
    }


def summary(rows: Sequence[Row]) -> str:
    """Mean shares at each contestant's best rate, and their ratio."""
    lines, means = [], {}
    for contestant in RATES:
        if not any(row["contestant"] == contestant for row in rows):
            continue
        rate = best_rate(contestant, rows)
        shares = [
            float(row["captions_right"])
            for row in rows
            if row["contestant"] == contestant and float(row["lr"]) == rate
        ]
        means[contestant] = sum(shares) / len(shares)
        spread = f"{100 * min(shares):.2f} to {100 * max(shares):.2f}"
        lines.append(
            f"{contestant:12} lr {rate:g}: {100 * means[contestant]:.2f} % right "
            f"(mean of {len(shares)} seeds, {spread})"
        )
    if len(means) == len(RATES):
        ratio = means["trits-full"] / means["dense-adamw"]
        lines.append(f"trits over float twin: {ratio:.4f} (goal: at least {GOAL_RATIO})")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with IDX files; default scikit-learn's digits")
    parser.add_argument("--held-out", help="share, path, or number of the last images; default a tenth")
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-patch", type=int, help="default 4")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--contestant", action="append", choices=tuple(RATES), help="default both")
    parser.add_argument("--minutes", type=float, default=60.0, help="no run begins after so long")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="commit to note where there is no git")
    return parser


if __name__ == "__main__":
    sys.exit(main())
