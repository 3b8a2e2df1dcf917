"""What a backward pass leaves for the optimizer: the gradient of one weight, in the smallest of its forms.

A use of a linear arrives as the pair (activations A [N, I], output gradients B [N, O]) with dW = B^T A. Pairs
are kept as they are while they take fewer bytes than dW; from then on only dW is kept, in the dtype of B
(fp32 where that is fp16). The gradient of a large table is kept as its touched rows.

Shape letters: N tokens, I in, O out, E experts, D width of a table's row.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arbitor.ops.expert_linear import add_grouped_outer, grouped_outer
from arbitor.ops.row_sums import row_sums

if TYPE_CHECKING:
    from arbitor.ternary.optimizer import VoteOptimizer

NARROW_ADDITIONS = 3  # sums in bf16, each of which may lose 2^-9 of the sum so far
# On bounds, for rounding in the sums: of the bound and of dW over N tokens N * 2^-24 each, and to bf16 2^-9.
ROUNDING_MARGIN = 1 + 2**-4


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


class MatrixCapture(Capture):
    """What the captures of a matrix and of experts share: pairs while they are smaller, then dW.

    A few uses add up in the dtype of their output gradients, which is what one batch costs even if a loop
    uses the weight again and again; more add up in fp32, since in bf16 the small gradient of a micro-batch
    is rounded away beside the sum of the others.

    Args:
        rows, columns: O and I.
        shape: of dW, `(..., O, I)`.
    """

    def __init__(self, rows: int, columns: int, shape: tuple[int, ...]) -> None:
        self.rows = rows
        self.columns = columns
        self._shape = shape
        self._pairs: list[tuple[Tensor, ...]] = []
        self._dense: Tensor | None = None
        self._additions = 0

    def _add_pair(self, *pair: Tensor) -> None:
        """Add a use: A, B, and what else `product` needs; without tokens it adds nothing."""
        activations, output_gradient, *rest = pair
        if not len(activations):
            return
        if output_gradient.dtype == torch.float16:  # whose range a product with codes soon exceeds
            output_gradient = output_gradient.to(torch.float32)
        self._pairs.append((activations, output_gradient, *rest))
        size = math.prod(self._shape) * output_gradient.element_size()
        if self._dense is not None or sum(a.nbytes + b.nbytes for a, b, *_ in self._pairs) >= size:
            self._form()

    def _form(self) -> None:
        """Add dW of all pairs to the dense gradient, and drop them."""
        gradient, self._pairs = self.product(), []
        self.add_dense(gradient)

    def product(self) -> Tensor:
        """dW of all pairs together, in the dtype of their output gradients."""
        raise NotImplementedError

    def add_dense(self, gradient: Tensor) -> None:
        """Add a gradient [..., O, I] that is already formed; the capture owns it from here on."""
        gradient = gradient.view(self._shape)
        if self._dense is None:
            self._dense = gradient.to(torch.float32) if gradient.dtype == torch.float16 else gradient
        else:
            self._dense = self._sum_so_far(self._dense, gradient.dtype).add_(gradient)

    def _sum_so_far(self, dense: Tensor, dtype: torch.dtype) -> Tensor:
        """The dense gradient in the dtype in which another of `dtype` is added; itself where that stays."""
        self._additions += 1
        dtype = torch.promote_types(dense.dtype, dtype)
        if self._additions > NARROW_ADDITIONS:
            dtype = torch.promote_types(dtype, torch.float32)
        return dense.to(dtype)

    @property
    def empty(self) -> bool:
        """True when nothing was captured since the last `clear`."""
        return self._dense is None and not self._pairs

    @property
    def num_tokens(self) -> int | None:
        """Tokens in the pairs, which bound the gradient's rank; None if it is dense."""
        return None if self._dense is not None else sum(len(a) for a, *_ in self._pairs)

    @property
    def dense(self) -> Tensor | None:
        """dW, if it is kept in this form."""
        return self._dense

    @property
    def plain_gradients(self) -> list[Tensor]:
        """The output gradients where all else are int8 codes; empty otherwise.

        127 times the sum of their magnitudes bounds every element of dW.
        """
        plain = self._dense is None and all(a.dtype == torch.int8 for a, *_ in self._pairs)
        return [b for _, b, *_ in self._pairs] if plain else []

    def magnitudes(self) -> list[Tensor]:
        """Tensors that show whether the gradient is finite: where they are, it is.

        With pairs it is one bound for each row o of dW, fp32 [O]: the sum over all pairs of
        max |A| * sum |B[:, o]| over their tokens, and the largest dense element. So products and sums that
        overflow show before they are formed.
        """
        if not self._pairs:
            return [] if self._dense is None else [self._dense]
        bound = sum(_bound(a, b) for a, b, *_ in self._pairs)
        assert isinstance(bound, Tensor)
        if self._dense is not None:
            dense = self._dense.view(-1, self.rows, self.columns)
            bound = bound + torch.linalg.vector_norm(dense, math.inf, dim=(0, 2), dtype=_wide(dense))
        return [bound * ROUNDING_MARGIN]

    def clear(self) -> None:
        """Forget everything."""
        self._pairs = []
        self._dense = None
        self._additions = 0


