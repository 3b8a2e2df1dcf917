"""From backward to the optimizer: what is captured, what adds up, and that backward changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from arbitor.ops.state_update import state_update_drawn
from arbitor.ternary import Int8Embedding, TernaryLinear, VoteOptimizer, capture, named_ternary
from testing.small_net import SmallNet, backward, batch, changed, loss_of, make, snapshot

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def gradients(net):
    """Captured gradients by name, as float64."""
    return {
        name: module.capture.gradient().to(torch.float64)
        for name, module in named_ternary(net)
        if not module.capture.empty
    }


def is_empty(net):
    return all(module.capture is None or module.capture.empty for _, module in named_ternary(net))


def assert_close(a, b, relative):
    """Equal to a share of each matrix's largest gradient."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= relative * b[name].abs().max(), name


@pytest.mark.parametrize("state", ["full", "compact", "lean"])
def test_backward_changes_no_trained_state(state):
    net, optimizer = make(state=state)
    before = snapshot(net, optimizer)
    plain = optimizer.hyperparameters()
    for seed in range(3):
        optimizer.note_loss(backward(net, batch(seed)))
    assert not is_empty(net)
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.hyperparameters() == plain


def test_every_integer_module_captures_its_gradient():
    net, _ = make()
    backward(net)
    for name, module in named_ternary(net):
        gradient = module.capture.gradient()
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name
    assert gradients(net)["embed"][-1].eq(0).all(), "the last id never occurs"
    assert gradients(net)["position"][-1].eq(0).all(), "the last position never occurs"


