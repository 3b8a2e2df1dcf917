"""Forward of the linear on packed trits by one int8 matmul, for matrices with one exponent a row.

Shape letters: N tokens, I in, O out, P packed bytes a row.
"""

import torch
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.int8_matmul import MAX_IN_FEATURES, int8_matmul
from arbitor.ops.trit_codec import triton as trit_codec


def has_int8_forward(x: Tensor, exponent: Tensor, quantize: bool) -> bool:
    """Whether `forward` equals the reference here: int8 codes, ROW scales, and sums that fp32 holds."""
    return (
        quantize
        and activations.compute_dtype(x) == torch.float32
        and exponent.shape[-1] == 1
        and x.shape[-1] <= MAX_IN_FEATURES
    )


def forward(
    x: Tensor, packed: Tensor, exponent: Tensor, input_norm: bool, out_dtype: torch.dtype, squared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.forward` of x [N, I], quantised, with exponent [O, 1]."""
    codes, scale, rstd = activations.normalize_and_quantize(x, input_norm, True, squared)
    trits, row_scale = trit_codec.decode_rows(packed, exponent, x.shape[-1])
    return int8_matmul(codes, trits, scale, row_scale, out_dtype), codes, scale, rstd
