"""`factored_update` by forming some rows of the direction at a time.

Shape letters: R rows of the factors, O out, I in, E experts, P packed bytes a row.
"""

import torch
from torch import Tensor

from arbitor.ops.random_bits import reference as random_bits
from arbitor.ops.state_update import reference as state_update

WEIGHTS_AT_ONCE = 1 << 20


def update(
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
    """In place; see `arbitor.ops.factored_update.factored_update`."""
    experts, rows, columns = accumulator.shape
    size = max(1, WEIGHTS_AT_ONCE // max(1, columns))
    if experts == 1:  # without asking a GPU how many tokens it has
        counts = torch.arange(len(left), device=left.device)[:, None] < offsets
        left, right = torch.where(counts, left, 0), torch.where(counts, right, 0)
        ends = [len(left)]
    else:
        ends = offsets.tolist()
    for expert, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if begin == end:
            continue
        for first in range(0, rows, size):
            part = slice(first, min(first + size, rows))
            direction = left[begin:end, part].t() @ right[begin:end]
            skipped = (expert * rows + first) * columns
            stream = torch.stack([keys[0].to(torch.int64) + skipped, keys[1].to(torch.int64)])
            bits = random_bits.random_bits(stream.to(torch.int32), direction.numel()).view(direction.shape)
            flips += state_update.update(
                packed[expert, part], accumulator[expert, part], direction, bits, ok, step, span, threshold,
                rail, False,
            )  # fmt: skip
