"""Finite scalar quantisation with three levels (Mentzer et al. 2023): a codebook of all 3^k trit vectors.

Shape letters: K trits of a code.
"""

import torch
from torch import Tensor

MAX_TRITS = 15
BOUND = 1.001  # tanh alone never reaches 1, and a trit of +-1 could not be met exactly


def quantize(h: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest code of BOUND * tanh(h), found element by element.

    Args:
        h: float [..., K].

    Returns:
        trits int8 [..., K], and ids int64 [...], the base-3 number with digit n = trit n + 1.
    """
    # In fp64, since vectorised fp32 functions differ from scalar ones in the last bit.
    trits = torch.tanh(h.to(torch.float64)).mul_(BOUND).round_().to(torch.int8)
    return trits, pack_ids(trits)


def pack_ids(trits: Tensor) -> Tensor:
    """Trits int8 [..., K] -> ids int64 [...]."""
    powers = 3 ** torch.arange(trits.shape[-1], dtype=torch.int64, device=trits.device)
    return ((trits.to(torch.int64) + 1) * powers).sum(dim=-1)


def trits_of(ids: Tensor, k: int) -> Tensor:
    """Trits int8 [..., k] of ids int64 [...]; the inverse of the ids that `quantize` gives."""
    powers = 3 ** torch.arange(k, dtype=torch.int64, device=ids.device)
    return ((ids[..., None] // powers) % 3 - 1).to(torch.int8)


def slope(h: Tensor) -> Tensor:
    """Derivative of BOUND * tanh(h), which stands for that of the rounded code."""
    return (1 - torch.tanh(h).square()).mul_(BOUND)
