"""Triton kernel of `ngram_hash`: all rows in one pass over the ids.

Shape letters: L ids, N positions (L - 2), H heads for each n, T tables (2 H: those of the 2-grams first).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.ngram_hash.reference import _FINAL, _multiplier_tensor, _signed

ROWS = 256
FINAL = tl.constexpr(_signed(_FINAL))


@triton.jit
def _shift_right(x, count: tl.constexpr):
    """Logical shift of int64."""
    return (x.to(tl.uint64, bitcast=True) >> count).to(tl.int64, bitcast=True)


@triton.jit
def _mix(x, code, multiplier):
    x = (x ^ code) * multiplier
    return x ^ _shift_right(x, 32)


@triton.jit(do_not_specialize=["total", "positions", "num_rows"])
def _rows_kernel(ids, multipliers, rows, total, positions, num_rows, HEADS: tl.constexpr, ROWS: tl.constexpr):
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = out < total
    table = out % (2 * HEADS)
    place = out // (2 * HEADS)
    # A text has two ids more than positions.
    first = ids + place.to(tl.int64) + (place // positions).to(tl.int64) * 2
    multiplier = tl.load(multipliers + table)
    oldest = tl.load(first, mask=inside, other=0) + 1
    middle = tl.load(first + 1, mask=inside, other=0) + 1
    last = tl.load(first + 2, mask=inside, other=0) + 1
    none = tl.zeros((ROWS,), dtype=tl.int64)
    x = tl.where(table < HEADS, none, _mix(none, oldest, multiplier))
    x = _mix(_mix(x, middle, multiplier), last, multiplier)
    x = _mix(x, _shift_right(x, 29), FINAL) & 0x7FFFFFFFFFFFFFFF
    # Neither is negative, and dividing unsigned numbers takes fewer instructions.
    row = x.to(tl.uint64, bitcast=True) % num_rows.to(tl.uint64)
    tl.store(rows + out, row.to(tl.int64, bitcast=True) + table.to(tl.int64) * num_rows, mask=inside)


def rows(ids: Tensor, heads: int, num_rows: int) -> Tensor:
    """As `reference.rows`; fewer than 2^31 rows come out."""
    positions = ids.shape[-1] - 2
    out = torch.empty((*ids.shape[:-1], positions, 2 * heads), dtype=torch.int64, device=ids.device)
    assert out.numel() < 1 << 31
    if out.numel():
        _rows_kernel[(triton.cdiv(out.numel(), ROWS),)](
            ids.contiguous(), _multiplier_tensor(heads, ids.device), out, out.numel(), positions, num_rows,
            HEADS=heads, ROWS=ROWS,
        )  # fmt: skip
    return out
