"""What the rows say: each contestant's best point, its mean over seeds, and a plot against the bytes kept."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learning.contestants import ALL_CONTESTANTS, ATTEMPTS
from benchmarks.learning.sweep import SWEEP_SEED, best_lr, results_of
from benchmarks.learning.table import Row

REFERENCES = ("bitnet-adamw", "bitnet-muon", "dense-adamw", "dense-muon")


@dataclass(frozen=True)
class Standing:
    """A contestant at its best learning rate.

    Attributes:
        name: contestant.
        lr: best learning rate of the sweep.
        bytes_per_weight: kept between steps for a trunk weight.
        values: held-out bits per byte of each seed.
        points: learning rates tried.
    """

    name: str
    lr: float
    bytes_per_weight: float
    values: tuple[float, ...]
    points: int

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None with a single seed."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) / len(self.values) ** 0.5


def standings(rows: Sequence[Row]) -> list[Standing]:
    """Every contestant that has a row of the sweep, in the order of `ALL_CONTESTANTS`."""
    found = []
    for name, contestant in ALL_CONTESTANTS.items():
        results = results_of(name, rows)
        swept = {lr: value for (lr, seed), value in results.items() if seed == SWEEP_SEED}
        if contestant.seeds:  # all rates have as many seeds, so that their means decide
            swept = {lr: statistics.fmean(v for (r, _), v in results.items() if r == lr) for lr in swept}
        if not swept:
            continue
        lr = best_lr(swept)
        values = tuple(value for (rate, _), value in sorted(results.items()) if rate == lr)
        size = next(float(row["bytes_per_weight"]) for row in rows if row["contestant"] == name)
        found.append(Standing(name, lr, size, values, len(swept)))
    return found


def report(rows: Sequence[Row]) -> str:
    """A table as text: contestant, bytes, best rate, mean, standard error, ratio to each twin."""
    table = standings(rows)
    means = {standing.name: standing.mean for standing in table}
    lines = [
        f"{'contestant':<22}{'bytes/weight':>13}{'best lr':>9}{'points':>7}{'seeds':>6}{'bits/byte':>11}"
        f"{'s.e.':>8}" + "".join(f"{'/ ' + name:>15}" for name in REFERENCES)
    ]
    for s in table:
        error = "" if s.standard_error is None else f"{s.standard_error:.4f}"
        ratios = [f"{s.mean / means[name]:.4f}" if name in means else "" for name in REFERENCES]
        lines.append(
            f"{s.name:<22}{s.bytes_per_weight:>13.3f}{s.lr:>9g}{s.points:>7}{len(s.values):>6}{s.mean:>11.4f}"
            f"{error:>8}" + "".join(f"{ratio:>15}" for ratio in ratios)
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bits per byte (mean and every seed) against bytes kept per weight, as a PNG; needs matplotlib."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    for standing in standings([row for row in rows if row["contestant"] not in ATTEMPTS]):
        trits = standing.name.startswith("trits")
        color = "#1b7837" if trits else ("#b35806" if standing.name.startswith("bitnet") else "#555555")
        marker = "s" if standing.name.endswith("muon") else "o"
        xs = [standing.bytes_per_weight] * len(standing.values)
        axes.plot(xs, standing.values, ".", color=color, alpha=0.5, markersize=4)
        axes.plot([xs[0]], [standing.mean], marker, color=color, markersize=7)
        axes.annotate(
            f"{standing.name} {standing.mean:.3f}",
            (xs[0], standing.mean),
            xytext=(-7 if marker == "s" else 7, 0),
            textcoords="offset points",
            fontsize=8,
            ha="right" if marker == "s" else "left",
            va="center",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, 32)
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", ""])
    axes.set_xlabel("bytes kept per trunk weight between steps")
    axes.set_ylabel("held-out bits per byte (lower is better)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
