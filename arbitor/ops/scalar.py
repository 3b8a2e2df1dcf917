"""Numbers that change from step to step, as tensors, so that a recorded CUDA graph reads their new value."""

import torch
from torch import Tensor


def scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """fp32 scalar on `device`; a tensor is taken as it is."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=device)
