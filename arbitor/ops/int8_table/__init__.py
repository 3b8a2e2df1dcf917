"""Byte tables in int8: `int8_gather`, `int8_linear`, `int8_linear_backward`, `int8_table_update`.

Shape letters: V rows, D dim, N tokens.
"""

import torch
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.int8_table import reference
from arbitor.ops.int8_table.reference import FRACTION_BITS, Q_MAX

__all__ = [
    "FRACTION_BITS",
    "Q_MAX",
    "int8_gather",
    "int8_linear",
    "int8_linear_backward",
    "int8_table_update",
]


@torch.library.custom_op("arbitor::int8_gather", mutates_args=())
def int8_gather(q: Tensor, exponent: Tensor, ids: Tensor) -> Tensor:
    """Rows ids [...] of the table q [V, D], exponent [V] -> fp32 [..., D]."""
    return reference.gather(q, exponent, ids)


@int8_gather.register_fake
def _(q: Tensor, exponent: Tensor, ids: Tensor) -> Tensor:
    return q.new_empty((*ids.shape, q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("arbitor::int8_linear", mutates_args=())
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
    return reference.linear(x, q, exponent, quantize, out_dtype)


@int8_linear.register_fake
def _(
    x: Tensor, q: Tensor, exponent: Tensor, quantize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = activations.compute_dtype(x)
    per_token = x.new_empty((x.shape[0], 1), dtype=dtype)
    codes = x.new_empty(x.shape, dtype=torch.int8 if quantize else dtype)
    return (
        x.new_empty((x.shape[0], q.shape[0]), dtype=out_dtype),
        codes,
        per_token,
        per_token.clone(),
    )


@torch.library.custom_op("arbitor::int8_linear_backward", mutates_args=())
def int8_linear_backward(dy: Tensor, x: Tensor, rstd: Tensor, q: Tensor, exponent: Tensor) -> Tensor:
    """Gradient [N, D] of x, in its dtype, from dy [N, V]; rounding passes straight through."""
    return reference.linear_backward(dy, x, rstd, q, exponent)


@int8_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, rstd: Tensor, q: Tensor, exponent: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("arbitor::int8_table_update", mutates_args=("q",))
def int8_table_update(q: Tensor, direction: Tensor, step: float, bits: Tensor, active: Tensor) -> None:
    """q += floor(-step * sign(direction) + uniform), in place; see `reference.update`."""
    reference.update(q, direction, step, bits, active)


@int8_table_update.register_fake
def _(q: Tensor, direction: Tensor, step: float, bits: Tensor, active: Tensor) -> None:
    return None
