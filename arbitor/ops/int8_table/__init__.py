"""Byte tables in int8: `int8_gather`, `int8_linear`, `int8_linear_backward`, `int8_table_update`.

Shape letters: V rows, D dim, N tokens.
"""

import torch
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.int8_table import reference
from arbitor.ops.int8_table.reference import FRACTION_BITS, Q_MAX
from arbitor.ops.registry import register
from arbitor.ops.scalar import scalar

__all__ = [
    "FRACTION_BITS",
    "Q_MAX",
    "int8_gather",
    "int8_linear",
    "int8_linear_backward",
    "int8_table_update",
]


def int8_gather(q: Tensor, exponent: Tensor, ids: Tensor) -> Tensor:
    """Rows ids [...] of the table q [V, D], exponent [V] -> fp32 [..., D]."""
    return _gather(q, exponent, ids)


def int8_linear(
    x: Tensor, q: Tensor, exponent: Tensor, quantize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMS norm, int8 codes per token, product with the table.

    Args:
        x: float [N, D].
        q: int8 [V, D].
        exponent: int8 [V].
        quantize: int8 activations, else float.
        out_dtype: of y.

    Returns:
        y [N, V]; codes [N, D] (int8 when `quantize`); scale [N, 1]; rstd [N, 1].
    """
    return _linear(x, q, exponent, quantize, out_dtype)


def int8_linear_backward(dy: Tensor, x: Tensor, rstd: Tensor, q: Tensor, exponent: Tensor) -> Tensor:
    """Gradient [N, D] of x, in its dtype, from dy [N, V]; rounding passes straight through."""
    return _linear_backward(dy, x, rstd, q, exponent)


def int8_table_update(
    q: Tensor, direction: Tensor, step: float | Tensor, bits: Tensor, active: Tensor
) -> None:
    """q += floor(-step * sign(direction) + uniform), in place; see `reference.update`.

    `step` is a number or an fp32 scalar on the device.
    """
    _update(q, direction, scalar(step, q.device), bits, active)


_gather = register(
    "int8_gather(Tensor q, Tensor exponent, Tensor ids) -> Tensor",
    reference.gather,
    lambda q, exponent, ids: q.new_empty((*ids.shape, q.shape[1]), dtype=torch.float32),
)
_linear = register(
    "int8_linear(Tensor x, Tensor q, Tensor exponent, bool quantize, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.linear,
    lambda x, q, exponent, quantize, out_dtype: activations.linear_outputs(
        x, q.shape[0], quantize, out_dtype
    ),
)
_linear_backward = register(
    "int8_linear_backward(Tensor dy, Tensor x, Tensor rstd, Tensor q, Tensor exponent) -> Tensor",
    reference.linear_backward,
    lambda dy, x, rstd, q, exponent: torch.empty_like(x),
)
_update = register(
    "int8_table_update(Tensor(a!) q, Tensor direction, Tensor step, Tensor bits, Tensor active) -> ()",
    reference.update,
    lambda q, direction, step, bits, active: None,
)
