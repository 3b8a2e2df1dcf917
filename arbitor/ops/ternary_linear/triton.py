"""Triton forward of the linear on packed trits.

Where a row has one exponent, few tokens are multiplied by trits that are decoded on the way; for many, trits
are decoded once, into int8. With more exponents a row, or on GPUs before Ampere, they become floats.

Shape letters: N tokens, I in, O out, P packed bytes a row.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.int8_matmul import MAX_IN_FEATURES, has_int8_kernels, int8_matmul
from arbitor.ops.thresholds import DEFAULTS, threshold
from arbitor.ops.trit_codec import triton as trit_codec
from arbitor.ops.triton import digit, exp2_int, is_legal

BYTES = 128  # packed bytes of a row at a time: four blocks of 160 trits

# Trits of four bytes at once: a byte and three times a byte fit into 16 bits, so a 32-bit product has two,
# and the digit in the upper half. Added 127 and with its first bit turned it is the trit. $0...$4 are the
# planes of trits, $5 is $7 with 1 added in the bytes that packing never produces, $6 are the bytes.
_PLANE = """
    mad.lo.u32 e, e, 3, 0x7F007F00;
    mad.lo.u32 o, o, 3, 0x7F007F00;
    prmt.b32 a, e, o, 0x7351;
    xor.b32 ${plane}, a, 0x80808080;
    and.b32 e, e, 0x00FF00FF;
    and.b32 o, o, 0x00FF00FF;
"""
_TRITS = tl.constexpr(
    """{
    .reg .b32 e, o, a;
    and.b32 e, $6, 0x00FF00FF;
    shr.u32 o, $6, 8;
    and.b32 o, o, 0x00FF00FF;
"""
    + "".join(_PLANE.replace("{plane}", str(plane)) for plane in range(5))
    + """
    add.u32 e, e, 0x000D000D;
    add.u32 o, o, 0x000D000D;
    prmt.b32 a, e, o, 0x7351;
    or.b32 $5, a, $7;
}"""
)


@triton.jit
def _trits(code, illegal, PACKED: tl.constexpr):
    """The five trits (int8) of bytes (uint8), and `illegal` (int8), 1 where a byte is."""
    if PACKED:
        t0, t1, t2, t3, t4, illegal = tl.inline_asm_elementwise(
            _TRITS, "=&r,=&r,=&r,=&r,=&r,=&r,r,r", [code, illegal],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        byte = code.to(tl.int32)
        t0 = (digit(byte, 0) - 1).to(tl.int8)
        t1 = (digit(byte, 1) - 1).to(tl.int8)
        t2 = (digit(byte, 2) - 1).to(tl.int8)
        t3 = (digit(byte, 3) - 1).to(tl.int8)
        t4 = (digit(byte, 4) - 1).to(tl.int8)
        illegal |= tl.where(is_legal(byte), 0, 1).to(tl.int8)
    return t0, t1, t2, t3, t4, illegal


@triton.jit
def _codes(codes, first, tokens, columns, plane: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr):
    """Codes [BYTES, TOKENS] of the columns that trit `plane` of `BYTES` packed bytes stands for."""
    block = tl.arange(0, BYTES // 32)[:, None, None] * 160
    column = first // 32 * 160 + block + 32 * plane + tl.arange(0, 32)[None, :, None]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, None, :]
    at = codes + token.to(tl.int64) * columns + column
    return tl.reshape(tl.load(at, mask=(column < columns) & (token < tokens), other=0), (BYTES, TOKENS))


@triton.jit(do_not_specialize=["tokens"])
def _few_tokens_kernel(
    codes, packed, exponents, scale, y, tokens, rows, columns, width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    byte = tl.arange(0, BYTES)
    # Beyond the end, tiles read what other tiles read, and do not write.
    packed_at = packed + (row % rows).to(tl.int64)[:, None] * width + byte[None, :]
    product = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
    illegal = tl.zeros((ROWS, BYTES), dtype=tl.int8)
    for first in range(0, width, BYTES):
        code = tl.load(packed_at + first, mask=byte[None, :] < width - first, other=0)
        t0, t1, t2, t3, t4, illegal = _trits(code, illegal, PACKED)
        c0 = _codes(codes, first, tokens, columns, 0, TOKENS, BYTES)
        c1 = _codes(codes, first, tokens, columns, 1, TOKENS, BYTES)
        c2 = _codes(codes, first, tokens, columns, 2, TOKENS, BYTES)
        c3 = _codes(codes, first, tokens, columns, 3, TOKENS, BYTES)
        c4 = _codes(codes, first, tokens, columns, 4, TOKENS, BYTES)
        product = tl.dot(t0, c0, product, out_dtype=tl.int32)
        product = tl.dot(t1, c1, product, out_dtype=tl.int32)
        product = tl.dot(t2, c2, product, out_dtype=tl.int32)
        product = tl.dot(t3, c3, product, out_dtype=tl.int32)
        product = tl.dot(t4, c4, product, out_dtype=tl.int32)
    by_row = exp2_int(tl.load(exponents + row % rows).to(tl.int32))
    by_row = tl.where(tl.max(illegal.to(tl.int32), axis=1) == 0, by_row, float("nan"))
    by_token = tl.load(scale + token, mask=token < tokens, other=0.0)
    result = product.to(tl.float32) * by_row[:, None] * by_token[None, :]
    at = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(at, result.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])


def few_tokens(
    codes: Tensor, packed: Tensor, exponent: Tensor, scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Product of codes int8 [N, I] and the trits, equal to `int8_matmul` of the decoded ones."""
    tokens, columns = codes.shape
    rows, width = packed.shape
    y = torch.empty((tokens, rows), dtype=out_dtype, device=codes.device)
    if not columns:
        return y.zero_()
    if y.numel():
        block_n, block_o, warps = _tile(tokens, rows, threshold("small_tile_rows", codes.device))
        _few_tokens_kernel[(triton.cdiv(rows, block_o), triton.cdiv(tokens, block_n))](
            codes.contiguous(), packed.contiguous(), exponent.contiguous(), scale, y,
            tokens, rows, columns, width, TOKENS=block_n, ROWS=block_o, BYTES=BYTES,
            PACKED=_has_ptx(), num_warps=warps, num_stages=3,
        )  # fmt: skip
    return y


