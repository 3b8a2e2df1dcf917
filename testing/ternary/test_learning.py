"""Votes learn: small tasks against their start and against a float twin."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from arbitor.ternary import TernaryLinear, VoteOptimizer
from testing.small_net import batch, each_rule, each_state, loss_of, make, train


class FloatLinear(nn.Module):
    """The float twin of a TernaryLinear: RMS norm of its input, then a dense matrix."""

    def __init__(self, columns, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) * columns**-0.5)

    def forward(self, x):
        return F.linear(F.rms_norm(x, x.shape[-1:], eps=1e-6), self.weight)


def classify(net, optimizer, steps=150):
    """Held-out loss before and after training on labels drawn from a random two-layer teacher."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(64, 32, generator=generator) * 32**-0.5
    second = torch.randn(8, 64, generator=generator) * 64**-0.5

    def data(count):
        x = torch.randn(count, 32, generator=generator)
        logits = 3 * F.relu(x @ first.T) @ second.T
        return x, torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()

    held_out = data(2048)

    def evaluate():
        with torch.no_grad():
            return F.cross_entropy(net(held_out[0]), held_out[1]).item()

    start, peak = evaluate(), optimizer.param_groups[0]["lr"]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * step / steps)) / 2
        x, y = data(256)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return start, evaluate()


@pytest.fixture(scope="module")
def float_twin_loss():
    torch.manual_seed(1)
    net = nn.Sequential(FloatLinear(32, 96), nn.ReLU(), FloatLinear(96, 8))
    # The best of 1e-3 to 4e-2.
    return classify(net, torch.optim.AdamW(net.parameters(), lr=2e-2))[1]


@each_state
def test_votes_learn_about_as_well_as_a_float_twin(state, float_twin_loss):
    torch.manual_seed(1)
    net = nn.Sequential(TernaryLinear(32, 96), nn.ReLU(), TernaryLinear(96, 8))
    start, trained = classify(net, VoteOptimizer(net, state=state))
    assert trained < 0.7 * start
    assert trained < 1.08 * float_twin_loss


@each_rule
def test_every_rule_learns(rule):
    net, optimizer = make(rule=rule)
    start = loss_of(net, batch(99, 64)).item()
    train(net, optimizer, range(60))
    assert loss_of(net, batch(99, 64)).item() < 0.6 * start
