"""Linears on a residual stream: the kernels' way against calling one after the other."""

import pytest
import torch

from arbitor.ops.int8_matmul import cpu as int8_matmul
from arbitor.ops.ternary_linear import cpu
from arbitor.ternary import TernaryLinear, VoteOptimizer
from arbitor.ternary.stream import Stream, add_to_stream, deferring, read_stream, settled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS32 = torch.finfo(torch.float32).eps


class Part(torch.nn.Module):
    """Linears on a stream of width 24."""

    def __init__(self, num_linears, tscale="ROW"):
        super().__init__()
        self.linears = torch.nn.ModuleList(
            TernaryLinear(24, out, tscale=tscale) for out in (10, 7)[:num_linears]
        )


def part_of(num_linears, tscale="ROW"):
    torch.manual_seed(0)
    part = Part(num_linears, tscale).to(DEVICE)
    return part, VoteOptimizer(part)


def everything(part, optimizer, tokens, used=None, device=DEVICE):
    """Outputs, gradient of the stream, captured gradients; `used` are the outputs that get a gradient."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens, 24, generator=generator).to(device).requires_grad_()
    outputs = read_stream(x, *part.linears)
    gradients = [torch.randn(y.shape, generator=generator).to(device) for y in outputs]
    used = range(len(outputs)) if used is None else used
    torch.autograd.backward([outputs[i] for i in used], [gradients[i] for i in used])
    captured = [linear.capture.gradient() for linear in part.linears if not linear.capture.empty]
    result = [y.detach().clone() for y in outputs], x.grad, [gradient.clone() for gradient in captured]
    optimizer.zero_grad()
    return result


@pytest.mark.long
@pytest.mark.parametrize("num_linears", [1, 2])
@pytest.mark.parametrize("tscale", ["ROW", "T8"])
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("used", [None, (1,), (0,)], ids=["all", "linear", "stream"])
def test_kernels_give_what_single_calls_give(num_linears, tscale, tokens, used, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    part, optimizer = part_of(num_linears, tscale)
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch")
    expected, expected_dx, expected_captured = everything(part, optimizer, tokens, used)
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    found, dx, captured = everything(part, optimizer, tokens, used)
    assert torch.equal(found[0], expected[0]), "the stream goes on as it is"
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        # The sum of squares of the norm, and with it the codes' scale, is rounded in another order.
        torch.testing.assert_close(mine, theirs, rtol=EPS32 * (2 + 24**0.5), atol=0)
    assert (dx - expected_dx).abs().max() <= EPS32 * (8 + 24**0.5) * 2 * expected_dx.abs().max()
    assert len(captured) == len(expected_captured)
    for mine, theirs in zip(captured, expected_captured, strict=True):
        assert (mine - theirs).abs().max() <= EPS32 * (4 + tokens**0.5) * 2 * theirs.abs().max()


@pytest.mark.parametrize("num_linears", [1, 2])
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("used", [None, (1,), (0,)], ids=["all", "linear", "stream"])
def test_a_cpu_quantises_once_and_gives_what_single_calls_give(num_linears, integers, used, monkeypatch):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch")
    monkeypatch.setattr(int8_matmul, "pays", lambda *_: integers)
    part, optimizer = part_of(num_linears)
    part, quantised, quantize = part.cpu(), [], cpu.quantize

    def counted(x, *rest):
        quantised.append(x.shape)
        return quantize(x, *rest)

    monkeypatch.setattr(cpu, "quantize", counted)
    found = everything(part, optimizer, 9, used, "cpu")
    assert len(quantised) == integers
    hook = part.linears[0].register_forward_hook(lambda module, args, y: None)  # which is called
    expected = everything(part, optimizer, 9, used, "cpu")
    hook.remove()
    assert len(quantised) == integers * (1 + num_linears)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_cpu_refuses_a_stream_of_another_width():
    part, _ = part_of(2)
    with pytest.raises(ValueError, match="expected a last dimension of 24"):
        read_stream(torch.randn(3, 25), *part.cpu().linears)


def test_frozen_linears_pass_the_gradient_on(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    torch.manual_seed(0)
    part = Part(2).to(DEVICE)
    assert not any(y.requires_grad for y in read_stream(torch.randn(3, 24, device=DEVICE), *part.linears))
    x = torch.randn(3, 24, device=DEVICE, requires_grad=True)
    h, a, b = read_stream(x, *part.linears)
    (together,) = torch.autograd.grad(h.sum() + a.sum() + b.square().sum(), x)
    y = [linear(x) for linear in part.linears]
    (apart,) = torch.autograd.grad(x.sum() + y[0].sum() + y[1].square().sum(), x)
    assert (together - apart).abs().max() <= EPS32 * (8 + 24**0.5) * 2 * apart.abs().max()


def test_hooks_and_other_modules_are_called(monkeypatch):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    part, _ = part_of(2)
    seen = []
    part.linears[1].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    x = torch.randn(3, 24, device=DEVICE)
    read_stream(x, *part.linears)
    assert seen == [(3, 7)]
    part.linears[0].forward = lambda x: x[..., :1]
    assert torch.equal(read_stream(x, *part.linears)[1], x[..., :1])
    dense = torch.nn.Linear(24, 5, device=DEVICE)
    assert torch.equal(read_stream(x, dense)[1], dense(x))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (7, 1000)], ids=str)
def test_the_sum_of_a_stream_and_a_narrower_tensor(backend, shape, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
    torch.manual_seed(0)
    stream = torch.randn(shape, device=DEVICE, requires_grad=True)
    y = torch.randn(shape, device=DEVICE).to(torch.bfloat16).requires_grad_()
    total = add_to_stream(stream, y)
    assert total.dtype == torch.float32
    assert torch.equal(total, stream + y)
    gradient = torch.randn(shape, device=DEVICE)
    total.backward(gradient)
    assert torch.equal(stream.grad, gradient)
    assert torch.equal(y.grad, gradient.to(torch.bfloat16))


def with_a_sum(part, optimizer, tokens, dtype, apart):
    """As `everything`, of a stream to which something is still to be added; `apart` adds it beforehand."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, tokens, 24, generator=generator).to(DEVICE) for _ in range(2))
    x, y = x.to(dtype).requires_grad_(), y.to(torch.bfloat16).requires_grad_()
    stream = add_to_stream(x, y) if apart else Stream(x, y)
    outputs = read_stream(stream, *part.linears)
    gradients = [torch.randn(z.shape, generator=generator).to(DEVICE, z.dtype) for z in outputs]
    torch.autograd.backward(outputs, gradients)
    captured = [linear.capture.gradient().clone() for linear in part.linears]
    optimizer.zero_grad()
    return [*(z.detach() for z in outputs), x.grad, y.grad, *captured]


@pytest.mark.parametrize("num_linears", [1, 2])
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_that_waits_for_its_reader_gives_equal_bits(num_linears, tokens, dtype, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 of its own")
    part, optimizer = part_of(num_linears)
    expected = with_a_sum(part, optimizer, tokens, dtype, True)
    found = with_a_sum(part, optimizer, tokens, dtype, False)
    assert [z.dtype for z in found] == [z.dtype for z in expected]
    assert found[0].dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_stream_that_waits_is_the_sum(backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
    x, y = torch.randn(2, 3, 5, device=DEVICE)
    assert torch.equal(settled(Stream(x, y)), x + y)
    assert settled(Stream(x)) is x
    assert settled(deferring(x)) is x
    assert isinstance(deferring(x), Stream) == (backend == "triton")
    linear = torch.nn.Linear(5, 2, device=DEVICE)
    assert torch.equal(read_stream(Stream(x, y), linear)[1], linear(x + y))
