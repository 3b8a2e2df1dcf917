"""Product of int8 codes and int8 weights with one scale a token and one a row; used inside other operations.

Shape letters: N tokens, I in, O out.
"""

from functools import cache

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.int8_matmul import cpu, reference
from arbitor.ops.int8_matmul.reference import MAX_IN_FEATURES

__all__ = ["MAX_IN_FEATURES", "has_int8_kernels", "int8_matmul", "integers_pay"]


@cache
def has_int8_kernels(device: torch.device) -> bool:
    """Whether Triton multiplies int8 there: on GPUs since NVIDIA's Ampere, and in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def integers_pay(x: Tensor, largest: int = 1) -> bool:
    """Whether a linear with one exponent a row shall multiply integers on this CPU, in place of floats.

    Args:
        x: its input [N, I]; what is not fp32 on a CPU keeps the float product.
        largest: magnitude of an integer weight; the two products are equal only where fp32 holds all sums.
    """
    fits = min(x.shape) > 1 and x.shape[-1] * largest <= MAX_IN_FEATURES
    return x.device.type == "cpu" and x.dtype == torch.float32 and fits and cpu.pays(largest)


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
    if codes.device.type == "cpu":
        return cpu.int8_matmul(codes, weight, scale, row_scale, out_dtype)
    return reference.int8_matmul(codes, weight, scale, row_scale, out_dtype)
