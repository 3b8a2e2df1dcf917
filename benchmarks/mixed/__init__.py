"""One model on text, code, images, sounds and clips, beside one on text alone.

    python -m benchmarks.mixed --preset small --accum 4 --text-data books --audio-data words.tar

Both are runs of `training/pretrain.py`, with the same settings and data. The second takes the batches of text
that the first drew, in their order (and up to `--accum` - 1 more, to fill its last step), and both are
measured on the same held-out text.

The default text, docstrings of Python's library, is verbatim part of the default code: the mix then sees more
of it than text alone does, and the two say little about each other. So what the text shares with the training
code is counted and printed, with a warning where it is more than 1 %; `--text-data` or `--code-data` give
other data.

A row of `mixed-<device>.csv` is a part of a run, with its baseline on the same held-out data. `weights` are
those of text, code, image, audio and video; `<part>_data` are the names of what each part learnt from, empty
where it is not drawn. `text_in_code` and `held_out_in_code` are the shares of the stretches of 40 bytes of
the training text and of the held-out text that occur in the training code of the mix, in the rows of text;
empty where they were not counted.
"""
