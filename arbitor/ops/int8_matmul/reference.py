"""Product of int8 codes and int8 weights with one scale a token and one a row, in integer arithmetic.

Shape letters: N tokens, I in, O out.
"""

import torch
from torch import Tensor

# Of so many products of codes up to 127 and trits, the sum stays below 2^24, where fp32 holds every integer.
MAX_IN_FEATURES = (1 << 24) // 127


def int8_matmul(
    codes: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """See `arbitor.ops.int8_matmul.int8_matmul`; the sums are int32, whatever the device."""
    sums = codes.to(torch.int32) @ weight.to(torch.int32).t()
    return (sums.to(torch.float32) * row_scale).mul_(scale).to(out_dtype)
