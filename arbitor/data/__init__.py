"""Byte streams to train and to evaluate on: the embedded corpus, own files, and an exact sampler."""

from arbitor.data.corpus import ByteCorpus, open_corpus
from arbitor.data.sampler import Sampler
from arbitor.data.stream import ByteStream

__all__ = ["ByteCorpus", "ByteStream", "Sampler", "open_corpus"]
