"""Vectors of fixed-point numbers, integer counters, and large tables of which only touched rows move."""

import copy

import pytest
import torch
from torch import nn

from arbitor.errors import UserError
from arbitor.ops.random_bits import random_bits, stream_keys
from arbitor.ternary import (
    Int8Vector,
    IntegerCounters,
    TernaryEmbeddingTable,
    TernaryLinear,
    VoteOptimizer,
)
from testing.small_net import each_rule, each_state


def test_a_vector_holds_its_value_as_a_code():
    vector = Int8Vector(5, fraction_bits=4, value=-1.25)
    assert vector.q.tolist() == [-20] * 5
    assert vector().tolist() == [-1.25] * 5
    assert vector.numel() == 5


@pytest.mark.parametrize("value", [5.97, -6.0, float("inf")])
def test_a_value_out_of_range_is_refused(value):
    with pytest.raises((UserError, OverflowError)):
        Int8Vector(3, fraction_bits=4, value=value)


def test_a_damaged_vector_is_refused():
    vector = Int8Vector(3, fraction_bits=4)
    with pytest.raises(RuntimeError, match="q holds a code outside"):
        vector.load_state_dict({"q": torch.tensor([0, 96, 0], dtype=torch.int8)})


@each_state
def test_a_vector_moves_against_its_gradient_and_keeps_elements_without_one_in_reach(state):
    vector = Int8Vector(4, fraction_bits=5)
    optimizer = VoteOptimizer(vector, state=state, lr=0.05)
    for _ in range(10):
        (vector() * torch.tensor([1.0, -2.0, 0.5, 0.0])).sum().backward()
        optimizer.step()
    # 10 steps of lr / 2 * 64 = 1.6 units, rounded stochastically.
    assert vector.q[0] < -10
    assert vector.q[1] > 10
    assert vector.q[2] < -10
    assert vector.q[3] == 0
    state_names = {name: t.dtype for name, t in optimizer.named_state().items()}
    assert state_names == {".M": torch.int8, ".M_exp": torch.int16}


def test_uses_of_a_vector_add_up():
    vector = Int8Vector(2, fraction_bits=5)
    VoteOptimizer(vector)
    (vector() * torch.tensor([1.0, 2.0])).sum().backward()
    (vector() * torch.tensor([3.0, -5.0])).sum().backward()
    assert vector.capture.gradient().tolist() == [[4.0, -3.0]]


