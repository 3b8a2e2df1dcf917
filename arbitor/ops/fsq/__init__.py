"""Finite scalar quantisation with three levels: `fsq`, `fsq_backward`, `fsq_trits`.

After Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3, with the levels -1, 0
and +1: a codebook of 3^K codes that is never stored.

Shape letters: K trits of a code; `...` positions.
"""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.fsq import reference
from arbitor.ops.registry import register

__all__ = ["MAX_TRITS", "fsq", "fsq_backward", "fsq_trits"]

MAX_TRITS = 15  # 3^15 codes: ids fit into int32


def fsq(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code of every position, in O(K): round(1.001 tanh(x / rms(x))), and its id.

    Args:
        x: float [..., K], 1 <= K <= 15. Not all codes are in reach: numbers of RMS 1 are never all near 0,
            and a single number is never near 0, unless x is about 0 altogether.

    Returns:
        codes: [..., K] in the dtype of x, -1, 0 or +1; NaN where x is not finite or its squares overflow.
        ids: int64 [...], sum of (trit_n + 1) * 3^n over n = 0...K-1, in 0...3^K - 1 whatever x is.

    Raises:
        ValueError: x is not a float tensor or has another number of columns.
    """
    if not x.is_floating_point() or x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_TRITS:
        raise ValueError(f"x must be float [..., 1 to {MAX_TRITS}], got {x.dtype} {list(x.shape)}")
    return _fsq(x)


def fsq_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient [..., K] of x, in its dtype, from that of the codes; rounding passes it straight through."""
    return _backward(dy, x)


def fsq_trits(ids: Tensor, k: int) -> Tensor:
    """The codes of ids.

    Args:
        ids: integers [...] in 0...3^k - 1.
        k: trits of a code, 1...15.

    Returns:
        int8 [..., k].

    Raises:
        ValueError: ids are not integers, or another k.
    """
    if ids.is_floating_point() or ids.dtype == torch.bool or not 1 <= k <= MAX_TRITS:
        raise ValueError(f"ids must be integers and k in 1...{MAX_TRITS}, got {ids.dtype} and k = {k}")
    return _trits(ids, k)


def _kernels(x: Tensor) -> Any:
    """The module whose functions compute for x."""
    if x.dtype != torch.float64 and uses_triton(x):
        from arbitor.ops.fsq import triton

        return triton
    return reference


_fsq = register(
    "fsq(Tensor x) -> (Tensor, Tensor)",
    lambda x: _kernels(x).quantize(x),
    lambda x: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)),
)
_backward = register(
    "fsq_backward(Tensor dy, Tensor x) -> Tensor",
    lambda dy, x: _kernels(x).backward(dy, x),
    lambda dy, x: x.new_empty(x.shape),
)
_trits = register(
    "fsq_trits(Tensor ids, int k) -> Tensor",
    lambda ids, k: _kernels(ids).trits(ids, k),
    lambda ids, k: ids.new_empty((*ids.shape, k), dtype=torch.int8),
)
