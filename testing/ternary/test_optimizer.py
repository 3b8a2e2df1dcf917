import copy
import math

import pytest
import torch
from torch import nn

from arbitor.errors import UserError
from arbitor.ops.momentum import GROUP
from arbitor.ternary import Int8Embedding, TernaryLinear, VoteOptimizer, named_ternary
from testing.small_net import (
    STATES,
    SmallNet,
    backward,
    batch,
    changed,
    each_rule,
    each_state,
    loss_of,
    make,
    snapshot,
    train,
)


def matrix(rows=6, columns=40, tscale="ROW", seed=0, **options):
    """A single matrix and its optimizer."""
    torch.manual_seed(seed)
    layer = TernaryLinear(columns, rows, tscale=tscale, leading_shape=options.pop("leading_shape", ()))
    return layer, VoteOptimizer(layer, **options)


@pytest.mark.parametrize(
    ("state", "lr", "threshold", "span", "rail"),
    [("full", 0.05, 64, 128, 63), ("compact", 0.07, 64, 128, 63), ("lean", 0.15, 80, 128, 64)],
    ids=STATES,
)
def test_constants_of_a_state(state, lr, threshold, span, rail):
    _, optimizer = make(state=state)
    assert (optimizer.accum_threshold, optimizer.span, optimizer.rail) == (threshold, span, rail)
    assert optimizer.e_accum_threshold == 32
    (group,) = optimizer.param_groups
    assert group["lr"] == lr
    assert len(group["params"]) == 7


def test_constants_of_the_sign_rule():
    layer, optimizer = matrix(rule="sign")
    assert (optimizer.accum_threshold, optimizer.rail) == (32, 32)
    assert optimizer.state[layer.T_packed]["T_accum"].abs().max() <= 32


@pytest.mark.parametrize(
    ("state", "threshold", "span", "rail"),
    [("full", 32, 64, 31), ("compact", 16, 32, 15), ("lean", 32, 51, 26), ("lean", 20, 32, 16)],
)
def test_a_threshold_sets_span_and_rail_along_with_it(state, threshold, span, rail):
    _, optimizer = make(state=state, accum_threshold=threshold)
    assert (optimizer.accum_threshold, optimizer.span, optimizer.rail) == (threshold, span, rail)


@each_state
def test_the_sign_rule_keeps_no_momentum_of_matrices(state):
    # The earlier system's rule has none; the bytes must not name what is not there.
    net, optimizer = make(rule="sign", state=state)
    kept = {name.rpartition(".")[2] for name in optimizer.named_state() if name.startswith("up.")}
    assert kept == {"T_accum", "E_accum"}
    assert optimizer.state_bytes() == make(rule="spectral", state="lean")[1].state_bytes()
    weights = {name: module.trits() for name, module in named_ternary(net) if name.startswith("up.")}
    before = {name: t.clone() for name, t in optimizer.named_state().items()}
    backward(net)
    votes = {name: -net.get_submodule(name).capture.gradient().sign() for name in weights}
    optimizer.step()
    for name, trits in weights.items():
        total = before[f"{name}.T_accum"] + votes[name]
        flips = ((total >= 32) & (trits < 1)).int() - ((total <= -32) & (trits > -1)).int()
        expected = torch.where(flips != 0, 0, total)
        expected = torch.where(trits * expected > 32, trits * 32, expected)
        assert torch.equal(optimizer.named_state()[f"{name}.T_accum"].float(), expected.float())


@each_state
def test_training_state_is_integers_of_the_documented_shapes(state):
    net, optimizer = make(state=state, tscale="T8")
    expected = {}
    for name, module in named_ternary(net):
        if isinstance(module, Int8Embedding):
            rows, columns, bits = module.num_embeddings, module.dim, 8
        else:
            rows, columns, bits = (
                module.out_features,
                module.in_features,
                {"full": 8, "compact": 4}.get(state),
            )
            expected[f"{name}.T_accum"] = (torch.int8, (rows, columns))
            expected[f"{name}.E_accum"] = (torch.int8, (rows, math.ceil(columns / 8)))
        if bits:
            expected[f"{name}.M"] = (
                (torch.int8, (rows, columns)) if bits == 8 else (torch.uint8, (rows, math.ceil(columns / 2)))
            )
            expected[f"{name}.M_exp"] = (torch.int16, (rows, math.ceil(columns / GROUP)))
    actual = {name: (t.dtype, tuple(t.shape)) for name, t in optimizer.named_state().items()}
    assert actual == expected


