"""The VQ bridge: codes, ids and their vectors, gradients against plain torch, how widely motifs are used."""

import math

import pytest
import torch
from torch.nn import functional as F

from arbitor.config import ModelConfig
from arbitor.model.vq import VQBridge, diversity, motif_metrics
from arbitor.ternary import VoteOptimizer, named_ternary
from testing.model.conftest import SMALL
from testing.small_net import changed, snapshot

DIM = SMALL["dim"]
KINDS = {"fsq": {"motif_trits": 5}, "learned": {"codebook_rows": 30}, "product": {"codebook_rows": 4225}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, seed=0):
    torch.manual_seed(seed)
    return VQBridge(ModelConfig(**SMALL, **KINDS[kind]))


def stream(batch=3, length=11, seed=1):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed))


def test_sizes():
    bridges = {kind: make(kind) for kind in KINDS}
    assert {kind: b.num_motifs for kind, b in bridges.items()} == {"fsq": 243, "learned": 30, "product": 4225}
    assert {kind: b.code_dim for kind, b in bridges.items()} == {"fsq": 5, "learned": 32, "product": 32}
    assert [len(bridges[kind].codebook.parts) for kind in ("learned", "product")] == [1, 2]
    assert bridges["fsq"].codebook is None
    assert [name for name, _ in named_ternary(bridges["fsq"])] == ["down", "up"]


@pytest.mark.parametrize(("rows", "parts"), [(4096, 1), (4225, 2), (1 << 20, 2)])
def test_a_large_codebook_is_a_product(rows, parts):
    config = ModelConfig(**SMALL, codebook_rows=rows)
    assert len(VQBridge(config, torch.device("meta")).codebook.parts) == parts


@each_kind
def test_what_is_added_is_the_motifs_code_through_up(kind):
    bridge, h = make(kind), stream()
    state, motif_BN, losses = bridge(h)
    assert motif_BN.shape == (3, 11)
    assert motif_BN.dtype == torch.int64
    assert motif_BN.unique().numel() > 5
    codes = bridge.code_vectors(motif_BN)
    assert codes.shape == (3, 11, bridge.code_dim)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, codes.clamp(-1, 1).round()), "trits"
    assert not codes.requires_grad
    assert torch.equal(state, h + bridge.up(codes))
    assert state.dtype == h.dtype
    assert set(losses) == (set() if kind == "fsq" else {"commitment"})


def literal_motif(x):
    """The id of one vector by the definition of finite scalar quantisation."""
    rms = math.sqrt(math.fsum(v * v for v in x) / len(x) + 1e-6)
    return sum((round(1.001 * math.tanh(v / rms)) + 1) * 3**n for n, v in enumerate(x))


def test_motifs_of_trits_are_those_of_the_definition():
    bridge, h = make("fsq"), stream()
    x = bridge.down(h).detach().flatten(0, 1)
    assert bridge(h).motifs.flatten().tolist() == [literal_motif(row) for row in x.tolist()]


@pytest.mark.parametrize("kind", ["learned", "product"])
def test_learned_motifs_are_the_nearest_rows(kind):
    bridge, h = make(kind), stream()
    x = bridge.down(h).detach().double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rows = bridge.code_vectors(torch.arange(bridge.num_motifs)).double()
    distance = (x[..., None, :] - rows).square().sum(-1)
    _, motif_BN, losses = bridge(h)
    assert torch.equal(motif_BN, distance.argmin(-1))
    assert losses["commitment"].item() == pytest.approx(1.25 * distance.amin(-1).mean().item() / 32, rel=1e-5)


@each_kind
def test_a_position_depends_on_itself_only(kind):
    bridge, h = make(kind), stream()
    whole = bridge(h)
    alone = [bridge(row[None, None]) for row in h.flatten(0, 1)]
    assert torch.equal(torch.cat([a.motifs for a in alone]).view(3, 11), whole.motifs)
    assert torch.equal(torch.cat([a.state for a in alone]).view(3, 11, DIM), whole.state)


