"""Entry points of the system that came before, for loops and scripts that were written for it.

They work on any model with ternary weights. A loop calls `prepare_ternary_backward` ahead of backward, and
`ternary_update_memory` where others call `optimizer.step()`; a `VoteOptimizer` with lean state is attached if
the model has none.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.ternary.optimizer import VoteOptimizer
from arbitor.ternary.tensor import named_ternary


class _Holder:
    """Keeps an optimizer alive for a model; a copy of the model has none."""

    def __init__(self, optimizer: VoteOptimizer | None) -> None:
        self.optimizer = optimizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Holder":
        return _Holder(None)


def attached_optimizer(model: nn.Module) -> VoteOptimizer | None:
    """The optimizer that captures the gradients of `model`, or None."""
    return next((module.optimizer for _, module in named_ternary(model) if module.optimizer), None)


def ensure_optimizer(model: nn.Module) -> VoteOptimizer:
    """The attached optimizer, or a new one with lean state, which the model keeps alive.

    Raises:
        UserError: the model has no ternary weights.
    """
    optimizer = attached_optimizer(model)
    if optimizer is None:
        optimizer = VoteOptimizer(model, state="lean")
        # Captures refer to their optimizer weakly, and nobody else holds this one.
        model.__dict__["_ternary_runtime"] = _Holder(optimizer)
    return optimizer


def prepare_ternary_backward(
    model: nn.Module, loss_signal: Tensor | None = None, update_scales: bool = True
) -> VoteOptimizer:
    """Make sure that the coming backward is captured.

    Args:
        model: what is trained.
        loss_signal: a loss, of which only the value counts: if it is not finite, the coming step is dropped.
            It replaces one that was given for a step that was never taken.
        update_scales: whether the coming step may move scale exponents.

    Returns:
        The attached optimizer.
    """
    optimizer = ensure_optimizer(model)
    optimizer.forget_loss()
    optimizer.update_scales = update_scales
    if loss_signal is not None:
        optimizer.note_loss(loss_signal)
    return optimizer


def ternary_update_memory(
    model: nn.Module,
    loss_signal: Tensor | None = None,
    loss_components: Mapping[str, Tensor] | None = None,
    update_scales: bool = True,
) -> bool:
    """Take a step from what backward captured, or from a loss that backward has not seen yet.

    Args:
        model: what is trained.
        loss_signal: a loss. With captures present only its value counts; else, if it has a graph, its
            backward runs first.
        loss_components: losses by name; their sum stands for `loss_signal` if that has no graph.
        update_scales: whether the step may move scale exponents.

    Returns:
        Whether a step was taken; without captures and without a loss that has a graph, nothing changes.
    """
    optimizer = attached_optimizer(model)
    captured = optimizer is not None and optimizer.has_captures
    loss = loss_signal
    if (loss is None or not loss.requires_grad) and loss_components:
        loss = torch.stack([part.sum() for part in loss_components.values()]).sum()
    if not captured and (loss is None or not loss.requires_grad or optimizer is None):
        return False
    assert optimizer is not None
    if loss is not None:
        optimizer.note_loss(loss)
    if not captured:
        assert loss is not None
        loss.backward()
    with _scales(optimizer, update_scales):
        optimizer.step()
    return True


def configure_ternary_training(
    model: nn.Module, accum_threshold: int = 32, e_accum_threshold: int = 32
) -> int:
    """Set the thresholds of flips and of scale exponents; live accumulators are rescaled.

    Args:
        model: what is trained.
        accum_threshold: accumulator value at which a trit flips; span and rail limit follow.
        e_accum_threshold: accumulator value at which a scale exponent moves.

    Returns:
        The threshold of flips.
    """
    optimizer = ensure_optimizer(model)
    optimizer.configure(accum_threshold, e_accum_threshold)
    return optimizer.accum_threshold


@contextmanager
def _scales(optimizer: VoteOptimizer, update: bool) -> Iterator[None]:
    before = optimizer.update_scales
    optimizer.update_scales = before and update
    try:
        yield
    finally:
        optimizer.update_scales = True