def test_accumulators_start_with_what_rounding_left_over():
    torch.manual_seed(0)
    layer = TernaryLinear(40, 6)
    residual = layer.T_residual.clone()
    optimizer = VoteOptimizer(layer)
    assert torch.equal(optimizer.state[layer.T_packed]["T_accum"], residual)
    assert layer.T_residual is None
    layer, optimizer = matrix(accum_threshold=32)
    expected = (residual.to(torch.float64) / 2).round().to(torch.int8)
    assert torch.equal(optimizer.state[layer.T_packed]["T_accum"], expected)


def test_accumulators_of_a_loaded_model_start_at_zero():
    net, _ = make()
    loaded = SmallNet()
    loaded.load_state_dict(net.state_dict())
    state = VoteOptimizer(loaded).named_state()
    assert all(t.eq(0).all() for name, t in state.items() if name.endswith("_accum"))


def test_a_second_optimizer_takes_the_model_over():
    net, first = make()
    second = VoteOptimizer(net, seed=1)
    before = snapshot(net, first)
    backward(net)
    second.step()
    assert "head.q" in changed({"head.q": before["head.q"]}, {"head.q": net.head.q})
    assert all(torch.equal(before[name], t) for name, t in first.named_state().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "lazy"}, r"unknown state 'lazy'; choose one of full, compact, lean"),
        ({"rule": "adam"}, r"unknown rule 'adam'; choose one of spectral, sinkhorn, row, sign"),
        ({"lr": -0.1}, r"learning rate must be a finite number that is not negative, got -0\.1"),
        ({"lr": math.nan}, r"learning rate must be a finite number that is not negative, got nan"),
        ({"lr": math.inf}, r"learning rate must be a finite number that is not negative, got inf"),
        ({"lr": "0.1"}, r"learning rate must be a finite number that is not negative, got 0\.1"),
        ({"scale_lr": -0.1}, r"learning rate of scales \(scale_lr\) must be .* not negative, got -0\.1"),
        ({"scale_lr": math.nan}, r"learning rate of scales \(scale_lr\) must be .* not negative, got nan"),
        ({"accum_threshold": 0}, r"accum_threshold must be between 2 and 127, got 0"),
        ({"accum_threshold": 1}, r"accum_threshold must be between 2 and 127, got 1"),
        ({"accum_threshold": 128}, r"accum_threshold must be between 2 and 127, got 128"),
        ({"e_accum_threshold": 0}, r"e_accum_threshold must be between 1 and 127, got 0"),
        ({"e_accum_threshold": 128}, r"e_accum_threshold must be between 1 and 127, got 128"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_what_is_not_allowed_is_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_parameters_in_place_of_the_model_are_refused():
    with pytest.raises(UserError, match=r"takes the model itself, got generator.*VoteOptimizer\(model\)"):
        VoteOptimizer(torch.nn.Linear(2, 2).parameters())


def test_a_model_without_ternary_weights_is_refused():
    with pytest.raises(UserError, match="the model has no ternary weights to train"):
        VoteOptimizer(nn.Linear(3, 4))


def test_float_parameters_are_left_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), TernaryLinear(8, 8))
    optimizer = VoteOptimizer(net)
    before = net[0].weight.clone()
    net(torch.randn(4, 8)).square().sum().backward()
    gradient = net[0].weight.grad.clone()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(net[0].weight, before)
    assert torch.equal(net[0].weight.grad, gradient)


