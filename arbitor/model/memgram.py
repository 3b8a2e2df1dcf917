"""MemGram: a memory that is looked up by the last two and three bytes (or motifs), by hashing.

After Engram (DeepSeek-AI 2026, "Conditional Memory via Scalable Lookup", sections 2.2 and 2.3), with rows of
trits.

Shape letters: B batch, L ids (N + 2), N positions, T tables (heads for 2-grams, then for 3-grams), W width of
a row, D dim.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.norm import rms_norm
from arbitor.model.precision import sigmoid
from arbitor.model.vocab import PAD
from arbitor.ops.ngram_hash import ngram_hash
from arbitor.ops.trit_codec import ternary_decode, trit_pack
from arbitor.ops.trit_gather import ternary_gather
from arbitor.ternary import TernaryEmbeddingTable, TernaryLinear
from arbitor.ternary.capture import RowCapture, wants_weights
from arbitor.ternary.layers import root_of
from arbitor.ternary.stream import read_stream
from arbitor.ternary.tensor import RESIDUAL_UNITS


class _Fetch(torch.autograd.Function):
    """Rows of a table, decoded on a device that need not be the table's."""

    @staticmethod
    def forward(
        ctx: Any, root: Tensor | None, rows: Tensor, table: "MemoryTable", device: torch.device
    ) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(rows)
        if table.T_packed.device == device:
            layout = table.in_features, table.group, torch.float32
            return ternary_gather(table.T_packed, table.E, rows, *layout)
        flat = rows.flatten()
        # Packed rows cross over, a tenth of the bytes of decoded ones.
        packed, exponent = (part[flat].to(device) for part in (table.T_packed, table.E))
        decoded = ternary_decode(packed, exponent, table.in_features, table.group, torch.float32)
        return decoded.view(*rows.shape, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (rows,) = ctx.saved_tensors
        capture = ctx.table.capture
        if isinstance(capture, RowCapture) and wants_weights(ctx):
            capture.add_rows(rows.flatten(), dy.flatten(0, -2))
        return None, None, None, None


class MemoryTable(TernaryEmbeddingTable):
    """The rows of all tables, one table after the other.

    They start as zeros, so that an n-gram adds nothing until training has met its rows; their accumulators
    start anywhere between two flips, so that even the first votes flip some of a row's trits.

    Args:
        num_embeddings, dim, tscale, device: as in `TernaryEmbeddingTable`.
        host: stay in host memory whatever device the model moves to.
    """

    def __init__(
        self, num_embeddings: int, dim: int, *, tscale: str, host: bool, device: torch.device | None = None
    ) -> None:
        if host and (device is None or device.type != "meta"):
            device = torch.device("cpu")
        super().__init__(num_embeddings, dim, tscale=tscale, sparse=True, device=device)
        self.host = host

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Rows of zeros, accumulators spread evenly over one trit, E = 0."""
        if self.T_packed.is_meta:
            return
        self.T_packed.copy_(trit_pack(torch.zeros((1, self.in_features), dtype=torch.int8)))
        self.E.zero_()
        residual = torch.empty(
            (self.out_features, self.in_features), dtype=torch.int8, device=self.T_packed.device
        )
        limit = RESIDUAL_UNITS // 2 - 1
        self.T_residual = residual.random_(-limit, limit + 1)

    def fetch(self, rows: Tensor, device: torch.device) -> Tensor:
        """rows int64 [...] -> fp32 [..., W] on `device`; the gradient is captured by row."""
        return _Fetch.apply(root_of(self), rows.to(self.T_packed.device), self, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryTable":
        """`Module.to` and its kin: a table in host memory goes nowhere but to the meta device and back."""
        return super()._apply(_staying(fn) if self.host else fn, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.host:  # with assign=True the given tensors become the parameters
            state_dict = {
                name: value.cpu() if name in (f"{prefix}T_packed", f"{prefix}E") else value
                for name, value in state_dict.items()
            }
        super()._load_from_state_dict(state_dict, prefix, *args)


def _staying(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `fn` does, unless it moves to an accelerator: nothing of a table's size is made there."""

    def stay(tensor: Tensor) -> Tensor:
        if fn(tensor.new_empty(0)).device.type in ("cpu", "meta"):
            return fn(tensor)
        return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor

    return stay


class MemGram(nn.Module):
    """Adds gate * value to the residual stream, both from the hashed rows of a position's n-grams.

    With e the rows of all heads side by side, k = key(e) and v = value(e), the gate is
    sigmoid(rms_norm(h) . rms_norm(k) / sqrt(D)).

    Args:
        config: `memory_rows` in each of 2 * `memory_heads` tables, `memory_dim` W, `memory_over`.
        device: where to make it.
        host: keep the table in host memory; its rows are gathered there.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device | None = None, *, host: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = config.memory_heads
        self.num_rows = config.memory_rows
        num_motifs = config.codebook_rows or 3**config.motif_trits
        self.start = PAD if config.memory_over == "bytes" else num_motifs
        tables, width, tscale = 2 * config.memory_heads, config.memory_dim, config.tscale
        self.table = MemoryTable(tables * config.memory_rows, width, tscale=tscale, host=host, device=device)
        self.key = TernaryLinear(tables * width, config.dim, tscale=tscale, device=device)
        self.value = TernaryLinear(tables * width, config.dim, tscale=tscale, device=device)

    def preceded(self, ids_BN: Tensor, before_B2: Tensor | None = None) -> Tensor:
        """Ids of positions with the two before them, [B, N + 2]; PAD (or no motif) at the start of a text."""
        if before_B2 is None:
            before_B2 = ids_BN.new_full((len(ids_BN), 2), self.start)
        return torch.cat([before_B2, ids_BN], dim=1)

    def forward(self, h_BND: Tensor, ids_BL: Tensor) -> Tensor:
        """What the memory adds to the residual stream.

        Args:
            h_BND: residual stream.
            ids_BL: int64, bytes or motifs; position n ends at element n + 2 (see `preceded`).

        Returns:
            [B, N, D]; position n depends on h of position n and on ids n to n + 2.
        """
        rows_BNT = ngram_hash(ids_BL, self.num_heads, self.num_rows)
        e_BNE = self.table.fetch(rows_BNT, h_BND.device).flatten(-2)
        _, key_BND, value_BND = read_stream(e_BNE, self.key, self.value)
        match_BN1 = (rms_norm(h_BND) * rms_norm(key_BND.to(h_BND.dtype))).sum(-1, keepdim=True)
        return sigmoid(match_BN1 * h_BND.shape[-1] ** -0.5) * value_BND


@dataclass(frozen=True, kw_only=True, slots=True)
class Collisions:
    """How often the n-grams of a text share rows, and how often they would with a perfect hash.

    Attributes:
        n: length of the n-grams.
        distinct: how many different ones there are.
        in_one_head: share of them whose row in a head is another's too, mean over the heads.
        in_all_heads: share that have no row of their own in any head.
        indistinct: share that have all rows in common with one other, so that the memory cannot tell them
            apart.
        expected: the three shares for independent and uniform rows.
    """

    n: int
    distinct: int
    in_one_head: float
    in_all_heads: float
    indistinct: float
    expected: tuple[float, float, float]


def collisions(ids: Tensor | bytes, config: ModelConfig) -> tuple[Collisions, Collisions]:
    """What the tables of `config` make of the 2-grams and the 3-grams of a text.

    Args:
        ids: bytes, or integers [L] (bytes or motifs), L >= 3.
        config: `memory_heads` and `memory_rows`.
    """
    text = torch.frombuffer(bytearray(ids), dtype=torch.uint8) if isinstance(ids, bytes) else ids
    text = text.to(torch.int64)
    heads, num_rows = config.memory_heads, config.memory_rows
    grams = torch.stack([text[:-2], text[1:-1], text[2:]], dim=1)
    figures = []
    for n in (2, 3):
        kinds = _kinds(grams[:, 3 - n :])
        example = torch.empty_like(kinds.unique()).scatter_(0, kinds, torch.arange(len(kinds)))
        tables = slice(0, heads) if n == 2 else slice(heads, 2 * heads)
        rows_UH = ngram_hash(grams[example], heads, num_rows)[:, 0, tables]
        shared_UH = torch.stack([_is_shared(rows_U) for rows_U in rows_UH.unbind(1)], dim=1)
        others = len(rows_UH) - 1
        one, same = (_any_of(others, p) for p in (1 / num_rows, num_rows**-heads))
        figures.append(
            Collisions(
                n=n,
                distinct=len(rows_UH),
                in_one_head=float(shared_UH.double().mean()),
                in_all_heads=float(shared_UH.all(dim=1).double().mean()),
                indistinct=float(_is_shared(_kinds(rows_UH)).double().mean()),
                expected=(one, one**heads, same),
            )
        )
    return figures[0], figures[1]


def _any_of(events: int, probability: float) -> float:
    """1 - (1 - p)^events, exact for small p too."""
    return -math.expm1(events * math.log1p(-probability)) if probability < 1 else float(events > 0)


def _kinds(rows_MK: Tensor) -> Tensor:
    """int64 [M]: equal numbers, from 0 on, for equal rows of integers below 2^32."""
    kinds_M = torch.zeros_like(rows_MK[:, 0])
    for column_M in rows_MK.unbind(1):
        _, kinds_M = (kinds_M * (int(column_M.max()) + 1) + column_M).unique(return_inverse=True)
    return kinds_M


def _is_shared(numbers_M: Tensor) -> Tensor:
    """bool [M]: whether a number occurs elsewhere too."""
    _, kinds_M, counts = numbers_M.unique(return_inverse=True, return_counts=True)
    return counts[kinds_M] > 1
