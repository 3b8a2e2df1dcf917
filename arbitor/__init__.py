"""Training without floating-point weights: trits, power-of-two scales and integer optimizer state.

Names load on first use, so that importing the package stays light: it initialises no CUDA context and
imports neither torch nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arbitor.errors import UserError
    from arbitor.evaluate import bits_per_byte
    from arbitor.model import ARBModel
    from arbitor.ternary import (
        Int8Embedding,
        TernaryEmbeddingTable,
        TernaryLinear,
        TernaryScaleTensor,
        TScaleType,
        VoteOptimizer,
    )
    from arbitor.ternary.audit import audit
    from arbitor.train.checkpoint import load

__version__ = "0.1.0"

_HOME = {
    "ARBModel": "arbitor.model",
    "Int8Embedding": "arbitor.ternary",
    "TScaleType": "arbitor.ternary",
    "TernaryEmbeddingTable": "arbitor.ternary",
    "TernaryLinear": "arbitor.ternary",
    "TernaryScaleTensor": "arbitor.ternary",
    "UserError": "arbitor.errors",
    "VoteOptimizer": "arbitor.ternary",
    "audit": "arbitor.ternary.audit",
    "bits_per_byte": "arbitor.evaluate",
    "load": "arbitor.train.checkpoint",
}

__all__ = [
    "ARBModel",
    "Int8Embedding",
    "TScaleType",
    "TernaryEmbeddingTable",
    "TernaryLinear",
    "TernaryScaleTensor",
    "UserError",
    "VoteOptimizer",
    "__version__",
    "audit",
    "bits_per_byte",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'arbitor' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
