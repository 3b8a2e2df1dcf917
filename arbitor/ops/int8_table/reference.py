"""Byte tables in int8: weight = q * 2^(E - 6), one exponent a row.

Shape letters: V rows, D dim, N tokens.
"""

import torch
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.exponent import exp2_int
from arbitor.ops.int8_matmul import integers_pay

FRACTION_BITS = 6  # q counts in 1/64
Q_MAX = 95  # 1.48 trits, where an initial weight is clamped too


def decode(q: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 q [V, D] and exponent [V] -> weights [V, D]; exact in bf16, fp32 and fp64."""
    return q.to(dtype) * exp2_int(exponent.to(torch.int32) - FRACTION_BITS).to(dtype)[:, None]


def gather(q: Tensor, exponent: Tensor, ids: Tensor) -> Tensor:
    """Rows of the table: ids int64 [...] -> fp32 [..., D]."""
    scale = exp2_int(exponent[ids].to(torch.int32) - FRACTION_BITS)
    return q[ids].to(torch.float32).mul_(scale[..., None])


def linear(
    x: Tensor, q: Tensor, exponent: Tensor, quantize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The table as an output layer; see `arbitor.ops.int8_table.int8_linear`."""
    if quantize and integers_pay(x, Q_MAX):
        row_scale = exp2_int(exponent.to(torch.int32) - FRACTION_BITS)
        return activations.integer_linear(x, q, row_scale, True, out_dtype)
    weight = decode(q, exponent, activations.weight_dtype(x, quantize))
    return activations.linear(x, weight, True, quantize, out_dtype)


def linear_backward(dy: Tensor, x: Tensor, rstd: Tensor, q: Tensor, exponent: Tensor) -> Tensor:
    """Gradient of x; see `arbitor.ops.int8_table.int8_linear_backward`."""
    weight = decode(q, exponent, activations.backward_dtype(x))
    return activations.linear_backward(dy, x, rstd, weight, input_norm=True)


def update(q: Tensor, direction: Tensor, step: Tensor, bits: Tensor, active: Tensor | None) -> None:
    """q += floor(-step * sign(direction) + uniform[0, 1)), clamped to +-Q_MAX, in place.

    Args:
        q: int8 [V, D], changed.
        direction: float [V, D]; only its sign counts, and 0 moves nothing.
        step: fp32 scalar, length of a step in units of q.
        bits: int32 [V, D]; the low 16 bits round.
        active: bool [V]; other rows stay. None is all.
    """
    whole = (step * 65536).round().to(torch.int32)
    moves = (direction.sign().to(torch.int32).mul_(-whole) + (bits & 0xFFFF)) >> 16
    if active is not None:
        moves = moves.masked_fill_(~active[:, None], 0)
    q.copy_((q + moves).clamp_(-Q_MAX, Q_MAX))
