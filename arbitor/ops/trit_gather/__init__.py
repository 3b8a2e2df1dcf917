"""Rows of a table of trits by id, decoded: `ternary_gather`.

Shape letters: V rows, W width, P packed bytes a row, G groups; `...` ids.
"""

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.registry import register
from arbitor.ops.trit_gather import reference

__all__ = ["ternary_gather"]


def ternary_gather(
    packed: Tensor, exponent: Tensor, ids: Tensor, in_features: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a table with weights T * 2^E, exact.

    Args:
        packed: uint8 [V, P].
        exponent: int8 [V, G].
        ids: int64 [...] in 0...V - 1; another raises IndexError on a CPU, and its row is NaN on a GPU.
        in_features: W.
        group: neighbouring elements of a row that share an exponent.
        dtype: fp32 or bf16.

    Returns:
        [..., W]; NaN where a byte is illegal.
    """
    return _gather(packed, exponent, ids, in_features, group, dtype)


def _dispatch(
    packed: Tensor, exponent: Tensor, ids: Tensor, in_features: int, group: int, dtype: torch.dtype
) -> Tensor:
    if uses_triton(packed):
        from arbitor.ops.trit_gather import triton

        return triton.gather(packed, exponent, ids, in_features, group, dtype)
    return reference.gather(packed, exponent, ids, in_features, group, dtype)


_gather = register(
    "ternary_gather(Tensor packed, Tensor exponent, Tensor ids, int in_features, int group, "
    "ScalarType dtype) -> Tensor",
    _dispatch,
    lambda packed, exponent, ids, in_features, group, dtype: packed.new_empty(
        (*ids.shape, in_features), dtype=dtype
    ),
)
