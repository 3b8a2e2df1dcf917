"""Product of int8 codes and int8 weights with one scale a token and one a row; used inside other operations.

Shape letters: N tokens, I in, O out.
"""

from functools import cache

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.int8_matmul import reference
from arbitor.ops.int8_matmul.reference import MAX_IN_FEATURES

__all__ = ["MAX_IN_FEATURES", "has_int8_kernels", "int8_matmul"]


@cache
def has_int8_kernels(device: torch.device) -> bool:
    """Whether Triton multiplies int8 there: on GPUs since NVIDIA's Ampere, and in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def int8_matmul(
    codes: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """(codes @ weight^T * row_scale) * scale, with exact sums and one rounding a multiplication.

    Args:
        codes: int8 [N, I], I at most MAX_IN_FEATURES.
        weight: int8 [O, I].
        scale: fp32 [N, 1], what a code of each token is worth.
        row_scale: fp32 [O], what a unit of each row of the weight is worth.
        out_dtype: fp32, bf16 or fp16.

    Returns:
        [N, O] in `out_dtype`.
    """
    if uses_triton(codes) and has_int8_kernels(codes.device):
        from arbitor.ops.int8_matmul import triton

        return triton.int8_matmul(codes, weight, scale, row_scale, out_dtype)
    return reference.int8_matmul(codes, weight, scale, row_scale, out_dtype)
