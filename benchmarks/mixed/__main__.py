"""Command line of the mixed run; see the package's docstring and `--help`."""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from arbitor.config import RunConfig, load_config
from arbitor.data.hub import is_hub
from arbitor.data.sampler import random_bits
from arbitor.data.sources import Skipped, find_sources
from arbitor.errors import UserError
from arbitor.pretrain_command import main as pretrain
from arbitor.train.device import resolve_device
from arbitor.train.mix import _MIX_KEY
from arbitor.train.runs import CONFIG_FILE, SUMMARY_FILE
from benchmarks.common import RESULTS, commit, provenance, slug
from benchmarks.learning.table import Row, Table
from benchmarks.mixed.overlap import STRETCH, Overlap, overlaps

PARTS = {
    "text": "bits/byte",
    "code": "bits/byte",
    "image": "bits/byte",
    "audio": "bits/code",
    "video": "velocity loss",
}
BASELINES = {"unigram": "unigram entropy", "gaussian": "Gaussian of the training latents"}
BUILT_IN = {
    "text": "docstrings of Python's library",
    "code": "Python's library",
    "image": "scikit-learn's digits",
    "audio": "synthesised sounds",
    "video": "moving digits",
}
DATA = tuple(f"{part}_data" for part in PARTS)
OVERLAPS = ("text_in_code", "held_out_in_code")
KEY = ("run", "part", "preset", "weights", *DATA, "steps", "accum", "batch", "seed")
COLUMNS = (
    *KEY,
    *("held_out", "baseline", "baseline_is", "router_right", "unit", *OVERLAPS),
    *("commit", "device", "torch", "date"),
)
MIXED, ALONE = "mixed", "text alone"
CONFOUNDED = "the text is part of the code, so the mix sees more of it than the run on text alone"
MOST_NAMED = 4  # files of a folder
GOAL_ROUTER, GOAL_RATIO = 0.99, 1.05
MOST_OVERLAP = 0.01  # of the text, so that text in the mix and alone can be compared


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
    runs, steps, found = {}, options.steps, None
    for run, drawn in ((MIXED, PARTS), (ALONE, ("text",))):
        name = f"benchmark-{run.replace(' ', '-')}"
        flags = [word for part in PARTS for word in flags_of(part, options, part in drawn)]
        code = pretrain(["--run", name, "--reset", "--steps", str(steps), *common, *flags])
        if code:
            return code
        folder = Path("runs", name)
        config = load_config(folder / CONFIG_FILE)
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        if run == MIXED:
            found = overlaps(config)
            print(told(found), flush=True)
            steps = steps_of_text(config)
        runs[run] = rows_of(run, config, summary, source, found)
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
    """Steps of text alone that take as many batches of it as the mix drew, or up to `accum` - 1 more."""
    weights = [config.mix.weight(part) for part in PARTS]
    whole = sum(map(Fraction, weights))
    upper = Fraction(weights[0]) / whole  # text is the first of a mix
    draws = np.arange(config.train.steps * config.train.accum, dtype=np.uint64)
    bits = random_bits(config.train.seed ^ _MIX_KEY, draws)
    drawn = len(bits) if upper == 1 else int((bits < np.uint64(int(upper * (1 << 64)))).sum())
    return max(1, math.ceil(drawn / config.train.accum))


def told(found: Mapping[str, Overlap] | None) -> str:
    """How much of the text is part of the code, and that it is too much if it is."""
    if found is None:
        return "text and code were not searched for what they share"
    lines = [
        f"of {of.count:,} stretches of {STRETCH} bytes of the {name} text, {of.found:,} occur in the code "
        f"({100 * of.share:.2f} %)"
        for name, of in (("training", found["text"]), ("held-out", found["held_out"]))
    ]
    if max(of.share for of in found.values()) > MOST_OVERLAP:
        lines.append(
            f"WARNING: {CONFOUNDED}; give --text-data or --code-data with nothing in common for a comparison"
        )
    return "\n".join(lines)


def rows_of(
    run: str,
    config: RunConfig,
    summary: Mapping[str, Any],
    source: Mapping[str, str],
    found: Mapping[str, Overlap] | None,
) -> list[dict[str, str]]:
    """A row for each part that the summary of a run has figures of."""
    weights = ":".join(format(config.mix.weight(part), "g") for part in PARTS)
    shares = ("", "") if found is None else tuple(format(of.share, ".5f") for of in found.values())
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
                "preset": config.preset,
                "weights": weights,
                **{f"{name}_data": data_of(config, name) for name in PARTS},
                "steps": str(config.train.steps),
                "accum": str(config.train.accum),
                "batch": str(config.train.batch),
                "seed": str(config.train.seed),
                "held_out": format(summary[f"held_out_{part}"], ".4f"),
                "baseline": format(summary[f"{beside}_{part}"], ".4f"),
                "baseline_is": BASELINES[beside],
                "router_right": "" if right is None else format(right, ".4f"),
                "unit": unit,
                **dict(zip(OVERLAPS, shares if part == "text" else ("", ""), strict=True)),
                **source,
            }
        )
    return rows


def data_of(config: RunConfig, part: str) -> str:
    """What a part of a run learnt from, by the names of its files or folders; empty where it has none.

    Of a folder of a few texts, their names tell more than its own.
    """
    if not config.mix.weight(part):
        return ""
    named = getattr(config.mix, f"{part}_data")
    if not named:
        return BUILT_IN[part]
    if part in ("text", "code") and not any(map(is_hub, named)):
        files = find_sources(named, Skipped())
        if len(files) <= MOST_NAMED:
            return " ".join(file.path.name for file in files)
    return " ".join(item if is_hub(item) else Path(item).expanduser().resolve().name for item in named)


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
    text, other = (next(row for row in runs[run] if row["part"] == "text") for run in (MIXED, ALONE))
    mixed, alone = float(text["held_out"]), float(other["held_out"])
    lines.append(
        f"text in the mix over text alone: {mixed / alone:.3f} ({mixed:.4f} and {alone:.4f}), goal at most "
        f"{GOAL_RATIO:g}"
    )
    share = max(float(text[name] or 0) for name in OVERLAPS)
    if share > MOST_OVERLAP:
        lines.append(f"which says little: {CONFOUNDED}")
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
