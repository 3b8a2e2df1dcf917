"""How many trits a model has, and how many of them take part in a position."""

from dataclasses import dataclass
from functools import cache

import torch

from arbitor.config import ModelConfig
from arbitor.model import ARBModel
from arbitor.model.memgram import MemoryTable
from arbitor.ternary import TernaryExperts, TernaryScaleTensor, named_ternary


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of a model in trits; byte tables and vectors are not counted.

    Attributes:
        total: all trits.
        active: those that one position meets: of the routed experts the active ones, of the memory the rows
            it reads.
        work: the same, the core's as many times as it may be iterated.
    """

    total: int
    active: int
    work: int


@cache
def counts(config: ModelConfig) -> Counts:
    """Sizes of a model, from its modules; nothing is allocated."""
    model = ARBModel(config=config, device=torch.device("meta"))
    total = active = work = 0
    for name, module in named_ternary(model):
        if not isinstance(module, TernaryScaleTensor):
            continue
        met = module.numel()
        if isinstance(module, TernaryExperts):
            met = met // config.num_experts * config.num_active_experts
        elif isinstance(module, MemoryTable):
            met = 2 * config.memory_heads * config.memory_dim
        total += module.numel()
        active += met
        work += met * (config.max_moe_iters if name.startswith("core.") else 1)
    return Counts(total, active, work)