def test_captured_gradients_equal_those_of_a_float_twin():
    # Two layers and a head in float64 without rounding of activations, against plain autograd.
    torch.manual_seed(0)
    first, second, head = (
        TernaryLinear(12, 9, tscale="T4"),
        TernaryLinear(9, 12),
        Int8Embedding(5, 12, kind="head"),
    )
    net = nn.ModuleList([first, second, head])
    VoteOptimizer(net)
    x = torch.randn(7, 12, dtype=torch.float64)
    hidden = F.relu(first(x, quantize=False)).square()
    F.cross_entropy(
        head.logits(second(hidden, quantize=False), quantize=False), torch.arange(7) % 5
    ).backward()

    def norm(t):
        return t / t.square().mean(-1, keepdim=True).add(1e-6).sqrt()

    weights = [first.decode(torch.float64), second.decode(torch.float64)]
    weights.append(head.q.to(torch.float64) * torch.exp2(head.E.to(torch.float64) - 6)[:, None])
    weights = [w.requires_grad_() for w in weights]
    hidden = F.relu(norm(x) @ weights[0].T).square()
    F.cross_entropy(norm(norm(hidden) @ weights[1].T) @ weights[2].T, torch.arange(7) % 5).backward()
    for module, weight in zip(net, weights, strict=True):
        torch.testing.assert_close(module.capture.gradient(), weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_micro_batches_equal_one_large_batch(parts, dtype):
    net, optimizer = make()
    data = batch(size=8)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast:
        loss = loss_of(net, data, "sum")
    loss.backward()
    whole = gradients(net)
    optimizer.zero_grad()
    for part in zip(*(t.chunk(parts) for t in data), strict=True):
        with autocast:
            loss = loss_of(net, part, "sum")
        loss.backward()
    # Forward and dY are those of single tokens. Sums over 40 tokens in fp32 and the rounding of each part's
    # product and of each running sum to the capture's dtype differ.
    relative = 4 * parts * UNIT_ROUNDOFF[dtype] + 4 * 40**0.5 * UNIT_ROUNDOFF[torch.float32]
    assert_close(gradients(net), whole, relative)


def test_micro_batches_add_up_and_the_last_does_not_replace_the_others():
    net, optimizer = make()
    separate = []
    for seed in range(3):
        backward(net, batch(seed))
        separate.append(gradients(net))
        optimizer.zero_grad()
    for seed in range(3):
        backward(net, batch(seed))
    total = gradients(net)
    expected = {name: sum(part[name] for part in separate) for name in total}
    assert_close(total, expected, 32 * UNIT_ROUNDOFF[torch.float32])
    assert all(not torch.equal(total[name], separate[-1][name]) for name in total)


def test_a_weight_used_several_times_captures_the_sum_and_votes_once(monkeypatch):
    torch.manual_seed(0)
    shared = TernaryLinear(16, 16)
    optimizer = VoteOptimizer(nn.Sequential(shared, nn.Tanh(), shared))
    x = torch.randn(5, 16, dtype=torch.float64)
    state = x
    for _ in range(3):
        state = state + shared(state, quantize=False)
    state.square().sum().backward()

    weight = shared.decode(torch.float64).requires_grad_()
    state = x
    for _ in range(3):
        state = state + state / state.square().mean(-1, keepdim=True).add(1e-6).sqrt() @ weight.T
    state.square().sum().backward()
    torch.testing.assert_close(shared.capture.gradient(), weight.grad, rtol=1e-10, atol=1e-10)

    updates = []
    monkeypatch.setattr(
        "arbitor.ternary.update.state_update_drawn",
        lambda *args: updates.append(args[0].shape) or state_update_drawn(*args),
    )
    optimizer.step()
    assert updates == [(1, 16, 32)], "one matrix, one update"


def test_a_table_that_is_embedding_and_head_captures_both_uses():
    torch.manual_seed(0)
    table = Int8Embedding(9, 12)
    VoteOptimizer(table)
    ids = torch.tensor([1, 4, 4, 7])
    F.cross_entropy(table.logits(table(ids).double(), quantize=False), ids).backward()
    weight = (table.q.to(torch.float64) / 64).requires_grad_()
    x = weight[ids]
    x = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    F.cross_entropy(x @ weight.T, ids).backward()
    # The embedding's rows and their gradient are fp32.
    torch.testing.assert_close(table.capture.gradient().double(), weight.grad, rtol=1e-5, atol=1e-6)


class Recorder:
    """Fails when any weight gradient is captured or formed."""

    def __call__(self, *args, **kwargs):
        raise AssertionError("a weight gradient was formed without an optimizer")


def forbid_weight_gradients(monkeypatch):
    for owner, name in (
        (capture.GradientCapture, "add_linear"),
        (capture.GradientCapture, "add_dense"),
        (capture.GradientCapture, "product"),
    ):
        monkeypatch.setattr(owner, name, Recorder())
    monkeypatch.setattr(torch.ops.aten, "embedding_dense_backward", Recorder())


def test_without_an_optimizer_no_weight_gradient_is_formed(monkeypatch):
    torch.manual_seed(0)
    net = SmallNet()
    forbid_weight_gradients(monkeypatch)
    x = torch.randn(5, 20, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = net.head.logits(net.down[0](net.up[0](x)))
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    codes = [t for t in saved if t.dtype == torch.int8 and t.shape[0] == 5]
    assert codes == [], "activation codes are kept for weight gradients alone"
    assert all(module.capture is None for _, module in named_ternary(net))
    assert not net(batch()[0]).requires_grad


def test_a_detached_optimizer_leaves_a_frozen_model(monkeypatch):
    net, optimizer = make()
    backward(net)
    optimizer.detach()
    forbid_weight_gradients(monkeypatch)
    x = torch.randn(5, 20, requires_grad=True)
    net.up[0](x).sum().backward()
    assert x.grad is not None
    assert not net(batch()[0]).requires_grad


def test_a_forward_alone_leaves_nothing():
    net, optimizer = make()
    before = snapshot(net, optimizer)
    loss_of(net, batch())
    with torch.no_grad():
        net(batch()[0])
    assert is_empty(net)
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []


def test_an_evaluation_between_forward_and_backward_does_not_disturb():
    net, optimizer = make()
    backward(net)
    expected = gradients(net)
    optimizer.zero_grad()
    loss = loss_of(net, batch())
    net.eval()
    with torch.no_grad():
        loss_of(net, batch(9))
    net.train()
    loss.backward()
    actual = gradients(net)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_zero_grad_drops_captures_and_the_noted_loss():
    net, optimizer = make()
    backward(net)
    optimizer.note_loss(torch.tensor(torch.nan))
    optimizer.zero_grad()
    assert is_empty(net)
    before = snapshot(net, optimizer)
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.dropped_steps == 0


def test_step_drops_captures():
    net, optimizer = make()
    backward(net)
    optimizer.step()
    assert is_empty(net)
    before = snapshot(net, optimizer)
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []


def test_a_copied_model_does_not_capture():
    net, _ = make()
    backward(net)
    expected = gradients(net)
    twin = copy.deepcopy(net)
    assert all(module.capture is None for _, module in named_ternary(twin))
    assert not twin(batch()[0]).requires_grad
    actual = gradients(net)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_an_empty_batch_captures_zero_and_moves_nothing():
    net, optimizer = make()
    before = snapshot(net, optimizer)
    net(torch.empty(0, 5, dtype=torch.int64)).sum().backward()
    optimizer.step()
    assert optimizer.last_step_applied
    assert changed(before, snapshot(net, optimizer)) == []


def block(net, x):
    return x + net.down[0](F.relu(net.up[0](x)).square())


@pytest.mark.parametrize("needs_grad", [True, False], ids=["x-needs-grad", "x-needs-none"])
def test_non_reentrant_checkpoints_capture_the_same_bits(needs_grad):
    net, optimizer = make()
    x = torch.randn(5, 20, requires_grad=needs_grad)
    block(net, x).square().sum().backward()
    plain, plain_dx = gradients(net), x.grad
    optimizer.zero_grad()
    x.grad = None
    checkpoint(block, net, x, use_reentrant=False).square().sum().backward()
    recomputed = gradients(net)
    assert recomputed.keys() == plain.keys() == {"up.0", "down.0"}
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
    if needs_grad:
        assert torch.equal(x.grad, plain_dx)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("needs_grad", [True, False], ids=["x-needs-grad", "x-needs-none"])
def test_reentrant_checkpoints_are_refused_with_the_way_out(training, needs_grad):
    net, _ = make()
    net.train(training)
    x = torch.randn(5, 20, requires_grad=needs_grad)
    with pytest.raises(RuntimeError, match=r"reentrant activation checkpointing .*use_reentrant=False"):
        checkpoint(block, net, x, use_reentrant=True)


def test_reentrant_checkpoints_of_a_frozen_model_are_allowed():
    net, optimizer = make()
    optimizer.detach()
    x = torch.randn(5, 20, requires_grad=True)
    checkpoint(block, net, x, use_reentrant=True).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("ask", ["grad", "inputs"])
def test_asking_for_the_gradient_of_an_input_alone_captures_nothing(ask):
    net, optimizer = make()
    embedded = net.embed(batch()[0]).detach().requires_grad_()
    before = snapshot(net, optimizer)

    def loss():
        vector = net.position(torch.zeros(1, dtype=torch.int64))
        return net.head.logits(block(net, embedded + vector)).square().sum()

    loss().backward()
    expected, expected_dx = gradients(net), embedded.grad
    assert expected.keys() == {"position", "up.0", "down.0", "head"}
    optimizer.zero_grad()
    embedded.grad = None

    if ask == "grad":
        (dx,) = torch.autograd.grad(loss(), embedded)
    else:
        loss().backward(inputs=[embedded])
        dx = embedded.grad
    assert torch.equal(dx, expected_dx)
    assert is_empty(net)
    assert not optimizer.has_captures
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []

    loss().backward()
    actual = gradients(net)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_half_precision_backward_beyond_its_range_is_captured():
    # Without a norm the codes' scale is 600 here, and 600 * 200 is beyond fp16.
    layer = TernaryLinear(8, 6, input_norm=False)
    VoteOptimizer(layer)
    x = torch.full((3, 8), 600 * 126.99, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    assert y.dtype == torch.float16
    y.backward(torch.full_like(y, 200.0))
    expected = torch.full((6, 8), 3 * 200 * 600 * 126.99)
    torch.testing.assert_close(layer.capture.gradient(), expected, rtol=1 / 126, atol=0)
    assert all(m.isfinite().all() for m in layer.capture.magnitudes())


def test_gradients_off_outside_a_checkpoint_is_no_error():
    net, _ = make()
    with torch.no_grad():
        assert net(batch()[0]).isfinite().all()