@each_kind
def test_autocast_does_not_move_motifs(kind):
    bridge, h = make(kind), stream()
    with torch.autocast("cpu", torch.bfloat16):
        state, motif_BN, _ = bridge(h)
    assert torch.equal(motif_BN, bridge(h).motifs)
    assert state.dtype == torch.float32


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def straight(value, x):
    return x + (value - x).detach()


@each_kind
def test_gradients_are_those_of_plain_torch(kind, unrounded):
    """In fp64 without activation rounding: linears are products, rounding passes the gradient through."""
    bridge = unrounded(make(kind))
    h = stream().double().requires_grad_()
    weights = stream(seed=2).double()
    state, motif_BN, losses = bridge(h)
    total = (state * weights).sum() + 7 * sum(losses.values())
    (actual,) = torch.autograd.grad(total, h)

    down, up = (linear.decode(torch.float64) for linear in (bridge.down, bridge.up))
    x = norm(F.linear(norm(h), down))
    code = bridge.code_vectors(motif_BN).double()
    if kind == "fsq":
        z = 1.001 * torch.tanh(x)
        assert torch.equal(z.round(), code)
        expected = ((h + F.linear(straight(code, z), up)) * weights).sum()
    else:
        pull = 0.25 * (x - code).square().mean() + (x.detach() - code).square().mean()
        expected = ((h + F.linear(straight(code, x), up)) * weights).sum() + 7 * pull
    (dh,) = torch.autograd.grad(expected, h)
    assert (dh - weights).abs().max() > 0.1, "something comes through the bottleneck"
    torch.testing.assert_close(actual, dh, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)


@each_kind
def test_every_weight_gets_a_gradient_and_moves(kind):
    bridge = make(kind)
    optimizer = VoteOptimizer(bridge, lr=0.3)
    before = snapshot(bridge)
    state, _, losses = bridge(stream())
    assert set(losses) == {"diversity" if kind == "fsq" else "commitment"}
    ((state * stream(seed=2)).sum() + sum(losses.values())).backward()
    assert not any(module.capture.empty for _, module in named_ternary(bridge))
    optimizer.step()
    moved = {"down.T_packed", "up.T_packed"}
    if kind != "fsq":
        moved |= {f"codebook.parts.{part}.T_packed" for part in range(len(bridge.codebook.parts))}
        moved |= {"codebook.unused"}
    assert set(changed(before, snapshot(bridge))) == moved


@each_kind
def test_a_forward_changes_nothing_and_repeats(kind):
    bridge = make(kind)
    optimizer = VoteOptimizer(bridge)
    before = snapshot(bridge, optimizer)
    first = bridge(stream())
    bridge.eval()
    second = bridge(stream())
    assert torch.equal(first.state, second.state)
    assert torch.equal(first.motifs, second.motifs)
    first.state.sum().backward()
    assert changed(before, snapshot(bridge, optimizer)) == []
    assert not any(tensor.is_floating_point() for tensor in bridge.state_dict().values())


# -- diversity of trits -------------------------------------------------------------------------------------


def test_diversity_is_that_of_the_definition():
    x = stream().double()
    z = [
        [math.tanh(v / math.sqrt(sum(w * w for w in row) / DIM + 1e-6)) for v in row]
        for row in x.flatten(0, 1).tolist()
    ]
    alike = [math.exp(-2 * sum((v - w) ** 2 for v, w in zip(a, b, strict=True))) for a in z for b in z]
    assert diversity(x).item() == pytest.approx(math.log(sum(alike) / len(z)), rel=1e-9)


def test_diversity_is_0_of_different_codes_and_the_log_of_their_number_of_equal_ones():
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5).double()
    beside = math.exp(-2 * (2 * math.tanh(1 / math.sqrt(1 + 1e-6))) ** 2)
    assert diversity(every).item() == pytest.approx(5 * math.log1p(beside), rel=1e-6)
    assert diversity(every.abs()).item() == pytest.approx(math.log(32), rel=1e-6)


