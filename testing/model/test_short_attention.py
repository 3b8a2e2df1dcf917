"""Attention with all weights at once, against the library's."""

import pytest
import torch
import torch.nn.functional as F

from arbitor.model import short_attention as module
from arbitor.model.short_attention import is_short, short_attention
from arbitor.ops.backend import rounded_gradients

BF16_EPS = 2.0**-8


def heads(count=3, shape=(2, 3, 37, 16), seed=0):
    """Queries, keys, values as attention has them: [B, N, H, K] in memory."""
    generator = torch.Generator().manual_seed(seed)
    B, H, N, K = shape
    made = (torch.randn(B, N, H, K, generator=generator).transpose(1, 2) for _ in range(count))
    return tuple(t.requires_grad_() for t in made)


@pytest.mark.parametrize("shape", [(2, 3, 37, 16), (1, 1, 2, 5), (16, 2, 126, 80)], ids=str)
def test_outputs_and_gradients_are_those_of_the_library(shape):
    q, k, v = heads(shape=shape)
    (dy,) = heads(1, shape, seed=1)
    y = short_attention(q, k, v, 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(y, (q, k, v), dy.detach())
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), dy.detach()), strict=True):
        # Each of the two or three factors of a gradient is rounded to bf16 once, and so is the result.
        assert (ours - theirs).norm() < 4 * BF16_EPS * theirs.norm()
        assert ours.dtype == torch.float32


def test_no_position_sees_a_later_one():
    q, k, v = heads()
    y = short_attention(q, k, v, 0.3)
    later = [t.detach().clone() for t in (k, v)]
    for t in later:
        t[:, :, 20:] += 1
    assert torch.equal(short_attention(q, *later, 0.3)[:, :, :20], y[:, :, :20])
    (dk,) = torch.autograd.grad(y[:, :, :20].sum(), k)
    assert dk[:, :, 20:].eq(0).all()


def test_it_is_for_short_texts_in_training_with_rounded_gradients(monkeypatch):
    q, k, v = heads()
    assert not is_short(q, k, v)
    with rounded_gradients(True):
        assert is_short(q, k, v)
        with torch.no_grad():
            assert not is_short(q, k, v)
        assert not is_short(q.detach(), k.detach(), v.detach())
        assert not is_short(*(t[:, :, :1] for t in (q, k, v)))
        monkeypatch.setattr(module, "MAX_POSITIONS", 36)
        assert not is_short(q, k, v)