def _has_ptx() -> bool:
    """Whether assembly for NVIDIA's GPUs can be run: not in the interpreter, nor on AMD's."""
    return os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None


def _tile(tokens: int, rows: int, small: int = DEFAULTS["small_tile_rows"]) -> tuple[int, int, int]:
    """Tokens and rows of a tile, and its warps: large tiles where there are enough for a large GPU."""
    block_n = 16 if tokens <= 16 else 32
    if rows > small:
        return block_n, 64, 4
    return (16, 16, 1) if block_n == 16 else (32, 32, 4)


def product(
    codes: Tensor, scale: Tensor, packed: Tensor, exponent: Tensor, group: int, out_dtype: torch.dtype
) -> Tensor:
    """Output [N, O] of a linear from its quantised input: codes int8 [N, I] and their scale fp32 [N, 1]."""
    columns = codes.shape[-1]
    if exponent.shape[-1] > 1 or columns > MAX_IN_FEATURES or not has_int8_kernels(codes.device):
        weight = trit_codec.decode(packed, exponent, columns, group, activations.weight_dtype(scale, True))
        return activations.scale_tokens(activations.exact_matmul(codes, weight, True), scale, out_dtype)
    if len(codes) <= threshold("few_tokens", codes.device):
        return few_tokens(codes, packed, exponent, scale, out_dtype)
    trits, row_scale = trit_codec.decode_rows(packed, exponent, columns)
    return int8_matmul(codes, trits, scale, row_scale, out_dtype)


def forward(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    out_dtype: torch.dtype,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.forward` of x [N, I], fp32 or narrower, quantised."""
    codes, scale, rstd = activations.normalize_and_quantize(x, input_norm, True, squared)
    with torch.autocast(x.device.type, enabled=False):
        return product(codes, scale, packed, exponent, group, out_dtype), codes, scale, rstd
