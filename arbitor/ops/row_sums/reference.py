"""Sums by row: sorted ids, whose runs of equal ones are summed as the rows of an embedding are.

Shape letters: N look-ups, D width.
"""

import torch
from torch import Tensor


def row_sums(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and sums; see `arbitor.ops.row_sums.row_sums`."""
    gradient = gradient.to(torch.float32)
    if not len(ids):
        return ids.clone(), gradient.clone()
    ids, order = torch.sort(ids, stable=True)
    begins = torch.ones_like(ids)
    begins[1:] = ids[1:] != ids[:-1]
    segment = begins.cumsum(0) - 1
    sums = torch.ops.aten.embedding_dense_backward(gradient[order], segment, len(ids), -1, False)
    slot = torch.minimum(torch.arange(len(ids), device=ids.device), segment[-1])
    first = torch.searchsorted(segment, slot)
    return ids[first], sums[slot]
