"""Weights that several modules share have one state and vote once."""

import pytest
import torch
from torch import nn

from arbitor.errors import UserError
from arbitor.ternary import Int8Embedding, TernaryEmbeddingTable, TernaryExperts, TernaryLinear, VoteOptimizer
from arbitor.ternary.audit import audit
from arbitor.ternary.layers import Int8Vector
from testing.small_net import changed, each_state, snapshot


class Twice(nn.Module):
    """One matrix used twice: one module, one module with two names, or two with the same parameters."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = TernaryLinear(16, 16)
        self.second = self.first
        if form == "one":
            del self.second
        elif form == "parameters":
            self.second = TernaryLinear(16, 16)
            self.second.T_packed, self.second.E = self.first.T_packed, self.first.E

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        second = getattr(self, "second", self.first)
        return second(torch.tanh(self.first(x)))


def steps(net, optimizer, count=3):
    for seed in range(count):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
        net(x).square().sum().backward()
        optimizer.step()


@each_state
@pytest.mark.parametrize("form", ["names", "parameters"])
def test_shared_weights_train_as_one_matrix_does(form, state):
    reference = Twice("one")
    reference_optimizer = VoteOptimizer(reference, state=state, lr=0.3)
    steps(reference, reference_optimizer)
    net = Twice(form)
    optimizer = VoteOptimizer(net, state=state, lr=0.3)
    assert len(optimizer.param_groups[0]["params"]) == 1
    assert optimizer.state_bytes() == reference_optimizer.state_bytes()
    steps(net, optimizer)
    assert changed(snapshot(reference), snapshot(Wrapper(net.first))) == []
    assert changed(reference_optimizer.named_state(), optimizer.named_state()) == []
    assert net.second.T_packed is net.first.T_packed
    assert optimizer.flip_rate() == reference_optimizer.flip_rate() > 0
    assert audit(net, optimizer).total_bytes == audit(reference, reference_optimizer).total_bytes
    assert net.second.optimizer is optimizer


class Wrapper(nn.Module):
    """A matrix under the name `first`."""

    def __init__(self, first: TernaryLinear) -> None:
        super().__init__()
        self.first = first


def test_zero_grad_and_detach_reach_every_module_of_shared_weights():
    net = Twice("parameters")
    optimizer = VoteOptimizer(net)
    net(torch.randn(5, 16)).sum().backward()
    assert not net.second.capture.empty
    optimizer.zero_grad()
    assert net.second.capture.empty
    optimizer.detach()
    assert net.second.capture is None
    assert not net(torch.randn(5, 16)).requires_grad


def test_an_embedding_table_and_a_head_may_be_two_modules_with_one_table():
    torch.manual_seed(0)
    embed, head = Int8Embedding(9, 12), Int8Embedding(9, 12, kind="head")
    head.q, head.E = embed.q, embed.E
    optimizer = VoteOptimizer(nn.ModuleList([embed, head]))
    head.logits(embed(torch.arange(5))).square().sum().backward()
    assert list(optimizer.named_state()) == ["0.M", "0.M_exp"]
    both = embed.capture.gradient()
    assert both.abs().amax(dim=1).gt(0).all(), "the head's gradient, which reaches every row"
    optimizer.step()
    assert torch.equal(head.q, embed.q)


def share(a, b, *names):
    for name in names:
        setattr(b, name, getattr(a, name))
    return nn.ModuleList([a, b])


def in_one_memory():
    a, b = TernaryLinear(16, 8), TernaryLinear(16, 8)
    b.T_packed.data, b.E.data = a.T_packed.data, a.E.data
    return nn.ModuleList([a, b])


@pytest.mark.parametrize(
    "build",
    [
        lambda: share(TernaryLinear(16, 8), TernaryLinear(16, 8), "T_packed"),
        lambda: share(TernaryLinear(16, 8), TernaryLinear(16, 8), "E"),
        lambda: share(TernaryLinear(16, 8), TernaryLinear(15, 8), "T_packed", "E"),
        lambda: share(
            TernaryEmbeddingTable(8, 16), TernaryEmbeddingTable(8, 16, sparse=True), "T_packed", "E"
        ),
        lambda: share(Int8Vector(4, fraction_bits=2), Int8Vector(4, fraction_bits=5), "q"),
        lambda: share(TernaryExperts(2, 16, 8), TernaryExperts(2, 16, 8), "T_packed"),
        in_one_memory,
    ],
    ids=["trits", "exponents", "width", "sparse", "fraction", "experts", "memory"],
)
def test_weights_that_are_shared_in_part_are_refused(build):
    torch.manual_seed(0)
    net = build()
    residuals = [getattr(module, "T_residual", None) for module in net]
    with pytest.raises(UserError, match="1 and 0 share some of their weights"):
        VoteOptimizer(net)
    assert all(module.capture is None for module in net), "nothing was attached"
    assert all(a is getattr(m, "T_residual", None) for a, m in zip(residuals, net, strict=True))


def test_modules_on_the_meta_device_are_not_taken_for_shared():
    net = nn.ModuleList(TernaryLinear(16, 8, device="meta") for _ in range(2))
    assert len(VoteOptimizer(net).named_state()) == 8


def test_assigning_to_shared_weights_is_refused():
    net = Twice("parameters")
    optimizer = VoteOptimizer(net)
    saved = {name: tensor.clone() for name, tensor in Twice("one").state_dict().items()}
    saved |= {name.replace("first", "second"): tensor for name, tensor in saved.items()}
    before = snapshot(net, optimizer)
    with pytest.raises(RuntimeError, match=r"cannot be assigned; load with assign=False"):
        net.load_state_dict(saved, assign=True)
    assert changed(before, snapshot(net, optimizer)) == []
    net.load_state_dict(saved)
    steps(net, optimizer, 1)
