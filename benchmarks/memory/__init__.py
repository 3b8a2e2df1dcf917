"""What training needs, in bytes: kept between steps, and at the peak of a step.

    python -m benchmarks.memory --preset base --batch 8

writes and draws `benchmarks/results/memory-<device>.csv`: trits with every state, and the dense twins of the
speed benchmark, each in a process of its own. Peaks depend on the batch, so it stands in every row.
"""
