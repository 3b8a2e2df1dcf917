"""Look-up in a ternary codebook: `codebook_nearest`.

Shape letters: M queries, R rows, C width, P packed bytes a row.
"""

from torch import Tensor

from arbitor.ops.codebook import reference
from arbitor.ops.registry import register

__all__ = ["codebook_nearest"]


def codebook_nearest(codes: Tensor, scale: Tensor, packed: Tensor, exponent: Tensor) -> Tensor:
    """The row with the smallest Euclidean distance to each query, the first of equally near ones.

    Exact, and without a tensor of M x R: some rows are compared at a time.

    Args:
        codes: int8 [M, C], queries in units of their scale.
        scale: fp32 [M, 1].
        packed: uint8 [R, P], trits of the rows.
        exponent: int8 [R, 1], of their scales.

    Returns:
        int64 [M].
    """
    return _nearest(codes, scale, packed, exponent)


_nearest = register(
    "codebook_nearest(Tensor codes, Tensor scale, Tensor packed, Tensor exponent) -> Tensor",
    reference.nearest,
    lambda codes, scale, packed, exponent: codes.new_empty((codes.shape[0],), dtype=codes.dtype).long(),
)
