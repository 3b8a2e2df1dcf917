"""Float twins of an ARBModel: the same network, each integer layer replaced by a float one.

Shape letters: N tokens, I in, O out, V rows of a table, D its width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.model import ARBModel
from arbitor.ternary import Int8Embedding, TernaryLinear

RMS_EPS = 1e-6  # as in the integer layers
SCALE_EPS = 1e-5  # of absmean and absmax, as in BitNet b1.58
INT8_MAX = 127


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


def round_straight_through(x: Tensor, limit: float) -> Tensor:
    """round(x) clamped to +-limit, with the gradient of x itself."""
    return x + (x.round().clamp(-limit, limit) - x).detach()


class DenseLinear(nn.Module):
    """y = rms_norm(x) W^T with float weights, drawn from N(0, I^-1/2); x float [..., I] -> [..., O].

    Without `input_norm`, x is taken as it is.
    """

    def __init__(
        self, in_features: int, out_features: int, device: torch.device, *, input_norm: bool = True
    ) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features, device=device) * in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x, in autocast's dtype where autocast is on."""
        return F.linear(self.normed(x), self.weight)

    def normed(self, x: Tensor) -> Tensor:
        """x over its root mean square, if the layer normalises its input."""
        return rms_norm(x) if self.input_norm else x


class BitLinear(DenseLinear):
    """BitNet b1.58's linear (Ma et al. 2024, "The Era of 1-bit LLMs", section 2, and its training notes).

    Weights are rounded to -1, 0, +1 times their mean magnitude, activations to int8 per token after the RMS
    norm; gradients pass both roundings straight through to the float master weights. Codes and trits are
    multiplied as the integers they are, which bf16 holds exactly, and scaled afterwards.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x, in autocast's dtype where autocast is on."""
        mean_size = self.weight.detach().abs().mean().clamp_min(SCALE_EPS)
        trits_OI = round_straight_through(self.weight / mean_size, 1)
        normed = self.normed(x.float())
        step = normed.detach().abs().amax(dim=-1, keepdim=True).clamp_min(SCALE_EPS) / INT8_MAX
        codes = round_straight_through(normed / step, INT8_MAX)
        product = F.linear(codes, trits_OI)
        return (product * (step * mean_size)).to(product.dtype)


class FloatTable(nn.Module):
    """Float stand-in of an `Int8Embedding`: a lookup by id, or an output layer.

    Embeddings start as N(0, 1), heads as N(0, D^-1/2). Neither is quantised, as in BitNet b1.58.
    """

    def __init__(self, num_embeddings: int, dim: int, std: float, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_embeddings, dim, device=device) * std)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> fp32 [..., D]."""
        return F.embedding(ids, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """x float [..., D] -> [..., V], of the RMS-normalised x."""
        return F.linear(rms_norm(x), self.weight)


def make_twin(model: ARBModel, linear: type[DenseLinear]) -> None:
    """Replace, in place, every integer layer of `model` by a float one with random weights.

    Args:
        model: all of its TernaryLinear and Int8Embedding modules are replaced, everything else stays.
        linear: `DenseLinear` or `BitLinear`.
    """
    device = model.device
    for name, module in list(model.named_modules()):
        if isinstance(module, TernaryLinear):
            twin: nn.Module = linear(
                module.in_features, module.out_features, device, input_norm=module.input_norm
            )
        elif isinstance(module, Int8Embedding):
            std = 1.0 if module.kind == "embedding" else module.dim**-0.5
            twin = FloatTable(module.num_embeddings, module.dim, std, device)
        else:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, twin)
