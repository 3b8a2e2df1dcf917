"""One step, element by element: votes, flips, momentum, tables, scale exponents, and what stays still."""

import dataclasses
import zlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from arbitor.ops.momentum import momentum_fold
from arbitor.ops.random_bits import random_bits, stream_keys
from arbitor.ternary import Int8Embedding, TernaryEmbeddingTable, TernaryLinear, VoteOptimizer
from arbitor.ternary import optimizer as optimizer_module
from arbitor.ternary import step as step_module
from arbitor.ternary.rules import get_rule
from testing import oracles
from testing.small_net import batch, changed, each_rule, each_state, make, snapshot, train


def matrix(rows=6, columns=40, tscale="ROW", seed=0, **options):
    """A single matrix and its optimizer."""
    torch.manual_seed(seed)
    layer = TernaryLinear(columns, rows, tscale=tscale, leading_shape=options.pop("leading_shape", ()))
    return layer, VoteOptimizer(layer, **options)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(seed, step, name, count):
    """Random words that belong to a tensor in a step, from the oracle."""
    keys = oracles.stream_keys(seed, step, zlib.crc32(name.encode()))
    return [oracles.random_word(keys, i) for i in range(count)]


def flip_oracle(layer, accumulator, direction, optimizer, name, step):
    """Trits and accumulators after a step, element by element."""
    count = layer.numel()
    factor = -1.0 if optimizer.rule == "sign" else -optimizer.param_groups[0]["lr"] * optimizer.span
    votes = [
        oracles.vote(u, factor, r)
        for u, r in zip(direction.flatten().tolist(), words(optimizer.seed, step, name, count), strict=True)
    ]
    constants = (optimizer.span, optimizer.accum_threshold, optimizer.rail, optimizer.rule == "sign")
    state = zip(layer.trits().flatten().tolist(), accumulator.flatten().tolist(), votes, strict=True)
    return [oracles.vote_and_flip(t, a, v, *constants) for t, a, v in state]


@each_rule
@pytest.mark.parametrize("tscale", ["ROW", "T32", "T6"])
def test_a_lean_step_equals_the_integer_rule(rule, tscale):
    layer, optimizer = matrix(9, 70, tscale, state="lean", rule=rule, lr=0.4, seed=3)
    layer.E.copy_(torch.randint(-9, -3, layer.E.shape, generator=torch.Generator().manual_seed(1)))
    optimizer.seed = 77
    optimizer.step_count = 5
    accumulator = optimizer.state[layer.T_packed]["T_accum"]
    total = 0
    for step in range(5, 9):
        gradient = gaussian(9, 70, seed=step)
        # Where exponents differ inside a matrix, the gradient counts in trits: multiplied by 2^E.
        group = layer.tscale.group(70)
        relative = torch.exp2((layer.E - layer.E.max()).float()).repeat_interleave(group, -1)[:, :70]
        direction = get_rule(rule)(gradient * relative)
        expected = flip_oracle(layer, accumulator, direction, optimizer, "", step)
        old = layer.trits()
        layer.capture.add_dense(gradient.clone())
        optimizer.step()
        new = layer.trits()
        assert list(zip(new.flatten().tolist(), accumulator.flatten().tolist(), strict=True)) == expected
        flips = (new != old).sum().item()
        assert optimizer.flip_rate() == pytest.approx(flips / layer.numel())
        total += flips
    assert total > 0


