"""What a backward pass leaves for the optimizer: the gradient of one weight, in the smallest of its forms.

A use of a linear arrives as the pair (activations A [N, I], output gradients B [N, O]) with dW = B^T A. Pairs
are kept as they are while they take fewer bytes than dW; from then on only dW is kept, in the dtype of B. The
gradient of a large table is kept as its touched rows.

Shape letters: N tokens, I in, O out, E experts, D width of a table's row.
"""

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arbitor.ops.expert_linear import grouped_outer

if TYPE_CHECKING:
    from arbitor.ternary.optimizer import VoteOptimizer


class Capture:
    """Sum of a weight's gradient over all its uses since the last step.

    Attributes:
        optimizer: weak reference to the optimizer that it is for, or None.
    """

    optimizer: "weakref.ref[VoteOptimizer] | None" = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copied model has no optimizer, so its layers capture nothing."""

    @property
    def empty(self) -> bool:
        """True when nothing was captured since the last `clear`."""
        raise NotImplementedError

    def magnitudes(self) -> list[Tensor]:
        """Tensors that show whether the gradient is finite: where they are, it is."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget everything."""
        raise NotImplementedError


class GradientCapture(Capture):
    """Gradient of one matrix, or of a table or vector that is small enough to have it dense."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._dense: Tensor | None = None

    def add_linear(self, activations: Tensor, output_gradient: Tensor) -> None:
        """Add one use of a linear.

        Args:
            activations: [N, I], int8 codes or floats.
            output_gradient: [N, O] float, with the codes' per-token scale already multiplied in.
        """
        if self._dense is None:
            pairs = [*self._pairs, (activations, output_gradient)]
            if _nbytes(pairs) < self.rows * self.columns * output_gradient.element_size():
                self._pairs = pairs
                return
            for a, b in self._pairs:
                self.add_dense(_outer(a, b))
            self._pairs = []
        self.add_dense(_outer(activations, output_gradient))

    def add_dense(self, gradient: Tensor) -> None:
        """Add a gradient [O, I] that is already formed; the capture owns it from here on."""
        if self._dense is None:
            self._dense = gradient
        else:
            self._dense += gradient

    @property
    def empty(self) -> bool:
        """True when nothing was captured since the last `clear`."""
        return self._dense is None and not self._pairs

    @property
    def num_tokens(self) -> int | None:
        """Tokens in the pairs, which bound the gradient's rank; None if it is dense."""
        return None if self._dense is not None else sum(len(a) for a, _ in self._pairs)

    def factors(self) -> tuple[Tensor, Tensor]:
        """All pairs as one: activations fp32 [N, I] and output gradients fp32 [N, O]."""
        return (
            torch.cat([a for a, _ in self._pairs]).to(torch.float32),
            torch.cat([b for _, b in self._pairs]).to(torch.float32),
        )

    def gradient(self) -> Tensor:
        """dW as a float tensor [O, I]; valid until the next `add_*` or `clear`."""
        total = self._dense
        for a, b in self._pairs:
            total = _outer(a, b) if total is None else total + _outer(a, b)
        if total is None:
            raise ValueError("nothing was captured")
        return total

    def magnitudes(self) -> list[Tensor]:
        """Tensors that show whether the gradient is finite: where they are, it is.

        For pairs it is the bound max |A| * sum |B| over the tokens, so that a product that overflows shows
        before it is formed.
        """
        bounds = [_bound(a, b) for a, b in self._pairs]
        return bounds if self._dense is None else [self._dense, *bounds]

    def clear(self) -> None:
        """Forget everything."""
        self._pairs = []
        self._dense = None


