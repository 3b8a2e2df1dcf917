"""The norm of activations that no linear normalises."""

import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-6


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)
