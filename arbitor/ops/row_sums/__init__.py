"""Sums of what belongs to the same row of a table: `row_sums`.

Shape letters: N look-ups, D width.
"""

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.registry import register
from arbitor.ops.row_sums import reference

__all__ = ["row_sums"]


def row_sums(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that were looked up and the sum of their gradients, always in the same order of addition.

    As many rows come back as look-ups were made, found without asking the device how many are distinct: the
    distinct ones in ascending order, then the last of them again and again, with equal sums.

    On a CPU what belongs to a row is added one after the other; by kernels 64 at a time, and their sums one
    after the other, so that a row of up to 64 look-ups has the same bits there.

    Args:
        ids: int64 [N].
        gradient: float [N, D].

    Returns:
        ids int64 [N] and sums fp32 [N, D].
    """
    return _row_sums(ids, gradient)


def _dispatch(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    if gradient.dtype != torch.float64 and uses_triton(gradient):
        from arbitor.ops.row_sums import triton

        return triton.row_sums(ids, gradient)
    return reference.row_sums(ids, gradient)


_row_sums = register(
    "row_sums(Tensor ids, Tensor gradient) -> (Tensor, Tensor)",
    _dispatch,
    lambda ids, gradient: (
        ids.new_empty(ids.shape),
        gradient.new_empty(gradient.shape, dtype=torch.float32),
    ),
)
