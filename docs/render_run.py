"""Draws a finished run as a picture of a terminal, for the README.

    python docs/render_run.py runs/tiny-1 docs/images/tiny.svg

Every figure comes from the run's own files; the steps between two lines are summarised by their mean.
"""

import argparse
import io
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

LINES = 12
WIDTH = 92
BAR_WIDTH = 32
UNIFORM_BITS = 8.0  # bits per byte of a model that knows nothing
SAMPLE_LINES = 14


def render(run: Path, picture: Path, command: str = "arbitor train") -> None:
    """Write the SVG of a run.

    Args:
        run: folder with metrics.jsonl, summary.json and sample.txt.
        picture: SVG file to write.
        command: what was typed to make the run.
    """
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    sample = (run / "sample.txt").read_text(errors="replace")
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(
        Group(
            Text.assemble(("$ ", "green"), (command, "bold")),
            Text(),
            _progress(metrics),
            Text(),
            _figures(summary),
            Text(),
            Text("what it writes:", style="bold"),
            _excerpt(sample),
        )
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title="arbitor", unique_id="arbitor")
    # Without the fonts that it would fetch from elsewhere: whoever looks at the picture has a monospaced one.
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


def _progress(metrics: Sequence[dict[str, Any]]) -> RenderableType:
    steps = [line for line in metrics if "bits_per_byte" in line]
    held_out = {
        line["step"]: line["held_out_bits_per_byte"] for line in metrics if "held_out_bits_per_byte" in line
    }
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("step", "bytes seen", "bits per byte", "", "held out", "trits flipped"):
        table.add_column(title, justify="left" if not title else "right", header_style="dim")
    bounds = [round(i * len(steps) / LINES) for i in range(LINES + 1)]
    for begin, end in itertools.pairwise(bounds):
        part = steps[begin:end]
        if not part:
            continue
        bits = statistics.fmean(line["bits_per_byte"] for line in part)
        flips = statistics.fmean(line["flip_rate"] for line in part)
        measured = [held_out[line["step"]] for line in part if line["step"] in held_out]
        table.add_row(
            str(part[-1]["step"]),
            f"{part[-1]['bytes_seen'] / 1e6:.2f} MB",
            f"{bits:.2f}",
            Text("█" * round(BAR_WIDTH * bits / UNIFORM_BITS), style="cyan"),
            f"{measured[-1]:.3f}" if measured else "",
            f"{100 * flips:.2f} %",
        )
    return table


def _figures(summary: dict[str, Any]) -> RenderableType:
    state = summary["state_bytes"] / 1e6
    return Text.assemble(
        (f"{summary['held_out_bits_per_byte']:.3f} bits per byte", "bold green"),
        " on held-out text, ",
        (f"{summary['bytes_per_weight']:.2f} bytes a weight", "bold green"),
        f" kept for training ({state:.1f} MB in all), {summary['trit_weights']:,} trits,"
        f" {summary['seconds']:.0f} s on {summary['device']}",
    )


def _excerpt(sample: str) -> RenderableType:
    lines = [line[:WIDTH] for line in sample.strip("\n").splitlines()[:SAMPLE_LINES]]
    return Syntax("\n".join(lines), "python", theme="ansi_dark", background_color="default")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--command", default="arbitor train", help="what was typed to make the run")
    options = parser.parse_args()
    render(options.run, options.picture, options.command)


if __name__ == "__main__":
    main()
