"""Triton kernels around a linear on integer weights: input norm and int8 codes, and the norm's gradient.

A program takes one token. Shape letters: N tokens, I in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.activations.reference import CODE_SCALE, RMS_EPS
from arbitor.ops.triton import has_ptx, rounded

MAX_BLOCK = 16384
# Columns and elements of a program without sums: 16 elements for each of 128 threads. Only two widths, as
# slices of experts' outputs have as many columns as the number of tokens lets them have.
PATCH_COLUMNS, PATCH_ELEMENTS = (128, 512), 2048


@triton.jit
def _squared_relu(x, dtype: tl.constexpr):
    """relu(x)^2 of fp32 x, rounded to `dtype`, as fp32; NaN stays."""
    positive = tl.where(x < 0.0, 0.0, x)
    return (positive * positive).to(dtype).to(tl.float32)


@triton.jit
def _input(x, column, columns, SQUARED: tl.constexpr):
    """Elements of a token as fp32, or the squares of their positive part; 0 behind the last one."""
    value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
    if SQUARED:
        value = _squared_relu(value, x.dtype.element_ty)
    return value


@triton.jit
def _summed(x, added, total, column, columns):
    """Elements of a token of x + added, stored into `total`, as fp32; 0 behind the last one."""
    used = column < columns
    value = tl.load(x + column, mask=used, other=0.0).to(tl.float32)
    value += tl.load(added + column, mask=used, other=0.0).to(tl.float32)
    stored = value.to(total.dtype.element_ty)
    tl.store(total + column, stored, mask=used)
    return stored.to(tl.float32)


@triton.jit(do_not_specialize=["last"])
def _quantize_kernel(
    x, added, total, codes, scale, rstd, sums, offsets, last, columns, eps, code_scale, smallest,
    NORM: tl.constexpr, SQUARED: tl.constexpr, ADDED: tl.constexpr, SUMS: tl.constexpr,
    COUNTED: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if COUNTED:
        count = tl.load(offsets + last)
        if token >= count:
            tl.store(scale + token, 0.0)
            tl.store(rstd + token, 0.0)
            return
    x += token * columns
    codes += token * columns
    column = tl.arange(0, BLOCK)
    if ONCE:
        if ADDED:
            kept = _summed(x, added + token * columns, total + token * columns, column, columns)
        else:
            kept = _input(x, column, columns, SQUARED)
        square, largest, strange = kept * kept, tl.abs(kept), kept - kept
    else:
        square = tl.zeros((BLOCK,), dtype=tl.float32)
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        strange = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, columns, BLOCK):
            value = _input(x, first + column, columns, SQUARED)
            square += value * value
            largest = tl.maximum(largest, tl.abs(value))
            strange += value - value
    absmax = tl.maximum(tl.max(largest, axis=0), smallest)
    # A maximum passes over NaN, so such a token's scale is made NaN by what is 0 for every finite value.
    if NORM:
        mean = tl.sum(square, axis=0) / columns + eps
        # The difference is 0, or NaN where the square overflowed: rsqrt alone would make such a token 0.
        inverse = 1.0 / tl.sqrt(mean) + (mean - mean)
    else:
        inverse = 1.0
        absmax += tl.sum(strange, axis=0)
    factor = code_scale / absmax
    tl.store(scale + token, absmax * inverse / code_scale)
    tl.store(rstd + token, inverse)
    if ONCE:
        units = rounded(kept * factor, PTX)
        tl.store(codes + column, units.to(tl.int8), mask=column < columns)
    else:
        units = tl.zeros((BLOCK,), dtype=tl.int32)
        for first in range(0, columns, BLOCK):
            code = rounded(_input(x, first + column, columns, SQUARED) * factor, PTX)
            tl.store(codes + first + column, code.to(tl.int8), mask=first + column < columns)
            units += code
    if SUMS:
        tl.store(sums + token, tl.sum(units, axis=0))


@triton.jit
def _gradient(dxn, more, at, used, MORE: tl.constexpr):
    """Sum of one or two gradients of the normed input, as fp32."""
    gradient = tl.load(dxn + at, mask=used, other=0.0).to(tl.float32)
    if MORE:
        gradient += tl.load(more + at, mask=used, other=0.0).to(tl.float32)
    return gradient


@triton.jit
def _given(x, at, used, SQUARED: tl.constexpr):
    """Elements of x as fp32, and what of them is normalised: they, or the squares of their positive part."""
    given = tl.load(x + at, mask=used, other=0.0).to(tl.float32)
    value = given
    if SQUARED:
        value = _squared_relu(given, x.dtype.element_ty)
    return given, value


@triton.jit
def _store_gradient(
    dx, beside, at, used, gradient, given, value, inverse, coefficient, SQUARED: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    """The norm's gradient of x, from that of the normed input and the mean of its product with that."""
    result = gradient * inverse - value * coefficient
    if SQUARED:
        result *= 2.0 * tl.where(given < 0.0, 0.0, given)
    if BESIDE:
        result += tl.load(beside + at, mask=used, other=0.0).to(tl.float32)
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["last"])
def _norm_backward_kernel(
    dxn, more, x, rstd, beside, dx, offsets, last, columns, NORM: tl.constexpr, SQUARED: tl.constexpr,
    MORE: tl.constexpr, BESIDE: tl.constexpr, COUNTED: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = token * columns
    if COUNTED:
        count = tl.load(offsets + last)
        if token >= count:
            for first in range(0, columns, BLOCK):
                column = first + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), dtype=dx.dtype.element_ty)
                tl.store(dx + row + column, zeros, mask=column < columns)
            return
    inverse = tl.load(rstd + token)
    cubed = inverse * inverse * inverse / columns
    coefficient = 0.0
    if ONCE:
        column = tl.arange(0, BLOCK)
        used = column < columns
        gradient = _gradient(dxn, more, row + column, used, MORE)
        given, value = _given(x, row + column, used, SQUARED)
        if NORM:
            coefficient = tl.sum(gradient * value, axis=0) * cubed
        _store_gradient(
            dx, beside, row + column, used, gradient, given, value, inverse, coefficient, SQUARED, BESIDE
        )
    else:
        if NORM:
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for first in range(0, columns, BLOCK):
                column = first + tl.arange(0, BLOCK)
                used = column < columns
                _, value = _given(x, row + column, used, SQUARED)
                total += _gradient(dxn, more, row + column, used, MORE) * value
            coefficient = tl.sum(total, axis=0) * cubed
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            used = column < columns
            gradient = _gradient(dxn, more, row + column, used, MORE)
            given, value = _given(x, row + column, used, SQUARED)
            _store_gradient(
                dx, beside, row + column, used, gradient, given, value, inverse, coefficient, SQUARED, BESIDE
            )


