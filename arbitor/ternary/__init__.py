"""The number format and its learning rule; knows nothing of any particular model."""

from arbitor.ternary.layers import Int8Embedding, TernaryEmbeddingTable, TernaryLinear
from arbitor.ternary.optimizer import VoteOptimizer
from arbitor.ternary.tensor import TernaryScaleTensor, TScaleType, named_ternary

__all__ = [
    "Int8Embedding",
    "TScaleType",
    "TernaryEmbeddingTable",
    "TernaryLinear",
    "TernaryScaleTensor",
    "VoteOptimizer",
    "named_ternary",
]
