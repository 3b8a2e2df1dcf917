import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arbitor.errors import UserError
from arbitor.ternary import TernaryConv1d, TernaryLinear, TernaryUpsample1d, VoteOptimizer
from arbitor.ternary.audit import audit

SHAPES = [
    pytest.param({"kernel_size": 1}, id="point"),
    pytest.param({"kernel_size": 4}, id="even"),
    pytest.param({"kernel_size": 5, "stride": 2}, id="stride"),
    pytest.param({"kernel_size": 3, "dilation": 3}, id="dilation"),
    pytest.param({"kernel_size": 4, "stride": 3, "dilation": 2, "causal": True}, id="causal"),
]


def conv(channels=3, rows=5, seed=0, **options):
    """A TernaryConv1d with exponents that differ."""
    torch.manual_seed(seed)
    layer = TernaryConv1d(channels, rows, **options)
    layer.set_trits(layer.trits(), torch.randint(-5, -2, layer.E.shape).to(torch.int8))
    return layer


def inputs(*shape, seed=1, dtype=torch.float64, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


def torch_conv(layer, weight, x):
    """The same by torch's own convolution, without a norm."""
    span = layer.dilation * (layer.kernel_size - 1)
    before = span if layer.causal else span // 2
    weight = weight.view(layer.out_features, layer.in_channels, layer.kernel_size)
    padded = F.pad(x, (before, span - before))
    return F.conv1d(padded, weight, stride=layer.stride, dilation=layer.dilation)


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
def test_gradcheck(options, input_norm):
    layer = conv(**options, input_norm=input_norm)
    assert torch.autograd.gradcheck(lambda x: layer(x, quantize=False), inputs(2, 3, 8))


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("tscale", ["T4", "ROW"])
@pytest.mark.parametrize("times", [1, 2, 7, 12])
def test_output_and_gradients_equal_those_of_a_torch_convolution(options, tscale, times):
    layer = conv(**options, tscale=tscale, input_norm=False)
    VoteOptimizer(layer)
    x = inputs(2, 3, times)
    y = layer(x, quantize=False)
    assert y.shape == (2, 5, -(-times // layer.stride))
    y.tanh().sum().backward()

    x_dense = x.detach().clone().requires_grad_()
    weight = layer.decode(torch.float64).requires_grad_()
    expected = torch_conv(layer, weight, x_dense)
    expected.tanh().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.capture.gradient(), weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", SHAPES)
def test_it_is_a_linear_on_windows_bit_for_bit(options):
    layer = conv(**options)
    linear = TernaryLinear(layer.in_features, layer.out_features)
    linear.load_state_dict(layer.state_dict())
    VoteOptimizer(nn.ModuleList([layer]))
    VoteOptimizer(nn.ModuleList([linear]))
    x = inputs(2, 3, 11, dtype=torch.float32, grad=False)
    y = layer(x)
    expected = linear(layer.windows(x))
    assert torch.equal(y, expected.transpose(1, 2))
    dy = inputs(*y.shape, dtype=torch.float32, grad=False)
    y.backward(dy)
    expected.backward(dy.transpose(1, 2))
    assert torch.equal(layer.capture.gradient(), linear.capture.gradient())


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("place", [0, 4, 10])
def test_a_causal_convolution_sees_nothing_ahead(options, place):
    layer = conv(**options | {"causal": True})
    x = inputs(1, 3, 11, dtype=torch.float32, grad=False)
    changed = x.clone()
    changed[..., place] += 1
    same = (layer(x) == layer(changed)).all(dim=1)[0]
    first = -(-place // layer.stride)  # the first window that ends at or after the change
    assert same[:first].all()


def test_the_last_tap_of_a_causal_window_is_the_present():
    layer = conv(1, 1, kernel_size=3, causal=True, input_norm=False)
    layer.set_trits(torch.tensor([[0, 0, 1]], dtype=torch.int8), torch.zeros_like(layer.E))
    x = torch.arange(1.0, 6.0).view(1, 1, 5)
    assert torch.equal(layer(x, quantize=False), x)


@pytest.mark.parametrize("factor", [1, 2, 5])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_upsampling_equals_a_transposed_convolution(factor, kernel_size):
    torch.manual_seed(0)
    layer = TernaryUpsample1d(4, 3, factor, kernel_size=kernel_size, input_norm=False)
    x = inputs(2, 4, 6)
    y = layer(x, quantize=False)
    assert y.shape == (2, 3, 6 * factor)
    # Row o * factor + r of the matrix makes time t * factor + r of channel o, from taps t + k - (K - 1) // 2.
    weight = layer.decode(torch.float64).view(3, factor, 4, kernel_size).permute(2, 0, 3, 1)
    kernel = weight.flip(2).reshape(4, 3, kernel_size * factor)
    expected = F.conv_transpose1d(x, kernel, stride=factor)
    behind = (kernel_size - 1 - (kernel_size - 1) // 2) * factor
    torch.testing.assert_close(y, expected[..., behind : behind + 6 * factor], rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: layer(x, quantize=False), inputs(1, 4, 3))


def test_votes_train_it_and_the_audit_counts_it():
    torch.manual_seed(0)
    net = nn.Sequential(
        TernaryConv1d(1, 16, 9, stride=4, input_norm=False),
        nn.ReLU(),
        TernaryUpsample1d(16, 1, 4, kernel_size=3),
    )
    weights = 16 * 9 + 4 * 48
    optimizer = VoteOptimizer(net, state="full")
    report = audit(net, optimizer)
    assert report.ok
    assert report.trit_weights == weights
    time = torch.arange(64) / 64
    x = torch.stack([torch.sin(2 * torch.pi * (f * time + p)) for f in (1, 2, 3) for p in (0, 0.3, 0.6)])[
        :, None
    ]
    before = net[0].trits()
    losses = []
    for step in range(150):
        loss = (net(x) - x).square().mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert not torch.equal(before, net[0].trits())
    assert losses[-1] < 0.25 * 0.5  # a quarter of the signals' power
    assert audit(net, optimizer).ok


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "kernel_size", "stride", "dilation"])
def test_sizes_below_one_are_refused(name):
    sizes = {"in_channels": 2, "out_channels": 2, "kernel_size": 3, name: 0}
    with pytest.raises(UserError, match=f"{name} of a convolution must be at least 1, got 0"):
        TernaryConv1d(**sizes)


def test_inputs_of_another_shape_are_refused():
    layer = conv(kernel_size=3)
    for shape in [(3, 8), (1, 2, 8), (1, 3, 0)]:
        with pytest.raises(ValueError, match=r"expected \[batch, 3, times\]"):
            layer(torch.zeros(shape))
