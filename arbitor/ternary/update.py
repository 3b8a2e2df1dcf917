"""How matrices move in a step: momentum, direction, votes, flips, a bounded piece at a time.

Everything works on batches of n matrices of one shape, in place. Elementwise work goes over slices of rows,
so that what is transient stays within a workspace whatever the size of a matrix.

Shape letters: O out, I in, P packed bytes a row, C momentum bytes a row, H momentum groups of a row, G scale
groups, R rows of a factor (tokens).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arbitor.ops.exponent import exp2_int
from arbitor.ops.factored_update import factored_update
from arbitor.ops.momentum import Weighed, momentum_fold_drawn, momentum_fold_weighed
from arbitor.ops.newton_schulz import iterates_narrow, newton_schulz
from arbitor.ops.random_bits import random_bits, skip
from arbitor.ops.state_update import Given, scale_update, state_update_drawn, state_update_of
from arbitor.ops.trit_codec import trit_unpack
from arbitor.ternary import rules

FACTORED_RULES = ("spectral", "row")  # whose direction needs no more than some rows at a time
WORKSPACE_BYTES_PER_WEIGHT = 40  # transient, of the weights that are worked on at once
LOOKAHEAD = 0.95  # weight of the momentum in the direction, Nesterov's form


@dataclass(frozen=True, kw_only=True)
class VoteConstants:
    """What stays the same from step to step.

    Attributes:
        rule: name of the direction's rule.
        span, threshold, rail: of the accumulators.
        momentum_bits: 8, 4, or 0 for none.
        beta: of the momentum.
        votes_on_scales: whether exponents move.
        scale_threshold: units in an octave.
        workspace_weights: weights that may be worked on at once.
    """

    rule: str
    span: int
    threshold: int
    rail: int
    momentum_bits: int
    beta: float
    votes_on_scales: bool
    scale_threshold: int
    workspace_weights: int


class StepNumbers:
    """What changes from step to step, on a device, so that a CUDA graph of a step reads the present values.

    Args:
        device: where to keep it.

    Attributes:
        count: int32 scalar, the low bits of the number of the step; which random streams it draws from.
        vote: fp32 scalar, accumulator units for a direction of 1.
        table: fp32 scalar, units of a byte table for a direction of 1.
        scale: fp32 scalar, units of the scale accumulator for a direction of 1.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.int32, device=device)
        self.vote, self.table, self.scale = (
            torch.zeros((), dtype=torch.float32, device=device) for _ in range(3)
        )

    def write(self, count: int, vote: float, table: float, scale: float) -> None:
        """Set all of them, without waiting for the device."""
        self.count.fill_((count + (1 << 31)) % (1 << 32) - (1 << 31))
        self.vote.fill_(vote)
        self.table.fill_(table)
        self.scale.fill_(scale)