@triton.jit(do_not_specialize=["tokens"])
def _add_kernel(x, y, total, tokens, columns, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = token.to(tl.int64)[:, None] * columns + column[None, :]
    used = (token < tokens)[:, None] & (column < columns)[None, :]
    value = tl.load(x + at, mask=used, other=0.0).to(tl.float32)
    value += tl.load(y + at, mask=used, other=0.0).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["tokens"])
def _scale_kernel(x, scale, y, tokens, columns, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale + token, mask=token < tokens, other=0.0)
    at = token.to(tl.int64)[:, None] * columns + column[None, :]
    used = (token < tokens)[:, None] & (column < columns)[None, :]
    value = tl.load(x + at, mask=used, other=0).to(tl.float32) * factor[:, None]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=used)


def quantize(
    x: Tensor,
    input_norm: bool,
    squared: bool = False,
    *,
    sums: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.normalize_and_quantize` of x [N, I] in fp32 or bf16; the codes are int8.

    `sums`, int32 [N, 1], are overwritten with the sums of each token's codes. With `offsets`, int32 [E], rows
    behind the last of them are left out: their scale and rstd are 0, and their codes and sums anything.
    """
    return _quantize(x, None, input_norm, squared, sums, offsets)


def add_and_quantize(
    x: Tensor, added: Tensor, *, sums: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + added, both [N, I], in the dtype of x, and `quantize` of that with its norm."""
    if x.shape[-1] > MAX_BLOCK:
        total = add(x, added)
        return total, *_quantize(total, None, True, False, sums, None)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, *_quantize(x, (added.contiguous(), total), True, False, sums, None)


def _quantize(
    x: Tensor,
    sum_of: tuple[Tensor, Tensor] | None,
    input_norm: bool,
    squared: bool,
    sums: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize`; with `sum_of`, what is added to x and where the sum goes."""
    tokens, columns = x.shape
    codes = torch.empty((tokens, columns), dtype=torch.int8, device=x.device)
    scale, rstd = (torch.empty((tokens, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    if tokens:
        smallest = torch.finfo(torch.float32).tiny * CODE_SCALE
        _quantize_kernel[(tokens,)](
            x.contiguous(), *(sum_of or (x, x)), codes, scale, rstd, codes if sums is None else sums,
            *_counted(x, offsets), columns, RMS_EPS, CODE_SCALE, smallest, NORM=input_norm, SQUARED=squared,
            ADDED=sum_of is not None, SUMS=sums is not None, COUNTED=offsets is not None,
            ONCE=columns <= _block(columns), BLOCK=_block(columns), PTX=has_ptx(),
            num_warps=_warps(columns, 1024), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale, rstd


def norm_backward(
    dxn: Tensor,
    x: Tensor,
    rstd: Tensor,
    input_norm: bool = True,
    squared: bool = False,
    *,
    more: Tensor | None = None,
    beside: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Gradient [N, I] of x, in its dtype, from that of u * rstd(u), u = x or relu(x)^2.

    Args:
        dxn: float [N, I].
        x: float [N, I].
        rstd: fp32 [N, 1].
        input_norm: without it, rstd is 1 and no function of u.
        squared: u is relu(x)^2.
        more: of the dtype of dxn, a second gradient to be added to it.
        beside: [N, I], a gradient of x itself, to be added to the result.
        offsets: int32 [E]; the gradient of rows behind the last of them is 0.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, columns = x.shape
    if tokens:
        _norm_backward_kernel[(tokens,)](
            dxn.contiguous(), dxn if more is None else more.contiguous(), x.contiguous(), rstd,
            x if beside is None else beside.contiguous(), dx, *_counted(x, offsets), columns,
            NORM=input_norm, SQUARED=squared, MORE=more is not None, BESIDE=beside is not None,
            COUNTED=offsets is not None, ONCE=columns <= _block(columns), BLOCK=_block(columns),
            num_warps=_warps(columns, 512),
        )  # fmt: skip
    return dx


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y of one shape [..., I] and two dtypes, in the dtype of x."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        columns = x.shape[-1]
        tokens = x.numel() // columns
        grid, block = _patches(tokens, columns)
        _add_kernel[grid](x.contiguous(), y.contiguous(), total, tokens, columns, **block, num_warps=4)
    return total


def scale_tokens(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, I], float or int8, times scale fp32 [N, 1], rounded once to `dtype`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        grid, block = _patches(*x.shape)
        _scale_kernel[grid](x.contiguous(), scale, y, *x.shape, **block, num_warps=4)
    return y


def _counted(x: Tensor, offsets: Tensor | None) -> tuple[Tensor, int]:
    """Where the number of rows stands, and the place of the last offset there."""
    return (x, 0) if offsets is None else (offsets, len(offsets) - 1)


def _patches(tokens: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes of the patches that elementwise kernels take."""
    block = PATCH_COLUMNS[columns > PATCH_COLUMNS[0]]
    rows = PATCH_ELEMENTS // block
    return (triton.cdiv(tokens, rows), triton.cdiv(columns, block)), {"TOKENS": rows, "BLOCK": block}


def _block(columns: int) -> int:
    return min(MAX_BLOCK, max(16, triton.next_power_of_2(columns)))


def _warps(columns: int, each: int) -> int:
    """Warps of a program of which each has so many columns of a token: few wait for each other less."""
    return min(16, max(1, _block(columns) // each))
