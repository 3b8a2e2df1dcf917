"""What each part of ARB is worth: one text, one number of bytes seen, equal active weights.

    python -m benchmarks.ablation --size arb-small --jobs 8

Every variant is the same model with some parts left out or replaced (`variants.py`); the width of its core is
chosen so that as many trits take part in a position as in the preset. All variants train with the step of
`arbitor train`. A finished run is a row of `benchmarks/results/ablation-<size>.csv`; it is skipped the next
time.

    python -m benchmarks.ablation --size arb-small --seconds 25

gives every variant the same time instead, in `benchmarks/results/ablation-<size>-timed.csv`.

    python -m benchmarks.ablation --stability runs/arb-small-1

judges a run of `arbitor train` instead (`stability.py`).
"""
