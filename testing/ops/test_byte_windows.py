"""Windows of neighbouring embeddings and the normed sum behind them: kernels against plain torch."""

import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.model.sequencer import TextSequencer
from arbitor.ops.byte_windows import add_and_norm, reference, windows
from arbitor.ternary import VoteOptimizer
from testing.guards import DEVICE, moved

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

EPS32 = torch.finfo(torch.float32).eps
SHAPES = [(2, 7, 20), (1, 3, 1), (3, 5, 1100), (2, 2, 8), (0, 5, 4), (1, 4, 16)]


def draw(*shape, seed=0):
    return moved(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))[0]


def with_gradients(function, inputs, seed=7):
    """Outputs, and the gradients of the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(
        outputs, [draw(*y.shape, seed=seed + i).to(y.dtype) for i, y in enumerate(outputs)]
    )
    return [y.detach() for y in outputs], [x.grad for x in inputs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_of_windows_equal_the_reference(shape, monkeypatch):
    e = draw(*shape)
    expected, (de,) = with_gradients(lambda e: reference.windows(e, e.dtype), [e])
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    found, (mine,) = with_gradients(windows, [e])
    for y, theirs in zip(found, expected, strict=True):
        assert torch.equal(y, theirs)
    torch.testing.assert_close(mine, de, rtol=0, atol=4 * EPS32 * float(de.abs().amax()) if de.numel() else 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_of_the_normed_sum_equal_the_reference(shape, monkeypatch):
    B, L, D = shape
    e, y = draw(B, L, D)[:, 2:], draw(B, max(0, L - 2), D, seed=1)
    (h,), gradients = with_gradients(lambda e, y: reference.add_and_norm(e, y, e.dtype), [e, y])
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    (found,), mine = with_gradients(add_and_norm, [e, y])
    torch.testing.assert_close(found, h, rtol=EPS32 * (4 + D**0.5), atol=0)
    for gradient, theirs in zip(mine, gradients, strict=True):
        if theirs.numel():
            # Of what is left after the projection, each token has what 1 / rms makes of the noise.
            largest = (1 / (e + y).square().mean(-1, keepdim=True).sqrt()).amax()
            assert (gradient - theirs).abs().amax() <= EPS32 * (8 + D**0.5) * 4 * largest * h.abs().amax()


def test_a_slice_of_embeddings_is_read_where_it_lies(monkeypatch):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    e, y = draw(2, 9, 24), draw(2, 7, 24, seed=1)
    assert torch.equal(add_and_norm(e[:, 2:], y), add_and_norm(e[:, 2:].contiguous(), y))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_kernels_keep_a_token_that_is_not_finite_visible(bad, monkeypatch):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    e, y = draw(1, 3, 24), draw(1, 3, 24, seed=1)
    y[0, 1, 5] = bad
    h = add_and_norm(e, y)
    assert h.isfinite().all(dim=-1).tolist() == [[True, False, True]]
    dwindow = draw(1, 3, 72)
    dwindow[0, 1, 5] = bad
    e = draw(1, 5, 24).requires_grad_()
    windows(e)[0].backward(dwindow)
    assert float(e.grad[0, 1, 5].nan_to_num(torch.inf)) >= 1e29


def test_kernels_give_a_sequencer_what_plain_torch_gives(monkeypatch):
    torch.manual_seed(0)
    sequencer = TextSequencer(ModelConfig(dim=40)).to(DEVICE)
    optimizer = VoteOptimizer(sequencer)
    e = draw(2, 9, 40)
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        (h,), (de,) = with_gradients(sequencer, [e])
        found.append((h, de, sequencer.mix.capture.gradient().clone()))
        optimizer.zero_grad()
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= EPS32 * (8 + 120**0.5) * 4 * theirs.norm()
