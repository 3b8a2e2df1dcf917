"""TernaryVQCodebook: learned code vectors of trits, found by exact look-up.

Shape letters: M queries, C width of a code, R rows of a part, V width of a part.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.ops.activations import normalize_and_quantize
from arbitor.ops.codebook import codebook_nearest
from arbitor.ops.trit_codec import trit_pack
from arbitor.ternary.counters import IntegerCounters, RandomBits
from arbitor.ternary.layers import TernaryEmbeddingTable

REVIVE_AFTER = 100  # steps without use after which a row starts anew
_MAX_IDLE = (1 << 31) - 1


class CodebookOutput(NamedTuple):
    """What a look-up returns.

    Attributes:
        code: [..., C], the nearest code vectors; the gradient goes straight through to the input.
        ids: int64 [...], their numbers.
        loss: fp32 scalar: how far rows are from inputs, plus the commitment of inputs to rows.
    """

    code: Tensor
    ids: Tensor
    loss: Tensor


class CodebookUsage(IntegerCounters):
    """Steps since each row was used last, and rows that start anew.

    Attributes:
        idle: int32 [R].
    """

    idle: Tensor

    def __init__(self, table: TernaryEmbeddingTable, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("idle", torch.zeros(table.out_features, dtype=torch.int32, device=device))
        self._table = [table]  # in a list, since the table is not this module's part
        self._ids: list[Tensor] = []
        self._inputs: Tensor | None = None

    def note(self, ids_M: Tensor, inputs_MV: Tensor) -> None:
        """Note rows that were used, and the inputs that found them."""
        if self.noting:
            self._ids.append(ids_M)
            self._inputs = inputs_MV.detach()

    def advance(self, ok: Tensor, random_bits: RandomBits) -> None:
        """Count, and put inputs of the last forward into the rows that were idle for too long."""
        if self._inputs is None:
            return
        rows = len(self.idle)
        used = torch.zeros(rows + 1, dtype=torch.bool, device=self.idle.device)
        used[torch.cat(self._ids)] = True
        idle = torch.where(used[:rows], 0, (self.idle + 1).clamp_max(_MAX_IDLE))
        revived = (idle > REVIVE_AFTER) & ok
        table = self._table[0]
        draws = random_bits("revival", rows).to(torch.int64) & 0x7FFFFFFF
        drawn_RV = self._inputs[draws % len(self._inputs)]
        trits_RV = (drawn_RV / _rms(drawn_RV)).clamp(-1, 1).round().to(torch.int8)
        packed = torch.where(revived[:, None], trit_pack(trits_RV), table.T_packed)
        table.T_packed.copy_(packed)
        self.idle.copy_(torch.where(ok, torch.where(revived, 0, idle), self.idle))

    def forget(self) -> None:
        """Drop what was noted."""
        self._ids = []
        self._inputs = None


class TernaryVQCodebook(nn.Module):
    """A codebook of `rows` code vectors, learned as in VQ-VAE (van den Oord et al. 2017).

    With `parts` above 1 it is the product of as many codebooks of rows^(1/parts) rows, each for its share of
    the width (Jegou et al. 2011, "Product quantization"): the distance is a sum over parts, so that the
    nearest of a million rows is found exactly among two times a thousand.

    Args:
        rows: code vectors; the `parts`-th power of an integer.
        dim: C, a multiple of `parts`.
        parts: codebooks that the vectors are made of.
        commitment: weight of the commitment term in the loss.
        device: where to make it.

    Raises:
        UserError: sizes that do not fit.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        *,
        parts: int = 1,
        commitment: float = 0.25,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rows_of_part = round(rows ** (1 / parts))
        if rows_of_part**parts != rows or dim % parts:
            raise UserError(
                f"a codebook of {rows} rows of width {dim} cannot be the product of {parts}: rows must be a "
                f"{parts}th power, the width a multiple of {parts}"
            )
        self.rows = rows
        self.dim = dim
        self.rows_of_part = rows_of_part
        self.commitment = commitment
        self.tables = nn.ModuleList(
            TernaryEmbeddingTable(rows_of_part, dim // parts, device=device) for _ in range(parts)
        )
        self.usage = nn.ModuleList(CodebookUsage(table, device) for table in self._tables())

    def forward(self, x: Tensor) -> CodebookOutput:
        """The nearest code vector of each input, float [..., C], brought to RMS 1 first."""
        x_MC = x.reshape(-1, self.dim)
        x_MC = x_MC / _rms(x_MC)
        inputs = x_MC.detach().chunk(len(self.tables), dim=-1)
        found = [self._nearest(table, part) for table, part in zip(self._tables(), inputs, strict=True)]
        for usage, ids_M, part in zip(self.usage, found, inputs, strict=True):
            assert isinstance(usage, CodebookUsage)
            usage.note(ids_M, part)
        code_MC = torch.cat([table(ids) for table, ids in zip(self._tables(), found, strict=True)], dim=-1)
        loss = F.mse_loss(code_MC, x_MC.detach()) + self.commitment * F.mse_loss(x_MC, code_MC.detach())
        straight_MC = x_MC + (code_MC - x_MC).detach()
        ids_M = found[0]
        for part_ids in found[1:]:
            ids_M = ids_M * self.rows_of_part + part_ids
        return CodebookOutput(straight_MC.view(x.shape), ids_M.view(x.shape[:-1]), loss)

    def code_vectors(self, ids: Tensor) -> Tensor:
        """Code vectors fp32 [..., C] of ids int64 [...], without a gradient."""
        parts = []
        for table in reversed(self._tables()):
            parts.append(table._rows(ids % self.rows_of_part))
            ids = ids // self.rows_of_part
        return torch.cat(parts[::-1], dim=-1)

    def _nearest(self, table: TernaryEmbeddingTable, x_MV: Tensor) -> Tensor:
        codes, scale, _ = normalize_and_quantize(x_MV.to(torch.float32), False, True)
        return codebook_nearest(codes.to(torch.int8), scale, table.T_packed, table.E)

    def _tables(self) -> list[TernaryEmbeddingTable]:
        return [table for table in self.tables if isinstance(table, TernaryEmbeddingTable)]


def _rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension, [..., 1]."""
    return x.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()
