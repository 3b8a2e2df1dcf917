"""Entry points of the system that came before, for loops and scripts that were written for it.

They work on any model with ternary weights. A loop calls `prepare_ternary_backward` ahead of backward, and
`ternary_update_memory` where others call `optimizer.step()`; a `VoteOptimizer` with lean state is attached if
the model has none. A forward that ran before anything was attached left nothing to learn from, so a script
should call `configure_ternary_training` or `prepare_ternary_backward` once ahead of its first forward.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.ternary.optimizer import VoteOptimizer
from arbitor.ternary.tensor import named_ternary

_HELD = "_ternary_runtime"  # attribute of a model that keeps its optimizer alive


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
    own = model.__dict__.get(_HELD)
    if own is not None and own.optimizer is not optimizer:
        # Another optimizer took its place; a state as large as the model must not stay alive for nothing.
        del model.__dict__[_HELD]
    if optimizer is None:
        optimizer = VoteOptimizer(model, state="lean")
        # Captures refer to their optimizer weakly, and nobody else holds this one.
        model.__dict__[_HELD] = _Holder(optimizer)
    return optimizer


def prepare_ternary_backward(
    model: nn.Module, loss_signal: Tensor | None = None, update_scales: bool = True
) -> VoteOptimizer:
    """Make sure that the coming backward is captured.

    Calls for several micro-batches, each ahead of its backward, add up to one step.

    Args:
        model: what is trained.
        loss_signal: a loss, of which only the value counts: if it is not finite, the coming step is dropped.
            It replaces one that was given without a backward that followed.
        update_scales: whether the coming step may move scale exponents.

    Returns:
        The attached optimizer. If this call had to attach it, a loss that was computed before is no part of
        any graph: a warning says so, its backward does nothing, and training begins with the next forward.

    Raises:
        UserError: the model has no ternary weights.
    """
    late = attached_optimizer(model) is None
    optimizer = ensure_optimizer(model)
    if not optimizer.has_captures:
        optimizer.forget_loss()
    optimizer.update_scales = update_scales
    if loss_signal is not None:
        optimizer.note_loss(loss_signal)
        if late and not loss_signal.requires_grad and not loss_signal.is_inference():
            warnings.warn(
                "the loss was computed before an optimizer was attached, so this step trains nothing; call "
                "configure_ternary_training(model) ahead of the first forward",
                stacklevel=2,
            )
            # A leaf: backward of it is allowed, and reaches nothing.
            loss_signal.requires_grad_()
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
        loss_components: losses by name; their sum stands for `loss_signal` if that is missing or has no
            graph.
        update_scales: whether the step may move scale exponents.

    Returns:
        Whether a step was taken (a step that was dropped, since something was not finite, is one). Without
        captures and without a loss whose backward reaches the weights nothing changes, and what was noted
        for the step is forgotten.
    """
    optimizer = attached_optimizer(model)
    if optimizer is None:
        return False
    loss = loss_signal
    if loss_components and (loss is None or not loss.requires_grad):
        loss = torch.stack([part.sum() for part in loss_components.values()]).sum()
    try:
        if loss is not None:
            optimizer.note_loss(loss)
            if not optimizer.has_captures and loss.requires_grad:
                loss.backward()
        if not optimizer.has_captures:
            return False
        optimizer.update_scales = optimizer.update_scales and update_scales
        optimizer.step()
        return True
    finally:
        # Whatever way it ended, nothing of it is left for the next step.
        optimizer.zero_grad()
        optimizer.update_scales = True


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
