"""The sweep's logic on objectives whose minimum is known; nothing is trained."""

import itertools
import math

import pytest

from benchmarks.learning.contestants import CONTESTANTS, Contestant, Run
from benchmarks.learning.sweep import MAX_POINTS, next_runs, plan, remaining, results_of

GRID = (0.025, 0.05, 0.1)


def valley(at):
    return lambda lr: 1.0 + abs(math.log2(lr / at))


def sweep(contestant, objective, limit=100):
    """Runs everything that is offered, in rounds; returns results by (lr, seed)."""
    results = {}
    for _ in range(limit):
        runs = next_runs(contestant, results)
        if not runs:
            return results
        for run in runs:
            assert (run.lr, run.seed) not in results
            results[run.lr, run.seed] = objective(run.lr)
    raise AssertionError("the sweep does not end")


@pytest.mark.parametrize("best", [0.003125, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.8])
def test_the_best_point_is_interior_and_has_three_seeds(best):
    results = sweep(Contestant("x", GRID), valley(best))
    swept = sorted(lr for lr, seed in results if seed == 0)
    assert set(GRID) <= set(swept)
    assert swept[0] < best < swept[-1]
    assert [lr for lr, seed in results if seed != 0] == pytest.approx([best, best])
    assert all(b / a == pytest.approx(2) for a, b in itertools.pairwise(swept))


def test_a_minimum_between_points_takes_the_nearer_one():
    results = sweep(Contestant("x", GRID), valley(0.06))
    assert {lr for lr, seed in results if seed == 1} == {0.05}


def test_diverged_runs_are_the_worst():
    results = sweep(Contestant("x", GRID), lambda lr: 1.5 if lr < 0.03 else math.nan)
    best = next(lr for lr, seed in results if seed == 1)
    assert best < 0.03
    assert math.isfinite(results[best, 0])


def test_a_contestant_that_never_learns_ends():
    results = sweep(Contestant("x", GRID), lambda lr: math.nan)
    assert sum(seed == 0 for _, seed in results) == MAX_POINTS


def test_without_a_rate_there_is_one_point_with_three_seeds():
    runs = next_runs(CONTESTANTS["trits-sign"], {})
    assert runs == [Run("trits-sign", 0.0, seed) for seed in (0, 1, 2)]
    assert next_runs(CONTESTANTS["trits-sign"], {(0.0, seed): 2.0 for seed in (0, 1, 2)}) == []


def test_seeds_wait_for_the_sweep_and_a_lost_one_is_offered_again():
    contestant = Contestant("x", GRID)
    results = {(0.025, 0): 1.2, (0.05, 0): 1.1}
    assert next_runs(contestant, results) == [Run("x", 0.1, 0)]
    results[0.1, 0] = 1.3
    assert next_runs(contestant, results) == [Run("x", 0.05, 1), Run("x", 0.05, 2)]
    results[0.05, 2] = 1.1
    assert next_runs(contestant, results) == [Run("x", 0.05, 1)]


def test_rows_count_only_for_their_contestant_and_running_ones_are_not_offered():
    rows = [
        {"contestant": "trits-full", "lr": "0.0250", "seed": "0", "held_out_bits_per_byte": "1.5"},
        {"contestant": "dense-muon", "lr": "0.05", "seed": "0", "held_out_bits_per_byte": "1.4"},
    ]
    assert results_of("trits-full", rows) == {(0.025, 0): 1.5}
    contestant = CONTESTANTS["trits-full"]
    ready = plan([contestant], rows)
    assert [run.lr for run in ready] == [0.05, 0.1]
    assert plan([contestant], rows, running=ready[:1]) == ready[1:]


def test_remaining_counts_what_is_left_without_extensions():
    contestant = Contestant("x", GRID)
    assert remaining(contestant, {}) == 5
    assert remaining(contestant, {(0.025, 0): 1.2, (0.05, 0): 1.1, (0.1, 0): 1.2}) == 2
    assert remaining(contestant, {(0.025, 0): 1.0, (0.05, 0): 1.1, (0.1, 0): 1.2}) == 3
    done = {(0.025, 0): 1.2, (0.05, 0): 1.1, (0.1, 0): 1.2, (0.05, 1): 1.1, (0.05, 2): 1.1}
    assert remaining(contestant, done) == 0


def test_every_grid_has_three_points_a_factor_two_apart():
    for contestant in CONTESTANTS.values():
        if contestant.name != "trits-sign":
            assert len(contestant.lrs) >= 3
            assert all(b / a == pytest.approx(2) for a, b in itertools.pairwise(contestant.lrs))
