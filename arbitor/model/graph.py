"""The motif graph: which motif tends to follow which, and messages from a motif's likely successors.

An edge a -> b says that motif b follows motif a (positions t and t + 1 of one text); its score estimates
127 * P(b | a). The list of edges is integer state that only an optimizer step changes, so within a forward it
is a constant and a position's message depends on its own motif alone.

Shape letters: B batch, N positions, M rows (positions of any texts), K neighbours, H heads, C code dims,
D dim.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.model.moe import Permute
from arbitor.ops.edge_list import MAX_SCORE, UNUSED, edge_list_look_up, edge_list_merge
from arbitor.ternary import IntegerCounters, TernaryLinear
from arbitor.ternary.counters import RandomBits
from arbitor.ternary.first_rows import on_first_rows

RATE_BITS = 4  # a batch counts 1/16 in the average
_BUFFERS = ("src", "dst", "score")


class Neighbours(NamedTuple):
    """The likely successors of the motif at each of M positions.

    Attributes:
        codes: float [M, K, C], their code vectors.
        prior: fp32 [M, K], logarithm of the estimated P(successor | motif).
        valid: bool [M, K], False where there are fewer than K.
    """

    codes: Tensor
    prior: Tensor
    valid: Tensor

    def rows(self, index_M: Tensor) -> "Neighbours":
        """Those of some positions: int64 [M], numbers of positions with the batch flattened."""
        return Neighbours(*(tensor[index_M] for tensor in self))

    def permuted(self, order_M: Tensor, inverse_M: Tensor) -> "Neighbours":
        """Those of all positions in another order, int64 [M]; `inverse_M` leads back."""
        return Neighbours(*(Permute.apply(tensor, order_M, inverse_M) for tensor in self))


class MotifGraph(IntegerCounters):
    """A bounded list of edges between motifs, and attention over the neighbours that it gives.

    Attributes:
        src, dst: int32 buffers [capacity], score int8 [capacity]; see `arbitor.ops.edge_list`.

    Args:
        config: `graph_edges` edges, `graph_neighbours` K, `graph_heads` H.
        code_dim: width of a motif's code vector.
        device: where to make it.
    """

    src: Tensor
    dst: Tensor
    score: Tensor

    def __init__(self, config: ModelConfig, code_dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.capacity = config.graph_edges
        self.num_motifs = config.codebook_rows or 3**config.motif_trits
        self.num_neighbours = config.graph_neighbours
        self.num_heads = config.graph_heads
        self.code_dim = code_dim
        width = self.num_heads * code_dim
        self.query = TernaryLinear(config.dim, width, tscale=config.tscale, device=device)
        self.out = TernaryLinear(width, config.dim, tscale=config.tscale, device=device)
        unused = torch.full((self.capacity,), UNUSED, dtype=torch.int32, device=device)
        self.register_buffer("src", unused)
        self.register_buffer("dst", torch.zeros_like(unused))
        self.register_buffer("score", torch.zeros_like(unused, dtype=torch.int8))
        self._noted: list[tuple[Tensor, Tensor]] = []

    def look_up(self, motif_BN: Tensor, code_vectors: Callable[[Tensor], Tensor]) -> Neighbours:
        """The neighbours of every position's motif; notes the batch's transitions for the next step.

        Args:
            motif_BN: int64 [B, N], motifs of the positions of B texts.
            code_vectors: gives the code vectors, float [..., C], of motifs int64 [...].

        Returns:
            Neighbours of M = B N rows.
        """
        if self.noting:
            motif_BN = motif_BN.detach()
            pairs = motif_BN[:, :-1].flatten(), motif_BN[:, 1:].flatten()
            self._noted.append((pairs[0].to(torch.int32), pairs[1].to(torch.int32)))
        neighbour_MK, score_MK = edge_list_look_up(
            self.src, self.dst, self.score, motif_BN.flatten(), self.num_neighbours
        )
        return Neighbours(code_vectors(neighbour_MK), _log_table(score_MK), score_MK > 0)

    def messages(self, s_MD: Tensor, neighbours: Neighbours, count: Tensor | None = None) -> Tensor:
        """What a position hears from the successors of its motif, weighed by what it asks for.

        Each head's query is a vector in the space of codes; a neighbour's weight is the softmax of
        query . code / sqrt(C) + log P over the neighbours that there are.

        Args:
            s_MD: state of M positions.
            neighbours: those of the same positions.
            count: int32 [1], how many of the first rows' messages are wanted; None are all. See
                `on_first_rows`.

        Returns:
            [M, D], exactly 0 for a position without neighbours.
        """
        query_MHC = on_first_rows(self.query, s_MD, count).unflatten(-1, (self.num_heads, self.code_dim))
        code_MKC = neighbours.codes.to(query_MHC.dtype)
        logits_MHK = (query_MHC @ code_MKC.mT) * self.code_dim**-0.5 + neighbours.prior[:, None]
        missing_M1K = ~neighbours.valid[:, None]
        # Not -inf, which would make the softmax of a position without neighbours NaN.
        logits_MHK = logits_MHK.masked_fill(missing_M1K, torch.finfo(logits_MHK.dtype).min)
        share_MHK = logits_MHK.softmax(dim=-1).masked_fill(missing_M1K, 0)
        return on_first_rows(self.out, (share_MHK.to(code_MKC.dtype) @ code_MKC).flatten(1), count)

    def advance(self, ok: Tensor, random_bits: RandomBits) -> None:
        """Merge the noted transitions into the list; with `ok` False it stays as it is."""
        if not self._noted:
            return
        pair_src, pair_dst = (torch.cat(parts) for parts in zip(*self._noted, strict=True))
        bits = random_bits("score", self.capacity + len(pair_src))
        edge_list_merge(self.src, self.dst, self.score, pair_src, pair_dst, bits, RATE_BITS, ok)
        self.forget()

    def forget(self) -> None:
        """Drop the noted transitions."""
        self._noted = []

    def metrics(self, neighbours: Neighbours) -> dict[str, Tensor]:
        """Scalars on the device: `graph_edges` in use, and `graph_reach`, the share of the positions of a
        forward that have a neighbour.
        """
        return {
            "graph_edges": (self.score > 0).sum(),
            "graph_reach": neighbours.valid[:, 0].float().mean(),
        }

    def check(self) -> None:
        """Raise UserError if the buffers hold no list of edges between this graph's motifs."""
        if self.src.device.type == "meta":
            return
        src, dst, score = (buffer.to(torch.int64) for buffer in (self.src, self.dst, self.score))
        used = src != UNUSED
        legal = torch.where(
            used,
            (src >= 0) & (src < self.num_motifs) & (dst >= 0) & (dst < self.num_motifs) & (score > 0),
            (dst == 0) & (score == 0),
        )
        same, last = src[1:] == src[:-1], used[1:]
        ordered = (src[1:] > src[:-1]) | (
            same & ((score[1:] < score[:-1]) | ((score[1:] == score[:-1]) & (dst[1:] > dst[:-1])))
        )
        if not bool(legal.all()) or not bool((ordered | (same & ~last)).all()):
            raise UserError("src, dst and score are no sorted list of edges: the data is damaged")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        for name in _BUFFERS:
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                # Copying would round floats to integers without a word.
                error_msgs.append(f"{prefix}{name} is {given.dtype}, expected {own.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        try:
            self.check()
        except UserError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")


def _log_table(score: Tensor) -> Tensor:
    """log(score / 127), fp32; of a score of 0 that of 1.

    Looked up, since a logarithm that is computed alone may differ in its last bit from one among others.
    """
    table = torch.arange(MAX_SCORE + 1, dtype=torch.float32, device=score.device).clamp_min(1).log()
    return (table - math.log(MAX_SCORE))[score.to(torch.int64)]