@dataclass(kw_only=True)
class MatrixBatch:
    """Matrices of one shape with their state.

    Attributes:
        packed: uint8 [n, O, P], changed.
        exponent: int8 [n, O, G], changed if exponents move.
        accumulator: int8 [n, O, I], changed.
        scale_accumulator: int8 [n, O, G], changed if exponents move.
        momentum: codes [n, O, C] and exponents int16 [n, O, H], changed; or None.
        group: weights along I that share an exponent.
        keys: int32 [n, 2], random stream of each matrix.
        scale_keys: int32 [n, 2], that of its exponents; None if they stay.
        numbers: of the step, on the device of all of these.
    """

    packed: Tensor
    exponent: Tensor
    accumulator: Tensor
    scale_accumulator: Tensor
    momentum: tuple[Tensor, Tensor] | None
    group: int
    keys: Tensor
    scale_keys: Tensor | None
    numbers: StepNumbers

    @property
    def in_features(self) -> int:
        """I."""
        return self.accumulator.shape[-1]

    def slices(self, weights: int) -> Iterator[slice]:
        """Ranges of rows with at most `weights` weights in all n matrices, at least one row."""
        n, rows, columns = self.accumulator.shape
        size = max(1, weights // max(1, n * columns))
        for first in range(0, rows, size):
            yield slice(first, min(first + size, rows))

    def keys_of(self, rows: slice) -> Tensor:
        """int32 [n, 2], random streams of these rows."""
        return skip(self.keys, rows.start * self.in_features) if rows.start else self.keys


def update_dense(
    batch: MatrixBatch, gradient: Tensor, active: Tensor, constants: VoteConstants, *, by_row: bool = False
) -> Tensor:
    """A step from formed gradients.

    Args:
        batch: what moves.
        gradient: fp32 [n, O, I]; overwritten.
        active: bool [n, 1, 1], or of single rows [n, O, 1]; the others stay as they are.
        constants: of the step.
        by_row: rows are entries of a table: what is not active must not steer the others either.

    Returns:
        int64 [n]: flips.
    """
    direction = gradient
    if batch.momentum is not None:
        direction = _folded(batch, gradient, active, constants)
    if by_row:
        direction.masked_fill_(~active, 0)
    relative = relative_scale(batch.exponent, batch.group, batch.in_features)
    if relative is not None:
        direction.mul_(relative)
    if constants.votes_on_scales:
        update_scales(batch, direction, active, constants)
    direction = rules.get_rule(constants.rule)(direction)
    flips = torch.zeros(len(direction), dtype=torch.int64, device=direction.device)
    for rows in batch.slices(constants.workspace_weights):
        flips += _vote(batch, direction[:, rows], rows, _of_rows(active, rows), constants)
    return flips


@dataclass(kw_only=True)
class ApartBatch:
    """Matrices of one shape with their state, each in tensors of its own.

    Attributes:
        packed, accumulator: of each matrix uint8 [O, P] and int8 [O, I], changed.
        momentum: of each matrix codes [O, C] and exponents int16 [O, H], changed; empty for none.
        exponent: int8 [n, O, G].
        group: weights along I that share an exponent.
        keys: int32 [n, 2], random stream of each matrix.
        numbers: of the step.
    """

    packed: list[Tensor]
    accumulator: list[Tensor]
    momentum: list[tuple[Tensor, Tensor]]
    exponent: Tensor
    group: int
    keys: Tensor
    numbers: StepNumbers


def update_apart(
    batch: ApartBatch, gradients: Sequence[Tensor], active: Tensor, constants: VoteConstants
) -> Tensor:
    """`update_dense` with the rule spectral and exponents that stay, where kernels run: in few passes.

    Weights and state are read and written where they lie. The direction is kept in what the iteration
    multiplies in, bf16 on a GPU, until votes are made of it.

    Args:
        batch: what moves.
        gradients: float [O, I] of each, of any dtype; kept.
        active: bool [n, 1, 1]; the others stay as they are.
        constants: of the step.

    Returns:
        int64 [n]: flips.
    """
    n, (rows, columns) = len(gradients), gradients[0].shape
    narrow = iterates_narrow(gradients[0])
    device = active.device
    dtype = torch.bfloat16 if narrow else torch.float32
    direction = torch.empty((n, rows, columns), dtype=dtype, device=device)
    largest = torch.zeros(n, dtype=torch.int32, device=device)
    weights = _relative(batch.exponent)
    if narrow:
        # The largest numbers of fp32 are infinite in bf16, and their halves are not. To the iteration, all
        # powers of two that a matrix is multiplied by are the same.
        weights.mul_(0.5)
    if batch.momentum:
        for i, (gradient, (codes, exponent)) in enumerate(zip(gradients, batch.momentum, strict=True)):
            momentum_fold_weighed(
                gradient[None], codes[None], exponent[None], batch.keys, active,
                constants.momentum_bits, constants.beta, LOOKAHEAD,
                Weighed(direction, weights, batch.group, largest, i),
            )  # fmt: skip
    else:
        for i, gradient in enumerate(gradients):
            torch.mul(gradient, _spread(weights[i], batch.group, columns), out=direction[i])
        magnitude = torch.linalg.vector_norm(direction, math.inf, dim=(-2, -1), dtype=torch.float32)
        largest = magnitude.view(torch.int32)
    if narrow:
        direction, unit = newton_schulz(direction, largest), rules.spectral_scale(rows, columns)
    else:
        direction, unit = rules.spectral(direction), 1.0
    flips = torch.zeros(n, dtype=torch.int64, device=device)
    given = Given(direction.contiguous(), unit, batch.keys, active, batch.numbers.vote, flips)
    for i, (packed, accumulator) in enumerate(zip(batch.packed, batch.accumulator, strict=True)):
        state_update_of(
            packed[None],
            accumulator[None],
            given,
            i,
            constants.span,
            constants.threshold,
            constants.rail,
            reset=False,
        )
    return flips


def transient_bytes(rows: int, columns: int) -> int:
    """About what `update_apart` takes for each matrix while it works, with its gradient if that is formed."""
    side = min(rows, columns)
    return 8 * rows * columns + 4 * side * side


@dataclass(kw_only=True)
class FactoredBatch:
    """Matrices of one shape, or those of experts, with gradients of few tokens, left^T right.

    Attributes:
        packed: n tensors uint8 [E, O, P], changed; E is 1 but for experts.
        accumulator: n tensors int8 [E, O, I], changed.
        exponent: int8 [n, O], or for experts [R, O], those of each token's expert.
        left: fp32 [n, R, O], output gradients; overwritten.
        right: fp32 [n, R, I], activations.
        offsets: int32 [E], the end of each expert's tokens.
        keys: int32 [n, 2], random stream of each of the n tensors.
        owner: int64 [R], each token's expert, E if it has none; None where E is 1.
        numbers: of the step.
    """

    packed: list[Tensor]
    accumulator: list[Tensor]
    exponent: Tensor
    left: Tensor
    right: Tensor
    offsets: Tensor
    keys: Tensor
    owner: Tensor | None
    numbers: StepNumbers

    def same(self) -> Tensor:
        """fp64 [1, R, R]: 1 where two tokens belong to the same matrix."""
        tokens = self.left.shape[1]
        if self.owner is None:
            return self.left.new_ones((1, tokens, tokens), dtype=torch.float64)
        has_one = self.owner < len(self.offsets)
        return ((self.owner[:, None] == self.owner) & has_one)[None].to(torch.float64)

    def weigh(self) -> None:
        """Multiply output gradients by 2^(E - max E of the matrix)."""
        if self.exponent.shape[-1] == 1:  # of one row, where it is 1
            return
        exponent = self.exponent.to(torch.int32)
        scale = exp2_int(exponent - exponent.amax(dim=-1, keepdim=True))
        self.left.mul_(scale[:, None] if self.owner is None else scale)


def update_factored(batches: Sequence[FactoredBatch], ok: Tensor, constants: VoteConstants) -> Tensor:
    """A step without momentum, from gradients of few tokens that are not formed.

    For the rules of `FACTORED_RULES`.

    Args:
        batches: what moves, with one exponent a row; all of the same number of tokens R.
        ok: bool scalar; False keeps everything.
        constants: of the step.

    Returns:
        int64, the flips of all tensors, batch after batch.
    """
    for batch in batches:
        batch.weigh()
    right_grams = [rules.gram(batch.right) for batch in batches]
    sames = [batch.same() for batch in batches]
    if constants.rule == "spectral":
        counts = [len(batch.left) for batch in batches]
        coefficients = rules.spectral_coefficients(
            torch.cat([rules.gram(batch.left) for batch in batches]),
            torch.cat(right_grams),
            torch.cat([same.expand(n, -1, -1) for same, n in zip(sames, counts, strict=True)]),
        ).to(torch.float32)
        for batch, part in zip(batches, coefficients.split(counts), strict=True):
            scale = max(batch.left.shape[-1], batch.right.shape[-1]) ** 0.5
            right = batch.right
            batch.right = torch.baddbmm(right, part, right, beta=0, alpha=scale)
    else:
        assert constants.rule == "row"
        for batch, gram, same in zip(batches, right_grams, sames, strict=True):
            rules.bring_rows_to_unit_rms(batch.left, gram, same, batch.right.shape[-1])
    count = sum(len(batch.left) for batch in batches)
    # Two numbers a matrix, so that all lie alike in memory: kernels are compiled for how they do.
    flips = torch.zeros((count, 2), dtype=torch.int64, device=ok.device)[:, 0]
    _vote_factored(batches, flips, ok, constants)
    return flips


def _vote_factored(
    batches: Sequence[FactoredBatch], flips: Tensor, ok: Tensor, constants: VoteConstants
) -> None:
    places = iter(flips.unbind())
    for batch in batches:
        keys_n4 = nn.functional.pad(batch.keys, (0, 2))
        matrices = zip(batch.packed, batch.accumulator, batch.left, batch.right, keys_n4, strict=True)
        for packed, accumulator, left, right, keys in matrices:
            factored_update(
                packed,
                accumulator,
                left,
                right,
                batch.offsets,
                keys,
                ok,
                next(places),
                batch.numbers.vote,
                constants.span,
                constants.threshold,
                constants.rail,
            )


def update_scales(batch: MatrixBatch, weighted: Tensor, active: Tensor, constants: VoteConstants) -> None:
    """Votes on exponents: the gradient of log2 of each group's scale, with RMS 1 in a matrix.

    Args:
        batch: what moves.
        weighted: fp32 [n, O, I], direction of the weights times their scale.
        active: bool, as in `update_dense`.
        constants: of the step.
    """
    assert batch.scale_keys is not None
    trits = trit_unpack(batch.packed, batch.in_features)
    groups = batch.exponent.shape[-1]
    padded = nn.functional.pad(weighted * trits, (0, groups * batch.group - batch.in_features))
    gradient = padded.unflatten(-1, (groups, batch.group)).sum(dim=-1)
    largest = gradient.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    gradient = gradient / largest
    gradient = gradient * gradient.square().mean(dim=(-2, -1), keepdim=True).clamp_min(1e-30).rsqrt()
    bits = random_bits(batch.scale_keys, gradient[0].numel()).view(gradient.shape)
    scale_update(
        batch.exponent,
        batch.scale_accumulator,
        gradient,
        bits,
        active,
        batch.numbers.scale,
        constants.scale_threshold,
    )


def relative_scale(exponent: Tensor, group: int, in_features: int) -> Tensor | None:
    """2^(E - max E of the matrix) for every weight; None for a single row with one exponent, where it is 1.

    Args:
        exponent: int8 [..., O, G].
        group: weights that share an exponent.
        in_features: I.

    Returns:
        fp32 [..., O, 1] or [..., O, I].
    """
    if exponent.shape[-2:] == (1, 1):
        return None
    return _spread(_relative(exponent), group, in_features)


def _relative(exponent: Tensor) -> Tensor:
    """2^(E - max E of the matrix) as fp32 [..., O, G] of int8 [..., O, G]."""
    largest = exponent.amax(dim=(-2, -1), keepdim=True)
    return exp2_int(exponent.to(torch.int32) - largest.to(torch.int32))


def _spread(scale: Tensor, group: int, in_features: int) -> Tensor:
    """[..., O, I] of [..., O, G], or [..., O, 1] where a row is one group."""
    return scale if scale.shape[-1] == 1 else scale.repeat_interleave(group, dim=-1)[..., :in_features]


def _of_rows(active: Tensor, rows: slice) -> Tensor:
    """The part of bool [n, 1, 1] or [n, O, 1] that belongs to some rows."""
    return active if active.shape[-2] == 1 else active[:, rows]


def _folded(batch: MatrixBatch, gradient: Tensor, active: Tensor, constants: VoteConstants) -> Tensor:
    """Momentum, in place; the direction that comes of it and the gradient, which is overwritten."""
    parts = list(batch.slices(constants.workspace_weights))
    if len(parts) == 1:
        return _fold(batch, gradient, parts[0], active, constants)
    for rows in parts:
        gradient[:, rows] = _fold(batch, gradient[:, rows], rows, active, constants)
    return gradient


def _fold(
    batch: MatrixBatch, gradient: Tensor, rows: slice, active: Tensor, constants: VoteConstants
) -> Tensor:
    """Momentum of some rows, in place; their direction, a new tensor."""
    assert batch.momentum is not None
    codes, exponent = (state[:, rows] for state in batch.momentum)
    return momentum_fold_drawn(
        gradient,
        codes,
        exponent,
        batch.keys_of(rows),
        _of_rows(active, rows),
        constants.momentum_bits,
        constants.beta,
        LOOKAHEAD,
    )


def _vote(
    batch: MatrixBatch, direction: Tensor, rows: slice, active: Tensor, constants: VoteConstants
) -> Tensor:
    """Votes and flips of some rows [n, rows, I], in place; flips int64 [n]."""
    return state_update_drawn(
        batch.packed[:, rows],
        batch.accumulator[:, rows],
        direction,
        batch.keys_of(rows),
        active,
        batch.numbers.vote,
        constants.span,
        constants.threshold,
        constants.rail,
        constants.rule == "sign",
    )
