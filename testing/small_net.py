"""A small model with one of every integer layer, and what a test needs to look at it bit by bit."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arbitor.ternary import Int8Embedding, TernaryEmbeddingTable, TernaryLinear, VoteOptimizer

VOCABULARY, POSITIONS, DIM = 11, 6, 20
STATES = ["full", "compact", "lean"]

each_state = pytest.mark.parametrize("state", STATES)
each_rule = pytest.mark.parametrize("rule", ["spectral", "sinkhorn", "row", "sign"])


class SmallNet(nn.Module):
    """Byte table + position table, two feed-forward blocks of equal shapes, byte head."""

    def __init__(self, tscale: str = "ROW") -> None:
        super().__init__()
        self.embed = Int8Embedding(VOCABULARY, DIM)
        self.position = TernaryEmbeddingTable(POSITIONS, DIM, tscale=tscale)
        self.up = nn.ModuleList(TernaryLinear(DIM, 36, tscale=tscale) for _ in range(2))
        self.down = nn.ModuleList(TernaryLinear(36, DIM, tscale=tscale) for _ in range(2))
        self.head = Int8Embedding(VOCABULARY, DIM, kind="head")

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> logits [B, L, VOCABULARY]."""
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)).square())
        return self.head.logits(x)


def make(seed: int = 0, *, tscale: str = "ROW", **options: object) -> tuple[SmallNet, VoteOptimizer]:
    """A net drawn from `seed` and its optimizer."""
    torch.manual_seed(seed)
    net = SmallNet(tscale)
    return net, VoteOptimizer(net, **options)


def batch(seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor]:
    """ids and targets [B, L]; ids POSITIONS - 1 and VOCABULARY - 1 never occur."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY - 1, (size, POSITIONS - 1), generator=generator)
    return ids, (3 * ids + 1) % (VOCABULARY - 1)


def loss_of(net: SmallNet, data: tuple[Tensor, Tensor], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the net on a batch."""
    device = next(net.parameters()).device
    ids, targets = (tensor.to(device) for tensor in data)
    return F.cross_entropy(net(ids).flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def backward(net: SmallNet, data: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Forward and backward on a batch; the loss."""
    loss = loss_of(net, batch() if data is None else data)
    loss.backward()
    return loss.detach()


def train(net: SmallNet, optimizer: VoteOptimizer, steps: range) -> list[float]:
    """Steps on the batches of these numbers; their losses."""
    losses = []
    for step in steps:
        loss = backward(net, batch(step))
        optimizer.note_loss(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(net: nn.Module, optimizer: VoteOptimizer | None = None) -> dict[str, Tensor]:
    """Copies of all weights and all training state."""
    tensors = dict(net.state_dict()) | (optimizer.named_state() if optimizer else {})
    return {name: tensor.clone() for name, tensor in tensors.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in any bit."""
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]
