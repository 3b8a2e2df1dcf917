"""The quintic Newton-Schulz iteration: `newton_schulz`.

Shape letters: n matrices, O out, I in.
"""

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.newton_schulz import reference
from arbitor.ops.newton_schulz.reference import COEFFICIENTS, STEPS

__all__ = ["COEFFICIENTS", "STEPS", "iterates_narrow", "newton_schulz"]


def iterates_narrow(x: Tensor) -> bool:
    """Whether kernels iterate on matrices of bf16 on this tensor's device, and bring them to norm 1."""
    return x.is_cuda and uses_triton(x)


def newton_schulz(x: Tensor, largest: Tensor) -> Tensor:
    """Five steps from matrices of any norm, each brought to norm 1 first.

    X becomes a X + (b A + c A A) X with A = X X^T, or X^T X of tall matrices; products are summed in fp32
    and what lies between them is rounded to the dtype of x.

    Args:
        x: bf16 or fp32 [n, O, I]; overwritten, or copied where it is not contiguous.
        largest: int32 [n], the bits of each matrix's largest magnitude as fp32, sign cleared; it may be off
            by a rounding to x's dtype.

    Returns:
        [n, O, I] in the dtype of x, zero where the matrix is zero: contiguous, x or a new tensor.
    """
    if iterates_narrow(x):
        from arbitor.ops.newton_schulz import triton

        if triton.can_multiply(x):
            return triton.newton_schulz(x.contiguous(), largest)
    magnitude = largest.view(torch.float32)[:, None, None].clamp_min(reference.TINY)
    return reference.newton_schulz(reference.brought_to_unit_norm(x, magnitude, x.dtype))
