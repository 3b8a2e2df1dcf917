"""Triton kernels of byte windows and of the normed sum behind them.

Shape letters: B batch, L ids, N = L - 2 positions, D dim, W = 3 D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.byte_windows.reference import BEFORE
from arbitor.ops.head_norm.reference import RMS_EPS

COLUMNS = 1024  # of a program at a time, where none depends on the others


@triton.jit
def _is_position(place, column, positions):
    """Whether there is a position `place`, once for each column: loads then wait for no branch."""
    place += tl.zeros_like(column)
    return (place >= 0) & (place < positions)


@triton.jit(do_not_specialize=["length"])
def _windows_kernel(e, window, length, dim, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Every embedding into the windows that it stands in."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(0) % length
    positions = length - (SLOTS - 1)
    first = row - row // length * (SLOTS - 1)  # number of the window that begins here
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        used = column < dim
        value = tl.load(e + row * dim + column, mask=used, other=0.0).to(window.dtype.element_ty)
        for slot in tl.static_range(SLOTS):
            at = window + ((first - slot) * SLOTS + slot) * dim + column
            tl.store(at, value, mask=used & _is_position(place - slot, column, positions))


@triton.jit(do_not_specialize=["length"])
def _windows_backward_kernel(dwindow, down, de, length, dim, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(0) % length
    positions = length - (SLOTS - 1)
    first = row - row // length * (SLOTS - 1)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        used = column < dim
        own = used & _is_position(place - (SLOTS - 1), column, positions)
        at = down + (first - (SLOTS - 1)) * dim + column
        total = tl.load(at, mask=own, other=0.0).to(tl.float32)
        for slot in tl.static_range(SLOTS):
            inside = used & _is_position(place - slot, column, positions)
            at = dwindow + ((first - slot) * SLOTS + slot) * dim + column
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(de + row * dim + column, total.to(de.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["positions", "length"])
def _add_and_norm_kernel(e, y, h, rstd, positions, length, dim, eps, BLOCK: tl.constexpr):
    """`length` rows of e lie between the first ones of two neighbours in the batch."""
    token = tl.program_id(0).to(tl.int64)
    row = token // positions * length + token % positions
    column = tl.arange(0, BLOCK)
    used = column < dim
    value = tl.load(e + row * dim + column, mask=used, other=0.0).to(tl.float32)
    value += tl.load(y + token * dim + column, mask=used, other=0.0).to(tl.float32)
    mean = tl.sum(value * value, axis=0) / dim + eps
    # The difference is 0, or NaN where the square overflowed: the root alone would make such a token 0.
    inverse = 1.0 / tl.sqrt(mean) + (mean - mean)
    tl.store(rstd + token, inverse)
    tl.store(h + token * dim + column, (value * inverse).to(h.dtype.element_ty), mask=used)


@triton.jit
def _normed_backward_kernel(dh, h, rstd, dx, dim, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    used = column < dim
    gradient = tl.load(dh + token * dim + column, mask=used, other=0.0).to(tl.float32)
    normed = tl.load(h + token * dim + column, mask=used, other=0.0).to(tl.float32)
    mean = tl.sum(gradient * normed, axis=0) / dim
    result = (gradient - normed * mean) * tl.load(rstd + token)
    tl.store(dx + token * dim + column, result.to(dx.dtype.element_ty), mask=used)


def windows(e_BLD: Tensor, dtype: torch.dtype) -> Tensor:
    """The windows [B, N, W] of `reference.windows`."""
    B, L, D = e_BLD.shape
    window_BNW = torch.empty((B, max(0, L - BEFORE), (BEFORE + 1) * D), dtype=dtype, device=e_BLD.device)
    if window_BNW.numel():
        _windows_kernel[(B * L,)](
            e_BLD.contiguous(), window_BNW, L, D, SLOTS=BEFORE + 1, COLUMNS=_block(D, COLUMNS), num_warps=4
        )
    return window_BNW


def windows_backward(dwindow_BNW: Tensor, down_BND: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Gradient of e [B, L, D], in `dtype`, from those of `windows` and of e[:, 2:]."""
    B, L, D = shape
    de_BLD = torch.empty(shape, dtype=dtype, device=down_BND.device)
    if not dwindow_BNW.numel():
        return de_BLD.zero_()
    _windows_backward_kernel[(B * L,)](
        dwindow_BNW.contiguous(), down_BND.contiguous(), de_BLD, L, D, SLOTS=BEFORE + 1,
        COLUMNS=_block(D, COLUMNS), num_warps=4,
    )  # fmt: skip
    return de_BLD


def add_and_norm(e_BND: Tensor, y_BND: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h = rms_norm(e + y) [B, N, D] in `dtype`, and fp32 [B, N], 1 / rms."""
    B, N, D = y_BND.shape
    h_BND = torch.empty((B, N, D), dtype=dtype, device=y_BND.device)
    rstd_BN = torch.empty((B, N), dtype=torch.float32, device=y_BND.device)
    if h_BND.numel():
        if e_BND.stride()[1:] != (D, 1) or e_BND.stride(0) % D:
            e_BND = e_BND.contiguous()
        _add_and_norm_kernel[(B * N,)](
            e_BND, y_BND.contiguous(), h_BND, rstd_BN, N, e_BND.stride(0) // D, D, RMS_EPS,
            BLOCK=_block(D), num_warps=_warps(D),
        )  # fmt: skip
    return h_BND, rstd_BN


def norm_backward(dh_BND: Tensor, h_BND: Tensor, rstd_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of e + y, in `dtype`, from that of h."""
    dx_BND = torch.empty(h_BND.shape, dtype=dtype, device=h_BND.device)
    if dx_BND.numel():
        dim = h_BND.shape[-1]
        _normed_backward_kernel[(rstd_BN.numel(),)](
            dh_BND.contiguous(), h_BND, rstd_BN, dx_BND, dim, BLOCK=_block(dim), num_warps=_warps(dim)
        )
    return dx_BND


def _block(columns: int, most: int = 1 << 30) -> int:
    return min(most, max(16, triton.next_power_of_2(columns)))


def _warps(columns: int) -> int:
    return min(16, max(1, _block(columns) // 512))