@pytest.mark.parametrize(("state", "beta"), [("full", 0.9), ("compact", 0.8)])
def test_a_step_with_momentum_folds_first_and_votes_with_the_unrounded_direction(state, beta):
    layer, optimizer = matrix(9, 70, state=state, rule="row", lr=0.3, seed=3)
    saved = {key: t.clone() for key, t in optimizer.state[layer.T_packed].items()}
    live = optimizer.state[layer.T_packed]
    for step in range(4):
        gradient = gaussian(9, 70, seed=step)
        keys = torch.tensor(stream_keys(3, step, zlib.crc32(b"")), dtype=torch.int32)
        optimizer.seed = 3
        bits = random_bits(keys, layer.numel()).view(9, 70)
        active = torch.ones(1, 1, dtype=torch.bool)
        width = 8 if state == "full" else 4
        direction = momentum_fold(gradient, saved["M"], saved["M_exp"], bits, active, width, beta, 0.95)
        expected = flip_oracle(layer, live["T_accum"], get_rule("row")(direction), optimizer, "", step)
        layer.capture.add_dense(gradient.clone())
        optimizer.step()
        actual = zip(layer.trits().flatten().tolist(), live["T_accum"].flatten().tolist(), strict=True)
        assert list(actual) == expected
        assert torch.equal(live["M"], saved["M"])
        assert torch.equal(live["M_exp"], saved["M_exp"])


@each_state
def test_a_table_steps_by_half_the_learning_rate_against_the_sign(state):
    torch.manual_seed(0)
    table = Int8Embedding(9, 40)
    optimizer = VoteOptimizer(table, lr=0.07, state=state, seed=5)
    momentum = {key: t.clone() for key, t in optimizer.state[table.q].items()}
    beta = 0.8 if state == "compact" else 0.9
    for step in range(3):
        gradient = gaussian(9, 40, seed=step)
        keys = torch.tensor(stream_keys(5, step, zlib.crc32(b"")), dtype=torch.int32)
        bits = random_bits(keys, 360).view(9, 40)
        active = torch.ones(9, 1, dtype=torch.bool)
        direction = momentum_fold(gradient, momentum["M"], momentum["M_exp"], bits, active, 8, beta, 0.95)
        expected = [
            oracles.table_update(q, sign, 0.07 / 2 * 64, r)
            for q, sign, r in zip(
                table.q.flatten().tolist(),
                direction.sign().int().flatten().tolist(),
                words(5, step, "", 360),
                strict=True,
            )
        ]
        table.capture.add_dense(gradient.clone())
        optimizer.step()
        assert table.q.flatten().tolist() == expected
        assert torch.equal(optimizer.state[table.q]["M"], momentum["M"])


