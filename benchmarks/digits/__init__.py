"""How well integer training sees: images of digits to their spelled words, as trits and as a float twin.

    python -m benchmarks.digits                                     scikit-learn's digits
    python -m benchmarks.digits --data MNIST_FOLDER --held-out 1000 --device cuda

Both are the preset `tiny` with the image sidecar, on the same images, moved in the same way, in the same
order, with the same schedule; the twin has dense floats in place of every integer layer and learns by AdamW
(`benchmarks.learning.contestants`). Each learning rate is run with seed 0, the best one of each, by the share
right, with two more seeds. What is compared is the mean share of held-out captions that are written right,
byte for byte. A finished run is a row of `benchmarks/results/digits-<data>-<device>.csv` and is skipped the
next time; with other steps, images or another `--held-out`, rows of before are left alone and not compared.
"""
