"""A bounded list of scored edges: merging what a batch saw, and the best edges that leave a node.

The list is three vectors, sorted by (source ascending, score descending, destination ascending); entries
that hold no edge stand at the end, with `UNUSED` as their source, destination 0 and score 0. Every shape
depends on the capacity and the number of pairs only, and the device is never asked for a value.

Shape letters: C capacity, P pairs, L = C + P, K neighbours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

UNUSED = (1 << 31) - 1  # source of an entry without an edge; sorts behind every node
MAX_SCORE = 127
FRACTION_BITS = 16  # of the step of a score ahead of its rounding

_NODE_BITS = 31


def merge(
    src: Tensor,
    dst: Tensor,
    score: Tensor,
    pair_src: Tensor,
    pair_dst: Tensor,
    bits: Tensor,
    rate_bits: int,
    ok: Tensor,
) -> None:
    """Scores move towards the batch's frequencies, in place; see `arbitor.ops.edge_list.edge_list_merge`."""
    capacity = len(src)
    key_L = torch.cat([_keys(src, dst), _keys(pair_src, pair_dst)])
    key_L, order_L = torch.sort(key_L, stable=True)  # an edge of the list comes ahead of its pairs
    source_L = key_L >> _NODE_BITS
    is_pair_L = (order_L >= capacity).to(torch.int64)
    pairs_before = F.pad(is_pair_L.cumsum(0), (1, 0))
    taken_L = _within(pairs_before, key_L)
    left_L = _within(pairs_before, source_L)
    old_L = F.pad(score.to(torch.int64), (0, len(pair_src)))[order_L]
    step_L = torch.div(
        (MAX_SCORE * taken_L - old_L * left_L) << FRACTION_BITS,
        left_L.clamp_min(1) << rate_bits,
        rounding_mode="floor",
    )
    fraction_L = bits & ((1 << FRACTION_BITS) - 1)
    new_L = old_L + ((step_L + fraction_L) >> FRACTION_BITS)
    new_L[1:].masked_fill_(key_L[1:] == key_L[:-1], 0)  # an edge's first entry stands for all of them
    # Stable sorts: among equal scores the smaller key stays, and within a source the order of scores.
    best_C = torch.sort(new_L.to(torch.int8), descending=True, stable=True).indices[:capacity]
    kept_C = new_L[best_C]
    source_C = source_L[best_C].masked_fill(kept_C == 0, UNUSED)
    target_C = (key_L[best_C] & UNUSED).masked_fill(kept_C == 0, 0)
    source_C, order_C = torch.sort(source_C, stable=True)
    for buffer, value_C in ((src, source_C), (dst, target_C[order_C]), (score, kept_C[order_C])):
        buffer.copy_(torch.where(ok, value_C.to(buffer.dtype), buffer))


def look_up(src: Tensor, dst: Tensor, score: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best edges that leave each node; see `arbitor.ops.edge_list.edge_list_look_up`."""
    first = torch.searchsorted(src, ids.to(torch.int32))
    slot = first[..., None] + torch.arange(count, device=src.device)
    beyond = slot >= len(src)
    slot = slot.clamp_max(len(src) - 1)
    other = beyond | (src[slot] != ids[..., None])
    return dst[slot].to(torch.int64).masked_fill(other, 0), score[slot].masked_fill(other, 0)


def _keys(src: Tensor, dst: Tensor) -> Tensor:
    """int64 that sort as (source, destination)."""
    return (src.to(torch.int64) << _NODE_BITS) | dst


def _within(before: Tensor, sorted_L: Tensor) -> Tensor:
    """For each element of a sorted vector, how much is counted among its equals.

    `before` [L + 1] counts what lies ahead of a position.
    """
    last = torch.searchsorted(sorted_L, sorted_L, right=True)
    return before[last] - before[torch.searchsorted(sorted_L, sorted_L)]
