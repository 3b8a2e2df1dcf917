"""How fast training is beside a dense twin in the same run, and whether the goals are met.

    python -m benchmarks.speed --preset base --batch 32
    python -m benchmarks.speed --goal G3 C1

The first form writes `benchmarks/results/speed-<device>.csv`, one row a contestant, and a picture. The second
measures goals that were predicted before (`predictions.csv`, or `--predict`) and writes `goals-<device>.csv`.
Nothing is printed if the layers' outputs differ from the reference (`parity.py`).
"""
