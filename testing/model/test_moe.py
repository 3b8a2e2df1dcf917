"""The mixture of experts against a literal computation, what a row's result depends on, and the balance."""

import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.model.moe import MAX_BIAS, MoE
from arbitor.ternary import VoteOptimizer
from testing.model import core_oracles as oracles

DIM = 24
# Experts, active ones, rows.
SIZES = [(8, 2, 13), (5, 3, 40), (3, 3, 6), (1, 1, 4), (16, 2, 3), (8, 1, 1), (33, 20, 7)]

each_size = pytest.mark.parametrize(("experts", "active", "rows"), SIZES)


def make(experts=8, active=2, seed=0, **overrides):
    torch.manual_seed(seed)
    settings = {"dim": DIM, "num_experts": experts, "num_active_experts": active, "expert_dim": 20}
    return MoE(ModelConfig(**{**settings, **overrides}))


def states(rows, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, DIM, generator=generator, dtype=torch.float64).to(dtype)


def set_bias(moe, seed=2):
    """Biases of up to +-0.2, which change many choices."""
    balance = moe.router.balance
    balance.bias.random_(-200, 201, generator=torch.Generator().manual_seed(seed))
    return balance.bias.tolist()


def captured(module):
    """The gradient that backward left for a matrix, or for the matrices of all experts."""
    capture = module.capture
    if not hasattr(capture, "sorted_rows"):
        return capture.gradient()
    if capture.dense is not None:
        return capture.dense
    activations, gradients, ends = capture.sorted_rows()
    inner = ends.tolist()[:-1]
    parts = zip(activations.tensor_split(inner), gradients.tensor_split(inner), strict=True)
    return torch.stack([g.t() @ a.to(g.dtype) for a, g in parts])


@each_size
def test_equals_the_oracle_with_every_gradient(experts, active, rows, unrounded):
    """In float64; sums of up to 40 terms in another order."""
    moe = unrounded(make(experts, active))
    bias = set_bias(moe)
    VoteOptimizer(moe)
    weights = oracles.dense_weights(moe)
    s = states(rows, dtype=torch.float64).requires_grad_()
    expected = torch.stack([oracles.moe(weights, bias, active, row) for row in s])
    dy = states(rows, seed=3, dtype=torch.float64)
    names = list(weights)
    ds, *dw = torch.autograd.grad(expected, [s, *weights.values()], dy)
    found, load = moe(s)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    found.backward(dy)
    torch.testing.assert_close(s.grad, ds, rtol=0, atol=1e-13)
    for name, gradient in zip(names, dw, strict=True):
        torch.testing.assert_close(captured(moe.get_submodule(name)), gradient, rtol=0, atol=1e-12)
    assert int(load.sum()) == rows * active


@each_size
def test_the_load_counts_the_uses(experts, active, rows, unrounded):
    moe = unrounded(make(experts, active))
    bias = set_bias(moe)
    weights = oracles.dense_weights(moe)
    expected = [0] * experts
    s = states(rows, dtype=torch.float64)
    for row in s:
        affinity = torch.sigmoid(oracles.linear(weights["router.affinity"], row))
        for e in oracles.chosen_experts(affinity, bias, active):
            expected[e] += 1
    load = moe(s)[1]
    assert load.dtype == torch.int32
    assert load.tolist() == expected


@each_size
def test_a_row_does_not_depend_on_the_others(experts, active, rows):
    moe = make(experts, active)
    set_bias(moe)
    s = states(rows)
    whole = moe(s)[0]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(4))
    assert torch.equal(moe(s[order])[0], whole[order])
    for index in range(rows):
        assert torch.equal(moe(s[index : index + 1])[0][0], whole[index])
    crowd = torch.cat([s[:1].expand(50, -1), s])  # one pair of experts gets almost all
    assert torch.equal(moe(crowd)[0][50:], whole)


