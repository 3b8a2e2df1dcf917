"""Float twins of a model with the audio sidecar: its convolutions and biases are replaced, too.

Shape letters: B batch, C channels in, O channels out, K taps, T times in, U times out.
"""

import torch
from torch import Tensor, nn

from arbitor.model import ARBModel
from arbitor.ternary import Int8Vector, TernaryConv1d, TernaryUpsample1d
from benchmarks.learning.twins import DenseLinear


class DenseConv1d(DenseLinear):
    """A `TernaryConv1d` or `TernaryUpsample1d` with float weights, drawn from N(0, (C K)^-1/2).

    Args:
        layer: whose windows and rates it takes over.
        device: where to make the weights.
    """

    def __init__(self, layer: TernaryConv1d, device: torch.device) -> None:
        super().__init__(layer.in_features, layer.out_features, device)
        self.factor = layer.factor if isinstance(layer, TernaryUpsample1d) else 1
        self.input_norm = layer.input_norm
        self._windows = layer.windows

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, T] -> [B, O, U]."""
        windows_BUW = self._windows(x)
        product = super().forward if self.input_norm else self._product
        y_BRU = product(windows_BUW).transpose(1, 2)
        batch, rows, times = y_BRU.shape
        return y_BRU.reshape(batch, rows // self.factor, self.factor, times).transpose(2, 3).flatten(2)

    def _product(self, windows_BUW: Tensor) -> Tensor:
        return nn.functional.linear(windows_BUW, self.weight)


class FloatVector(nn.Module):
    """A float stand-in of an `Int8Vector`, starting with its values."""

    def __init__(self, vector: Int8Vector) -> None:
        super().__init__()
        self.weight = nn.Parameter(vector().detach().clone())

    def forward(self) -> Tensor:
        """Its numbers."""
        return self.weight


def replace_convolutions(model: ARBModel) -> list[nn.Parameter]:
    """Replace, in place, the convolutions and vectors of the audio sidecar; the vectors' parameters."""
    vectors = []
    for name, module in list(model.named_modules()):
        if isinstance(module, TernaryConv1d):
            twin: nn.Module = DenseConv1d(module, model.device)
        elif isinstance(module, Int8Vector):
            twin = FloatVector(module)
            vectors.append(twin.weight)
        else:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, twin)
    return vectors
