"""TernaryVQCodebook: learned rows of trits, looked up by the vector that they are nearest to.

Shape letters: M positions, P parts, V rows of a part, K rows that may be drawn anew in a step, C width of a
code, W width of a part (C / P).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.ops.codebook import MAX_WIDTH, codebook_nearest
from arbitor.ops.trit_codec import trit_pack
from arbitor.ternary.counters import IntegerCounters, RandomBits
from arbitor.ternary.layers import TernaryEmbeddingTable

REVIVE_AFTER = 100
REVIVE_AT_ONCE = 256  # rows of a part, in a step
_ZERO_NIBBLES = 0x88  # two 4-bit momentum codes of 0


class CodebookOutput(NamedTuple):
    """What a look-up returns.

    Attributes:
        code: [..., C] in the dtype of the input, the nearest rows themselves; the gradient goes straight
            through to the input, as if they were it.
        ids: int64 [...], the rows' numbers.
        loss: scalar, at least fp32: mean of (row - input)^2, whose gradient pulls rows to inputs, plus
            `commitment` times the same, whose gradient pulls inputs to rows.
    """

    code: Tensor
    ids: Tensor
    loss: Tensor


class _Uses(NamedTuple):
    """What one forward used.

    Attributes:
        ids: int64 [P, M], row of each part at each position.
        met: bool [P, M], whether the row is what the position's numbers are rounded to.
        trits: int8 [M, C], that rounding; of what is not finite some value, which no step that counts uses.
    """

    ids: Tensor
    met: Tensor
    trits: Tensor


class _StraightThrough(torch.autograd.Function):
    """The value of `code` with the gradient of `x`; x + (code - x) would round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, code: Tensor) -> Tensor:
        return code.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class TernaryVQCodebook(IntegerCounters):
    """A codebook that is learned as in VQ-VAE (van den Oord et al. 2017, section 3.2).

    With P parts its rows are all concatenations of one row of each part (Jegou et al. 2011, "Product
    quantization for nearest neighbor search", section II.B; product keys of Lample et al. 2019). The squared
    distance is the sum over the parts, so that the nearest of V^P rows is that of each part by itself: exact,
    with P V comparisons. Rows are numbered with the first part's as the highest digit; of equally near rows
    the one with the lowest number is taken.

    A row of a part that no position has taken for `revive_after` steps starts anew as the trits of an input,
    drawn from those that the part's rows do not meet exactly; at most 256 rows of a part in a step, all
    different, the longest unused first. Inputs should have an RMS near 1, as rows have when they start
    (exponent 0).

    Attributes:
        parts: P tables of V rows of width W.
        unused: int32 buffer [P, V], steps since a row was taken last, saved with the weights.

    Args:
        num_rows: V^P.
        dim: C.
        parts: P.
        commitment: weight of the commitment term in the loss.
        revive_after: steps without use after which a row is drawn anew; 0 never does so.
        device: where to make it.

    Raises:
        UserError: sizes that do not fit.
    """

    unused: Tensor

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        parts: int = 1,
        commitment: float = 0.25,
        revive_after: int = REVIVE_AFTER,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_rows < 1 or parts < 1 or not parts <= dim <= parts * MAX_WIDTH or dim % parts:
            raise UserError(
                f"a codebook needs at least one row, and a width that is a multiple of its parts and at most "
                f"{MAX_WIDTH} for each, not {num_rows} rows of width {dim} in {parts} parts"
            )
        rows = round(num_rows ** (1 / parts))
        if rows**parts != num_rows:
            raise UserError(
                f"a codebook of {parts} parts has as many rows as a number to the power of {parts}, such as "
                f"{rows**parts}; {num_rows} is none"
            )
        self.num_rows = num_rows
        self.rows_of_part = rows
        self.dim = dim
        self.commitment = commitment
        self.revive_after = revive_after
        # Rows that were looked up vote one by one, whatever the size of the table: a row's step must not
        # depend on how many others are in use.
        self.parts = nn.ModuleList(
            TernaryEmbeddingTable(rows, dim // parts, sparse=True, device=device) for _ in range(parts)
        )
        self.register_buffer("unused", torch.zeros((parts, rows), dtype=torch.int32, device=device))
        self._noted: list[_Uses] = []

    @property
    def tables(self) -> list[TernaryEmbeddingTable]:
        """The parts, typed."""
        return list(self.parts)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> CodebookOutput:
        """The nearest row of each vector; notes what was used for the next step.

        Args:
            x: float [..., C].
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"expected a last dimension of {self.dim}, got {tuple(x.shape)}")
        x_MC = x.reshape(-1, self.dim)
        trits_MC = x_MC.detach().clamp(-1, 1).round_().to(torch.int8)
        ids_P, rows_P, met_P = [], [], []
        for table, x_MW, trits_MW in zip(self.tables, self._split(x_MC), self._split(trits_MC), strict=True):
            ids_M = codebook_nearest(x_MW.detach(), table.T_packed, table.E)
            rows_MW = table(ids_M)
            ids_P.append(ids_M)
            rows_P.append(rows_MW)
            met_P.append((rows_MW.detach() == trits_MW).all(dim=-1))
        if self.noting:
            self._noted.append(_Uses(torch.stack(ids_P), torch.stack(met_P), trits_MC))
        code_MC = torch.cat(rows_P, dim=-1).to(torch.promote_types(x.dtype, torch.float32))
        loss = F.mse_loss(code_MC, x_MC.detach().to(code_MC.dtype))
        loss = loss + self.commitment * F.mse_loss(x_MC.to(code_MC.dtype), code_MC.detach())
        code = _StraightThrough.apply(x, code_MC.detach().view(x.shape))
        return CodebookOutput(code, self._joined(ids_P).view(x.shape[:-1]), loss)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows by number, int64 [...] -> fp32 [..., C], without gradient."""
        rows_P = []
        with torch.no_grad():
            for table in reversed(self.tables):
                rows_P.append(table(ids % self.rows_of_part))
                ids = ids // self.rows_of_part
        return torch.cat(rows_P[::-1], dim=-1)

    def _split(self, x_MC: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each part, [M, W]."""
        return x_MC.chunk(len(self.parts), dim=-1)

    def _joined(self, ids_P: list[Tensor]) -> Tensor:
        """Numbers of the rows whose parts have these numbers."""
        ids = ids_P[0]
        for digit in ids_P[1:]:
            ids = ids * self.rows_of_part + digit
        return ids

    # -- state beside the weights ---------------------------------------------------------------------------

    def advance(self, ok: Tensor, random_bits: RandomBits) -> None:
        """Count the steps without use, and draw rows anew; with `ok` False everything stays as it is."""
        if not self._noted:
            return
        ids_PM = torch.cat([uses.ids for uses in self._noted], dim=1)
        met_PM = torch.cat([uses.met for uses in self._noted], dim=1)
        trits_MC = torch.cat([uses.trits for uses in self._noted])
        self.forget()
        for part, trits_MW in enumerate(self._split(trits_MC)):
            used_V = torch.zeros_like(self.unused[part], dtype=torch.bool).index_fill_(0, ids_PM[part], True)
            unused_V = torch.where(used_V, 0, self.unused[part] + 1)
            if self.revive_after:
                bits_M = random_bits(f"part{part}", len(trits_MW))
                self._revive(part, unused_V, trits_MW, met_PM[part], bits_M, ok)
            self.unused[part] = torch.where(ok, unused_V, self.unused[part])

    def _revive(
        self, part: int, unused_V: Tensor, trits_MW: Tensor, met_M: Tensor, bits_M: Tensor, ok: Tensor
    ) -> None:
        """Put positions in random order into the rows that are due; these rows' counts become 0.

        No two rows become equal, since of those only the first would ever be taken: where a position's trits
        are drawn again, the row waits for the next step.
        """
        count = min(REVIVE_AT_ONCE, len(unused_V), len(trits_MW))
        # Keys without ties, so that every device chooses the same rows: the longest unused, then the first.
        number_V = torch.arange(len(unused_V), device=unused_V.device)
        row_K = (unused_V.to(torch.int64) * len(unused_V) - number_V).topk(count).indices
        # Positions that their row meets exactly come last, and are not taken.
        key_M = (met_M.to(torch.int64) << 32) | (bits_M.to(torch.int64) & 0xFFFFFFFF)
        drawn_K = torch.argsort(key_M, stable=True)[:count]
        trits_KW = trits_MW[drawn_K]
        due_K = (unused_V[row_K] >= self.revive_after) & ~met_M[drawn_K] & ~_repeats(trits_KW) & ok
        unused_V[row_K] = torch.where(due_K, 0, unused_V[row_K])
        table = self.tables[part]
        _put_rows(table.T_packed.data, row_K, due_K, trit_pack(trits_KW))
        _put_rows(table.E.data, row_K, due_K, 0)
        optimizer = table.optimizer
        if optimizer is not None:
            # What the row was about to become must not be added to what it is now.
            for state in optimizer.state[table.T_packed].values():
                _put_rows(state, row_K, due_K, _ZERO_NIBBLES if state.dtype == torch.uint8 else 0)

    def forget(self) -> None:
        """Drop what was noted."""
        self._noted = []

    def check(self) -> None:
        """Raise UserError if a count is negative."""
        if self.unused.device.type != "meta" and bool((self.unused < 0).any()):
            raise UserError("unused holds a negative count: the data is damaged")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        given = state_dict.get(prefix + "unused")
        if isinstance(given, Tensor) and given.dtype != self.unused.dtype:
            # Copying would round floats to integers without a word.
            error_msgs.append(f"{prefix}unused is {given.dtype}, expected {self.unused.dtype}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        try:
            self.check()
        except UserError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_rows={self.num_rows}, dim={self.dim}, parts={len(self.parts)}"


def _repeats(trits_KW: Tensor) -> Tensor:
    """bool [K]: whether a row of trits equals one ahead of it."""
    values = trits_KW.to(torch.float32)
    square_K = values.square().sum(dim=-1)
    # Squared distances from sums of small integers, exact.
    same_KK = square_K[:, None] + square_K - 2 * (values @ values.t()) == 0
    return same_KK.tril(-1).any(dim=-1)


def _put_rows(tensor: Tensor, row_K: Tensor, due_K: Tensor, value: Tensor | int) -> None:
    """tensor[row_K] = value [K, ...] where due, in place; no row comes twice."""
    tensor[row_K] = torch.where(due_K[:, None], value, tensor[row_K])
