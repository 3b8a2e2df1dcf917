"""Linear on packed trits, forward and gradient of its input, by decoding and a library matmul.

Shape letters: N tokens, I in, O out, P packed bytes a row, G groups.
"""

import torch
from torch import Tensor

from arbitor.ops import activations, trit_codec


def forward(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = quantize(rms_norm(x)) @ (T * 2^E)^T; see `arbitor.ops.ternary_linear.ternary_linear`."""
    weight = trit_codec.decode(packed, exponent, x.shape[-1], group, activations.weight_dtype(x, quantize))
    return activations.linear(x, weight, input_norm, quantize, out_dtype, squared)


def backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    squared: bool = False,
) -> Tensor:
    """Gradient of x; see `arbitor.ops.ternary_linear.ternary_linear_backward`."""
    weight = trit_codec.decode(
        packed,
        exponent,
        x.shape[-1],
        group,
        activations.weight_dtype(x, quantized=True),
    )
    return activations.linear_backward(dy, x, rstd, weight, input_norm, squared)
