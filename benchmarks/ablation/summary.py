"""What the rows say: each variant's mean over seeds, and its difference to what it is compared with."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ablation.training import PART_COLUMNS
from benchmarks.ablation.variants import Variant
from benchmarks.learning.table import Row

Group = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Standing:
    """A variant's rows of one group.

    Attributes:
        variant: which one.
        rows: by seed.
    """

    variant: str
    rows: Mapping[int, Row]

    @property
    def mean(self) -> float:
        """Held-out bits per byte, mean over the seeds."""
        return statistics.fmean(_bits(row) for row in self.rows.values())

    def minus(self, other: "Standing") -> tuple[float, float | None] | None:
        """Mean difference over the seeds that both have, and its standard error (None of a single one)."""
        pairs = [
            _bits(row) - _bits(other.rows[seed]) for seed, row in self.rows.items() if seed in other.rows
        ]
        if not pairs:
            return None
        error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None
        return statistics.fmean(pairs), error


def groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """Rows that may be compared: of one learning rate, state, and number of bytes seen or time."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault((row["lr"], row["state"], row.get("limit") or row["bytes_seen"]), []).append(row)
    return found


def standings(rows: Sequence[Row], variants: Mapping[str, Variant]) -> dict[str, Standing]:
    """The variants that have rows, in the order of `variants`; `rows` are of one group."""
    found = {}
    for name in variants:
        own = {int(row["seed"]): row for row in rows if row["variant"] == name}
        if own:
            found[name] = Standing(name, own)
    return found


def report(rows: Sequence[Row], variants: Mapping[str, Variant]) -> str:
    """Tables as text, one for every group; below 0 a difference is for the variant."""
    lines = []
    for (lr, state, most), members in groups(rows).items():
        length = f"{most} s of training" if members[0].get("limit") else f"{int(most) / 1e6:.1f} MB seen"
        lines += [
            f"lr {lr}, {state} state, {length}",
            f"{'variant':<15}{'trits M':>9}{'active M':>9}{'B/weight':>9}{'seeds':>6}{'bits/byte':>10}"
            f"{'iters':>7}{'load':>7}{'motifs':>8}{'kB/s':>8}  difference",
        ]
        found = standings(members, variants)
        for name, standing in found.items():
            first = next(iter(standing.rows.values()))
            parts = [_mean(standing, column) for column in PART_COLUMNS]
            speed = statistics.fmean(bytes_per_second(row) for row in standing.rows.values())
            differences = []
            for peer in variants[name].against:
                difference = standing.minus(found[peer]) if peer in found else None
                if difference is not None:
                    error = "" if difference[1] is None else f" +- {difference[1]:.4f}"
                    differences.append(f"{difference[0]:+.4f}{error} to {peer}")
            lines.append(
                f"{name:<15}{int(first['trit_weights']) / 1e6:>9.2f}"
                f"{int(first['active_trit_weights']) / 1e6:>9.2f}{float(first['bytes_per_weight']):>9.3f}"
                f"{len(standing.rows):>6}{standing.mean:>10.4f}{parts[0]:>7}{parts[1]:>7}{parts[2]:>8}"
                f"{speed / 1e3:>8,.0f}  {', '.join(differences)}"
            )
    return "\n".join(lines)


def bytes_per_second(row: Row) -> float:
    """Training speed of a run."""
    return float(row["bytes_seen"]) / max(float(row["seconds"]), 0.1)


def plot(rows: Sequence[Row], variants: Mapping[str, Variant], path: Path, title: str) -> None:
    """Bits per byte of every variant (mean and every seed) of the largest group; needs matplotlib."""
    from matplotlib import pyplot

    found = standings(max(groups(rows).values(), key=len), variants)
    names = list(reversed(found))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.35 * len(names)), dpi=120, layout="constrained")
    for place, name in enumerate(names):
        values = [_bits(row) for row in found[name].rows.values()]
        axes.plot(values, [place] * len(values), ".", color="#1b7837", alpha=0.5, markersize=5)
        axes.plot([found[name].mean], [place], "o", color="#1b7837", markersize=7)
    if "base" in found:
        axes.axvline(found["base"].mean, color="#555555", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("held-out bits per byte (lower is better)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _mean(standing: Standing, column: str) -> str:
    values = [float(row[column]) for row in standing.rows.values() if row[column]]
    return f"{statistics.fmean(values):.4g}" if values else ""


def _bits(row: Row) -> float:
    return float(row["held_out_bits_per_byte"])
