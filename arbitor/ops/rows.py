"""Writing rows of a tensor by number."""

import torch
from torch import Tensor


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
