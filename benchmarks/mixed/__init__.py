"""One model on text, code, images, sounds and clips, beside one on text alone: `python -m benchmarks.mixed`.

Both are runs of `training/pretrain.py`. The second takes as many steps as the first, on average, drew text,
so both see as much of it. A row of `mixed-<device>.csv` is a part of a run, with its baseline on the same
held-out data.
"""