@pytest.mark.parametrize("rule", ["spectral", "row"])
@pytest.mark.parametrize("slices", [1 << 40, 40 * 64], ids=["whole", "a row at a time"])
def test_a_gradient_of_few_tokens_votes_as_if_it_were_formed(rule, slices, monkeypatch):
    """Up to rounding: an accumulator differs by one unit where a product does in its last bits."""
    monkeypatch.setattr(optimizer_module, "WORKSPACE_BYTES_PER_WEIGHT", (96 << 20) // slices or 1)
    accumulators, flips = [], []
    for factored in (True, False):
        layer, optimizer = matrix(48, 64, state="lean", rule=rule, lr=0.4)
        if not factored:
            monkeypatch.setattr("arbitor.ternary.step.Step._may_stay_factored", lambda *_: False)
        for step in range(4):
            (layer(gaussian(5, 64, seed=step)) * gaussian(5, 48, seed=9)).sum().backward()
            optimizer.step()
            flips.append(optimizer.flip_rate())
        accumulators.append(optimizer.named_state()[".T_accum"].int())
    assert min(flips) > 0
    assert flips[4:] == pytest.approx(flips[:4], abs=2e-3)
    difference = (accumulators[0] - accumulators[1]).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.002


def test_each_matrix_has_its_own_random_stream_by_its_name():
    torch.manual_seed(0)
    net = nn.ModuleDict({"one": TernaryLinear(40, 6), "two": TernaryLinear(40, 6)})
    net["two"].load_state_dict(net["one"].state_dict())
    net["one"].T_residual = None
    optimizer = VoteOptimizer(net, rule="row", state="lean", lr=0.4)
    expected = {}
    for name, layer in net.items():
        accumulator = optimizer.state[layer.T_packed]["T_accum"]
        gradient = gaussian(6, 40)
        expected[name] = flip_oracle(layer, accumulator, get_rule("row")(gradient), optimizer, name, 0)
        layer.capture.add_dense(gradient)
    optimizer.step()
    for name, layer in net.items():
        accumulator = optimizer.state[layer.T_packed]["T_accum"]
        actual = zip(layer.trits().flatten().tolist(), accumulator.flatten().tolist(), strict=True)
        assert list(actual) == expected[name]
    one, two = (optimizer.state[layer.T_packed]["T_accum"] for layer in net.values())
    assert not torch.equal(one, two), "equal gradients, different random numbers"


@each_state
@pytest.mark.parametrize("bytes_per_weight", [1 << 40, 1 << 20], ids=["row by row", "some rows"])
def test_how_much_is_worked_on_at_once_does_not_matter(state, bytes_per_weight, monkeypatch):
    # The row rule is elementwise but for row sums, so equal shapes together or alone, all of a matrix or a
    # few rows of it, give the same bits.
    net, optimizer = make(state=state, rule="row")
    losses = train(net, optimizer, range(3))
    monkeypatch.setattr(optimizer_module, "WORKSPACE_BYTES_PER_WEIGHT", bytes_per_weight)
    other, other_optimizer = make(state=state, rule="row")
    assert train(other, other_optimizer, range(3)) == losses
    assert changed(snapshot(net, optimizer), snapshot(other, other_optimizer)) == []


@each_rule
@each_state
def test_a_learning_rate_of_zero_moves_no_weight(rule, state):
    net, optimizer = make(rule=rule, state=state, lr=0.0)
    before = snapshot(net)
    train(net, optimizer, range(3))
    moved = changed(before, snapshot(net))
    assert moved == ([] if rule != "sign" else [n for n in before if n.endswith("T_packed")])


@each_rule
@each_state
def test_a_matrix_without_a_gradient_stays(rule, state):
    net, optimizer = make(rule=rule, state=state, scale_lr=0.1)
    train(net, optimizer, range(3))
    before = snapshot(net, optimizer)
    x = torch.randn(4, 20)
    net.down[1](F.relu(net.up[1](x)).square()).square().sum().backward()
    optimizer.step()
    moved = changed(before, snapshot(net, optimizer))
    assert {name.rsplit(".", 1)[0] for name in moved} == {"up.1", "down.1"}


@each_state
def test_a_gradient_of_zero_is_no_gradient(state):
    net, optimizer = make(state=state, scale_lr=0.1)
    train(net, optimizer, range(3))
    before = snapshot(net, optimizer)
    (net(batch()[0]) * 0.0).sum().backward()
    optimizer.step()
    assert optimizer.last_step_applied
    assert changed(before, snapshot(net, optimizer)) == []


@each_rule
@each_state
def test_an_expert_without_a_gradient_stays(rule, state):
    layer, optimizer = matrix(6, 40, "T8", leading_shape=(2, 3), rule=rule, state=state, scale_lr=0.1, lr=0.3)
    for step in range(3):
        layer.capture.add_dense(gaussian(2, 3, 6, 40, seed=step))
        optimizer.step()
    before = snapshot(layer, optimizer)
    gradient = gaussian(2, 3, 6, 40, seed=9)
    still = torch.tensor([[True, False, True], [False, True, True]])
    gradient[still] = 0
    layer.capture.add_dense(gradient)
    optimizer.step()
    after = snapshot(layer, optimizer)
    for name in before:
        assert torch.equal(before[name][still], after[name][still]), name
    for expert in (~still).nonzero().tolist():
        assert not torch.equal(before["T_packed"][tuple(expert)], after["T_packed"][tuple(expert)])


@pytest.mark.parametrize("rule", ["row", "sign"])
def test_experts_train_like_separate_matrices_but_for_their_random_numbers(rule):
    layer, optimizer = matrix(6, 40, leading_shape=(3,), rule=rule, state="lean", lr=0.3)
    accumulator = optimizer.state[layer.T_packed]["T_accum"]
    gradient = gaussian(3, 6, 40)
    expected = flip_oracle(layer, accumulator, get_rule(rule)(gradient), optimizer, "", 0)
    layer.capture.add_dense(gradient)
    optimizer.step()
    actual = zip(layer.trits().flatten().tolist(), accumulator.flatten().tolist(), strict=True)
    assert list(actual) == expected


@each_state
@pytest.mark.parametrize("table", [Int8Embedding, TernaryEmbeddingTable], ids=lambda t: t.__name__)
def test_table_rows_without_a_gradient_stay(table, state):
    torch.manual_seed(0)
    module = table(9, 40)
    optimizer = VoteOptimizer(module, state=state, lr=0.3, scale_lr=0.1)
    for step in range(3):
        module(torch.arange(9)).backward(gaussian(9, 40, seed=step))
        optimizer.step()
    before = snapshot(module, optimizer)
    used = torch.tensor([1, 4, 5])
    module(used).backward(gaussian(3, 40, seed=9))
    optimizer.step()
    after = snapshot(module, optimizer)
    still = torch.ones(9, dtype=torch.bool)
    still[used] = False
    for name in before:
        assert torch.equal(before[name][still], after[name][still]), name
    weights = module.stored
    assert (weights != before[next(iter(before))]).any(-1).tolist() == (~still).tolist()


def test_unused_rows_of_a_ternary_table_do_not_steer_the_others():
    # The spectral rule mixes rows; what steers is what was looked up, not the stale momentum of the rest.
    used = torch.tensor([1, 4, 5])
    results = []
    for seed in (8, 9):
        torch.manual_seed(0)
        table = TernaryEmbeddingTable(9, 40)
        optimizer = VoteOptimizer(table, lr=0.3)
        gradient = gaussian(9, 40, seed=seed)
        gradient[used] = 0
        table.capture.add_dense(gradient)
        optimizer.step()
        table(used).backward(gaussian(3, 40))
        optimizer.step()
        results.append(optimizer.state[table.T_packed]["T_accum"][used])
    assert torch.equal(*results)


@pytest.mark.parametrize("threshold", [32, 8])
def test_scale_votes_move_exponents_through_their_accumulator(threshold):
    layer, optimizer = matrix(
        9, 70, "T32", state="lean", rule="row", scale_lr=0.3, e_accum_threshold=threshold, seed=3
    )
    state = optimizer.state[layer.T_packed]
    moved = 0
    for step in range(6):
        gradient = gaussian(9, 70, seed=step)
        relative = torch.exp2((layer.E - layer.E.max()).float()).repeat_interleave(32, -1)[:, :70]
        # The gradient of log2 of a group's scale is the sum of gradient times weight, here with RMS 1.
        per_weight = F.pad(gradient * relative * layer.trits(), (0, 26)).view(9, 3, 32).sum(-1)
        direction = per_weight / per_weight.square().mean().sqrt()
        random = words(3, step, ".E", 27)
        optimizer.seed = 3
        cells = zip(
            direction.flatten().tolist(),
            layer.E.flatten().tolist(),
            state["E_accum"].flatten().tolist(),
            random,
            strict=True,
        )
        factor = -0.3 * threshold
        # A vote within rounding of a whole number may fall on either side, so both are allowed.
        allowed = [
            {
                oracles.scale_vote(e, a, oracles.fixed_point(u, factor) + d + (r & 0xFFFF) >> 16, threshold)
                for d in (-4, 0, 4)
            }
            for u, e, a, r in cells
        ]
        old = layer.E.clone()
        layer.capture.add_dense(gradient)
        optimizer.step()
        actual = zip(layer.E.flatten().tolist(), state["E_accum"].flatten().tolist(), strict=True)
        assert all(cell in choice for cell, choice in zip(actual, allowed, strict=True))
        moved += (old != layer.E).sum().item()
        assert state["E_accum"].abs().max() < threshold
    assert moved > 0


@pytest.mark.parametrize(("start", "sense"), [(-62, 1.0), (31, -1.0)], ids=["lowest", "highest"])
def test_exponents_stop_at_the_ends_of_their_range(start, sense):
    layer, optimizer = matrix(4, 32, state="lean", rule="row", scale_lr=3.0)
    layer.E.fill_(start)
    for _ in range(4):
        layer.capture.add_dense(sense * layer.trits().float() + 1e-3)
        optimizer.step()
    layer.check()
    assert layer.E.eq(start).all()


def test_without_scale_votes_exponents_stay():
    net, optimizer = make(tscale="T8")
    before = {name: p.clone() for name, p in net.named_parameters() if name.endswith(".E")}
    train(net, optimizer, range(4))
    assert all(torch.equal(before[name], net.get_parameter(name)) for name in before)


@pytest.mark.parametrize("exponent", [-62, -40, 0, 20, 31])
@pytest.mark.parametrize("threshold", [1, 5, 32, 127])
def test_waiting_steps_of_exponents_never_leave_their_range(exponent, threshold):
    """All 255 accumulators; 31 + 127 steps and -62 - 127 of them do not fit into a byte."""
    layer, optimizer = matrix(rows=255, e_accum_threshold=threshold)
    waiting = torch.arange(-127, 128)
    accumulator = optimizer.state[layer.T_packed]["E_accum"]
    accumulator.copy_(waiting.view_as(accumulator))
    with torch.no_grad():
        layer.E.fill_(exponent)
    moved = layer.update_E()
    steps = [int(value / threshold) for value in waiting.tolist()]
    expected = [max(-62, min(31, exponent + step)) for step in steps]
    assert layer.E.flatten().tolist() == expected
    rest = [value - threshold * step for value, step in zip(waiting.tolist(), steps, strict=True)]
    assert accumulator.flatten().tolist() == rest
    assert moved == sum(value != exponent for value in expected)


class Shapes(nn.Module):
    """Matrices that a CPU moves together, some of one shape, and one whose rows are no whole blocks."""

    def __init__(self):
        super().__init__()
        sizes = [(160, 7), (160, 32), (320, 32), (160, 32), (160, 2), (70, 32)]
        self.layers = nn.ModuleList(TernaryLinear(columns, rows) for columns, rows in sizes)


def steps_of_shapes(monkeypatch, *, joined, workspace=None, **options):
    """Weights and state after some steps in which a matrix in turn has no gradient."""
    if not joined:
        monkeypatch.setattr(step_module, "may_join", lambda *_: False)
    torch.manual_seed(5)
    model = Shapes()
    model.layers[1].E.copy_(torch.randint(-9, -3, model.layers[1].E.shape))
    optimizer = VoteOptimizer(model, lr=0.3, seed=3, **options)
    if workspace is not None:
        optimizer.kind = dataclasses.replace(optimizer.kind, workspace_bytes=workspace)
    rates = []
    for step in range(6):
        for number, layer in enumerate(model.layers):
            gradient = gaussian(layer.out_features, layer.in_features, seed=10 * step + number)
            layer.capture.add_dense(gradient.to(torch.bfloat16) * (number != step))
        optimizer.step()
        metrics = optimizer.layer_metrics()
        rates.append([metrics[f"layers.{number}"]["flip_rate"] for number in range(len(model.layers))])
        assert rates[-1][step] == 0
    return snapshot(model, optimizer), rates


@each_rule
@each_state
@pytest.mark.parametrize("workspace", [None, 40 * 160 * 70], ids=["together", "some matrices at a time"])
def test_matrices_move_together_as_they_do_by_shape(rule, state, workspace, monkeypatch):
    together = steps_of_shapes(monkeypatch, joined=True, workspace=workspace, rule=rule, state=state)
    by_shape = steps_of_shapes(monkeypatch, joined=False, rule=rule, state=state)
    assert not changed(together[0], by_shape[0])
    assert together[1] == by_shape[1]
    assert all(sum(rates) > 0 for rates in together[1])
