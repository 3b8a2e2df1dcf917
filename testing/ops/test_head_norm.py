"""`head_norm`: closed gradients against autograd, and the kernels against the reference."""

import pytest
import torch

from arbitor.model.rotary import rotation
from arbitor.ops.head_norm import cpu, keys_and_values, norm_and_rotate, reference, split_latent
from testing.guards import moved

# B, N, H, P, R, V
SHAPES = [
    (2, 3, 4, 6, 4, 5),
    (1, 1, 1, 1, 2, 1),
    (3, 5, 7, 48, 32, 80),
    (1, 40, 3, 0, 6, 3),
    (2, 4, 12, 17, 10, 9),
]
EPS32 = torch.finfo(torch.float32).eps

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_shape_of_keys = pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3]], ids=str)


def queries(shape, dtype=torch.float32):
    B, N, H, P, R, _ = shape
    torch.manual_seed(0)
    cos, sin = rotation(3, N, R, 100.0, torch.device("cpu"))
    return torch.randn(B, N, H, P + R).to(dtype), cos.to(dtype), sin.to(dtype)


def parts_of_keys(shape, dtype=torch.float32):
    B, N, H, P, R, V = shape
    torch.manual_seed(0)
    return torch.randn(B, N, H, P + V).to(dtype), torch.randn(B, N, R).to(dtype)


@each_shape
def test_closed_gradient_of_queries_is_autograds(shape):
    x, cos, sin = queries(shape, torch.float64)
    x.requires_grad_()
    dy = torch.randn_like(x)
    reference.norm_and_rotate(x, cos, sin).backward(dy)
    torch.testing.assert_close(reference.norm_and_rotate_backward(dy, x.detach(), cos, sin), x.grad)


@each_shape_of_keys
def test_closed_gradient_of_keys_is_autograds(shape):
    P, V = shape[3], shape[5]
    up, shared = (t.requires_grad_() for t in parts_of_keys(shape, torch.float64))
    key, value = reference.keys(up, shared, P), up[..., P:]
    dkey, dvalue = torch.randn_like(key), torch.randn_like(value)
    torch.autograd.backward((key, value), (dkey, dvalue))
    dup, dshared = reference.keys_backward(dkey, dvalue, up.detach(), torch.float64)
    assert dup.shape[-1] == P + V
    torch.testing.assert_close(dup, up.grad)
    torch.testing.assert_close(dshared, shared.grad)


@each_shape
def test_closed_gradient_of_latents_is_autograds(shape):
    x, cos, sin = queries(shape, torch.float64)
    down = torch.randn(*x.shape[:2], 7 + shape[4], dtype=torch.float64).requires_grad_()
    latent, rotary, shared = reference.split_latent(down, cos, sin, 7)
    dlatent, dshared = torch.randn_like(latent), torch.randn_like(shared)
    torch.autograd.backward((latent, shared), (dlatent, dshared))
    found = reference.split_latent_backward(dlatent, dshared, rotary.detach(), cos, sin)
    torch.testing.assert_close(found, down.grad)


@pytest.fixture(params=[1, 1 << 20], ids=["a text at a time", "at once"])
def at_once(request, monkeypatch):
    monkeypatch.setattr("arbitor.ops.rows.ELEMENTS_A_CORE", request.param)


