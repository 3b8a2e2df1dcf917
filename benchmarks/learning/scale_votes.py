"""Do votes on the scale exponents help? The same runs with them on and off, paired by seed."""

import statistics
from collections.abc import Sequence

from benchmarks.learning.contestants import CONTESTANTS, Run
from benchmarks.learning.sweep import SEEDS, SWEEP_SEED, best_lr, results_of
from benchmarks.learning.table import COLUMNS as SWEEP_COLUMNS
from benchmarks.learning.table import Row

CONTESTANT = "trits-full"
TSCALES = ("ROW", "T32")
SCALE_LRS = (3e-4,)
COLUMNS = ("tscale", "scale_lr", *SWEEP_COLUMNS)
KEY = ("tscale", "scale_lr", "lr", "seed")


def best_full_lr(rows: Sequence[Row]) -> float:
    """The best rate of the sweep's rows, or the middle of the grid where there are none."""
    results = results_of(CONTESTANT, rows)
    swept = {lr: value for (lr, seed), value in results.items() if seed == SWEEP_SEED}
    grid = CONTESTANTS[CONTESTANT].lrs
    return best_lr(swept) if swept else grid[len(grid) // 2]


def runs(lr: float, strengths: Sequence[float] = ()) -> list[Run]:
    """Every scale type and seed, with votes off and with each of `strengths` (octaves per step)."""
    return [
        Run(CONTESTANT, lr, seed, tscale, strength)
        for tscale in TSCALES
        for strength in (0.0, *(strengths or SCALE_LRS))
        for seed in SEEDS
    ]


def identify(run: Run) -> dict[str, str]:
    """The columns that identify a run."""
    return {
        "tscale": run.tscale,
        "scale_lr": format(run.scale_lr, "g"),
        "lr": format(run.lr, "g"),
        "seed": str(run.seed),
    }


def report(rows: Sequence[Row]) -> str:
    """Mean difference to votes off over the seeds, and its standard error, for every setting."""
    values = {
        (row["tscale"], float(row["scale_lr"]), float(row["lr"]), int(row["seed"])): float(
            row["held_out_bits_per_byte"]
        )
        for row in rows
    }
    settings = sorted({(tscale, strength, lr) for tscale, strength, lr, _ in values if strength})
    lines = ["on minus off, bits per byte (below 0: scale votes help)"]
    for tscale, strength, lr in settings:
        pairs = [
            value - values[tscale, 0.0, lr, seed]
            for (t, s, r, seed), value in sorted(values.items())
            if (t, s, r) == (tscale, strength, lr) and (tscale, 0.0, lr, seed) in values
        ]
        if len(pairs) > 1:
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            mean = statistics.fmean(pairs)
            lines.append(
                f"{tscale:<4} scale_lr {strength:g}: {mean:+.4f} +- {error:.4f} over {len(pairs)} seeds"
            )
    return "\n".join(lines)