class Counter(IntegerCounters):
    """Counts rows seen; a random bit is added to every count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(2, dtype=torch.int32))
        self.noted = 0

    def forward(self, x):
        if self.noting:
            self.noted += len(x)
        return x

    def advance(self, ok, random_bits):
        self.count += ok * torch.stack([torch.tensor(self.noted), random_bits("extra", 1)[0] & 0xFF])

    def forget(self):
        self.noted = 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = TernaryLinear(8, 4)
        self.counter = Counter()

    def forward(self, x):
        return self.linear(self.counter(x))


def test_counters_change_in_a_step_only():
    net = Net()
    net(torch.randn(3, 8))
    assert net.counter.noted == 0, "nothing is noted without an optimizer"
    optimizer = VoteOptimizer(net, seed=4)
    for rows in (3, 2):
        net(torch.randn(rows, 8)).sum().backward()
    assert net.counter.noted == 5
    assert net.counter.count.tolist() == [0, 0]
    optimizer.step()
    keys = torch.tensor([stream_keys(4, 0, __import__("zlib").crc32(b"counter.extra"))], dtype=torch.int32)
    assert net.counter.count.tolist() == [5, int(random_bits(keys, 1)[0, 0]) & 0xFF]
    optimizer.step()
    assert net.counter.count[0] == 5, "what was noted counts once"


def test_counters_note_nothing_in_evaluation_or_without_gradients():
    net = Net()
    optimizer = VoteOptimizer(net)
    with torch.no_grad():
        net(torch.randn(3, 8))
    net.eval()
    net(torch.randn(3, 8))
    assert net.counter.noted == 0
    net.train()
    net(torch.randn(3, 8))
    assert net.counter.noted == 3
    optimizer.zero_grad()
    assert net.counter.noted == 0, "zero_grad drops what was noted"
    optimizer.detach()
    net(torch.randn(3, 8))
    assert net.counter.noted == 0


def test_a_copy_of_counters_has_no_optimizer_and_notes_nothing():
    net = Net()
    VoteOptimizer(net)
    net(torch.randn(3, 8)).sum().backward()
    twin = copy.deepcopy(net)
    twin(torch.randn(3, 8))
    assert (twin.counter.attached, twin.counter.noted) == (False, 0)
    assert (net.counter.attached, net.counter.noted) == (True, 3)
    assert twin.counter.count.data_ptr() != net.counter.count.data_ptr()


def test_counters_stay_in_a_dropped_step():
    net = Net()
    optimizer = VoteOptimizer(net)
    net(torch.full((3, 8), float("nan"))).sum().backward()
    optimizer.note_loss(torch.tensor(float("nan")))
    optimizer.step()
    assert optimizer.dropped_steps == 1
    assert net.counter.count.tolist() == [0, 0]
    assert net.counter.noted == 0


ROWS, DIM = 50, 12


def table(sparse=True, tscale="ROW"):
    torch.manual_seed(0)
    return TernaryEmbeddingTable(ROWS, DIM, tscale=tscale, sparse=sparse)


def uses(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ROWS // 2, (3, 5), generator=generator)
    return ids, torch.randn(3, 5, DIM, generator=generator)


@pytest.mark.parametrize("tscale", ["ROW", "T4"])
def test_touched_rows_and_their_gradients_are_captured(tscale):
    layer = table(tscale=tscale)
    VoteOptimizer(layer)
    expected = torch.zeros(ROWS, DIM)
    for seed in range(3):
        ids, weights = uses(seed)
        (layer(ids) * weights).sum().backward()
        expected.index_add_(0, ids.flatten(), weights.flatten(0, 1))
    ids, sums = layer.capture.touched()
    assert ids.tolist() == sorted(ids.tolist())
    assert set(ids.tolist()) == set(torch.cat([uses(s)[0].flatten() for s in range(3)]).tolist())
    torch.testing.assert_close(sums, expected[ids])


@each_state
@each_rule
@pytest.mark.parametrize("tscale", ["ROW", "T4"])
@pytest.mark.parametrize(
    ("bytes_per_weight", "rows_at_once"),
    [(40, 1 << 16), (1 << 21, 1 << 16), (1 << 40, 1 << 16), (40, 3)],
    ids=["at once", "in parts", "one by one", "in parts of three"],
)
def test_every_touched_row_moves_as_a_matrix_of_one_row(
    state, rule, tscale, bytes_per_weight, rows_at_once, monkeypatch
):
    monkeypatch.setattr("arbitor.ternary.optimizer.WORKSPACE_BYTES_PER_WEIGHT", bytes_per_weight)
    monkeypatch.setattr("arbitor.ternary.step.ROWS_AT_ONCE", rows_at_once)
    sparse, dense = table(tscale=tscale), table(sparse=False, tscale=tscale)
    options = {"state": state, "lr": 0.3, "seed": 9}
    one = VoteOptimizer(sparse, rule=rule, **options)
    # In the dense table every row votes for itself under these two rules.
    other = VoteOptimizer(dense, rule="sign" if rule == "sign" else "row", **options)
    before = sparse.T_packed.clone()
    for seed in range(4):
        ids, weights = uses(seed)
        for layer, optimizer in ((sparse, one), (dense, other)):
            (layer(ids) * weights).sum().backward()
            optimizer.step()
        assert one.flip_rate() == other.flip_rate()
    assert torch.equal(sparse.T_packed, dense.T_packed)
    for name, tensor in one.named_state().items():
        assert torch.equal(tensor, other.named_state()[name]), name
    assert torch.equal(sparse.T_packed[ROWS // 2 :], before[ROWS // 2 :]), "rows that were not looked up"
    assert not torch.equal(sparse.T_packed, before)


def test_a_dropped_step_keeps_every_row():
    layer = table()
    optimizer = VoteOptimizer(layer)
    before = {k: t.clone() for k, t in ({**layer.state_dict(), **optimizer.named_state()}).items()}
    ids, weights = uses(0)
    (layer(ids) * weights).sum().backward()
    (layer(ids) * torch.full_like(weights, float("inf"))).sum().backward()
    optimizer.step()
    assert optimizer.dropped_steps == 1
    after = {**layer.state_dict(), **optimizer.named_state()}
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


def test_a_step_of_a_large_table_forms_nothing_of_its_size(monkeypatch):
    layer = TernaryEmbeddingTable(200_000, 16, sparse=True)
    optimizer = VoteOptimizer(layer, state="lean")
    ids = torch.tensor([3, 199_999, 3])
    layer(ids).sum().backward()
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not any(out is a for a in args):
                shared = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
                if out.untyped_storage().data_ptr() not in shared:
                    largest = max(largest, out.numel())
            return out

    with Sizes():
        optimizer.step()
    assert 0 < largest <= 4096
