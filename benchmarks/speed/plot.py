"""Bars of speed and memory, a group for every setting; needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.learning.table import Row

TRITS = ("#1b7837", "#a6dba0")
TWINS = ("#555555", "#bbbbbb")


def plot(rows: Sequence[Row], figures: Mapping[str, str], path: Path) -> None:
    """A bar for each row and figure, those of one preset, batch and context side by side.

    Args:
        rows: of one device.
        figures: columns to draw, at most two, and what to call them.
        path: of the PNG file.
    """
    from matplotlib import pyplot

    rows = sorted(rows, key=_setting, reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.4 * len(rows)), dpi=120, layout="constrained")
    height = 0.8 / len(figures)
    for number, (column, label) in enumerate(figures.items()):
        places = [place - number * height for place in range(len(rows))]
        values = [float(row[column]) for row in rows]
        colours = [(TRITS if row["contestant"] == "trits" else TWINS)[number] for row in rows]
        bars = axes.barh(places, values, height, color=colours, label=label)
        axes.bar_label(bars, list(map(_rounded, values)), padding=3, fontsize=8)
    middle = (len(figures) - 1) * height / 2
    axes.set_yticks([place - middle for place in range(len(rows))], map(_name, rows))
    axes.margins(x=0.15)
    axes.ticklabel_format(axis="x", style="plain")
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(", ".join(sorted({row["device"] for row in rows})), fontsize=10)
    if len(figures) > 1:
        figure.legend(loc="outside lower center", ncols=len(figures))
    else:
        axes.set_xlabel(next(iter(figures.values())))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _setting(row: Row) -> tuple[str, int, int, str, str]:
    return row["preset"], int(row["batch"]), int(row["ctx"]), row["contestant"], row["state"]


def _name(row: Row) -> str:
    return f"{row['preset']} {row['batch']} x {row['ctx']}: {row['contestant']} {row['state']}".rstrip()
