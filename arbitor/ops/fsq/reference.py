"""Finite scalar quantisation with three levels: every number of a vector becomes a trit.

z = 1.001 tanh(x / rms(x)), code = round(z). Since tanh is monotone, a number's trit is its sign where
(x / rms)^2 exceeds atanh(0.5 / 1.001)^2, and 0 elsewhere. Squares and sums are taken one column after the
other, so that a code depends on nothing but its own vector, to the last bit and on every device.

Shape letters: K trits of a code; `...` positions.
"""

import math

import torch
from torch import Tensor

from arbitor.ops.activations import RMS_EPS, compute_dtype, norm_backward

LEVEL_SCALE = 1.001
ZERO_BELOW = math.atanh(0.5 / LEVEL_SCALE) ** 2  # of (x / rms)^2


def smooth(x: Tensor) -> Tensor:
    """z [..., K] ahead of rounding, in the compute dtype: what the gradient is taken of."""
    x = x.to(compute_dtype(x))
    return LEVEL_SCALE * torch.tanh(x * _rstd(x))


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and ids; see `arbitor.ops.fsq.fsq`."""
    columns = x.to(compute_dtype(x)).unbind(dim=-1)
    squares = [column * column for column in columns]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    limit = (total + len(columns) * RMS_EPS) * ZERO_BELOW
    ids = torch.zeros(total.shape, dtype=torch.int64, device=x.device)
    trits = []
    for n, (column, square) in enumerate(zip(columns, squares, strict=True)):
        far = square * len(columns) > limit
        trit = (far & (column > 0)).to(torch.int8) - (far & (column < 0)).to(torch.int8)
        trits.append(trit)
        ids.add_(trit + 1, alpha=3**n)
    # The difference is 0, or NaN where a number was not finite: comparisons alone would make such a code 0.
    codes = torch.stack(trits, dim=-1) + (total - total)[..., None]
    return codes.to(x.dtype), ids


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, in its dtype, through `smooth`: rounding passes it straight through."""
    wide = x.to(compute_dtype(x))
    rstd = _rstd(wide)
    slope = 1 - torch.tanh(wide * rstd).square()
    return norm_backward(slope.mul_(dy).mul_(LEVEL_SCALE), wide, rstd).to(x.dtype)


def trits(ids: Tensor, k: int) -> Tensor:
    """int8 [..., K] of ids [...]."""
    powers_K = 3 ** torch.arange(k, device=ids.device)
    return (ids[..., None] // powers_K % 3 - 1).to(torch.int8)


def _rstd(x: Tensor) -> Tensor:
    return x.square().mean(dim=-1, keepdim=True).add_(RMS_EPS).rsqrt_()
