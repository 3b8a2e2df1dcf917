"""Triton kernels of the linear by expert: products that read packed trits, and products of decoded ones.

Programs find their expert in the offsets on the device, so that neither an expert without rows costs anything
nor the host must know how many rows each has. Behind the last expert's rows, all results are zeros.

Few rows are multiplied by trits that are decoded on the way; for many, the trits of experts that have rows
are decoded once, a slice of output rows at a time.

Shape letters: M rows (sorted by expert), I in, O out, E experts, P packed bytes a row, G groups, S parts of a
sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.activations import triton as activation_kernels
from arbitor.ops.expert_linear import reference
from arbitor.ops.int8_matmul import MAX_IN_FEATURES, has_int8_kernels
from arbitor.ops.thresholds import threshold
from arbitor.ops.trit_codec.triton import scaled_weights
from arbitor.ops.triton import digit, exp2_int, has_ptx, is_legal

FEW_ROWS = 64  # altogether, or
FEW_ROWS_EACH = 16  # for each expert on average, are few; see `product` for the forward
FEW_TOKENS = 16  # rows of a tile then, the fewest that tensor cores take
MANY_ROWS = 4096  # output rows from which on such tiles are large
BYTES = 64  # packed bytes of a row at a time: two blocks of 160 trits
PROGRAMS = 1024  # about as many as keep a large GPU busy
MIN_ROWS_EACH = 256  # least output rows of a part of a sum over them
TILES_AT_ONCE = 8  # tiles of rows that share the weights in the second-level cache


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
def tile_of(offsets, slot, experts, tokens, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Expert, first row and end of the rows of tile number `slot`; first = end if there are fewer tiles.

    Expert number `experts` stands for the rows behind the last expert's, up to `tokens`.
    """
    e = tl.arange(0, EXPERTS)
    begin = tl.load(offsets + e - 1, mask=(e > 0) & (e <= experts), other=0)
    end = tl.load(offsets + e, mask=e < experts, other=0)
    end = tl.where(e == experts, tokens, end)
    tiles = tl.where(e <= experts, (end - begin + TOKENS - 1) // TOKENS, 0)
    upto = tl.cumsum(tiles, axis=0)
    before = upto - tiles
    mine = (before <= slot) & (slot < upto)
    expert = tl.sum(tl.where(mine, e, 0), axis=0)
    first = tl.sum(tl.where(mine, begin + (slot - before) * TOKENS, 0), axis=0)
    return expert, first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def _columns(first, plane: tl.constexpr, BYTES: tl.constexpr):
    """Columns int32 [BYTES] that trit `plane` of the packed bytes from number `first` on stands for."""
    block = tl.arange(0, BYTES // 32)[:, None] * 160
    return tl.reshape(first // 32 * 160 + block + 32 * plane + tl.arange(0, 32)[None, :], (BYTES,))


@triton.jit
def _codes(codes, first, token, end, columns, plane: tl.constexpr, BYTES: tl.constexpr):
    """Codes [BYTES, TOKENS] of the columns of one plane."""
    # Neighbours along a last but one dimension of their own, so that the compiler sees that they are.
    block = tl.arange(0, BYTES // 32)[:, None, None] * 160
    column = first // 32 * 160 + block + 32 * plane + tl.arange(0, 32)[None, :, None]
    at = codes + token.to(tl.int64)[None, None, :] * columns + column
    used = (column < columns) & (token < end)[None, None, :]
    return tl.reshape(tl.load(at, mask=used, other=0), (BYTES, token.shape[0]))


@triton.jit(do_not_specialize=["tokens"])
def _few_rows_kernel(
    codes, offsets, packed, exponents, scale, y, experts, tokens, rows, columns, width,
    EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    expert, first_token, end = tile_of(offsets, tl.program_id(1), experts, tokens, TOKENS, EXPERTS)
    if first_token >= end:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = first_token + tl.arange(0, TOKENS)
    at = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    used = (row < rows)[:, None] & (token < end)[None, :]
    if expert == experts:
        tl.store(at, tl.zeros((ROWS, TOKENS), dtype=y.dtype.element_ty), mask=used)
        return
    byte = tl.arange(0, BYTES)
    # Beyond the end, tiles read what other tiles read, and do not write.
    row_number = expert.to(tl.int64) * rows + row % rows
    packed_at = packed + row_number[:, None] * width + byte[None, :]
    product = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
    illegal = tl.zeros((ROWS, BYTES), dtype=tl.int8)
    for first in range(0, width, BYTES):
        code = tl.load(packed_at + first, mask=byte[None, :] < width - first, other=0)
        t0, t1, t2, t3, t4, illegal = _trits(code, illegal, PACKED)
        c0 = _codes(codes, first, token, end, columns, 0, BYTES)
        c1 = _codes(codes, first, token, end, columns, 1, BYTES)
        c2 = _codes(codes, first, token, end, columns, 2, BYTES)
        c3 = _codes(codes, first, token, end, columns, 3, BYTES)
        c4 = _codes(codes, first, token, end, columns, 4, BYTES)
        product = tl.dot(t0, c0, product, out_dtype=tl.int32)
        product = tl.dot(t1, c1, product, out_dtype=tl.int32)
        product = tl.dot(t2, c2, product, out_dtype=tl.int32)
        product = tl.dot(t3, c3, product, out_dtype=tl.int32)
        product = tl.dot(t4, c4, product, out_dtype=tl.int32)
    by_row = exp2_int(tl.load(exponents + row_number).to(tl.int32))
    by_row = tl.where(tl.max(illegal.to(tl.int32), axis=1) == 0, by_row, float("nan"))
    by_token = tl.load(scale + token, mask=token < end, other=0.0)
    result = product.to(tl.float32) * by_row[:, None] * by_token[None, :]
    tl.store(at, result.to(y.dtype.element_ty), mask=used)


@triton.jit
def _weights(trits, illegal, exponents, column, columns, group, DTYPE: tl.constexpr):
    """Trits int8 [ROWS, BYTES] of one plane times the powers of two of their groups; `exponents` [ROWS, 1]
    are places of the rows' first ones."""
    used = (column < columns)[None, :]
    exponent = tl.load(exponents + (column // group)[None, :], mask=used, other=0).to(tl.int32)
    return tl.where(illegal == 0, trits.to(tl.float32) * exp2_int(exponent), float("nan")).to(DTYPE)


@triton.jit
def _product_of_plane(
    product, trits, illegal, exponents, codes, first, token, end, columns, group,
    plane: tl.constexpr, BYTES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    column = _columns(first, plane, BYTES)
    weight = _weights(trits, illegal, exponents, column, columns, group, DTYPE)
    weight = tl.where((column < columns)[None, :], weight, 0.0)  # not NaN, which 0 would not take away
    code = _codes(codes, first, token, end, columns, plane, BYTES).to(DTYPE)
    return tl.dot(weight, code, product, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def _few_rows_by_group_kernel(
    codes, offsets, packed, exponents, scale, y, experts, tokens, rows, columns, width, group, groups,
    EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    expert, first_token, end = tile_of(offsets, tl.program_id(1), experts, tokens, TOKENS, EXPERTS)
    if first_token >= end:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = first_token + tl.arange(0, TOKENS)
    at = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    used = (row < rows)[:, None] & (token < end)[None, :]
    if expert == experts:
        tl.store(at, tl.zeros((ROWS, TOKENS), dtype=y.dtype.element_ty), mask=used)
        return
    byte = tl.arange(0, BYTES)
    row_number = expert.to(tl.int64) * rows + row % rows
    packed_at = packed + row_number[:, None] * width + byte[None, :]
    exponents_at = exponents + row_number[:, None] * groups
    product = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for first in range(0, width, BYTES):
        code = tl.load(packed_at + first, mask=byte[None, :] < width - first, other=0)
        t0, t1, t2, t3, t4, bad = _trits(code, tl.zeros((ROWS, BYTES), dtype=tl.int8), PACKED)
        product = _product_of_plane(
            product, t0, bad, exponents_at, codes, first, token, end, columns, group, 0, BYTES, DTYPE
        )
        product = _product_of_plane(
            product, t1, bad, exponents_at, codes, first, token, end, columns, group, 1, BYTES, DTYPE
        )
        product = _product_of_plane(
            product, t2, bad, exponents_at, codes, first, token, end, columns, group, 2, BYTES, DTYPE
        )
        product = _product_of_plane(
            product, t3, bad, exponents_at, codes, first, token, end, columns, group, 3, BYTES, DTYPE
        )
        product = _product_of_plane(
            product, t4, bad, exponents_at, codes, first, token, end, columns, group, 4, BYTES, DTYPE
        )
    by_token = tl.load(scale + token, mask=token < end, other=0.0)
    tl.store(at, (product * by_token[None, :]).to(y.dtype.element_ty), mask=used)


@triton.jit
def _store_plane(
    at, sum_of, illegal, first, token, end, columns, plane: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    column = _columns(first, plane, BYTES)
    value = tl.where((illegal == 0)[None, :], sum_of, float("nan"))
    used = (token < end)[:, None] & (column < columns)[None, :]
    tl.store(at + token.to(tl.int64)[:, None] * columns + column[None, :], value, mask=used)


@triton.jit(do_not_specialize=["tokens", "rows_each"])
def _few_rows_backward_kernel(
    dy, offsets, packed, exponents, parts, experts, tokens, rows, columns, width, group, groups, rows_each,
    EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    PACKED: tl.constexpr, BY_ROW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    expert, first_token, end = tile_of(offsets, tl.program_id(1), experts, tokens, TOKENS, EXPERTS)
    if (first_token >= end) | (expert == experts):
        return
    first_byte = tl.program_id(0) * BYTES
    byte = first_byte + tl.arange(0, BYTES)
    token = first_token + tl.arange(0, TOKENS)
    s0 = tl.zeros((TOKENS, BYTES), dtype=tl.float32)
    s1 = tl.zeros((TOKENS, BYTES), dtype=tl.float32)
    s2 = tl.zeros((TOKENS, BYTES), dtype=tl.float32)
    s3 = tl.zeros((TOKENS, BYTES), dtype=tl.float32)
    s4 = tl.zeros((TOKENS, BYTES), dtype=tl.float32)
    illegal = tl.zeros((ROWS, BYTES), dtype=tl.int8)
    begin = tl.program_id(2) * rows_each
    stop = tl.minimum(begin + rows_each, rows)
    for first in range(begin, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        row_number = expert.to(tl.int64) * rows + row
        inside = row < stop
        used = inside[:, None] & (byte < width)[None, :]
        # Where nothing is, 128 stands for five zeros.
        code = tl.load(packed + row_number[:, None] * width + byte[None, :], mask=used, other=128)
        dy_at = dy + token.to(tl.int64)[:, None] * rows + row[None, :]
        gradient = tl.load(dy_at, mask=(token < end)[:, None] & inside[None, :], other=0.0)
        gradient = gradient.to(DTYPE)
        if BY_ROW:
            exponent = tl.load(exponents + row_number, mask=inside, other=0).to(tl.int32)
            scale = tl.broadcast_to(exp2_int(exponent)[:, None], (ROWS, BYTES))
            w0, w1, w2, w3, w4 = scaled_weights(code, scale, scale, scale, scale, scale, PACKED)
        else:
            t0, t1, t2, t3, t4, illegal = _trits(code, illegal, PACKED)
            legal = tl.zeros((ROWS, BYTES), dtype=tl.int8)  # NaN comes at the end
            at = exponents + tl.where(inside, row_number, 0)[:, None] * groups
            c0 = _columns(first_byte, 0, BYTES)
            w0 = _weights(t0, legal, at, c0, columns, group, DTYPE)
            w1 = _weights(t1, legal, at, c0 + 32, columns, group, DTYPE)
            w2 = _weights(t2, legal, at, c0 + 64, columns, group, DTYPE)
            w3 = _weights(t3, legal, at, c0 + 96, columns, group, DTYPE)
            w4 = _weights(t4, legal, at, c0 + 128, columns, group, DTYPE)
        s0 = tl.dot(gradient, w0.to(DTYPE), s0, input_precision="ieee")
        s1 = tl.dot(gradient, w1.to(DTYPE), s1, input_precision="ieee")
        s2 = tl.dot(gradient, w2.to(DTYPE), s2, input_precision="ieee")
        s3 = tl.dot(gradient, w3.to(DTYPE), s3, input_precision="ieee")
        s4 = tl.dot(gradient, w4.to(DTYPE), s4, input_precision="ieee")
    bad = tl.max(illegal.to(tl.int32), axis=0)
    part = parts + tl.program_id(2).to(tl.int64) * tokens * columns
    _store_plane(part, s0, bad, first_byte, token, end, columns, 0, BYTES)
    _store_plane(part, s1, bad, first_byte, token, end, columns, 1, BYTES)
    _store_plane(part, s2, bad, first_byte, token, end, columns, 2, BYTES)
    _store_plane(part, s3, bad, first_byte, token, end, columns, 3, BYTES)
    _store_plane(part, s4, bad, first_byte, token, end, columns, 4, BYTES)


@triton.jit
def _decode_experts_kernel(
    packed, offsets, exponents, weights, scale, first, rows, all_rows, columns, width, group, groups,
    ROWS: tl.constexpr, BYTES: tl.constexpr, PACKED: tl.constexpr, INTEGERS: tl.constexpr,
    BY_ROW: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    if begin == tl.load(offsets + expert):
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    packed_row = expert.to(tl.int64) * all_rows + first + row
    weight_row = expert.to(tl.int64) * rows + row
    exponents_at = exponents + tl.where(inside, packed_row, 0)[:, None] * groups
    by_row = exp2_int(tl.load(exponents_at).to(tl.int32))
    illegal = tl.zeros((ROWS, BYTES), dtype=tl.int8)
    for start in range(0, width, BYTES):
        byte = start + tl.arange(0, BYTES)
        used = inside[:, None] & (byte < width)[None, :]
        code = tl.load(packed + packed_row[:, None] * width + byte[None, :], mask=used, other=128)
        if INTEGERS:
            t0, t1, t2, t3, t4, illegal = _trits(code, illegal, PACKED)
        elif BY_ROW:
            scale_there = tl.broadcast_to(by_row, (ROWS, BYTES))
            t0, t1, t2, t3, t4 = scaled_weights(
                code, scale_there, scale_there, scale_there, scale_there, scale_there, PACKED
            )
        else:
            illegal = tl.zeros((ROWS, BYTES), dtype=tl.int8)
            t0, t1, t2, t3, t4, illegal = _trits(code, illegal, PACKED)
        for plane in tl.static_range(5):
            column = _columns(start, plane, BYTES)
            if plane == 0:
                trit = t0
            elif plane == 1:
                trit = t1
            elif plane == 2:
                trit = t2
            elif plane == 3:
                trit = t3
            else:
                trit = t4
            block = tl.arange(0, BYTES // 32)[None, :, None] * 160
            place = start // 32 * 160 + block + 32 * plane + tl.arange(0, 32)[None, None, :]
            at = weights + weight_row[:, None, None] * columns + place
            there = inside[:, None, None] & (place < columns)
            if not INTEGERS:
                if BY_ROW:
                    trit = trit.to(weights.dtype.element_ty)
                else:
                    trit = _weights(
                        trit, illegal, exponents_at, column, columns, group, weights.dtype.element_ty
                    )
            tl.store(at, tl.reshape(trit, (ROWS, BYTES // 32, 32)), mask=there)
    if INTEGERS:
        # NaN, so that trits of an illegal byte can never pass for weights.
        bad = tl.max(illegal.to(tl.int32), axis=1)[:, None]
        tl.store(scale + weight_row[:, None], tl.where(bad == 0, by_row, float("nan")), mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "slots"])
def _many_rows_kernel(
    codes, offsets, weight, scale, row_scale, y, experts, tokens, slots, first_row, rows, all_rows, columns,
    EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_o = tl.cdiv(rows, ROWS)
    first_slot = tile // (TILES * tiles_o) * TILES
    height = tl.minimum(slots - first_slot, TILES)
    within = tile % (TILES * tiles_o)
    slot = first_slot + within % height
    expert, first_token, end = tile_of(offsets, slot, experts, tokens, TOKENS, EXPERTS)
    if first_token >= end:
        return
    token = first_token + tl.arange(0, TOKENS)
    row = within // height * ROWS + tl.arange(0, ROWS)
    used = (token < end)[:, None] & (row < rows)[None, :]
    y_at = y + token.to(tl.int64)[:, None] * all_rows + (first_row + row)[None, :]
    if expert == experts:
        tl.store(y_at, tl.zeros((TOKENS, ROWS), dtype=y.dtype.element_ty), mask=used)
        return
    # Beyond the end, tiles read what other tiles read, and do not write.
    column = tl.arange(0, COLUMNS)
    row_number = expert.to(tl.int64) * rows + row % rows
    codes_at = codes + tl.minimum(token, end - 1).to(tl.int64)[:, None] * columns + column[None, :]
    weight_at = weight + row_number[None, :] * columns + column[:, None]
    total = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
    for first in range(0, columns, COLUMNS):
        if EVEN:
            a = tl.load(codes_at)
            b = tl.load(weight_at)
        else:
            a = tl.load(codes_at, mask=column[None, :] < columns - first, other=0)
            b = tl.load(weight_at, mask=column[:, None] < columns - first, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        codes_at += COLUMNS
        weight_at += COLUMNS
    by_token = tl.load(scale + token, mask=token < end, other=0.0)
    by_row = tl.load(row_scale + row_number)
    result = total.to(tl.float32) * by_row[None, :] * by_token[:, None]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=used)


@triton.jit
def _clear_idle_kernel(gradient, offsets, size, BLOCK: tl.constexpr):
    expert = tl.program_id(1)
    if tl.load(offsets + expert - 1, mask=expert > 0, other=0) != tl.load(offsets + expert):
        return
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = gradient + expert.to(tl.int64) * size + element
    tl.store(at, tl.zeros((BLOCK,), dtype=gradient.dtype.element_ty), mask=element < size)


@triton.jit
def _add_busy_kernel(total, gradient, offsets, size, BLOCK: tl.constexpr):
    expert = tl.program_id(1)
    if tl.load(offsets + expert - 1, mask=expert > 0, other=0) == tl.load(offsets + expert):
        return
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = expert.to(tl.int64) * size + element
    used = element < size
    sum_of = tl.load(total + at, mask=used, other=0.0).to(tl.float32)
    sum_of += tl.load(gradient + at, mask=used, other=0.0).to(tl.float32)
    tl.store(total + at, sum_of.to(total.dtype.element_ty), mask=used)


def runs_forward(x: Tensor, offsets: Tensor, exponent: Tensor) -> bool:
    """Whether `forward` is for such a product: else the reference decodes and calls the library.

    That is where many rows are multiplied and no integer product can be exact.
    """
    return has_few_rows(x, offsets) or _has_integer_product(x, exponent)


def has_few_rows(x: Tensor, offsets: Tensor, each: int = FEW_ROWS_EACH) -> bool:
    """Whether decoding on the way is cheaper than decoding once; `each`: rows of an expert that are few."""
    return len(x) <= few_rows(len(offsets), each)


def few_rows(experts: int, each: int) -> int:
    """How many rows of all experts are few."""
    return max(FEW_ROWS, each * experts)


def _has_integer_product(x: Tensor, exponent: Tensor) -> bool:
    one_a_row = exponent.shape[-1] == 1 and x.shape[1] <= MAX_IN_FEATURES
    return one_a_row and has_int8_kernels(x.device)


def forward(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    out_dtype: torch.dtype,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.forward` of x [M, I], fp32 or narrower, quantised."""
    codes, scale, rstd = activation_kernels.quantize(x, input_norm, squared, offsets=offsets)
    return product(codes, scale, offsets, packed, exponent, group, out_dtype), codes, scale, rstd


def product(
    codes: Tensor,
    scale: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Output [M, O] from int8 codes [M, I] and their scale fp32 [M, 1]; see `runs_forward`."""
    tokens, columns = codes.shape
    experts, rows, width = packed.shape
    y = torch.empty((tokens, rows), dtype=out_dtype, device=codes.device)
    if not y.numel() or not columns:
        return y.zero_()
    packed, exponent = packed.contiguous(), exponent.contiguous()
    exact = _has_integer_product(codes, exponent)  # so that both ways give the same bits
    each = threshold("few_expert_rows", codes.device) if exact else FEW_ROWS_EACH
    if not has_few_rows(codes, offsets, each):
        assert exact
        _many_rows(codes, scale, offsets, packed, exponent, y)
        return y
    block_o, warps = _few_tile(rows)
    grid = (triton.cdiv(rows, block_o), _slots(tokens, experts, FEW_TOKENS))
    sizes = {"EXPERTS": _places(experts), "TOKENS": FEW_TOKENS, "ROWS": block_o, "BYTES": BYTES}
    if exact:
        _few_rows_kernel[grid](
            codes, offsets, packed, exponent, scale, y, experts, tokens, rows, columns, width, **sizes,
            PACKED=has_ptx(), num_warps=warps, num_stages=3,
        )  # fmt: skip
    else:
        _few_rows_by_group_kernel[grid](
            codes, offsets, packed, exponent, scale, y, experts, tokens, rows, columns, width, group,
            exponent.shape[-1], **sizes, PACKED=has_ptx(),
            DTYPE=tl.bfloat16 if codes.is_cuda else tl.float32, num_warps=warps, num_stages=2,
            enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _many_rows(
    codes: Tensor, scale: Tensor, offsets: Tensor, packed: Tensor, exponent: Tensor, y: Tensor
) -> None:
    """Fill y [M, O], a slice of its columns after the other."""
    tokens, columns = codes.shape
    experts, all_rows, _ = packed.shape
    block_t, block_o, block_i, warps, stages = _many_tile(tokens, experts, all_rows)
    slots = _slots(tokens, experts, block_t)
    for first, last in reference.slices([codes, y], columns, all_rows, experts, 1):
        trits, row_scale = decode_experts(packed, exponent, offsets, first, last, columns)
        rows = last - first
        _many_rows_kernel[(slots * triton.cdiv(rows, block_o),)](
            codes, offsets, trits, scale, row_scale, y, experts, tokens, slots, first, rows, all_rows,
            columns, EXPERTS=_places(experts), TOKENS=block_t, ROWS=block_o, COLUMNS=block_i,
            EVEN=columns % block_i == 0, TILES=TILES_AT_ONCE, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def decode_experts(
    packed: Tensor,
    exponent: Tensor,
    offsets: Tensor,
    first: int,
    last: int,
    columns: int,
    group: int = 0,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """Some output rows of the experts that have rows; what is given for the others is undefined.

    Args:
        packed: uint8 [E, O, P], contiguous.
        exponent: int8 [E, O, G], contiguous; G = 1 for int8.
        offsets: int32 [E], the end of each expert's rows.
        first, last: of the output rows.
        columns: I.
        group: neighbours along I that share an exponent; for floats.
        dtype: int8 for trits, else that of the weights.

    Returns:
        [E, last - first, I]; and for int8 2^exponent as fp32 [E, last - first], NaN for a row with an illegal
        byte. Weights of an illegal byte are NaN themselves.
    """
    experts, all_rows, width = packed.shape
    rows = last - first
    weights = torch.empty((experts, rows, columns), dtype=dtype, device=packed.device)
    scale = torch.empty((experts, rows), dtype=torch.float32, device=packed.device)
    _decode_experts_kernel[(triton.cdiv(rows, 16), experts)](
        packed, offsets, exponent, weights, scale, first, rows, all_rows, columns, width, max(1, group),
        exponent.shape[-1], ROWS=16, BYTES=BYTES, PACKED=has_ptx(), INTEGERS=dtype == torch.int8,
        BY_ROW=exponent.shape[-1] == 1, num_warps=4,
    )  # fmt: skip
    return weights, scale


def backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    squared: bool,
) -> Tensor:
    """As `reference.backward` of x [M, I], fp32 or narrower."""
    dtype = activations.backward_dtype(x)
    dy, packed, exponent = dy.to(dtype).contiguous(), packed.contiguous(), exponent.contiguous()
    if has_few_rows(x, offsets):
        dxn = _few_rows_gradient(dy, offsets, packed, exponent, x.shape[1], group)
    else:
        dxn = _many_rows_gradient(dy, x, offsets, packed, exponent, group)
    if input_norm or squared:
        return activation_kernels.norm_backward(dxn, x, rstd, input_norm, squared, offsets=offsets)
    return reference.clear_behind(dxn, offsets).to(x.dtype)


def _few_rows_gradient(
    dy: Tensor, offsets: Tensor, packed: Tensor, exponent: Tensor, columns: int, group: int
) -> Tensor:
    """dy [M, O] times each row's expert, fp32 [M, I]; of rows behind the last expert's anything."""
    tokens, experts, rows, width = len(dy), *packed.shape
    if not dy.numel() or not columns:
        return torch.zeros((tokens, columns), dtype=torch.float32, device=dy.device)
    slots = _slots(tokens, experts, FEW_TOKENS)
    tiles = triton.cdiv(width, BYTES)
    count = min(triton.cdiv(rows, MIN_ROWS_EACH), triton.cdiv(PROGRAMS, tiles * min(experts, tokens)))
    each = 64 * triton.cdiv(triton.cdiv(rows, count), 64)
    count = triton.cdiv(rows, each)
    parts = torch.empty((count, tokens, columns), dtype=torch.float32, device=dy.device)
    _few_rows_backward_kernel[(tiles, slots, count)](
        dy, offsets, packed, exponent, parts, experts, tokens, rows, columns, width, group,
        exponent.shape[-1], each, EXPERTS=_places(experts), TOKENS=FEW_TOKENS, ROWS=64, BYTES=BYTES,
        PACKED=has_ptx(), BY_ROW=exponent.shape[-1] == 1,
        DTYPE=tl.bfloat16 if dy.dtype == torch.bfloat16 else tl.float32, num_warps=4, num_stages=2,
    )  # fmt: skip
    return parts[0] if count == 1 else parts.sum(dim=0)


def _many_rows_gradient(
    dy: Tensor, x: Tensor, offsets: Tensor, packed: Tensor, exponent: Tensor, group: int
) -> Tensor:
    """As `_few_rows_gradient`, in the dtype of dy or fp32, by the library's grouped product."""
    experts, rows, _ = packed.shape
    columns = x.shape[1]
    dxn: Tensor | None = None
    for first, last in reference.slices([x, dy], columns, rows, experts, dy.element_size()):
        weight, _ = decode_experts(packed, exponent, offsets, first, last, columns, group, dy.dtype)
        part = dy if last - first == rows else dy[:, first:last].contiguous()
        part = reference.grouped_matmul(part, weight, offsets)
        dxn = part if dxn is None else dxn.to(torch.float32).add_(part)
    assert dxn is not None, "an expert has at least one row"
    return dxn


def clear_idle(gradient: Tensor, offsets: Tensor) -> Tensor:
    """gradient [E, O, I], contiguous, with zeros for experts without rows; only theirs are written."""
    experts, *size = gradient.shape
    count = size[0] * size[1]
    if gradient.numel():
        _clear_idle_kernel[(triton.cdiv(count, 4096), experts)](gradient, offsets, count, BLOCK=4096)
    return gradient


def add_busy(total: Tensor, gradient: Tensor, offsets: Tensor) -> None:
    """Add gradient to total, both [E, O, I] and contiguous, where experts have rows; sums are in fp32."""
    experts, *size = gradient.shape
    count = size[0] * size[1]
    if gradient.numel():
        _add_busy_kernel[(triton.cdiv(count, 4096), experts)](total, gradient, offsets, count, BLOCK=4096)


def _places(experts: int) -> int:
    """A power of two with room for the experts and what is behind them."""
    return triton.next_power_of_2(experts + 1)


def _slots(tokens: int, experts: int, block: int) -> int:
    """Most tiles of `block` rows, none with rows of two experts, that there can be."""
    groups = min(experts + 1, tokens)
    return groups + (tokens - groups) // block


def _few_tile(rows: int) -> tuple[int, int]:
    """Output rows of a tile, and its warps: large tiles where there are enough for a large GPU."""
    return (64, 4) if rows >= MANY_ROWS else (16, 1)


def _many_tile(tokens: int, experts: int, rows: int) -> tuple[int, int, int, int, int]:
    """Tokens, rows and columns of a tile; warps; stages."""
    if tokens <= 128 * experts or rows <= 128:
        return 64, 128, 128, 4, 4
    return 128, 256, 128, 8, 3
