"""How well integer training learns: one model, one text, as trits and as float twins.

    python -m benchmarks.learning --size cpu

Every contestant is `ARBModel`'s text path on the same batches in the same order with the same schedule. The
learning rate of each is swept on seed 0, the grid is extended while its best point stands at an edge, and
the best is repeated with seeds 1 and 2. A finished run is a row of `benchmarks/results/learning-<size>.csv`;
it is skipped the next time. `--attempts` runs recorded attempts at other constants instead.
"""
