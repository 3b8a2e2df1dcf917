"""Rows of a table of trits: packed rows first, a tenth of the bytes of decoded ones, then the codec."""

import torch
from torch import Tensor

from arbitor.ops.trit_codec import decode


def gather(
    packed: Tensor, exponent: Tensor, ids: Tensor, in_features: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Rows [..., in_features]; see `arbitor.ops.trit_gather.ternary_gather`."""
    flat = ids.reshape(-1)
    rows = decode(packed[flat], exponent[flat], in_features, group, dtype)
    return rows.view(*ids.shape, in_features)
