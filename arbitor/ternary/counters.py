"""Integer state beside the weights: usage counters, balance biases, edge lists.

It obeys the same law as weights: a forward only notes what it saw, and `VoteOptimizer.step()` is the only
place that changes anything.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

RandomBits = Callable[[str, int], Tensor]


class IntegerCounters(nn.Module):
    """Base of modules whose persistent buffers are integers that training moves without a gradient.

    A subclass keeps its state in persistent integer buffers (saved with the weights, since inference needs
    it), appends what a forward saw to transient attributes, and overrides `advance` and `forget`.

    Attributes:
        attached: an optimizer will call `advance`; without one nothing may be noted.
    """

    attached: bool = False

    @property
    def noting(self) -> bool:
        """Whether a forward shall note what it sees: in training mode, with gradients, with an optimizer."""
        return self.attached and self.training and torch.is_grad_enabled()

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerCounters":
        """A copy without an optimizer, which therefore notes nothing."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.attached = False
        twin.forget()
        return twin

    def advance(self, ok: Tensor, random_bits: RandomBits) -> None:
        """Apply what was noted since the last step.

        Args:
            ok: bool scalar on the device; where False every buffer must stay bit-identical.
            random_bits: (name, count) -> int32 [count] on the device, fresh random bits of this module in
                this step; another name gives another stream.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what was noted and not applied."""
        raise NotImplementedError


def named_counters(model: nn.Module) -> Iterator[tuple[str, IntegerCounters]]:
    """Names and modules of all counters in `model`, in order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, IntegerCounters):
            yield name, module
