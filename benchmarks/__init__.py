"""Comparisons that back the project's claims; run from a checkout, results under `benchmarks/results/`."""
