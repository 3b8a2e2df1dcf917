"""How well integer training learns: one model, one text, as trits and as float twins.

    python -m benchmarks.learning --size cpu

Every contestant is `ARBModel`'s text path on the same batches in the same order with the same schedule. The
learning rate of each is swept on seed 0, the grid is extended while its best point stands at an edge, and
the best is repeated with seeds 1 and 2. A finished run is a row of `benchmarks/results/learning-<size>.csv`;
it is skipped the next time. Rows name their text and their commit; a table holds rows of one text only.
`--attempts` runs recorded attempts at other constants instead.

What the comparison does not do: the BitNet twins follow the schedule of all others, a warm-up and half a
cosine with constant weight decay, and not the two stages of learning rate and weight decay that BitNet's
authors train with. And a best rate is the best point of a grid whose neighbours are a factor of 2 apart, not
refined any further: each contestant's optimum is about a factor of sqrt(2) away at most, if its valley is
symmetric.
"""
