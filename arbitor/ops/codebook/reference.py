"""Nearest row of a table of trits, some queries and some rows at a time.

Shape letters: M queries, R rows, C width, P packed bytes a row.
"""

import torch
from torch import Tensor

from arbitor.ops.trit_codec import ternary_decode

QUERIES_AT_ONCE = 1 << 10
ROWS_AT_ONCE = 1 << 10
# A query is rounded to multiples of 2^-40 to 2^-42 of its largest magnitude. Sums of up to 1024 such numbers
# are exact in fp64, so that a distance depends neither on the order of summation nor on other queries.
FRACTION_BITS = 40
MAX_WIDTH = 1 << 10


def nearest(x: Tensor, packed: Tensor, exponent: Tensor) -> Tensor:
    """Number of the nearest row; see `arbitor.ops.codebook.codebook_nearest`."""
    found = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for first in range(0, len(x), QUERIES_AT_ONCE):
        part = slice(first, first + QUERIES_AT_ONCE)
        found[part] = _nearest_of_some(_on_grid(x[part].to(torch.float64)), packed, exponent)
    return found


def _on_grid(x_MC: Tensor) -> Tensor:
    """x [M, C] rounded to a grid, one for each row, that is fine enough to keep most of fp32's bits."""
    # A sum is rounded to its last bit, here that of the large number or of half of it.
    large_M1 = x_MC.abs().amax(dim=-1, keepdim=True) * 2.0 ** (52 - FRACTION_BITS)
    return (x_MC + large_M1) - large_M1


def _nearest_of_some(x_MC: Tensor, packed: Tensor, exponent: Tensor) -> Tensor:
    best_M = x_MC.new_full((len(x_MC),), torch.inf)
    found_M = torch.zeros(len(x_MC), dtype=torch.int64, device=x_MC.device)
    for first in range(0, len(packed), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        width = x_MC.shape[1]
        rows_RC = ternary_decode(packed[part], exponent[part], width, width, torch.float64)
        # |x - r|^2 without |x|^2, which is the same for all rows. The product is exact, and what follows
        # rounds element by element: equal rows are equally near.
        distance_MR = rows_RC.square().sum(dim=-1) - 2 * (x_MC @ rows_RC.t())
        nearest_M, index_M = distance_MR.min(dim=-1)  # the first of equal ones
        nearer_M = nearest_M < best_M
        best_M = torch.where(nearer_M, nearest_M, best_M)
        found_M = torch.where(nearer_M, index_M + first, found_M)
    return found_M
