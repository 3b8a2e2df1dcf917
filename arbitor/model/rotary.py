"""Rotary position embedding (Su et al. 2021, "RoFormer").

Shape letters: N positions, R rotary dims; the pairs are (i, i + R/2).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, fp32 [N, R/2]."""

    cos: Tensor
    sin: Tensor


def rotation(start: int, num_positions: int, dims: int, theta: float, device: torch.device) -> Rotation:
    """Angles of positions start, ..., start + num_positions - 1: position * theta^(-2i / dims).

    They are computed in fp64 and rounded once, so that a position gets the same fp32 values whether it is
    computed alone or among others (vectorised fp32 sines differ from scalar ones in the last bit).
    """
    positions_N = torch.arange(start, start + num_positions, dtype=torch.float64, device=device)
    frequencies_R = theta ** -(torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims)
    angles_NR = positions_N[:, None] * frequencies_R
    return Rotation(angles_NR.cos().float(), angles_NR.sin().float())
