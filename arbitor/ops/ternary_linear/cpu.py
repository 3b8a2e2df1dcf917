"""Linear on packed trits on a CPU, the product in integers: the bits of the reference in fewer operations.

Called straight by the layers, without torch's dispatcher to Python. The forward hands its decoded trits to
the backward.

Shape letters: N tokens, I in, O out, P packed bytes a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from arbitor.ops import activations, native
from arbitor.ops.activations import cpu as passes
from arbitor.ops.backend import uses_triton
from arbitor.ops.exponent import exp2_int
from arbitor.ops.int8_matmul import cpu as int8_matmul
from arbitor.ops.int8_matmul import integers_pay
from arbitor.ops.trit_codec import cpu as trit_codec
from arbitor.ops.trit_codec import reference as trit_reference


class Decoded(NamedTuple):
    """A matrix without its packing.

    Attributes:
        trits: int8 [O, I].
        row_scale: fp32 [O], a power of two; NaN for a row with an illegal byte.
    """

    trits: Tensor
    row_scale: Tensor


Quantized = tuple[Tensor, Tensor, Tensor]  # what `quantize` gives: codes, scale, rstd
quantize = passes.quantize


def applies(x: Tensor, exponent: Tensor, quantize: bool) -> bool:
    """Whether `forward` may take the place of the library op, for x [N, I] and exponents [O, G]."""
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not uses_triton(x)
    return plain and quantize and exponent.shape[-1] == 1 and integers_pay(x)


def decode(packed: Tensor, exponent: Tensor, in_features: int) -> Decoded:
    """uint8 [O, P] and int8 [O, 1] -> trits and scales."""
    compiled = native.passes((packed, torch.uint8), (exponent, torch.int8))
    if compiled is not None and packed.shape[1] == trit_reference.packed_width(in_features):
        trits = packed.new_empty((len(packed), in_features), dtype=torch.int8)
        row_scale = packed.new_empty(len(packed), dtype=torch.float32)
        compiled.decode(
            packed.data_ptr(), exponent.data_ptr(), trits.data_ptr(), row_scale.data_ptr(), *packed.shape,
            in_features, torch.get_num_threads(),
        )  # fmt: skip
        return Decoded(trits, row_scale)
    row_scale = exp2_int(exponent[:, 0])
    if trit_codec.all_legal(packed):
        return Decoded(trit_codec.unpack_legal(packed, in_features), row_scale)
    trits = trit_reference.unpack(packed, in_features)
    illegal_O = (trits == trit_reference.ILLEGAL).any(dim=1)
    return Decoded(trits, row_scale.masked_fill_(illegal_O, torch.nan))


def forward(quantized: Quantized, weight: Decoded, out_dtype: torch.dtype) -> Tensor:
    """The product [N, O] of `arbitor.ops.ternary_linear.ternary_linear`, of a decoded matrix."""
    codes, scale, _ = quantized
    return int8_matmul.int8_matmul(codes, weight.trits, scale, weight.row_scale, out_dtype)


def backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Decoded, input_norm: bool, squared: bool = False
) -> Tensor:
    """`arbitor.ops.ternary_linear.ternary_linear_backward` on a decoded matrix."""
    dtype = activations.backward_dtype(x)
    weight_OI = weight.trits.to(dtype).mul_(weight.row_scale[:, None].to(dtype))
    return activations.linear_backward(dy, x, rstd, weight_OI, input_norm, squared)
