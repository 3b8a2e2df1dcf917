"""Low-rank adapters (Hu et al. 2021, "LoRA") on frozen integer linears: y = base(x) + (alpha / r) B A x.

A and B are floats and belong to a finetune only; the base's integers are neither changed nor captured.

Shape letters: I in, O out, R rank.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.config import did_you_mean
from arbitor.errors import UserError
from arbitor.model.heads import ByteHead
from arbitor.ternary import TernaryLinear, named_ternary

MAX_RANK = 4096
# What these compute has a threshold behind it (experts, motifs, halting, modality), where a float added to
# the sum would only move the threshold.
DECISIONS = ("core.moe.router", "core.halting", "vq", "router")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The shape of an adapter.

    Attributes:
        rank: R.
        alpha: the update is scaled by alpha / rank.
        dropout: share of an adapter's inputs that are zeroed in training.
        modules: full names of the linears that have one, in the model's order.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise UserError(f"--rank must be between 1 and {MAX_RANK}, got {self.rank}")
        if not 0 < self.alpha <= 1e6:
            raise UserError(f"--alpha must be above 0 and at most 1e6, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be from 0 to below 1, got {self.dropout!r}")


class LoraLinear(nn.Module):
    """A frozen linear, ternary or the byte head, with a float update of low rank beside it.

    The parts are named as in the PEFT library: `base_layer`, `lora_A` [R, I] and `lora_B` [O, R]. B starts at
    zero, so that a fresh adapter changes nothing.

    Args:
        base_layer: the frozen linear.
        rank, alpha, dropout: as in `Adapter`.
    """

    float_adapter = True  # tells the audit what these floats are

    def __init__(
        self, base_layer: TernaryLinear | ByteHead, rank: int, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        device = base_layer.stored.device
        self.base_layer = base_layer
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor, quantize: bool = True) -> Tensor:
        """x float [..., I] -> [..., O] in the dtype that the base gives; see `TernaryLinear`."""
        y = self.base_layer(x, quantize)
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return y + (self.scaling * update).to(y.dtype)

    def logits(self, x: Tensor, quantize: bool = True) -> Tensor:
        """The same, under the name that a head is called by."""
        return self(x, quantize)


def adaptable(model: nn.Module) -> list[str]:
    """Full names of all ternary linears of a model and its byte head, in its order; experts are left out."""
    return [name for name, module in named_ternary(model) if isinstance(module, TernaryLinear | ByteHead)]


def choose_modules(
    model: nn.Module, targets: Sequence[str] = (), apart: Sequence[str] = ()
) -> tuple[str, ...]:
    """The linears that `targets` mean.

    Args:
        model: the base.
        targets: parts of module names, whole words between dots: `attention`, `ffn.up`, `prelude.0`. None of
            them: every linear but those whose output only decides something (router, halting, motifs), and
            those apart.
        apart: first words of names: what the data does not reach.

    Returns:
        Full names in the model's order.

    Raises:
        UserError: a target that no linear has in its name.
    """
    names = adaptable(model)
    if not targets:
        without = (*DECISIONS, *apart)
        return tuple(name for name in names if not any(_contains(name, part, 0) for part in without))
    for target in targets:
        if not any(_contains(name, target) for name in names):
            words = sorted({word for name in names for word in name.split(".") if not word.isdecimal()})
            raise UserError(
                f"--targets {target!r} is in no linear's name{did_you_mean(target, words)}; words are "
                f"{', '.join(words)}"
            )
    return tuple(name for name in names if any(_contains(name, target) for target in targets))


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put fresh adapters beside the linears of `adapter`, drawn from torch's global generator.

    The model is then in evaluation mode but for the adapters: the base is frozen.

    Raises:
        UserError: there are adapters or an optimizer already, or a name is not that of a linear.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError("the model has an adapter already")
    if any(module.capture is not None for _, module in named_ternary(model)):
        raise UserError("a VoteOptimizer is attached to the model; an adapter needs a frozen base: detach it")
    names = set(adaptable(model))
    for name in adapter.modules:
        if name not in names:
            raise UserError(f"the model has no linear {name!r} to put an adapter beside")
    if not adapter.modules:
        raise UserError("the adapter names no linear")
    for name in adapter.modules:
        parent, _, attribute = name.rpartition(".")
        base_layer = model.get_submodule(name)
        assert isinstance(base_layer, TernaryLinear | ByteHead)
        wrapped = LoraLinear(base_layer, adapter.rank, adapter.alpha, adapter.dropout)
        setattr(model.get_submodule(parent), attribute, wrapped)
    set_training(model, False)


def set_training(model: nn.Module, training: bool) -> None:
    """Switch the adapters' dropout on or off; the base stays in evaluation mode."""
    model.eval()
    for _, module in named_adapters(model):
        module.dropout.train(training)


def named_adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Names of the adapted linears, as they are without an adapter, and their modules."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`<linear>.lora_A.weight` fp32 [R, I] and `<linear>.lora_B.weight` fp32 [O, R] of all adapters."""
    return {
        f"{name}.{part}.weight": getattr(module, part).weight
        for name, module in named_adapters(model)
        for part in ("lora_A", "lora_B")
    }


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the base holds, under the names that it has there; adapters are left out."""
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if id(tensor) not in adapters
    }


def fingerprint(model: nn.Module) -> str:
    """Checksum of every byte of the base, its names and shapes: BLAKE2b, 128 bits in hexadecimal."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(base_tensors(model).items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hasher.update(flat.numpy().data)
    return hasher.hexdigest()


def _contains(name: str, part: str, at: int | None = None) -> bool:
    """Whether the words of `part` stand in `name` one after another, from word `at` if that is given."""
    words, wanted = name.split("."), part.split(".")
    starts = range(len(words) - len(wanted) + 1) if at is None else (at,)
    return any(words[start : start + len(wanted)] == wanted for start in starts)
