"""Products of gradients in bf16 on a CPU: only inside, only of fp32, and only gradients."""

import pytest
import torch

from arbitor.ops import backend
from arbitor.ops.backend import has_bf16_products, rounded_gradients
from arbitor.ops.int8_table import int8_linear_backward
from arbitor.ops.ternary_linear import ternary_linear, ternary_linear_backward
from arbitor.ops.trit_codec import ternary_decode, trit_pack
from arbitor.ternary import TernaryLinear, VoteOptimizer
from arbitor.ternary.layers import scaled_gradient
from arbitor.ternary.rules import spectral

ROUNDING = 2.0**-9  # of a number that becomes bf16


@pytest.fixture
def case():
    """dy [N, O], x [N, I], packed, E, W [O, I], all fp32 but the integers."""
    generator = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (40, 170), generator=generator, dtype=torch.int8)
    exponent = torch.randint(-5, 0, (40, 1), generator=generator).to(torch.int8)
    packed = trit_pack(trits)
    weight = ternary_decode(packed, exponent, 170, 170, torch.float32)
    dy, x = (torch.randn(33, size, generator=generator) for size in (40, 170))
    return dy, x, packed, exponent, weight


def test_the_gradient_of_the_input_is_within_two_roundings(case):
    dy, x, packed, exponent, weight = case
    rstd = torch.ones(33, 1)
    exact = dy.double() @ weight.double()
    with rounded_gradients(True):
        found = ternary_linear_backward(dy, x, rstd, packed, exponent, 170, False)
    assert found.dtype == torch.float32
    error = (found.double() - exact).abs()
    bound = 2 * ROUNDING * (1 + 2 * ROUNDING) * (dy.double().abs() @ weight.double().abs())
    assert (error <= bound).all()
    outside = ternary_linear_backward(dy, x, rstd, packed, exponent, 170, False)
    assert not torch.equal(found, outside)
    with rounded_gradients(False):
        assert torch.equal(ternary_linear_backward(dy, x, rstd, packed, exponent, 170, False), outside)


def test_a_table_rounds_alike():
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-95, 96, (30, 20), generator=generator, dtype=torch.int8)
    exponent = torch.zeros(30, dtype=torch.int8)
    dy, x = torch.randn(9, 30, generator=generator), torch.randn(9, 20, generator=generator)
    rstd = x.square().mean(-1, keepdim=True).rsqrt()
    outside = int8_linear_backward(dy, x, rstd, q, exponent)
    with rounded_gradients(True):
        inside = int8_linear_backward(dy, x, rstd, q, exponent)
    assert not torch.equal(inside, outside)
    torch.testing.assert_close(inside, outside, rtol=0, atol=float(16 * ROUNDING * outside.abs().max()))


def test_forwards_do_not_change(case):
    _, x, packed, exponent, _ = case
    outside = ternary_linear(x, packed, exponent, 170, True, True, torch.float32)
    with rounded_gradients(True):
        inside = ternary_linear(x, packed, exponent, 170, True, True, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_gradients_of_weights_are_kept_in_bf16():
    dy, scale = torch.randn(5, 3), torch.rand(5, 1)
    with rounded_gradients(True):
        assert torch.equal(scaled_gradient(dy, scale), (dy * scale).to(torch.bfloat16))
        assert scaled_gradient(dy.double(), scale.double()).dtype == torch.float64
    assert torch.equal(scaled_gradient(dy, scale), dy * scale)


def test_directions_stay_orthogonal():
    n = torch.randn(64, 40, generator=torch.Generator().manual_seed(2))
    with rounded_gradients(True):
        rounded = spectral(n)
    exact = spectral(n)
    assert not torch.equal(rounded, exact)
    cosine = torch.nn.functional.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0)
    assert cosine > 1 - 1e-3


def test_the_setting_ends_with_its_section():
    x = torch.zeros(1)
    with rounded_gradients(True):
        assert backend.rounds_gradients(x)
        assert not backend.rounds_gradients(x.double())
        with rounded_gradients(False):
            assert not backend.rounds_gradients(x)
        assert backend.rounds_gradients(x)
    with pytest.raises(KeyError), rounded_gradients(True):
        raise KeyError
    assert not backend.rounds_gradients(x)


def test_a_step_inside_votes_like_one_outside():
    flips = []
    for on in (True, False):
        torch.manual_seed(0)
        layer = TernaryLinear(160, 96)
        optimizer = VoteOptimizer(layer, lr=0.5)
        x, target = torch.randn(200, 160), torch.randn(200, 96)
        before = layer.trits().clone()
        with rounded_gradients(on):
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        flips.append(layer.trits() - before)
    moved = [(f != 0) for f in flips]
    assert moved[0].sum() > 1000
    assert (flips[0] == flips[1]).float().mean() > 0.99


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)],
)
def test_it_asks_the_processor(monkeypatch, capabilities, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bf16_products.__wrapped__() == has
