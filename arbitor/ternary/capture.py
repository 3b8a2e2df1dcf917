"""What a backward pass leaves for the optimizer: the gradient of one weight, in the smaller of two forms."""

from typing import Any

import torch
from torch import Tensor


class GradientCapture:
    """Sum of a weight's gradient over all its uses since the last step.

    A use arrives as the pair (activations A [N, I], output gradients B [N, O]), dW = B^T A. The pairs are
    kept as they are while they take fewer bytes than dW; from then on only dW is kept, in the dtype of B.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._dense: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copied model has no optimizer, so its layers capture nothing."""

    def add_linear(self, activations: Tensor, output_gradient: Tensor) -> None:
        """Add one use of a linear.

        Args:
            activations: [N, I], int8 codes or floats.
            output_gradient: [N, O] float, with the codes' per-token scale already multiplied in.
        """
        if self._dense is None:
            pairs = [*self._pairs, (activations, output_gradient)]
            kept = sum(a.nbytes + b.nbytes for a, b in pairs)
            if kept < self.rows * self.columns * output_gradient.element_size():
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
        bounds = [_largest(a) * torch.linalg.vector_norm(b, 1, dim=0) for a, b in self._pairs]
        return bounds if self._dense is None else [self._dense, *bounds]

    def clear(self) -> None:
        """Forget everything."""
        self._pairs = []
        self._dense = None


def _largest(activations: Tensor) -> Tensor | int:
    return 127 if activations.dtype == torch.int8 else activations.abs().amax()


def _outer(activations: Tensor, output_gradient: Tensor) -> Tensor:
    return output_gradient.t() @ activations.to(output_gradient.dtype)


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


def needs_root(capture: GradientCapture | None) -> bool:
    """Whether a forward must be recorded by autograd even though no float parameter asks for it."""
    return capture is not None and torch.is_grad_enabled()
