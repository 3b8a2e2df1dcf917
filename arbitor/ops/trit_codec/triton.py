"""Triton kernels of the codec: trits times powers of two, or trits beside a scale a row, in one pass.

A program takes some packed bytes, or those of a row; digit d of a byte is one of five weights that stand 32
apart. Where a scale exponent is shared by whole planes of 32 weights, which it is with one a row or with
groups of a multiple of 32, four bytes are decoded at once.

Shape letters: O out, I in, P packed bytes a row, G groups; `...` leading dimensions (matrices, experts).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.trit_codec import assembly
from arbitor.ops.trit_codec.reference import PLANE
from arbitor.ops.triton import digit, exp2_int, grid_of_rows, has_halves, has_ptx, is_legal, part_of_rows

BYTES = 1024
MAX_BLOCKS = 64  # of a row at once: 2048 bytes, 16 for each of 128 threads
# Rows of a program that decodes to floats, which takes a block of each; the first is in use.
TILES = (16, 8, 32)
# Octaves between the exponents of a row that still leave its weights 8-bit integers.
MAX_SHIFT = 6

_LEADING = tl.constexpr(("", *(assembly.leading(count) for count in range(1, 6))))
_MARKED = tl.constexpr(assembly.leading(5, assembly.MARK))
_DIGIT = tl.constexpr(tuple(assembly.digit(plane) for plane in range(5)))
_TRITS = tl.constexpr(assembly.trits())
_TRITS_OPERANDS = tl.constexpr(",".join(["=&r"] * 6 + ["r"] * 6))
_WEIGHTS = tl.constexpr(assembly.weights())
_WEIGHTS_OPERANDS = tl.constexpr(",".join(["=&r"] * 10 + ["r"] * 11))


@triton.jit
def leading(code, count: tl.constexpr, PTX: tl.constexpr):
    """The number (int8, of 8 bits) that the first `count` digits of bytes (uint8) make."""
    if PTX:
        return tl.inline_asm_elementwise(
            _LEADING[count], "=&r,r", [code], dtype=tl.int8, is_pure=True, pack=4
        )
    return ((code.to(tl.int32) * 3**count) >> 8).to(tl.int8)


@triton.jit
def marked(code, PTX: tl.constexpr):
    """`leading` of all five digits, and 1 more for bytes that packing never produces."""
    if PTX:
        return tl.inline_asm_elementwise(_MARKED, "=&r,r", [code], dtype=tl.int8, is_pure=True, pack=4)
    byte = code.to(tl.int32)
    return (((byte * 243) >> 8) + tl.where(is_legal(byte), 0, 1)).to(tl.int8)


@triton.jit
def digits(code, plane: tl.constexpr, PTX: tl.constexpr):
    """Digit number `plane` (int8) of bytes (uint8), as one function of them.

    So that the compiler gives bytes the layout that a product wants of its operand, and not digits.
    """
    if PTX:
        return tl.inline_asm_elementwise(_DIGIT[plane], "=&r,r", [code], dtype=tl.int8, is_pure=True, pack=4)
    return digit(code.to(tl.int32), plane).to(tl.int8)


@triton.jit
def _times(code, plane: tl.constexpr, factor):
    return ((digit(code.to(tl.int32), plane) - 1) * factor.to(tl.int32)).to(tl.int8)


@triton.jit
def scaled_trits(code, m0, m1, m2, m3, m4, PTX: tl.constexpr):
    """The five trits (int8) of bytes (uint8), times factors (int8) of 1 to 64; where a byte is illegal."""
    if PTX:
        t0, t1, t2, t3, t4, illegal = tl.inline_asm_elementwise(
            _TRITS, _TRITS_OPERANDS, [code, m0, m1, m2, m3, m4],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        t0, t1, t2 = _times(code, 0, m0), _times(code, 1, m1), _times(code, 2, m2)
        t3, t4 = _times(code, 3, m3), _times(code, 4, m4)
        illegal = tl.where(is_legal(code.to(tl.int32)), 0, 1).to(tl.int8)
    return t0, t1, t2, t3, t4, illegal


@triton.jit
def _weight(code, plane: tl.constexpr, scale):
    byte = code.to(tl.int32)
    return tl.where(is_legal(byte), (digit(byte, plane) - 1).to(tl.float32) * scale, float("nan"))


@triton.jit
def scaled_weights(code, s0, s1, s2, s3, s4, PTX: tl.constexpr):
    """The five weights of bytes (uint8) with scales (fp32), bf16 if PTX; NaN where a byte is illegal."""
    if PTX:
        w0, w1, w2, w3, w4 = tl.inline_asm_elementwise(
            _WEIGHTS, _WEIGHTS_OPERANDS,
            [code, s0.to(tl.bfloat16), s1.to(tl.bfloat16), s2.to(tl.bfloat16), s3.to(tl.bfloat16),
             s4.to(tl.bfloat16)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        w0, w1, w2 = _weight(code, 0, s0), _weight(code, 1, s1), _weight(code, 2, s2)
        w3, w4 = _weight(code, 3, s3), _weight(code, 4, s4)
    return w0, w1, w2, w3, w4


@triton.jit
def _shift(exponents, column, lowest, group, groups, MAX_SHIFT: tl.constexpr):
    """2^(exponent - lowest) as int8, of the groups that columns are in."""
    exponent = tl.load(exponents + tl.minimum(column // group, groups - 1)).to(tl.int32)
    return (1 << tl.minimum(exponent - lowest, MAX_SHIFT)).to(tl.int8)


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
def _scale(exponents, column, group, groups, used):
    """2^exponent (fp32) of the group that a column is in; of the last one behind the end."""
    return exp2_int(
        tl.load(exponents + tl.minimum(column // group, groups - 1), mask=used, other=0).to(tl.int32)
    )


@triton.jit(do_not_specialize=["rows"])
def _decode_planes_kernel(
    packed, exponents, weights, wanted, rows, columns, width, group, groups,
    ROWS: tl.constexpr, WHOLE: tl.constexpr, TURNED: tl.constexpr, ASKED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    if ASKED:
        asked = tl.load(wanted)
        if asked == 0:
            return
    block, part = part_of_rows(TURNED)
    row = part * ROWS + tl.arange(0, ROWS)[:, None]
    byte = tl.arange(0, 32)[None, :]
    inside = (row < rows) & (byte < 32)
    code = tl.load(packed + row.to(tl.int64) * width + (block * 32 + byte), mask=inside, other=0)
    first = block * 160
    scale_at = exponents + row.to(tl.int64) * groups
    s0 = _scale(scale_at, first, group, groups, row < rows)
    s1 = _scale(scale_at, first + 32, group, groups, row < rows)
    s2 = _scale(scale_at, first + 64, group, groups, row < rows)
    s3 = _scale(scale_at, first + 96, group, groups, row < rows)
    s4 = _scale(scale_at, first + 128, group, groups, row < rows)
    w0, w1, w2, w3, w4 = scaled_weights(code, s0, s1, s2, s3, s4, PTX)
    at = weights + row.to(tl.int64) * columns + (first + byte)
    left = columns - first
    dtype: tl.constexpr = weights.dtype.element_ty
    tl.store(at, w0.to(dtype), mask=inside & (WHOLE | (byte < left)))
    tl.store(at + 32, w1.to(dtype), mask=inside & (WHOLE | (byte < left - 32)))
    tl.store(at + 64, w2.to(dtype), mask=inside & (WHOLE | (byte < left - 64)))
    tl.store(at + 96, w3.to(dtype), mask=inside & (WHOLE | (byte < left - 96)))
    tl.store(at + 128, w4.to(dtype), mask=inside & (WHOLE | (byte < left - 128)))


@triton.jit
def _decode_rows_kernel(
    packed, exponents, trits, scale, wide, columns, width, group, groups, MAX_SHIFT: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, GROUPED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    exponents += row * groups
    packed += row * width
    trits += row * columns
    lowest = tl.load(exponents).to(tl.int32)
    if GROUPED:
        place = tl.arange(0, GROUPS)
        exponent = tl.load(exponents + tl.minimum(place, groups - 1)).to(tl.int32)
        lowest = tl.min(exponent, axis=0)
        if tl.max(exponent, axis=0) - lowest > MAX_SHIFT:
            tl.store(wide, 1)
    m0 = tl.full((BLOCKS, 1), 1, dtype=tl.int8)
    m1, m2, m3, m4 = m0, m0, m0, m0
    strange = tl.zeros((BLOCKS, 32), dtype=tl.int8)
    byte = tl.arange(0, 32)[None, :]
    for first in range(0, width // 32, BLOCKS):
        block = first + tl.arange(0, BLOCKS)[:, None]
        code = tl.load(packed + block * 32 + byte, mask=(block * 32 < width) & (byte < 32), other=0)
        column = block * 160
        if GROUPED:
            m0 = _shift(exponents, column, lowest, group, groups, MAX_SHIFT)
            m1 = _shift(exponents, column + 32, lowest, group, groups, MAX_SHIFT)
            m2 = _shift(exponents, column + 64, lowest, group, groups, MAX_SHIFT)
            m3 = _shift(exponents, column + 96, lowest, group, groups, MAX_SHIFT)
            m4 = _shift(exponents, column + 128, lowest, group, groups, MAX_SHIFT)
        t0, t1, t2, t3, t4, illegal = scaled_trits(code, m0, m1, m2, m3, m4, PTX)
        strange |= illegal
        column = column + byte
        tl.store(trits + column, t0, mask=column < columns)
        tl.store(trits + column + 32, t1, mask=column < columns - 32)
        tl.store(trits + column + 64, t2, mask=column < columns - 64)
        tl.store(trits + column + 96, t3, mask=column < columns - 96)
        tl.store(trits + column + 128, t4, mask=column < columns - 128)
    # NaN, so that trits of an illegal byte can never pass for weights.
    found = tl.max(tl.max(tl.where(strange == 0, 0, 1), axis=1), axis=0)
    tl.store(scale + row, tl.where(found == 0, exp2_int(lowest), float("nan")))


def decode_rows(packed: Tensor, exponent: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Trits and the scale of each row, for matrices with one exponent a row.

    Args:
        packed: uint8 [..., O, P].
        exponent: int8 [..., O, 1].
        in_features: I.

    Returns:
        int8 [..., O, I], and 2^exponent as fp32 [..., O]: NaN for a row with an illegal byte.
    """
    return _decode_rows(packed, exponent, in_features, in_features, None)