class GradientCapture(MatrixCapture):
    """Gradient of one matrix, or of a table or vector that is small enough to have it dense."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns, (rows, columns))

    def add_linear(self, activations: Tensor, output_gradient: Tensor) -> None:
        """Add one use of a linear.

        Args:
            activations: [N, I], int8 codes or floats.
            output_gradient: [N, O] float, with the codes' per-token scale already multiplied in.
        """
        self._add_pair(activations, output_gradient)

    def forms_product(self, activations: Tensor, output_gradient: Tensor) -> bool:
        """Whether `add_linear` of these would form dW at once, of nothing but them."""
        size = self.rows * self.columns * output_gradient.element_size()
        return not self._pairs and activations.nbytes + output_gradient.nbytes >= size

    def factors(self) -> tuple[Tensor, Tensor]:
        """All pairs as one: activations [N, I], int8 codes or floats, and output gradients float [N, O]."""
        return _cat([a for a, _ in self._pairs]), _cat([b for _, b in self._pairs])

    def product(self) -> Tensor:
        """dW of all pairs, [O, I]."""
        activations, output_gradient = self.factors()
        with outside_autocast():
            return output_gradient.t() @ activations.to(output_gradient.dtype)

    def gradient(self) -> Tensor:
        """dW as a float tensor [O, I]; valid until the next `add_*` or `clear`."""
        if not self._pairs:
            if self._dense is None:
                raise ValueError("nothing was captured")
            return self._dense
        formed = self.product()
        return formed if self._dense is None else self._dense.to(_wide(self._dense)) + formed


class ExpertCapture(MatrixCapture):
    """Gradients of one matrix for each expert [E, O, I], from rows that are sorted by expert."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__(rows, columns, (experts, rows, columns))
        self.experts = experts

    def add_experts(self, activations: Tensor, output_gradient: Tensor, offsets: Tensor) -> None:
        """Add one use.

        Args:
            activations: [N, I], int8 codes or floats, the rows of expert 0 first.
            output_gradient: [N, O] float, with the codes' per-token scale already multiplied in.
            offsets: int32 [E], the end of each expert's rows.
        """
        self._add_pair(activations, output_gradient, offsets)

    def sorted_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs as one, sorted by expert: activations [N, I], output gradients [N, O], offsets int32 [E].

        The order of rows within an expert is that of the uses.
        """
        if len(self._pairs) == 1:
            activations, gradients, offsets = self._pairs[0]
            return activations, gradients, offsets
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

    def product(self) -> Tensor:
        """Zero for an expert without rows."""
        with outside_autocast():
            return grouped_outer(*self._operands())

    def _form(self) -> None:
        if self._dense is None:
            super()._form()
            return
        output_gradient, activations, offsets = self._operands()
        self._pairs = []
        self._dense = self._sum_so_far(self._dense, output_gradient.dtype)
        with outside_autocast():
            add_grouped_outer(self._dense, output_gradient, activations, offsets)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of `grouped_outer`: output gradients, activations in their dtype, and the ends of the rows."""
        activations, output_gradient, offsets = self.sorted_rows()
        return output_gradient, activations.to(output_gradient.dtype), offsets


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
        ids = _cat([ids for ids, _ in self._uses])
        # A table in host memory may be looked up for another device; its gradients come over only here.
        # In fp32 they add up without loss.
        return row_sums(ids, _cat([gradient.to(ids.device, torch.float32) for _, gradient in self._uses]))

    def magnitudes(self) -> list[Tensor]:
        """For each column the sum of all look-ups' magnitudes, fp32 [D]: a bound on every row's sum."""
        bound = sum(_bound(None, gradient) for _, gradient in self._uses)
        return [bound * ROUNDING_MARGIN] if isinstance(bound, Tensor) else []

    def clear(self) -> None:
        """Forget everything."""
        self._uses = []


def _wide(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for what is fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bound(activations: Tensor | None, output_gradient: Tensor) -> Tensor:
    """max |A| * sum |B| over the tokens, [O] in fp32 or fp64; without activations they count as 1."""
    total = torch.linalg.vector_norm(output_gradient, 1, dim=0, dtype=_wide(output_gradient))
    if activations is None:
        return total
    return total * (127 if activations.dtype == torch.int8 else activations.abs().amax())


@contextmanager
def outside_autocast() -> Iterator[None]:
    """Products keep the dtype of their operands even inside an autocast context."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def wants_weights(ctx: Any) -> bool:
    """Whether a backward that is under way shall leave gradients of weights, as `loss.backward()` does.

    `torch.autograd.grad(loss, x)` and `loss.backward(inputs=[x])` ask for the gradient of x alone: like the
    `.grad` of float parameters, captures stay as they are.

    Args:
        ctx: of an autograd function whose first input is the root.
    """
    node = ctx.next_functions[0][0]
    return node is not None and torch._C._will_engine_execute_node(node)


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
