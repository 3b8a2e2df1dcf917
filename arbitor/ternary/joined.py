"""A step of many matrices on a CPU, whatever their shapes: as one list of blocks of 160 weights.

Where a row is a whole number of blocks, momentum, votes, flips and packing go through blocks without regard
to whose they are, so that all matrices cost as many operations as one. Only the direction needs their shapes.
The integers are those of `arbitor.ternary.update`.

Shape letters: n matrices of one shape, O out, I in, N blocks.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.int8_table import reference as int8_table
from arbitor.ops.momentum import GROUP
from arbitor.ops.momentum import cpu as momentum
from arbitor.ops.random_bits import random_bits, skip
from arbitor.ops.rows import write_rows
from arbitor.ops.state_update import cpu as state_update
from arbitor.ops.trit_codec import BLOCK
from arbitor.ternary import rules
from arbitor.ternary.tensor import TernaryScaleTensor
from arbitor.ternary.update import LOOKAHEAD, StepNumbers, VoteConstants, relative_scale

BLOCKS_AT_ONCE = 1 << 11  # whose floats a core's cache holds
CHANGED = ("T_packed", "T_accum", "M", "M_exp")


def may_join(module: TernaryScaleTensor, constants: VoteConstants) -> bool:
    """Whether a matrix with a formed gradient may move in this way."""
    packed = module.T_packed
    on_cpu = packed.device.type == "cpu" and not uses_triton(packed)
    return on_cpu and module.in_features % BLOCK == 0 and not constants.votes_on_scales


def may_step_table(q: Tensor) -> bool:
    """Whether an int8 table [rows, columns] may step by `update_table`."""
    return q.device.type == "cpu" and not uses_triton(q) and q.dim() == 2 and q.shape[1] % GROUP == 0


def update_joined(
    tensors: Sequence[Mapping[str, Tensor]],
    gradients: Sequence[Tensor],
    groups: Sequence[int],
    keys: Tensor,
    numbers: StepNumbers,
    constants: VoteConstants,
) -> list[Tensor]:
    """A step of matrices; those whose gradient is all zero stay as they are.

    Args:
        tensors: of each matrix, `T_packed`, `E`, `T_accum` and, with momentum, `M` and `M_exp`; changed.
            Matrices of one shape stand together.
        gradients: float [O, I], finite.
        groups: of each matrix, weights along I that share an exponent.
        keys: int32 [matrices, 2], random stream of each.
        numbers: of the step.
        constants: of the step.

    Returns:
        int64 scalars: the flips of each matrix.
    """
    flips = [torch.zeros((), dtype=torch.int64) for _ in tensors]
    # A norm is quicker to find than whether any element is not 0, but may underflow.
    norms = torch.stack(list(torch._foreach_norm(list(gradients)))).tolist()
    active = [i for i, norm in enumerate(norms) if norm > 0 or bool(gradients[i].any())]
    if not active:
        return flips
    gradients = [gradients[i] for i in active]
    sizes = [gradient.numel() // BLOCK for gradient in gradients]
    direction = torch.empty((sum(sizes), BLOCK), dtype=torch.float32)
    own = [part.view(g.shape) for part, g in zip(direction.split(sizes), gradients, strict=True)]
    torch._foreach_copy_(own, gradients)
    kept = {
        key: [tensors[i][key].view(size, -1) for i, size in zip(active, sizes, strict=True)]
        for key in CHANGED
        if key in tensors[0]
    }
    state = {key: torch.cat(parts) for key, parts in kept.items()}
    block_keys = _block_keys(keys[active], sizes)
    drawn = [random_bits(block_keys[part], BLOCK) for part in _parts(len(direction))]
    if constants.momentum_bits:
        for part, bits in zip(_parts(len(direction)), drawn, strict=True):
            momentum.fold(
                direction[part],
                state["M"][part],
                state["M_exp"][part],
                bits,
                constants.momentum_bits,
                constants.beta,
                LOOKAHEAD,
            )
    _direct(direction, sizes, [tensors[i]["E"] for i in active], [groups[i] for i in active], own, constants)
    moved = [
        state_update.update(
            state["T_packed"][part],
            state["T_accum"][part],
            direction[part],
            bits,
            numbers.vote,
            constants.span,
            constants.threshold,
            constants.rail,
            constants.rule == "sign",
        )
        for part, bits in zip(_parts(len(direction)), drawn, strict=True)
    ]
    for key, parts in kept.items():
        torch._foreach_copy_(parts, list(state[key].split(sizes)))
    for i, part in zip(active, torch.cat(moved).split(sizes), strict=True):
        flips[i] = part.sum(dtype=torch.int64)
    return flips


def update_table(
    q: Tensor,
    momenta: Tensor,
    exponents: Tensor,
    gradient: Tensor,
    keys: Tensor,
    numbers: StepNumbers,
    beta: float,
) -> None:
    """A step of an int8 table; rows whose gradient is all zero stay as they are.

    Args:
        q: int8 [rows, columns], columns a multiple of 32; changed.
        momenta, exponents: its momentum, int8 and int16; changed.
        gradient: fp32 [rows, columns], finite; changed.
        keys: int32 [1, 2], its random stream.
        numbers: of the step.
        beta: of the momentum.
    """
    bits = random_bits(keys, q.numel()).view(q.shape)
    norms = torch.linalg.vector_norm(gradient, dim=-1)
    active = norms.nonzero()[:, 0]
    if len(active) < len(q):
        active = gradient.any(dim=-1).nonzero()[:, 0]
    if not len(active):
        return
    rows = [q, momenta, exponents]
    moved = rows
    if len(active) < len(q):
        moved = [tensor[active] for tensor in rows]
        gradient, bits = gradient[active], bits[active]
    momentum.fold(gradient, moved[1], moved[2], bits, 8, beta, LOOKAHEAD)
    int8_table.update(moved[0], gradient, numbers.table, bits, None)
    if moved is not rows:
        for tensor, part in zip(rows, moved, strict=True):
            write_rows(tensor, active, part)


def _direct(
    direction: Tensor,
    sizes: Sequence[int],
    exponents: Sequence[Tensor],
    groups: Sequence[int],
    own: Sequence[Tensor],
    constants: VoteConstants,
) -> None:
    """From folded gradients to directions, in place, all matrices of one shape at once.

    Args:
        direction: fp32 [N, 160] of all blocks.
        sizes: blocks of each matrix.
        exponents: int8 [O, G] of each.
        groups: of each.
        own: views of `direction`, [O, I] of each.
        constants: of the step.
    """
    rule = rules.get_rule(constants.rule)
    first = done = 0
    while first < len(own):
        kind = (own[first].shape, groups[first])
        last = first
        while last < len(own) and (own[last].shape, groups[last]) == kind:
            last += 1
        blocks = sum(sizes[first:last])
        matrices = direction[done : done + blocks].view(last - first, *own[first].shape)
        exponent = torch.stack(list(exponents[first:last]))
        if bool((exponent != exponent[:, :1, :1]).any()):  # else relative scales are 1
            relative = relative_scale(exponent, groups[first], matrices.shape[-1])
            assert relative is not None
            matrices.mul_(relative)
        matrices.copy_(rule(matrices))
        first, done = last, done + blocks


def _block_keys(keys: Tensor, sizes: Sequence[int]) -> Tensor:
    """int32 [N, 2]: streams whose element 0 is the first weight of each block."""
    number = torch.cat([torch.arange(size) for size in sizes])
    return skip(keys.repeat_interleave(torch.tensor(sizes), dim=0), number * BLOCK)


def _parts(blocks: int) -> Iterator[slice]:
    for first in range(0, blocks, BLOCKS_AT_ONCE):
        yield slice(first, first + BLOCKS_AT_ONCE)
