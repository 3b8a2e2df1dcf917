"""A preset beside its dense float twin on the same text, each for the same time: `python -m benchmarks.race`.

Every contestant's step is timed first; the steps that fit into `--minutes` then make one cosine. That is the
comparison at equal time. For the one at equal bytes, give the faster contestant `--steps` of the slower one.

A race of minutes reads more than the packages of a machine hold: `python -m benchmarks.race.gather FOLDER`
makes a folder of all its text, for `--data FOLDER --held-out 0.01`.

A row of `race-<device>.csv` is a run; `race-<device>-curve.csv` has its held-out figure on the way, on less
text. Time is that of training alone, without evaluation and compilation.
"""