def test_lr_schedulers_drive_the_learning_rate():
    for factory, expected in (
        (
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
            [1, 1 / 2, 1 / 3, 1 / 4],
        ),
        (
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4),
            [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)],
        ),
    ):
        net, optimizer = make(lr=0.2)
        scheduler = factory(optimizer)
        rates = []
        for step in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            train(net, optimizer, range(step, step + 1))
            scheduler.step()
        assert rates == pytest.approx([0.2 * e for e in expected])
        twin, twin_optimizer = make(lr=0.2)
        for step, rate in enumerate(rates):
            twin_optimizer.param_groups[0]["lr"] = rate
            train(twin, twin_optimizer, range(step, step + 1))
        assert changed(snapshot(net, optimizer), snapshot(twin, twin_optimizer)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", math.nan), ("lr", math.inf), ("lr", -1e-9), ("lr", None), ("scale_lr", math.nan)],
    ids=str,
)
def test_a_rate_that_became_illegal_is_refused_by_the_step(key, value):
    net, optimizer = make()
    train(net, optimizer, range(1))
    backward(net)
    before = snapshot(net, optimizer)
    old = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with pytest.raises(UserError, match=f"must be a finite number that is not negative, got {value}"):
        optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.step_count == 1
    # Nothing is lost: with a legal rate the step is the one that it would have been.
    optimizer.param_groups[0][key] = old
    optimizer.step()
    twin, twin_optimizer = make()
    train(twin, twin_optimizer, range(1))
    backward(twin)
    twin_optimizer.step()
    assert changed(snapshot(net, optimizer), snapshot(twin, twin_optimizer)) == []


