"""Every contestant trains for a few steps at a micro size, on the same data, and its bytes are counted."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.optim import AdamW, Muon

from arbitor.config import ModelConfig
from arbitor.ternary import Int8Embedding, TernaryLinear, VoteOptimizer
from benchmarks.learning import training
from benchmarks.learning.contestants import ALL_CONTESTANTS, ATTEMPTS, CONTESTANTS, TABLE_LR_SHARE, Run, build
from benchmarks.learning.sizes import SIZES, Size
from benchmarks.learning.table import MEASURED
from benchmarks.learning.training import measure, train

MICRO = Size(
    name="micro",
    model=ModelConfig(
        dim=160,
        num_prelude_layers=1,
        num_heads=2,
        head_dim=16,
        rope_dim=8,
        value_dim=80,
        kv_latent_dim=160,
        ffn_dim=160,
        ctx=16,
    ),
    steps=3,
    batch=2,
    corpus="given",
    held_out_bytes=100,
)
TEXT = b"the quick brown fox jumps over the lazy dog; " * 40
CPU = torch.device("cpu")
# Kept for a trunk weight between steps: trits 0.2, accumulator 1, momentum codes 1 or 0.5 with an int16
# exponent for 32 of them; float master 4, AdamW's moments 8, Muon's 4.
STATE_BYTES = {
    "trits-full": 2.2 + 2 / 32,
    "trits-compact": 1.7 + 2 / 32,
    "trits-lean": 1.2,
    "trits-sign": 1.2,
    "bitnet-adamw": 12.0,
    "bitnet-muon": 8.0,
    "dense-adamw": 12.0,
    "dense-muon": 8.0,
}


def text_tensor():
    return torch.from_numpy(np.frombuffer(TEXT, dtype=np.uint8).copy())


def run_of(name, seed=0):
    return Run(name, (ALL_CONTESTANTS[name].lrs or (0.0,))[0], seed)


def test_contestants_are_those_of_the_contract():
    assert list(CONTESTANTS) == list(STATE_BYTES)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_three_steps(name):
    row = measure(run_of(name), MICRO, text_tensor(), text_tensor().numpy())
    assert tuple(row) == MEASURED
    assert row["contestant"] == name
    assert int(row["bytes_seen"]) == 3 * 2 * 16
    assert 2.0 < float(row["held_out_bits_per_byte"]) < 12.0
    # ROW's exponents and their accumulators, and AdamW's step counts, are the rest.
    assert STATE_BYTES[name] <= float(row["bytes_per_weight"]) < STATE_BYTES[name] + 0.02


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_step_changes_weights_and_drops_gradients(name):
    # A step of half a trit, so that the highest threshold, 80 of 128 units, can be reached at once.
    trainee = build(Run(name, 0.5, 0), MICRO.model, CPU)
    before = {key: value.clone() for key, value in trainee.model.state_dict().items()}
    assert train(trainee, dataclasses.replace(MICRO, steps=1), text_tensor(), 0, lambda: False)
    changed = [
        key for key, value in trainee.model.state_dict().items() if not torch.equal(value, before[key])
    ]
    assert any("ffn" in key for key in changed)
    assert any("embed" in key for key in changed)
    assert all(p.grad is None for p in trainee.model.parameters())


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempts_keep_what_they_say(name):
    row = measure(run_of(name), dataclasses.replace(MICRO, steps=1), text_tensor(), text_tensor().numpy())
    codes = {"full": 1.0, "compact": 0.5, "lean": 0.0}[name.split("-")[1]]
    exponents = 2 / (16 if name.endswith("g16") else 32) if codes else 0.0
    kept = 1.2 + codes + exponents
    assert kept <= float(row["bytes_per_weight"]) < kept + 0.02


def test_attempts_differ_in_one_constant_and_are_not_in_a_normal_sweep():
    assert not set(ATTEMPTS) & set(CONTESTANTS)
    betas = {
        name: build(run_of(name), MICRO.model, CPU).optimizers[0].kind.beta
        for name in ("trits-compact", "trits-compact-g16", "trits-compact-beta0.7", "trits-compact-beta0.9")
    }
    assert list(betas.values()) == [0.8, 0.8, 0.7, 0.9]


def test_all_contestants_have_the_same_trunk():
    assert len({build(run_of(name), MICRO.model, CPU).trunk_weights() for name in CONTESTANTS}) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", CONTESTANTS)
def test_seeds_decide_everything(name):
    def loss(seed):
        trainee = build(run_of(name, seed), MICRO.model, CPU)
        train(trainee, MICRO, text_tensor(), seed, lambda: False)
        ids = text_tensor()[None, :64].long()
        with torch.no_grad():
            return trainee.model(ids, targets=ids).loss.item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_optimizers_are_those_of_the_contract():
    for name in ("trits-full", "trits-compact", "trits-lean"):
        (optimizer,) = build(run_of(name), MICRO.model, CPU).optimizers
        assert isinstance(optimizer, VoteOptimizer)
        assert (optimizer.rule, optimizer.state_name) == ("spectral", name.removeprefix("trits-"))
    (optimizer,) = build(run_of("bitnet-adamw"), MICRO.model, CPU).optimizers
    assert isinstance(optimizer, AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    muon, tables = build(Run("dense-muon", 0.05, 0), MICRO.model, CPU).optimizers
    assert isinstance(muon, Muon)
    assert isinstance(tables, AdamW)
    assert tables.param_groups[0]["lr"] == 0.05 * TABLE_LR_SHARE
    assert [p.shape[0] for p in tables.param_groups[0]["params"]] == [288, 288]


def test_muon_steps_are_in_units_of_the_initial_spread():
    """lr is the RMS of a step over the standard deviation that a matrix starts with, whatever its shape."""
    trainee = build(Run("dense-muon", 0.05, 0), MICRO.model, CPU)
    for group in trainee.optimizers[0].param_groups:
        group["weight_decay"] = 0.0
    before = [m.weight.detach().clone() for m in trainee.trunk()]
    train(trainee, dataclasses.replace(MICRO, steps=1, batch=64), text_tensor(), 0, lambda: False)
    for module, old in zip(trainee.trunk(), before, strict=True):
        ratio = (module.weight.detach() - old).square().mean().sqrt() * module.in_features**0.5
        # Newton-Schulz brings singular values to 0.7 ... 1.2; a matrix of low rank keeps small ones.
        assert 0.3 * 0.05 < ratio < 1.3 * 0.05


def test_schedule_ends_at_zero_and_moves_every_rate():
    trainee = build(Run("trits-full", 0.05, 0, "T32", 0.001), MICRO.model, CPU)
    group = trainee.optimizers[0].param_groups[0]
    trainee.step(0.5)
    assert (group["lr"], group["scale_lr"]) == (0.025, 0.0005)
    trainee.step(1.0)
    assert (group["lr"], group["scale_lr"]) == (0.05, 0.001)


def test_out_of_time_abandons_the_run():
    assert measure(run_of("trits-lean"), MICRO, text_tensor(), text_tensor().numpy(), lambda: True) is None


@pytest.mark.parametrize(
    ("figures", "best"), [([3.0, 2.0, 2.5], 2.0), ([2.0, 3.0, 2.5], 2.0), ([3.0, 2.5, 2.0], 2.0)]
)
def test_tracking_reports_the_best_point_wherever_it_stands(monkeypatch, figures, best):
    """Two evaluations on the way, after steps 2 and 4, and the last one."""
    given, steps = iter(figures), []
    monkeypatch.setattr(training, "_evaluate", lambda *_: next(given))
    prepare = training.Trainee.prepare
    monkeypatch.setattr(
        training.Trainee, "prepare", lambda self, share: (steps.append(share), prepare(self, share))
    )
    size = dataclasses.replace(MICRO, steps=6, track_every=2)
    row = measure(Run("dense-adamw", 0.05, 0), size, text_tensor(), text_tensor().numpy())
    assert float(row["held_out_bits_per_byte"]) == best
    assert len(steps) == 6
    assert list(given) == []


def test_without_tracking_the_last_point_counts(monkeypatch):
    given = iter([2.5])
    monkeypatch.setattr(training, "_evaluate", lambda *_: next(given))
    row = measure(run_of("dense-adamw"), MICRO, text_tensor(), text_tensor().numpy())
    assert float(row["held_out_bits_per_byte"]) == 2.5


@pytest.mark.parametrize("name", CONTESTANTS)
def test_the_schedule_is_a_warm_up_and_half_a_cosine_of_every_rate(monkeypatch, name):
    """5 % of 40 steps rise in a line to the peak, the rest fall along the cosine, in every group."""
    trainee = build(Run(name, 0.02, 0, scale_lr=0.001), MICRO.model, CPU)
    groups = [group for optimizer in trainee.optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    rates = []
    for optimizer in trainee.optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: None)
    monkeypatch.setattr(trainee, "apply", lambda: rates.append([group["lr"] for group in groups]))
    train(trainee, dataclasses.replace(MICRO, steps=40), text_tensor(), 0, lambda: False)
    shares = [0.5, 1.0] + [(1 + math.cos(math.pi * i / 38)) / 2 for i in range(38)]
    assert len(rates) == 40
    for step, share in enumerate(shares):
        assert rates[step] == pytest.approx([peak * share for peak in peaks]), step


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if not name.startswith("trits")])
@pytest.mark.parametrize(("size", "norm"), [(100.0, 1.0), (0.001, None)])
def test_gradients_of_the_twins_are_clipped_to_norm_1_together(monkeypatch, name, size, norm):
    trainee = build(run_of(name), MICRO.model, CPU)
    parameters = list(trainee.model.parameters())
    assert sum(p.numel() for o in trainee.optimizers for g in o.param_groups for p in g["params"]) == sum(
        p.numel() for p in parameters
    )
    torch.manual_seed(1)
    given = [torch.randn_like(p) for p in parameters]
    length = sum(float(g.double().square().sum()) for g in given) ** 0.5
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient * (size / length)
    seen = []
    for optimizer in trainee.optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: None)
    # The first one sees the gradients of all: each drops its own after its step.
    monkeypatch.setattr(
        trainee.optimizers[0], "step", lambda: seen.extend(p.grad.clone() for p in parameters)
    )
    trainee.step(1.0)
    factor = (size if norm is None else norm) / length
    for gradient, unclipped in zip(seen, given, strict=True):
        torch.testing.assert_close(gradient, unclipped * factor, rtol=1e-4, atol=0.0)


def test_votes_are_not_clipped():
    assert build(run_of("trits-full"), MICRO.model, CPU)._clipped == []


def test_gpu_size_is_as_large_as_it_says():
    size = SIZES["gpu"]
    trainee = build(Run("trits-lean", 0.1, 0), size.model, torch.device("meta"))
    assert trainee.trunk_weights() >= 7_000_000
    assert size.bytes_seen >= 16_000_000
    for module in trainee.trunk():
        assert module.in_features % 160 == 0


def test_linears_of_the_model_are_all_in_the_trunk():
    trainee = build(run_of("trits-full"), MICRO.model, CPU)
    modules = list(trainee.model.modules())
    assert len(trainee.trunk()) == sum(isinstance(m, TernaryLinear) for m in modules)
    assert sum(isinstance(m, Int8Embedding) for m in modules) == 2
