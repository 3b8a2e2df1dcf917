"""Spoken words: trits beside a float twin of the whole pipeline, each speaker held out in turn.

`listen`: the codec, then words out of its codes, both trained without one speaker; measured by the share of
that speaker's words that are written right, byte for byte. `speak`: the codec and words into codes, trained
on nine recordings of ten; measured by how many of the spoken words a recogniser reads back, a separate float
network trained on the real recordings. Both note the codec's log-mel distance on the recordings held out,
beside that of each band's median over those recordings.

    python -m benchmarks.speech --data recordings.tar
    python -m benchmarks.speech --summary                 what the rows say; nothing is trained

The first prints what its own runs say, all of one seed; the second prints every recipe that was run on all
speakers, with the mean over its seeds, and the trits' best recipe over the twin's, each chosen by that mean.
"""
