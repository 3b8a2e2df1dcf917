"""Triton kernels of the codec: trits times powers of two, or trits beside a scale a row, in one pass.

A program takes some packed bytes, or those of a row; digit d of a byte is one of five weights that stand 32
apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.triton import digit, exp2_int, is_legal

BYTES = 1024


@triton.jit(do_not_specialize=["rows"])
def _decode_kernel(packed, exponents, weights, rows, columns, width, group, groups, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = byte < rows * width
    row = byte // width
    within = byte % width
    column = (within // 32) * 160 + within % 32
    code = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    legal = is_legal(code)  # an illegal byte gives NaN, not a weight
    for plane in tl.static_range(5):
        col = column + 32 * plane
        used = inside & (col < columns)
        exponent = tl.load(exponents + row * groups + col // group, mask=used, other=0).to(tl.int32)
        weight = (digit(code, plane) - 1).to(tl.float32) * exp2_int(exponent)
        weight = tl.where(legal, weight, float("nan"))
        tl.store(weights + row * columns + col, weight.to(weights.dtype.element_ty), mask=used)


@triton.jit
def _decode_rows_kernel(packed, exponents, trits, scale, columns, width, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    illegal = tl.zeros((BYTES,), dtype=tl.int32)
    for first in range(0, width, BYTES):
        byte = first + tl.arange(0, BYTES)
        inside = byte < width
        code = tl.load(packed + row * width + byte, mask=inside, other=0).to(tl.int32)
        illegal |= tl.where(is_legal(code), 0, 1)
        column = (byte // 32) * 160 + byte % 32
        for plane in tl.static_range(5):
            col = column + 32 * plane
            trit = (digit(code, plane) - 1).to(tl.int8)
            tl.store(trits + row * columns + col, trit, mask=inside & (col < columns))
    exponent = tl.load(exponents + row).to(tl.int32)
    # NaN, so that trits of an illegal byte can never pass for weights.
    value = tl.where(tl.max(illegal, axis=0) == 0, exp2_int(exponent), float("nan"))
    tl.store(scale + row, value)


def decode_rows(packed: Tensor, exponent: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Trits and the scale of each row, for matrices with one exponent a row.

    Args:
        packed: uint8 [..., O, P].
        exponent: int8 [..., O, 1].
        in_features: I.

    Returns:
        int8 [..., O, I], and 2^exponent as fp32 [..., O]: NaN for a row with an illegal byte.
    """
    *leading, width = packed.shape
    trits = torch.empty((*leading, in_features), dtype=torch.int8, device=packed.device)
    scale = torch.empty(leading, dtype=torch.float32, device=packed.device)
    if scale.numel():
        _decode_rows_kernel[(scale.numel(),)](
            packed.contiguous(), exponent.contiguous(), trits, scale, in_features, width,
            BYTES=min(BYTES, triton.next_power_of_2(width)),
        )  # fmt: skip
    return trits, scale


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
