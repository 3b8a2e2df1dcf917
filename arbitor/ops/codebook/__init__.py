"""Exact look-up in a table of trits: `codebook_nearest`.

Shape letters: M queries, R rows, C width, P packed bytes a row.
"""

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.codebook import reference
from arbitor.ops.codebook.reference import MAX_WIDTH
from arbitor.ops.registry import register

__all__ = ["MAX_WIDTH", "codebook_nearest"]


def codebook_nearest(x: Tensor, packed: Tensor, exponent: Tensor) -> Tensor:
    """The row with the smallest Euclidean distance to each query; of equally near ones, the first.

    All rows are compared, a slice at a time with the best so far: no tensor of M x R is formed. Distances are
    taken in fp64 from exact products (see `reference`), so that a query's row depends on neither the other
    queries nor the device.

    Args:
        x: float [M, C], 1 <= C <= 1024; a query that is not finite gets row 0.
        packed: uint8 [R, P], trits of the rows, R >= 1.
        exponent: int8 [R, 1], scale exponents of the rows.

    Returns:
        int64 [M].

    Raises:
        ValueError: shapes or dtypes that are not the ones above.
    """
    if not x.is_floating_point() or x.dim() != 2 or not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x must be float [queries, 1 to {MAX_WIDTH}], got {x.dtype} {list(x.shape)}")
    if packed.dim() != 2 or not len(packed) or exponent.shape != (len(packed), 1):
        raise ValueError(
            "packed must be [rows, bytes] with at least one row and exponent [rows, 1], got "
            f"{list(packed.shape)} and {list(exponent.shape)}"
        )
    return _nearest(x, packed, exponent)


def _dispatch(x: Tensor, packed: Tensor, exponent: Tensor) -> Tensor:
    if uses_triton(x):
        from arbitor.ops.codebook import triton

        return triton.nearest(x, packed, exponent)
    return reference.nearest(x, packed, exponent)


_nearest = register(
    "codebook_nearest(Tensor x, Tensor packed, Tensor exponent) -> Tensor",
    _dispatch,
    lambda x, packed, exponent: x.new_empty((x.shape[0],), dtype=torch.int64),
)
