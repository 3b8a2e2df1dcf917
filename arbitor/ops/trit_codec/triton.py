"""Triton kernel of `ternary_decode`: trits times powers of two as floats, in one pass.

A program takes some packed bytes; digit d of a byte is one of five weights that stand 32 apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.triton import digit, exp2_int

BYTES = 1024


@triton.jit
def _decode_kernel(packed, exponents, weights, rows, columns, width, group, groups, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = byte < rows * width
    row = byte // width
    within = byte % width
    column = (within // 32) * 160 + within % 32
    code = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    # Packing never produces byte q where ceil(256 v / 243) skips it; such a byte gives NaN, not a weight.
    value = (code * 243) >> 8
    legal = ((value * 256 + 242) // 243 == code) | (((value + 1) * 256 + 242) // 243 == code)
    for plane in tl.static_range(5):
        col = column + 32 * plane
        used = inside & (col < columns)
        exponent = tl.load(exponents + row * groups + col // group, mask=used, other=0).to(tl.int32)
        weight = (digit(code, plane) - 1).to(tl.float32) * exp2_int(exponent)
        weight = tl.where(legal, weight, float("nan"))
        tl.store(weights + row * columns + col, weight.to(weights.dtype.element_ty), mask=used)


def decode(packed: Tensor, exponent: Tensor, in_features: int, group: int, dtype: torch.dtype) -> Tensor:
    """As `reference.decode`, to fp32 or bf16."""
    *leading, width = packed.shape
    weights = torch.empty((*leading, in_features), dtype=dtype, device=packed.device)
    rows = packed.numel() // max(1, width)
    if rows:
        grid = (triton.cdiv(rows * width, BYTES),)
        _decode_kernel[grid](
            packed.contiguous(), exponent.contiguous(), weights, rows, in_features, width, group,
            exponent.shape[-1], BYTES=BYTES,
        )  # fmt: skip
    return weights