@pytest.mark.parametrize(("windows", "places"), [(12, 256), (32, 96), (8, 256), (1, 2047), (45, 1024)])
def test_diversity_looks_at_a_thousand_positions_of_all_places(windows, places):
    x = torch.zeros(windows, places, 3)
    x[..., 0] = 1
    x = (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) / 8).requires_grad_()
    diversity(x).backward()
    seen = x.grad.abs().sum(dim=-1) > 0
    assert 500 < seen.sum() <= 1024
    assert seen.any(dim=0).sum() == min(places, seen.sum())


def test_training_spreads_motifs_out():
    bridge = make("fsq")
    optimizer = VoteOptimizer(bridge, lr=0.03)
    # Positions that share most of what they are, which a random `down` hardly tells apart.
    h = stream(batch=8, length=64) + 3 * stream(batch=1, length=1, seed=3)
    use = []
    for _ in range(60):
        output = bridge(h)
        use.append(bridge.metrics(output.motifs)["motif_perplexity"].item())
        output.losses["diversity"].backward()
        optimizer.step()
    assert use[-1] > 2 * use[0]


def test_diversity_is_a_loss_of_down_alone():
    bridge, h = make("fsq"), stream().requires_grad_()
    VoteOptimizer(bridge)
    bridge(h).losses["diversity"].backward()
    assert h.grad is None
    assert [name for name, module in named_ternary(bridge) if not module.capture.empty] == ["down"]
    with torch.no_grad():
        assert bridge(h).losses == {}


# -- use of motifs ------------------------------------------------------------------------------------------


def histogram_metrics(ids, num_motifs):
    counts = torch.bincount(ids.flatten(), minlength=num_motifs).double()
    share = counts / counts.sum()
    entropy = -float(torch.special.xlogy(share, share).sum())
    return math.exp(entropy), float((counts == 0).double().mean())


@pytest.mark.parametrize("num_motifs", [1, 3, 50, 3**9, 3**15])
@pytest.mark.parametrize("skew", [1, 4])
def test_metrics_equal_those_of_a_histogram(num_motifs, skew):
    u = torch.rand(7, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = (u**skew * num_motifs).long()
    metrics = motif_metrics(ids, num_motifs)
    perplexity, dead = histogram_metrics(ids, num_motifs)
    assert set(metrics) == {"motif_perplexity", "motif_dead_share"}
    assert float(metrics["motif_perplexity"]) == pytest.approx(perplexity, rel=1e-12)
    assert float(metrics["motif_dead_share"]) == pytest.approx(dead, abs=1e-15)


def test_metrics_of_known_ids():
    metrics = motif_metrics(torch.tensor([[5, 5, 5, 5]]), 8)
    assert [float(value) for value in metrics.values()] == [1, 1 - 1 / 8]
    metrics = motif_metrics(torch.arange(8).repeat(3), 8)
    assert float(metrics["motif_perplexity"]) == pytest.approx(8, rel=1e-14)
    assert float(metrics["motif_dead_share"]) == 0
    with pytest.raises(ValueError, match="at least one id"):
        motif_metrics(torch.empty(0, dtype=torch.int64), 8)


def test_metrics_of_a_bridge():
    bridge = make("fsq")
    ids = bridge(stream()).motifs
    expected = histogram_metrics(ids, 243)
    metrics = bridge.metrics(ids)
    assert [float(value) for value in metrics.values()] == pytest.approx(expected, rel=1e-12)
    assert all(value.dim() == 0 for value in metrics.values())


def test_random_positions_use_most_motifs():
    bridge, h = make("fsq"), stream(40, 250)
    metrics = bridge.metrics(bridge(h).motifs)
    # A trit of a normal number has 1.563 bits of at most 1.585, and down's rows are not quite independent.
    assert float(metrics["motif_perplexity"]) > 0.8 * 243
    # After a norm, numbers are never near 0 all together.
    assert float(metrics["motif_dead_share"]) == pytest.approx(1 / 243, abs=1e-12)
