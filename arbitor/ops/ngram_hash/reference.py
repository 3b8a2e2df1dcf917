"""Hash of the 2-grams and 3-grams that end at every position, one hash function for each table.

All arithmetic is on int64 modulo 2^64 (two's complement; a logical shift is a shift and a mask), so that the
rows are the same on every device.

Shape letters: L ids, N positions (L - 2), H heads for each n, T tables (2 H: those of the 2-grams first).
"""

from functools import cache

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FINAL = 0xBF58476D1CE4E5B9


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def multipliers(heads: int) -> list[int]:
    """The odd multiplier of each table as an int64, 2 * heads of them.

    They are outputs of splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
    generators"), made odd: head h of the n-grams has output number 2 h + n - 2, whatever the number of heads.
    """
    numbers = [2 * head + n - 2 for n in (2, 3) for head in range(heads)]
    return [_signed(_splitmix(number) | 1) for number in numbers]


def _splitmix(number: int) -> int:
    x = (number + 1) * _GOLDEN & _MASK
    x = (x ^ (x >> 30)) * _FINAL & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


@cache
def _multiplier_tensor(heads: int, device: torch.device) -> Tensor:
    """int64 [2, H]."""
    return torch.tensor(multipliers(heads), dtype=torch.int64, device=device).view(2, heads)


def rows(ids: Tensor, heads: int, num_rows: int) -> Tensor:
    """Rows of all tables, one table after the other; see `arbitor.ops.ngram_hash.ngram_hash`."""
    count = ids.shape[-1] - 2
    windows = [ids[..., start : start + count, None] + 1 for start in range(3)]  # oldest first; no id is 0
    tables = []
    for n, multiplier_H in zip((2, 3), _multiplier_tensor(heads, ids.device), strict=True):
        x = torch.zeros_like(multiplier_H)
        for id_N1 in windows[3 - n :]:
            x = _fold((x ^ id_N1) * multiplier_H)
        x = _fold((x ^ _logical_shift(x, 29)) * _signed(_FINAL))
        tables.append((x & ((1 << 63) - 1)) % num_rows)
    first_T = torch.arange(2 * heads, device=ids.device) * num_rows
    return torch.cat(tables, dim=-1) + first_T


def _fold(x: Tensor) -> Tensor:
    return x ^ _logical_shift(x, 32)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
