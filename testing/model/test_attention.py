"""LatentAttention against a literal per-head, per-position computation in fp64."""

import cmath
import math

import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.model.attention import LatentAttention
from arbitor.model.rotary import rotation
from arbitor.ops.head_norm import rotate

EPS64 = torch.finfo(torch.float64).eps


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def rotated(x, position, theta):
    """The pairs (i, i + R/2) as complex numbers, turned by position * theta^(-2i/R)."""
    half = len(x) // 2
    y = [0.0] * len(x)
    for i in range(half):
        z = complex(x[i], x[i + half]) * cmath.exp(1j * position * theta ** (-2 * i / len(x)))
        y[i], y[i + half] = z.real, z.imag
    return torch.tensor(y, dtype=torch.float64)


def literal_attention(config, module, h):
    """One sequence h [N, D] -> [N, D]; loops over queries, heads and keys."""
    weights = {
        name: getattr(module, name).decode(torch.float64) for name in ("query", "kv_down", "kv_up", "out")
    }
    P, R, V, H = config.head_dim, config.rope_dim, config.value_dim, config.num_heads
    query = (rms(h) @ weights["query"].T).view(len(h), H, P + R)
    down = rms(h) @ weights["kv_down"].T
    latent, shared = down[:, : config.kv_latent_dim], down[:, config.kv_latent_dim :]
    up = (rms(latent) @ weights["kv_up"].T).view(len(h), H, P + V)
    rows = []
    for n in range(len(h)):
        heads = []
        for head in range(H):
            q = rms(query[n, head])
            q = torch.cat([q[:P], rotated(q[P:].tolist(), n, config.rope_theta)])
            first = max(0, n - config.attention_window + 1) if config.attention_window else 0
            scores, values = [], []
            for m in range(first, n + 1):
                k = torch.cat([rms(up[m, head, :P]), rotated(rms(shared[m]).tolist(), m, config.rope_theta)])
                scores.append(float(q @ k) / math.sqrt(P + R))
                values.append(up[m, head, P:])
            share = torch.tensor(scores, dtype=torch.float64).softmax(0)
            heads.append(share @ torch.stack(values))
        rows.append(torch.cat(heads))
    return rms(torch.stack(rows)) @ weights["out"].T


def unrounded(module):
    for name in ("query", "kv_down", "kv_up", "out"):
        weight = getattr(module, name).decode(torch.float64)
        getattr(module, name).forward = lambda x, weight=weight: rms(x) @ weight.T
    return module


@pytest.mark.parametrize("at_once", [True, False], ids=["keys from latents", "keys"])
@pytest.mark.parametrize("window", [0, 1, 4, 9, 50])
@pytest.mark.parametrize("value_dim", [10, 4, 14], ids=["V=K", "V<K", "V>K"])
def test_equals_the_literal_computation(window, value_dim, at_once, monkeypatch):
    monkeypatch.setattr("arbitor.model.attention.can_attend", lambda *_: at_once)
    torch.manual_seed(0)
    config = ModelConfig(
        dim=24,
        num_heads=3,
        head_dim=6,
        rope_dim=4,
        value_dim=value_dim,
        kv_latent_dim=20,
        attention_window=window,
        rope_theta=100.0,
    )
    module = LatentAttention(config)
    h = torch.randn(2, 9, 24, dtype=torch.float64)
    expected = torch.stack([literal_attention(config, module, sequence) for sequence in h])
    # The module keeps cosines and sines in fp32 (error 2^-25 each); the output is of order 1 and smooth in
    # them, with at most 3 heads * 9 keys * 2 rotations * 2 products contributing.
    tolerance = 108 * 2**-25
    found = unrounded(module)(h, rotation(0, 9, 4, 100.0, h.device))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_rotation_of_a_position_is_the_same_alone_and_among_others():
    device = torch.device("cpu")
    many = rotation(0, 1000, 32, 10000.0, device)
    for position in (0, 1, 17, 500, 999):
        alone = rotation(position, 1, 32, 10000.0, device)
        assert torch.equal(alone.cos[0], many.cos[position])
        assert torch.equal(alone.sin[0], many.sin[position])


def test_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    angles = rotation(0, 200, 16, 10000.0, torch.device("cpu"))

    def score(n, m):
        return rotate(q, angles.cos[n], angles.sin[n]) @ rotate(k, angles.cos[m], angles.sin[m])

    # fp32 cosines and sines: 2^-25 each, two rotations, 16 products.
    for n, m in ((5, 3), (100, 98), (199, 197)):
        assert abs(float(score(n, m) - score(2, 0))) < 64 * 2**-25 * float(q.norm() * k.norm())
