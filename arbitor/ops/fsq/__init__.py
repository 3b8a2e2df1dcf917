"""Finite scalar quantisation with three levels: `fsq_quantize`, `fsq_trits`, `fsq_slope`.

Shape letters: K trits of a code, 1 to `MAX_TRITS`.
"""

import torch
from torch import Tensor

from arbitor.ops.fsq import reference
from arbitor.ops.fsq.reference import MAX_TRITS
from arbitor.ops.registry import register

__all__ = ["MAX_TRITS", "fsq_quantize", "fsq_slope", "fsq_trits"]


def fsq_quantize(h: Tensor) -> tuple[Tensor, Tensor]:
    """round(1.001 * tanh(h)) as trits int8 [..., K], and ids int64 [...] in 0 ... 3^K - 1."""
    _check_trits(h.shape[-1])
    return _quantize(h)


def fsq_slope(h: Tensor) -> Tensor:
    """The straight-through derivative of the trits by h [..., K], in the dtype of h."""
    return _slope(h)


def fsq_trits(ids: Tensor, k: int) -> Tensor:
    """Ids int64 [...] -> their trits, int8 [..., k]."""
    _check_trits(k)
    return _trits(ids, k)


def _check_trits(k: int) -> None:
    if not 1 <= k <= MAX_TRITS:
        raise ValueError(f"a code has 1 to {MAX_TRITS} trits, not {k}")


_quantize = register(
    "fsq_quantize(Tensor h) -> (Tensor, Tensor)",
    reference.quantize,
    lambda h: (torch.empty_like(h, dtype=torch.int8), h.new_empty(h.shape[:-1], dtype=torch.int64)),
)
_slope = register("fsq_slope(Tensor h) -> Tensor", reference.slope, lambda h: torch.empty_like(h))
_trits = register(
    "fsq_trits(Tensor ids, int k) -> Tensor",
    reference.trits_of,
    lambda ids, k: ids.new_empty((*ids.shape, k), dtype=torch.int8),
)
