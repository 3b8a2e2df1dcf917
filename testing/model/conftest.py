"""Small models, and a way to take all rounding out of one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model import ARBModel
from arbitor.ternary import Int8Embedding, TernaryExperts, TernaryLinear

SMALL: dict[str, Any] = {
    "dim": 40,
    "num_prelude_layers": 2,
    "num_coda_layers": 1,
    "num_heads": 3,
    "head_dim": 6,
    "rope_dim": 4,
    "value_dim": 10,
    "kv_latent_dim": 24,
    "ffn_dim": 56,
    "ctx": 32,
}


class _InDouble(nn.Module):
    """An embedding whose rows come out in fp64, so that everything after it is computed in fp64."""

    def __init__(self, table: Int8Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).double()


@pytest.fixture
def make_model() -> Callable[..., ARBModel]:
    """make_model(seed=0, **fields of ModelConfig) -> a small model with three layers."""

    def make(seed: int = 0, **overrides: Any) -> ARBModel:
        torch.manual_seed(seed)
        return ARBModel(config=ModelConfig(**{**SMALL, **overrides}))

    return make


def _unrounded(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, TernaryLinear | TernaryExperts):
            part.forward = partial(part.forward, quantize=False)
    return module


@pytest.fixture
def unrounded() -> Callable[[nn.Module], nn.Module]:
    """Makes the linears of a module take float activations; it then computes in the dtype of its input."""
    return _unrounded


@pytest.fixture
def without_rounding() -> Callable[[ARBModel], ARBModel]:
    """Makes a model compute in fp64 with float activations; its fp32 logits then hold one rounding each."""

    def convert(model: ARBModel) -> ARBModel:
        model.embed = _InDouble(model.embed)
        model.head.logits = partial(model.head.logits, quantize=False)
        if model.memory is not None:
            fetch = model.memory.table.fetch
            model.memory.table.fetch = lambda rows, device: fetch(rows, device).double()
        return _unrounded(model)

    return convert


@pytest.fixture
def make_ids() -> Callable[..., Tensor]:
    """make_ids(batch, length, seed=0) -> int64 ids of the whole vocabulary."""

    def make(batch: int, length: int, seed: int = 0) -> Tensor:
        return torch.randint(0, 288, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make