def test_gates_are_the_unbiased_affinities_over_their_sum(unrounded):
    moe = unrounded(make())
    s = states(20, dtype=torch.float64)
    affinity = torch.sigmoid(torch.stack([oracles.linear(moe.router.affinity.decode(s.dtype), r) for r in s]))
    bias = set_bias(moe)
    routing = moe.router(s)
    gate = routing.gate
    for row in range(20):
        chosen = oracles.chosen_experts(affinity[row], bias, 2)
        expected = affinity[row][chosen] / affinity[row][chosen].sum()
        torch.testing.assert_close(gate[row], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("active", [1, 2, 5])
def test_equal_experts_are_taken_from_the_lowest_number_on(active):
    moe = make(experts=33, active=active)
    linear = moe.router.affinity
    trits = linear.trits()[:1].expand(33, -1).clone()
    linear.set_trits(trits, linear.E)
    load = moe(states(6))[1]
    assert load.tolist() == [6] * active + [0] * (33 - active)
    moe.router.balance.bias[7] = 1
    moe.router.balance.bias[20] = 1
    load = moe(states(6))[1]
    first = [7, 20, *(e for e in range(33) if e not in (7, 20))][:active]
    assert load.nonzero()[:, 0].tolist() == sorted(first)


def test_all_experts_go_through_one_call_of_each_linear():
    moe = make(experts=16)
    calls = []
    for linear in (moe.up, moe.down):
        linear.register_forward_hook(lambda _, args, y: calls.append((tuple(args[0].shape), tuple(y.shape))))
    moe(states(9))
    assert calls == [((18, DIM), (18, 20)), ((18, 20), (18, DIM))]


def test_repeats_bit_for_bit_under_deterministic_algorithms():
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            moe = make()
            VoteOptimizer(moe)
            s = states(30).requires_grad_()
            y, _ = moe(s)
            y.square().sum().backward()
            results.append([y.detach(), s.grad, captured(moe.up), captured(moe.down)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_dtype_of_the_state_is_kept():
    assert make()(states(4))[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = make()(states(4))
    assert y.dtype == torch.float32, "the gates weigh in fp32"


# -- balance ------------------------------------------------------------------------------------------------


def advance(moe, ok=True):
    moe.router.balance.advance(torch.tensor(ok), lambda name, count: torch.zeros(count, dtype=torch.int32))


def noting(**options):
    moe = make(**options)
    moe.router.balance.attached = True
    return moe


def test_the_bias_moves_by_a_unit_towards_equal_loads():
    moe = noting()
    load = moe(states(30))[1].tolist()
    assert len(set(load)) > 3
    advance(moe)
    mean = sum(load) / 8
    assert moe.router.balance.bias.tolist() == [(mean > n) - (mean < n) for n in load]


def test_an_expert_at_the_whole_part_of_the_mean_is_below_it():
    moe = noting()
    moe.router.balance.note(torch.tensor([3, 4, 4, 4, 4, 4, 4, 4]))  # a mean of 3.875
    advance(moe)
    assert moe.router.balance.bias.tolist() == [1] + [-1] * 7
    moe.router.balance.note(torch.tensor([5, 4, 4, 4, 4, 4, 4, 4]))  # and of 4.125
    advance(moe)
    assert moe.router.balance.bias.tolist() == [0] * 8


def test_the_loads_of_all_forwards_count_together():
    moe = noting()
    load = sum(moe(states(n, seed=n))[1] for n in (3, 30, 11)).tolist()
    advance(moe)
    once = moe.router.balance.bias.tolist()
    assert once == [(sum(load) > 8 * n) - (sum(load) < 8 * n) for n in load]
    advance(moe)
    assert moe.router.balance.bias.tolist() == once, "what was noted counts in one step only"


def test_a_dropped_step_keeps_the_bias_and_forgets_the_loads():
    moe = noting()
    before = set_bias(moe)
    moe(states(30))
    advance(moe, ok=False)
    advance(moe)
    assert moe.router.balance.bias.tolist() == before
    moe(states(30))
    moe.router.balance.forget()
    advance(moe)
    assert moe.router.balance.bias.tolist() == before


def test_the_bias_stays_in_its_range():
    moe = noting()
    balance = moe.router.balance
    balance.bias.fill_(MAX_BIAS)
    balance.bias[::2] = -MAX_BIAS
    for _ in range(3):
        balance.note(torch.tensor([9, 0] * 4))
        advance(moe)
    assert balance.bias.tolist() == [-MAX_BIAS, MAX_BIAS] * 4
    assert balance.bias.dtype == torch.int16


@pytest.mark.parametrize("case", ["no optimizer", "evaluation", "no gradient"])
def test_only_training_notes_loads(case):
    moe = make()
    optimizer = None if case == "no optimizer" else VoteOptimizer(moe)
    before = {name: t.clone() for name, t in moe.state_dict().items()}
    if case == "evaluation":
        moe.eval()
    with torch.set_grad_enabled(case != "no gradient"):
        moe(states(30))
    if optimizer is not None:
        optimizer.step()
    else:
        advance(moe)
    assert all(torch.equal(before[name], t) for name, t in moe.state_dict().items())


def test_the_optimizer_moves_the_bias_and_levels_the_loads():
    moe = make()
    optimizer = VoteOptimizer(moe, lr=0.0)
    s = states(200) + 2 * states(1, seed=9)
    uneven = moe(s)[1]
    optimizer.zero_grad()
    for _ in range(300):
        y, load = moe(s)
        y.sum().backward()
        optimizer.step()
    assert int(uneven.max()) > 2 * 50
    assert int(load.max()) <= 1.1 * 50
    assert int(load.min()) >= 0.9 * 50


def test_a_float_bias_is_refused():
    moe = make()
    weights = moe.state_dict()
    weights["router.balance.bias"] = weights["router.balance.bias"].float() + 0.4
    with pytest.raises(RuntimeError, match=r"router.balance.bias is torch.float32, expected torch.int16"):
        moe.load_state_dict(weights)
