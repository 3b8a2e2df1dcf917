"""The number format and its learning rule; knows nothing of any particular model."""

from arbitor.ternary.codebook import TernaryVQCodebook
from arbitor.ternary.conv import TernaryConv1d, TernaryUpsample1d
from arbitor.ternary.counters import IntegerCounters, named_counters
from arbitor.ternary.experts import TernaryExperts
from arbitor.ternary.layers import Int8Embedding, Int8Vector, TernaryEmbeddingTable, TernaryLinear
from arbitor.ternary.optimizer import VoteOptimizer
from arbitor.ternary.tensor import TernaryScaleTensor, TScaleType, named_ternary

__all__ = [
    "Int8Embedding",
    "Int8Vector",
    "IntegerCounters",
    "TScaleType",
    "TernaryConv1d",
    "TernaryEmbeddingTable",
    "TernaryExperts",
    "TernaryLinear",
    "TernaryScaleTensor",
    "TernaryUpsample1d",
    "TernaryVQCodebook",
    "VoteOptimizer",
    "named_counters",
    "named_ternary",
]