def by_heads(x):
    """As attention hands it back: of one head all positions lie together."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@each_shape
def test_queries_on_a_cpu_have_the_bits_of_the_reference(shape, at_once):
    whole, cos, sin = queries(shape)
    dy = by_heads(torch.randn_like(whole))
    for x in (whole, torch.cat([whole, whole], dim=-1)[..., : whole.shape[-1]]):
        kept = x.clone(), dy.clone()
        assert torch.equal(cpu.norm_and_rotate(x, cos, sin), reference.norm_and_rotate(x, cos, sin))
        found = cpu.norm_and_rotate_backward(dy, x, cos, sin)
        assert torch.equal(found, reference.norm_and_rotate_backward(dy, x, cos, sin))
        assert torch.equal(x, kept[0])
        assert torch.equal(dy, kept[1])


@each_shape_of_keys
def test_keys_on_a_cpu_have_the_bits_of_the_reference(shape, at_once):
    P = shape[3]
    up, shared = parts_of_keys(shape)
    dkey = by_heads(torch.randn_like(reference.keys(up, shared, P)))
    dvalue = by_heads(torch.randn_like(up[..., P:]))
    found = cpu.keys_backward(dkey, dvalue, up, torch.float32)
    for one, other in zip(found, reference.keys_backward(dkey, dvalue, up, torch.float32), strict=True):
        assert torch.equal(one, other)


def test_ops_are_registered_as_they_behave():
    ops = torch.ops.arbitor
    for dtype in (torch.float32, torch.bfloat16):
        x, cos, sin = queries(SHAPES[0])
        x = x.to(dtype)
        up, shared = parts_of_keys(SHAPES[0], dtype)
        key = ops.head_keys(up, shared, 6)
        torch.library.opcheck(ops.head_norm.default, (x, cos, sin))
        torch.library.opcheck(ops.head_norm_backward.default, (x, x, cos, sin))
        torch.library.opcheck(ops.head_keys.default, (up, shared, 6))
        torch.library.opcheck(ops.head_keys_backward.default, (key, up[..., 6:], up, dtype))
        down = x[:, :, 0]
        latent, rotary, shared = ops.head_latent(down, cos, sin, 6)
        torch.library.opcheck(ops.head_latent.default, (down, cos, sin, 6))
        torch.library.opcheck(ops.head_latent_backward.default, (latent, shared, rotary, cos, sin))


def on_both(monkeypatch, function, *inputs):
    """Outputs and gradients of the inputs with the reference and with the kernels, brought back."""
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        given = [t.requires_grad_() for t in moved(*inputs)]
        outputs = function(*given)
        generator = torch.Generator().manual_seed(1)
        gradients = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
        torch.autograd.backward(outputs, gradients)
        results.append([t.detach().cpu() for t in (*outputs, *(t.grad for t in given))])
    return results


def assert_near(found, expected, terms):
    """Equal but for the rounding of a sum of so many terms."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error = (found - expected).abs().max() if found.numel() else 0
    assert error <= EPS32 * (4 + terms**0.5) * expected.abs().max()


@each_shape
def test_kernels_of_queries_equal_the_reference(shape, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    x, cos, sin = queries(shape)
    cos, sin = moved(cos, sin)
    expected, found = on_both(monkeypatch, lambda x: [norm_and_rotate(x, cos, sin)], x)
    for mine, theirs in zip(found, expected, strict=True):
        assert_near(mine, theirs, x.shape[-1])


@each_shape_of_keys
def test_kernels_of_keys_equal_the_reference(shape, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    P = shape[3]
    expected, found = on_both(
        monkeypatch, lambda up, shared: keys_and_values(up, shared, P), *parts_of_keys(shape)
    )
    assert torch.equal(found[1], expected[1]), "values are passed on"
    assert torch.equal(found[0][..., P:], expected[0][..., P:]), "so is what the heads share"
    for mine, theirs in zip(found, expected, strict=True):
        assert_near(mine, theirs, max(shape))


@each_shape
def test_kernels_of_latents_equal_the_reference(shape, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    B, N, _, P, R, _ = shape
    _, cos, sin = queries(shape)
    cos, sin = moved(cos, sin)
    down = torch.randn(B, N, P + 70 + R)
    expected, found = on_both(monkeypatch, lambda down: split_latent(down, cos, sin, P + 70), down)
    assert torch.equal(found[0], expected[0]), "a latent is passed on"
    for mine, theirs in zip(found, expected, strict=True):
        assert_near(mine, theirs, R)


def test_kernels_take_strided_tensors_and_none(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    x, cos, sin = queries(SHAPES[0])
    cos, sin = moved(cos, sin)
    wide = torch.cat([x, x], dim=-1)
    expected, found = on_both(monkeypatch, lambda x: [norm_and_rotate(x[..., 5:15], cos, sin)], wide)
    for mine, theirs in zip(found, expected, strict=True):
        assert_near(mine, theirs, 10)
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    assert norm_and_rotate(*moved(x[:0]), cos, sin).shape == (0, *x.shape[1:])
    up, shared = parts_of_keys(SHAPES[0])
    key, value = keys_and_values(*moved(up[:0], shared[:0]), 6)
    assert key.shape == (0, *key.shape[1:])
    assert value.shape == (0, *value.shape[1:])
