"""Which runs a contestant still needs: the grid of rates, its extension, then further seeds at the best."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from benchmarks.learning.contestants import Contestant, Run
from benchmarks.learning.table import Row

SWEEP_SEED = 0
SEEDS = (0, 1, 2)
LR_FACTOR = 2.0
MAX_POINTS = 12  # of one sweep; only a contestant that never learns gets there


def next_runs(contestant: Contestant, results: Mapping[tuple[float, int], float]) -> list[Run]:
    """The runs that can start now, given the finished ones; none when the contestant is complete.

    Args:
        contestant: whose sweep it is.
        results: held-out bits per byte by (lr, seed); what is not finite counts as the worst.

    Returns:
        Of a contestant with seeds of its own, every rate with each of them. Of others first the missing
        points of the grid on seed 0; then, while the best point stands at an edge, the next point beyond it;
        then the other seeds at the best point.
    """
    if contestant.seeds:
        points = [(lr, seed) for seed in contestant.seeds for lr in contestant.lrs]
        return [Run(contestant.name, *point) for point in points if point not in results]
    if not contestant.lrs:
        return [Run(contestant.name, 0.0, seed) for seed in SEEDS if (0.0, seed) not in results]
    swept = {lr: value for (lr, seed), value in results.items() if seed == SWEEP_SEED}
    missing = [lr for lr in contestant.lrs if lr not in swept]
    if missing:
        return [Run(contestant.name, lr, SWEEP_SEED) for lr in missing]
    best = best_lr(swept)
    if len(swept) < MAX_POINTS:
        if best == min(swept):
            return [Run(contestant.name, tidy(best / LR_FACTOR), SWEEP_SEED)]
        if best == max(swept):
            return [Run(contestant.name, tidy(best * LR_FACTOR), SWEEP_SEED)]
    return [Run(contestant.name, best, seed) for seed in SEEDS if (best, seed) not in results]


def best_lr(swept: Mapping[float, float]) -> float:
    """The rate with the lowest figure, of equal ones the smallest rate (where all diverge: go down)."""
    return min(sorted(swept), key=lambda lr: swept[lr] if math.isfinite(swept[lr]) else math.inf)


def tidy(lr: float) -> float:
    """The rate as the results spell it, so that it is found again."""
    return float(format(lr, "g"))


def results_of(name: str, rows: Iterable[Row]) -> dict[tuple[float, int], float]:
    """A contestant's held-out bits per byte by (lr, seed)."""
    return {
        (tidy(float(row["lr"])), int(row["seed"])): float(row["held_out_bits_per_byte"])
        for row in rows
        if row["contestant"] == name
    }


def plan(contestants: Sequence[Contestant], rows: Sequence[Row], running: Collection[Run] = ()) -> list[Run]:
    """The runs of all contestants that can start now, without those that are running."""
    ready = [run for c in contestants for run in next_runs(c, results_of(c.name, rows))]
    return [run for run in ready if run not in running]


def remaining(contestant: Contestant, results: Mapping[tuple[float, int], float]) -> int:
    """How many runs are left if no grid has to be extended any further."""
    runs = next_runs(contestant, results)
    if not runs or not contestant.lrs or contestant.seeds:
        return len(runs)
    sweeping = runs[0].seed == SWEEP_SEED
    return len(runs) + (len(SEEDS) - 1 if sweeping else 0)
