"""A bounded list of scored edges: `edge_list_merge` and `edge_list_look_up`.

Shape letters: C capacity, P pairs, K neighbours.
"""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.edge_list import reference
from arbitor.ops.edge_list.reference import MAX_SCORE, UNUSED
from arbitor.ops.registry import register

__all__ = ["MAX_SCORE", "UNUSED", "edge_list_look_up", "edge_list_merge"]


def edge_list_merge(
    src: Tensor,
    dst: Tensor,
    score: Tensor,
    pair_src: Tensor,
    pair_dst: Tensor,
    bits: Tensor,
    rate_bits: int,
    ok: Tensor,
) -> None:
    """Move the scores of a list towards the frequencies of a batch, in place.

    An edge's score estimates 127 * P(destination | source). With n pairs of the batch that start at a source
    and c of them that end at the edge's destination, its score s (0 for an edge that is not in the list)
    moves by

        x = floor(2^16 * (127 c - s n) / (2^rate_bits * n)),    s <- s + floor((x + (bits & 0xFFFF)) / 2^16),

    which is the step (127 c/n - s) / 2^rate_bits of an exponential moving average, rounded stochastically; it
    cannot leave 0...127. Edges whose source is in no pair keep their score. Then edges with score 0 are
    dropped, and of the others the `C` with the highest score are kept; of equal scores, those with the
    smallest (source, destination). The random bits of an edge are those at the place of its first entry in
    list and pairs together, sorted by (source, destination).

    Args:
        src, dst: int32 [C], sorted by (source, score descending, destination), unused entries (`UNUSED`, 0)
            at the end; changed.
        score: int8 [C]; changed.
        pair_src, pair_dst: int32 [P], nodes in 0...2^31 - 2; fewer than 2^31 pairs.
        bits: int32 [C + P], of which the low 16 round.
        rate_bits: the average's weight is 2^-rate_bits.
        ok: bool scalar; where False nothing changes.

    Raises:
        ValueError: a length or a dtype that is not the one above.
    """
    _require("src, dst and score", (src, dst, score), (torch.int32, torch.int32, torch.int8), len(src))
    _require("pair_src and pair_dst", (pair_src, pair_dst), (torch.int32, torch.int32), len(pair_src))
    _require("bits", (bits,), (torch.int32,), len(src) + len(pair_src))
    _merge(src, dst, score, pair_src, pair_dst, bits, rate_bits, ok)


def edge_list_look_up(
    src: Tensor, dst: Tensor, score: Tensor, ids: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` edges with the highest scores that leave each node.

    Args:
        src, dst, score: the list, as in `edge_list_merge`, with at least one entry.
        ids: integers [...], nodes.
        count: K.

    Returns:
        Destinations int64 [..., K] and scores int8 [..., K], highest first; both 0 where there are fewer
        edges (no edge has a score of 0).
    """
    _require("src, dst and score", (src, dst, score), (torch.int32, torch.int32, torch.int8), len(src))
    return _look_up(src, dst, score, ids, count)


def _require(names: str, tensors: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...], length: int) -> None:
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        if tensor.dtype != dtype or tensor.shape != (length,):
            given = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors)
            wanted = ", ".join(str(d) for d in dtypes)
            raise ValueError(f"{names} must be vectors of length {length} ({wanted}), got {given}")


def _kernels(src: Tensor) -> Any:
    """The module whose functions work on this list."""
    if uses_triton(src):
        from arbitor.ops.edge_list import triton

        return triton
    return reference


_merge = register(
    "edge_list_merge(Tensor(a!) src, Tensor(b!) dst, Tensor(c!) score, Tensor pair_src, Tensor pair_dst, "
    "Tensor bits, int rate_bits, Tensor ok) -> ()",
    lambda src, *rest: _kernels(src).merge(src, *rest),
    lambda src, dst, score, pair_src, pair_dst, bits, rate_bits, ok: None,
)
_look_up = register(
    "edge_list_look_up(Tensor src, Tensor dst, Tensor score, Tensor ids, int count) -> (Tensor, Tensor)",
    lambda src, *rest: _kernels(src).look_up(src, *rest),
    lambda src, dst, score, ids, count: (
        ids.new_empty((*ids.shape, count), dtype=torch.int64),
        score.new_empty((*ids.shape, count)),
    ),
)
