"""Command line of the mixed run; see the package's docstring and `--help`."""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arbitor.config import RunConfig, load_config
from arbitor.errors import UserError
from arbitor.pretrain_command import main as pretrain
from arbitor.train.device import resolve_device
from arbitor.train.runs import CONFIG_FILE, SUMMARY_FILE
from benchmarks.common import RESULTS, commit, provenance, slug
from benchmarks.learning.table import Row, Table

PARTS = {
    "text": "bits/byte",
    "code": "bits/byte",
    "image": "bits/byte",
    "audio": "bits/code",
    "video": "velocity loss",
}
BASELINES = {"unigram": "unigram entropy", "gaussian": "Gaussian of the training latents"}
COLUMNS = (
    *("run", "part", "held_out", "baseline", "baseline_is", "router_right", "unit"),
    *("steps", "accum", "batch", "seed", "commit", "device", "torch", "date"),
)
KEY = ("run", "part", "accum", "batch", "seed")
MIXED, ALONE = "mixed", "text alone"
GOAL_ROUTER, GOAL_RATIO = 0.99, 1.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both and compare; exit code 0: done, 2: bad arguments, another: that of a run that failed."""
    options, passed_on = _parser().parse_known_args(arguments)
    try:
        return compare(options, passed_on)
    except UserError as error:
        print(f"benchmarks.mixed: error: {error}", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace, passed_on: Sequence[str]) -> int:
    """Both runs, their rows and what they say."""
    device = resolve_device(options.device).device
    table = Table(options.results / f"mixed-{slug(device)}.csv", COLUMNS, KEY)
    source = provenance(device, options.commit or commit())
    common = ["--device", options.device, "--no-save", *passed_on]
    runs, steps = {}, options.steps
    for run, drawn in ((MIXED, PARTS), (ALONE, ("text",))):
        name = f"benchmark-{run.replace(' ', '-')}"
        flags = [word for part in PARTS for word in flags_of(part, options, part in drawn)]
        code = pretrain(["--run", name, "--reset", "--steps", str(steps), *common, *flags])
        if code:
            return code
        folder = Path("runs", name)
        config = load_config(folder / CONFIG_FILE)
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        runs[run] = rows_of(run, config, summary, source)
        steps = steps_of_text(config)
        if not options.keep:
            shutil.rmtree(folder)
    for row in (row for rows in runs.values() for row in rows):
        table.put(row)
    print(verdict(runs))
    return 0


def flags_of(part: str, options: argparse.Namespace, drawn: bool) -> list[str]:
    """What `training/pretrain.py` is told of a part: its weight and data, or that it is left out."""
    if not drawn:
        return [f"--{part}-weight", "0"]
    weight, data = (getattr(options, f"{part}_{what}") for what in ("weight", "data"))
    flags = [] if weight is None else [f"--{part}-weight", format(weight, "g")]
    return [*flags, f"--{part}-data", *data] if data else flags


def steps_of_text(config: RunConfig) -> int:
    """Steps of text alone that take as many batches of it as the mix drew on average."""
    weights = {part: getattr(config.mix, f"{part}_weight") for part in PARTS}
    return max(1, round(config.train.steps * weights["text"] / sum(weights.values())))


def rows_of(
    run: str, config: RunConfig, summary: Mapping[str, Any], source: Mapping[str, str]
) -> list[dict[str, str]]:
    """A row for each part that the summary of a run has figures of."""
    rows = []
    for part, unit in PARTS.items():
        if f"held_out_{part}" not in summary:
            continue
        beside = next(name for name in BASELINES if f"{name}_{part}" in summary)
        right = summary.get(f"held_out_router_{part}")
        rows.append(
            {
                "run": run,
                "part": part,
                "held_out": format(summary[f"held_out_{part}"], ".4f"),
                "baseline": format(summary[f"{beside}_{part}"], ".4f"),
                "baseline_is": BASELINES[beside],
                "router_right": "" if right is None else format(right, ".4f"),
                "unit": unit,
                "steps": str(config.train.steps),
                "accum": str(config.train.accum),
                "batch": str(config.train.batch),
                "seed": str(config.train.seed),
                **source,
            }
        )
    return rows


def verdict(runs: Mapping[str, Sequence[Row]]) -> str:
    """Every part beside its baseline, the router, and text in the mix over text alone."""
    lines = []
    for row in runs[MIXED]:
        held_out, baseline = float(row["held_out"]), float(row["baseline"])
        lines.append(
            f"{row['part']}: {held_out:.4f} {row['unit']}, {row['baseline_is']} {baseline:.4f}: "
            f"{'below' if held_out < baseline else 'NOT below'}"
        )
    right = [float(row["router_right"]) for row in runs[MIXED] if row["router_right"]]
    if right:
        lines.append(
            f"router right at {100 * min(right):.1f} % of the positions of each part or more, "
            f"goal {100 * GOAL_ROUTER:g} %"
        )
    mixed, alone = (float(next(r for r in runs[run] if r["part"] == "text")["held_out"]) for run in runs)
    lines.append(
        f"text in the mix over text alone: {mixed / alone:.3f} ({mixed:.4f} and {alone:.4f}), goal at most "
        f"{GOAL_RATIO:g}"
    )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixed",
        description="Train one model on all modalities and one on the same text alone, under ./runs. "
        "Other flags, such as --preset, are those of training/pretrain.py.",
    )
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="of the mixed run")
    for part in PARTS:
        add(f"--{part}-weight", type=float, help="how often it is drawn")
        add(f"--{part}-data", nargs="+", help="as in training/pretrain.py")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--commit", help="what to note as the commit where there is no git")
    add("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    add("--keep", action="store_true", help="leave the folders of both runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
