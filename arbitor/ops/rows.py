"""Rows of tensors: writing them by number, and going through some at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS_A_CORE = 1 << 17  # whose floats, and those of what is made of them, the cache of a CPU's core holds


def write_rows(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """target[index] = rows, in place, where rows that come twice come with equal values.

    The result then does not depend on the order of writing. torch does not know that, and under
    `use_deterministic_algorithms` would sort all rows on a GPU first, which takes many times longer.

    Args:
        target: [N, ...], changed.
        index: int64 [K].
        rows: [K, ...] of the target's dtype.

    Returns:
        The target.
    """
    strict = target.is_cuda and torch.are_deterministic_algorithms_enabled()
    if not strict:
        return target.index_copy_(0, index, rows)
    # The debug mode is the same flag; to set it does not import torch's compiler.
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        return target.index_copy_(0, index, rows)
    finally:
        torch.set_deterministic_debug_mode(mode)


def row_parts(x: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of x [N, I] and of tensors [N, ...], in about equal parts that caches hold."""
    most = ELEMENTS_A_CORE * torch.get_num_threads()
    size = max(1, -(-x.shape[0] // max(1, -(-x.numel() // most))))
    return zip(*(tensor.split(size) for tensor in (x, *beside)), strict=True)
