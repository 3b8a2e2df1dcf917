"""Powers of two as floats, built from bits, so that every device agrees exactly."""

import torch
from torch import Tensor

# The exponents that a normal fp32 number can have.
MIN_EXPONENT = -126
MAX_EXPONENT = 127


def exp2_int(exponent: Tensor) -> Tensor:
    """2^exponent as fp32, exact.

    Args:
        exponent: any integer dtype, values in [-126, 127].

    Returns:
        fp32 tensor of the same shape.
    """
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