def decode_integers(
    packed: Tensor, exponent: Tensor, in_features: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights as integers times the lowest scale of each row, for groups of a multiple of 32.

    Args:
        packed: uint8 [..., O, P].
        exponent: int8 [..., O, G].
        in_features: I.
        group: neighbours along I that share an exponent.

    Returns:
        int8 [..., O, I]; the scale of a unit, fp32 [..., O], NaN for a row with an illegal byte; int32 [1],
        which is not 0 where the exponents of some row lie too far apart for that, by more than MAX_SHIFT.
    """
    wide = torch.zeros(1, dtype=torch.int32, device=packed.device)
    return *_decode_rows(packed, exponent, in_features, group, wide), wide


def _decode_rows(
    packed: Tensor, exponent: Tensor, in_features: int, group: int, wide: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Integers and scales; `wide` is for matrices with several exponents a row."""
    *leading_shape, width = packed.shape
    groups = exponent.shape[-1]
    trits = torch.empty((*leading_shape, in_features), dtype=torch.int8, device=packed.device)
    scale = torch.empty(leading_shape, dtype=torch.float32, device=packed.device)
    assert groups == 1 or wide is not None
    if scale.numel():
        _decode_rows_kernel[(scale.numel(),)](
            packed.contiguous(), exponent.contiguous(), trits, scale, scale if wide is None else wide,
            in_features, width, group, groups, MAX_SHIFT=MAX_SHIFT,
            BLOCKS=min(MAX_BLOCKS, triton.next_power_of_2(width // PLANE)),
            GROUPS=triton.next_power_of_2(groups), GROUPED=groups > 1, PTX=has_ptx(), num_warps=4,
        )  # fmt: skip
    return trits, scale


def decode(
    packed: Tensor,
    exponent: Tensor,
    in_features: int,
    group: int,
    dtype: torch.dtype,
    wanted: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """As `reference.decode`, to fp32 or bf16.

    With `wanted`, int32 [1], the result is anything where that is 0; it takes whole planes to an exponent.
    """
    *leading_shape, width = packed.shape
    weights = torch.empty((*leading_shape, in_features), dtype=dtype, device=packed.device)
    rows = packed.numel() // max(1, width)
    groups = exponent.shape[-1]
    given = packed.contiguous(), exponent.contiguous(), weights
    if not rows:
        return weights
    if groups == 1 or group % PLANE == 0:
        tile = tile or TILES[0]
        grid, turned = grid_of_rows(width // PLANE, triton.cdiv(rows, tile))
        _decode_planes_kernel[grid](
            *given, weights if wanted is None else wanted, rows, in_features, width,
            group, groups,
            ROWS=tile, WHOLE=in_features % (5 * PLANE) == 0, TURNED=turned, ASKED=wanted is not None,
            PTX=dtype == torch.bfloat16 and has_halves(packed.device), num_warps=tile // 4,
        )  # fmt: skip
    else:
        assert wanted is None
        _decode_kernel[(triton.cdiv(rows * width, BYTES),)](
            *given, rows, in_features, width, group, groups, BYTES=BYTES
        )
    return weights
