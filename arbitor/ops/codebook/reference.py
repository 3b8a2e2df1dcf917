"""Nearest row of a ternary codebook, by exact integer products, some rows at a time.

Shape letters: M queries, R rows, C width, P packed bytes a row.
"""

import torch
from torch import Tensor

from arbitor.ops.exponent import exp2_int
from arbitor.ops.trit_codec import reference as trit_codec

SCORES_AT_ONCE = 1 << 22


def nearest(codes: Tensor, scale: Tensor, packed: Tensor, exponent: Tensor) -> Tensor:
    """Number of the nearest row; see `arbitor.ops.codebook.codebook_nearest`."""
    queries = codes.to(torch.float32)
    best = torch.full((len(codes),), torch.inf, device=codes.device)
    found = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    step = max(1, SCORES_AT_ONCE // max(1, len(codes)))
    for first in range(0, len(packed), step):
        trits = trit_codec.unpack(packed[first : first + step], codes.shape[1]).to(torch.float32)
        size = exp2_int(exponent[first : first + step, 0])
        # |q - r|^2 = |q|^2 - 2 q.r + |r|^2, of which the first does not depend on the row. The products are
        # sums of integers below 2^24, exact in whatever order and however many rows there are.
        product = (queries @ trits.t()) * scale * size
        score = trits.square().sum(dim=-1) * size.square() - 2 * product
        nearest_here = score.min(dim=-1)
        better = nearest_here.values < best
        best = torch.where(better, nearest_here.values, best)
        found = torch.where(better, nearest_here.indices + first, found)
    return found
