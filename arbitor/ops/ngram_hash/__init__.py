"""Rows of hash tables for the n-grams that end at every position: `ngram_hash`.

Shape letters: L ids, N positions (L - 2), H heads for each n, T tables (2 H).
"""

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.ngram_hash import reference
from arbitor.ops.ngram_hash.reference import multipliers
from arbitor.ops.registry import register

__all__ = ["multipliers", "ngram_hash"]


def ngram_hash(ids: Tensor, heads: int, num_rows: int) -> Tensor:
    """The row of each table for the n-gram that ends at each position.

    With M the odd multiplier of a table (`multipliers`), the hash of ids i_1 ... i_n, oldest first, is,
    modulo 2^64 and with >> a logical shift,

        x <- 0;  for each i:  x <- (x ^ (i + 1)) * M,  x <- x ^ (x >> 32);
        x <- (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9,  x <- x ^ (x >> 32),

    and the row is (x mod 2^63) mod num_rows. Tables lie one after the other: first the H heads of the
    2-grams, then those of the 3-grams.

    Args:
        ids: int64 [..., L], not negative, L >= 2; position p ends at element p + 2.
        heads: H.
        num_rows: rows of each table.

    Returns:
        int64 [..., L - 2, T] in 0...T * num_rows - 1.

    Raises:
        ValueError: ids are not int64 or fewer than 2.
    """
    if ids.dtype != torch.int64 or ids.dim() == 0 or ids.shape[-1] < 2:
        raise ValueError(f"ids must be int64 [..., 2 or more], got {ids.dtype} {list(ids.shape)}")
    return _rows(ids, heads, num_rows)


def _dispatch(ids: Tensor, heads: int, num_rows: int) -> Tensor:
    if uses_triton(ids):
        from arbitor.ops.ngram_hash import triton

        return triton.rows(ids, heads, num_rows)
    return reference.rows(ids, heads, num_rows)


_rows = register(
    "ngram_hash(Tensor ids, int heads, int num_rows) -> Tensor",
    _dispatch,
    lambda ids, heads, num_rows: ids.new_empty((*ids.shape[:-1], ids.shape[-1] - 2, 2 * heads)),
)
