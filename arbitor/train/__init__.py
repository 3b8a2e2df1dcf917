"""Training: the loop, its schedule, checkpoints, metrics and the folders of runs."""