def test_further_parameter_groups_are_refused():
    _, optimizer = make()
    with pytest.raises(UserError, match="VoteOptimizer has one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


@each_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_state
def test_a_step_inside_autocast_is_the_step_outside(state, dtype, rule):
    net, optimizer = make(state=state, rule=rule, scale_lr=0.1, tscale="T8")
    twin, twin_optimizer = make(state=state, rule=rule, scale_lr=0.1, tscale="T8")
    for seed in range(3):
        backward(net, batch(seed))
        backward(twin, batch(seed))
        optimizer.step()
        with torch.autocast("cpu", dtype):
            twin_optimizer.step()
            assert torch.is_autocast_enabled("cpu")
    assert changed(snapshot(net, optimizer), snapshot(twin, twin_optimizer)) == []


def test_data_parallel_is_refused_while_training():
    net, optimizer = make()
    with pytest.raises(UserError, match="DataParallel cannot train integer layers"):
        net.up[0]._replicate_for_data_parallel()
    optimizer.detach()
    assert net.up[0]._replicate_for_data_parallel().capture is None


def test_step_takes_a_closure():
    net, optimizer = make()
    twin, twin_optimizer = make()

    def closure():
        optimizer.zero_grad()
        return backward(net)

    loss = optimizer.step(closure)
    assert loss == backward(twin)
    assert twin_optimizer.step() is None
    assert changed(snapshot(net, optimizer), snapshot(twin, twin_optimizer)) == []


def test_it_is_an_optimizer_with_one_group_of_integer_parameters():
    net, optimizer = make()
    assert isinstance(optimizer, torch.optim.Optimizer)
    parameters = optimizer.param_groups[0]["params"]
    assert [p.dtype for p in parameters].count(torch.int8) == 2
    assert {id(p) for p in parameters} == {id(m.stored) for _, m in named_ternary(net)}
    assert "VoteOptimizer" in repr(optimizer)


def test_step_alone_changes_state():
    net, optimizer = make()
    train(net, optimizer, range(2))
    before = snapshot(net, optimizer)
    hyperparameters = optimizer.hyperparameters()
    optimizer.note_loss(backward(net))
    net.eval()
    loss_of(net, batch(1))
    optimizer.flip_rate()
    optimizer.layer_metrics()
    optimizer.state_dict()
    optimizer.named_state()
    optimizer.state_bytes()
    copy.deepcopy(net)
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.hyperparameters() == hyperparameters


@pytest.mark.parametrize(
    ("state", "threshold", "span", "rail"),
    [("full", 32, 64, 31), ("full", 96, 192, 95), ("lean", 40, 64, 32)],
)
def test_configure_rescales_live_accumulators_with_the_span(state, threshold, span, rail):
    net, optimizer = make(state=state, lr=0.3)
    train(net, optimizer, range(3))
    before = snapshot(net, optimizer)
    optimizer.configure(accum_threshold=threshold)
    after = snapshot(net, optimizer)
    assert (optimizer.accum_threshold, optimizer.span, optimizer.rail) == (threshold, span, rail)
    for name in changed(before, after):
        assert name.endswith(".T_accum")
        expected = (before[name].double() * span / 128).round().clamp(-127, 127)
        trits = net.get_submodule(name.removesuffix(".T_accum")).trits()
        expected = torch.where(trits == 1, expected.clamp(max=rail), expected)
        expected = torch.where(trits == -1, expected.clamp(min=-rail), expected)
        assert torch.equal(after[name], expected.to(torch.int8))
    assert "up.0.T_accum" in changed(before, after)
    train(net, optimizer, range(3, 5))


def test_configure_keeps_what_is_not_given():
    net, optimizer = make(accum_threshold=32, e_accum_threshold=20)
    optimizer.configure(accum_threshold=48)
    assert (optimizer.accum_threshold, optimizer.e_accum_threshold) == (48, 20)
    optimizer.configure(e_accum_threshold=10)
    assert (optimizer.accum_threshold, optimizer.e_accum_threshold) == (48, 10)
    before = snapshot(net, optimizer)
    for bad in ({"accum_threshold": 200}, {"e_accum_threshold": 0}, {"accum_threshold": 0}):
        with pytest.raises(UserError, match="must be between"):
            optimizer.configure(**bad)
    assert changed(before, snapshot(net, optimizer)) == []
    assert (optimizer.accum_threshold, optimizer.span, optimizer.rail) == (48, 96, 47)


def test_metrics_count_flips_zeros_and_weights_at_a_rail():
    net, optimizer = make(state="full", lr=0.5)
    train(net, optimizer, range(4))
    matrices = {name: m for name, m in named_ternary(net) if not isinstance(m, Int8Embedding)}
    old = {name: m.trits() for name, m in matrices.items()}
    train(net, optimizer, range(4, 5))
    metrics = optimizer.layer_metrics()
    assert metrics.keys() == matrices.keys()
    flips = 0
    for name, module in matrices.items():
        trits, accumulator = module.trits(), optimizer.state[module.T_packed]["T_accum"]
        flips += (trits != old[name]).sum().item()
        railed = ((trits == 1) & (accumulator == 63)) | ((trits == -1) & (accumulator == -63))
        assert metrics[name]["flip_rate"] == pytest.approx((trits != old[name]).double().mean().item())
        assert metrics[name]["zero_share"] == pytest.approx((trits == 0).double().mean().item())
        assert metrics[name]["rail_share"] == pytest.approx(railed.double().mean().item())
    assert optimizer.flip_rate() == pytest.approx(flips / sum(m.numel() for m in matrices.values()))
    assert flips > 0
    assert any(m["rail_share"] > 0 for m in metrics.values())


@pytest.mark.parametrize("tscale", ["ROW", "T32"])
@pytest.mark.parametrize(("state", "limit"), [("full", 2.35), ("compact", 1.85), ("lean", 1.30)])
@pytest.mark.parametrize(("rows", "columns"), [(160, 160), (480, 160), (160, 640), (320, 1120)], ids=str)
def test_bytes_kept_for_each_weight_of_the_trunk(state, limit, tscale, rows, columns):
    layer, optimizer = matrix(rows, columns, tscale, state=state)
    layer(torch.randn(2, columns)).square().sum().backward()
    optimizer.step()
    live = [*layer.parameters(), *layer.buffers(), *optimizer.state[layer.T_packed].values()]
    kept = sum(t.untyped_storage().nbytes() for t in live if t is not None)
    assert kept == optimizer.state_bytes()
    assert kept / layer.numel() <= limit
    assert layer.T_residual is None
    assert layer.capture.empty