class ExpertCapture(Capture):
    """Gradients of one matrix for each expert, from rows that are sorted by expert."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        self.experts = experts
        self.rows = rows
        self.columns = columns
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._dense: Tensor | None = None

    def add_experts(self, activations: Tensor, output_gradient: Tensor, offsets: Tensor) -> None:
        """Add one use.

        Args:
            activations: [N, I], int8 codes or floats, the rows of expert 0 first.
            output_gradient: [N, O] float, with the codes' per-token scale already multiplied in.
            offsets: int32 [E], the end of each expert's rows.
        """
        if not len(activations):
            return
        use = (activations, output_gradient, offsets)
        if self._dense is None:
            size = self.experts * self.rows * self.columns * output_gradient.element_size()
            if _nbytes((a, b) for a, b, _ in [*self._pairs, use]) < size:
                self._pairs.append(use)
                return
            for pair in self._pairs:
                self.add_dense(_outer_by_expert(*pair))
            self._pairs = []
        self.add_dense(_outer_by_expert(*use))

    def add_dense(self, gradient: Tensor) -> None:
        """Add gradients [..., O, I] that are already formed; the capture owns them from here on."""
        gradient = gradient.view(self.experts, self.rows, self.columns)
        if self._dense is None:
            self._dense = gradient
        else:
            self._dense += gradient

    @property
    def empty(self) -> bool:
        """True when nothing was captured since the last `clear`."""
        return self._dense is None and not self._pairs

    @property
    def dense(self) -> Tensor | None:
        """dW of all experts [E, O, I], if it is kept in this form."""
        return self._dense

    def sorted_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs as one, sorted by expert: activations [N, I], output gradients [N, O], offsets int32 [E].

        The order of rows within an expert is that of the uses.
        """
        if len(self._pairs) == 1:
            return self._pairs[0]
        experts = torch.arange(self.experts, device=self._pairs[0][2].device)
        owner = torch.cat(
            [
                torch.searchsorted(offsets, torch.arange(len(a), device=a.device), right=True)
                for a, _, offsets in self._pairs
            ]
        )
        order = torch.argsort(owner, stable=True)
        offsets = torch.searchsorted(owner[order], experts, right=True).to(torch.int32)
        activations = torch.cat([a for a, _, _ in self._pairs])
        gradients = torch.cat([b for _, b, _ in self._pairs])
        return activations[order], gradients[order], offsets

    def magnitudes(self) -> list[Tensor]:
        """As in `GradientCapture`, over the rows of all experts together."""
        bounds = [_bound(a, b) for a, b, _ in self._pairs]
        return bounds if self._dense is None else [self._dense, *bounds]

    def clear(self) -> None:
        """Forget everything."""
        self._pairs = []
        self._dense = None


class RowCapture(Capture):
    """Gradient of a large table, as the rows that were looked up; no tensor of the table's size is formed."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns
        self._uses: list[tuple[Tensor, Tensor]] = []

    def add_rows(self, ids: Tensor, gradient: Tensor) -> None:
        """Add a look-up: ids int64 [N] and their rows' gradients float [N, D]."""
        if len(ids):
            self._uses.append((ids, gradient))

    @property
    def empty(self) -> bool:
        """True when nothing was captured since the last `clear`."""
        return not self._uses

    def touched(self) -> tuple[Tensor, Tensor]:
        """The rows that were looked up and the sum of their gradients.

        As many rows come back as look-ups were made, found without asking the device how many are distinct:
        the distinct ones in ascending order, then the last of them again and again, with equal sums.

        Returns:
            ids int64 [N] and fp32 [N, D].
        """
        ids = torch.cat([ids for ids, _ in self._uses])
        # A table in host memory may be looked up for another device; its gradients come over only here.
        gradient = torch.cat([gradient for _, gradient in self._uses]).to(ids.device)
        ids, order = torch.sort(ids, stable=True)
        begins = torch.ones_like(ids)
        begins[1:] = ids[1:] != ids[:-1]
        segment = begins.cumsum(0) - 1
        sums = torch.ops.aten.embedding_dense_backward(gradient[order], segment, len(ids), -1, False)
        slot = torch.minimum(torch.arange(len(ids), device=ids.device), segment[-1])
        first = torch.searchsorted(segment, slot)
        return ids[first], sums[slot].to(torch.float32)

    def magnitudes(self) -> list[Tensor]:
        """The gradients themselves."""
        return [gradient for _, gradient in self._uses]

    def clear(self) -> None:
        """Forget everything."""
        self._uses = []


def _nbytes(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(a.nbytes + b.nbytes for a, b in pairs)


def _bound(activations: Tensor, output_gradient: Tensor) -> Tensor:
    largest = 127 if activations.dtype == torch.int8 else activations.abs().amax()
    return largest * torch.linalg.vector_norm(output_gradient, 1, dim=0)


def _outer(activations: Tensor, output_gradient: Tensor) -> Tensor:
    return output_gradient.t() @ activations.to(output_gradient.dtype)


def _outer_by_expert(activations: Tensor, output_gradient: Tensor, offsets: Tensor) -> Tensor:
    """[E, O, I]; zero for an expert without rows."""
    return grouped_outer(output_gradient, activations.to(output_gradient.dtype), offsets)


def refuse_reentrant_checkpoint() -> None:
    """Raise if the caller runs inside the forward of a reentrant activation checkpoint."""
    import sys

    from torch.utils.checkpoint import CheckpointFunction

    code = CheckpointFunction.forward.__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            raise RuntimeError(
                "reentrant activation checkpointing is not supported by integer layers: "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        frame = frame.f_back  # type: ignore[assignment]


def needs_root(capture: Capture | None) -> bool:
    """Whether a forward must be recorded by autograd even though no float parameter asks for it."""
    return capture is not None and torch.is_grad_enabled()
