"""Windows of three neighbouring embeddings, and the normed sum that a residual stream begins with.

Shape letters: B batch, L ids, N = L - 2 positions, D dim, W = 3 D.
"""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.byte_windows import reference

__all__ = ["add_and_norm", "kernels_run", "windows"]


def kernels_run(e_BLD: Tensor) -> bool:
    """Whether kernels compute the two functions for these embeddings, which are fp32 or bf16."""
    fits = e_BLD.dtype in (torch.float32, torch.bfloat16) and e_BLD.shape[-1] <= reference.WIDEST
    return fits and not torch.compiler.is_compiling() and uses_triton(e_BLD)


def windows(e_BLD: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Each position's embedding behind the two before it, and its own.

    Args:
        e_BLD: float.
        dtype: of the windows; None is that of e. Gradients are added up in fp32 and rounded once.

    Returns:
        [B, N, W] in `dtype`, and the view e[:, 2:], [B, N, D].
    """
    dtype = e_BLD.dtype if dtype is None else dtype
    return _Windows.apply(e_BLD, dtype) if kernels_run(e_BLD) else reference.windows(e_BLD, dtype)


def add_and_norm(e_BND: Tensor, y_BND: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """rms_norm(e + y) in `dtype`, else in that of e."""
    dtype = e_BND.dtype if dtype is None else dtype
    if kernels_run(e_BND):
        return _AddAndNorm.apply(e_BND, y_BND, dtype)
    return reference.add_and_norm(e_BND, y_BND, dtype)


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e_BLD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        from arbitor.ops.byte_windows import triton

        ctx.dtype, ctx.shape = e_BLD.dtype, e_BLD.shape
        return triton.windows(e_BLD, dtype), e_BLD[:, reference.BEFORE :]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dwindow_BNW: Tensor, down_BND: Tensor) -> tuple[Tensor, None]:
        from arbitor.ops.byte_windows import triton

        return triton.windows_backward(dwindow_BNW, down_BND, ctx.shape, ctx.dtype), None


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e_BND: Tensor, y_BND: Tensor, dtype: torch.dtype) -> Tensor:
        from arbitor.ops.byte_windows import triton

        h_BND, rstd = triton.add_and_norm(e_BND, y_BND, dtype)
        ctx.dtypes = e_BND.dtype, y_BND.dtype
        ctx.save_for_backward(h_BND, rstd)
        return h_BND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh_BND: Tensor) -> tuple[Tensor, Tensor, None]:
        from arbitor.ops.byte_windows import triton

        de_dtype, dy_dtype = ctx.dtypes
        narrow = dy_dtype if dy_dtype.itemsize < de_dtype.itemsize else de_dtype
        h_BND, rstd_BN = ctx.saved_tensors
        gradient_BND = triton.norm_backward(dh_BND, h_BND, rstd_BN, narrow)
        return gradient_BND.to(de_dtype), gradient_BND.to(dy_dtype), None
