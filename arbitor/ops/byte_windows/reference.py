"""Windows of neighbouring embeddings and a normed sum, in plain torch; see `arbitor.ops.byte_windows`."""

import torch
from torch import Tensor

from arbitor.ops.head_norm import rms_norm

BEFORE = 2  # embeddings of a window ahead of its last
WIDEST = 16384  # columns of an embedding that kernels take


def windows(e_BLD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[e_{t-2}, e_{t-1}, e_t] side by side, and e_t."""
    own_BND = e_BLD[:, BEFORE:]
    return torch.cat([e_BLD[:, :-2], e_BLD[:, 1:-1], own_BND], dim=-1).to(dtype), own_BND


def add_and_norm(e_BND: Tensor, y_BND: Tensor, dtype: torch.dtype) -> Tensor:
    """rms_norm(e + y)."""
    return rms_norm(e_BND + y_BND).to(dtype)
