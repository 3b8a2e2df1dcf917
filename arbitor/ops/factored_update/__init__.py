"""Votes from a direction that is the product of two thin factors: `factored_update`.

Shape letters: R rows of the factors (tokens, sorted by expert), O out, I in, E experts, P packed bytes a row.
"""

from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.factored_update import reference
from arbitor.ops.registry import register
from arbitor.ops.scalar import scalar

__all__ = ["factored_update"]


def factored_update(
    packed: Tensor,
    accumulator: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    keys: Tensor,
    ok: Tensor,
    flips: Tensor,
    step: float | Tensor,
    span: int,
    threshold: int,
    rail: int,
) -> None:
    """`state_update` of every expert that has rows, with the direction left^T right over its rows.

    Where kernels run, no tensor of a matrix's size is formed.

    Args:
        packed: uint8 [E, O, P]; changed.
        accumulator: int8 [E, O, I]; changed.
        left: fp32 [R, O].
        right: fp32 [R, I].
        offsets: int32 [E], the end of each expert's rows; what is behind the last one's does not count.
        keys: int32 [2 or more], of which the first two are the random stream whose element 0 belongs to the
            first weight of expert 0.
        ok: bool scalar; False keeps everything.
        flips: int64 scalar, to which the flips are added.
        step: accumulator units for a direction of 1, a number or an fp32 scalar on the device.
        span, threshold, rail: as in `state_update`.
    """
    step = scalar(step, left.device)
    _update(packed, accumulator, left, right, offsets, keys, ok, flips, step, span, threshold, rail)


def _dispatch(
    packed: Tensor,
    accumulator: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    keys: Tensor,
    ok: Tensor,
    flips: Tensor,
    step: Tensor,
    span: int,
    threshold: int,
    rail: int,
) -> None:
    if uses_triton(packed):
        from arbitor.ops.factored_update import triton

        update = triton.update
    else:
        update = reference.update
    update(packed, accumulator, left, right, offsets, keys, ok, flips, step, span, threshold, rail)


_update = register(
    "factored_update(Tensor(a!) packed, Tensor(b!) accumulator, Tensor left, Tensor right, Tensor offsets, "
    "Tensor keys, Tensor ok, Tensor(c!) flips, Tensor step, int span, int threshold, int rail) -> ()",
    _dispatch,
    lambda *_: None,
)
