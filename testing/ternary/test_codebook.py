"""The learned codebook: exact look-up, gradients, learning, rows drawn anew; state that only steps change."""

import copy

import pytest
import torch
from torch import nn

from arbitor.errors import UserError
from arbitor.ops.trit_codec import trit_unpack
from arbitor.ternary import TernaryLinear, TernaryVQCodebook, VoteOptimizer, named_ternary
from arbitor.ternary import codebook as codebook_module
from arbitor.ternary.audit import audit
from testing.small_net import changed, each_state, snapshot

ROWS, DIM, PARTS = 49, 12, 2


def make(num_rows=ROWS, dim=DIM, parts=PARTS, seed=0, **options):
    torch.manual_seed(seed)
    return TernaryVQCodebook(num_rows, dim, parts=parts, **options)


def inputs(number=40, dim=DIM, seed=1):
    x = torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.square().mean(-1, keepdim=True).sqrt()


def all_rows(book):
    """Every row by its definition: concatenations of rows of the parts, the first part turning slowest."""
    rows = [[]]
    for table in book.parts:
        rows = [row + part for row in rows for part in table.decode(torch.float64).tolist()]
    return torch.tensor(rows, dtype=torch.float64)


# -- look-up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "dim", "parts"), [(9, 5, 1), (4096, 16, 2), (3375, 12, 3), (1, 4, 4)])
def test_finds_what_an_exhaustive_search_finds(num_rows, dim, parts):
    book = make(num_rows, dim, parts)
    for index, table in enumerate(book.parts):  # scales that differ between rows and parts
        table.E.copy_(torch.arange(len(table.E))[:, None] % 3 - 1 + index % 2)
    rows = all_rows(book)
    assert len(rows) == num_rows
    x = inputs(200, dim)
    code, ids, _ = book(x)
    distances = (x.double()[:, None] - rows).square().sum(-1)
    smallest = distances.min(-1, keepdim=True).values
    # Equal rows and equal distances, whose sums may round in another order here, count as one.
    near = distances <= smallest * (1 + 4 * dim * 2.0**-53)
    assert ids.tolist() == near.to(torch.int8).argmax(-1).tolist(), "recall 1, the lowest number first"
    assert torch.equal(code.double(), rows[ids])
    assert torch.equal(book.rows(ids), code)
    assert torch.equal(book.rows(torch.arange(num_rows).view(-1, 1)).double(), rows[:, None])


def test_shapes_and_types():
    book = make()
    x = inputs(24).view(2, 3, 4, DIM)
    code, ids, loss = book(x)
    assert code.shape == x.shape
    assert ids.shape == (2, 3, 4)
    assert ids.dtype == torch.int64
    assert loss.dim() == 0
    for dtype in (torch.bfloat16, torch.float64):
        other = book(x.to(dtype))
        assert other.code.dtype == dtype
        assert other.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert book(x[:0]).ids.shape == (0, 3, 4)
    with pytest.raises(ValueError, match="expected a last dimension of 12"):
        book(torch.zeros(3, 11))


def test_a_position_does_not_depend_on_the_others():
    book = make(4096, 32, 2)
    x = inputs(50, 32)
    whole = book(x)
    for size in (1, 7):
        parts = [book(part) for part in x.split(size)]
        assert torch.equal(torch.cat([p.ids for p in parts]), whole.ids)
        assert torch.equal(torch.cat([p.code for p in parts]), whole.code)


@pytest.mark.parametrize(
    ("num_rows", "dim", "parts", "message"),
    [
        (50, 12, 2, "to the power of 2, such as 49; 50 is none"),
        (49, 13, 2, "a multiple of its parts"),
        (0, 4, 1, "at least one row"),
        (4, 2, 4, "a multiple of its parts"),
        (4, 1025, 1, "at most 1024"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(num_rows, dim, parts, message):
    with pytest.raises(UserError, match=message):
        TernaryVQCodebook(num_rows, dim, parts=parts)


def test_a_million_rows_are_two_thousand_in_memory():
    book = make(1024**2, 32, 2)
    assert sum(t.numel() for t in book.state_dict().values()) < 1 << 18
    assert int(book(inputs(4, 32)).ids.max()) < 1024**2


# -- gradients and learning ---------------------------------------------------------------------------------


def oracle(book, x, rows, weights, commitment):
    """Gradients of VQ-VAE's equation 3 by autograd: x, and the rows of each part."""
    x = x.double().requires_grad_()
    parts = [table.decode(torch.float64).requires_grad_() for table in book.parts]
    digits = [rows // len(parts[1]), rows % len(parts[1])]
    e = torch.cat([part[digit] for part, digit in zip(parts, digits, strict=True)], dim=-1)
    straight = x + (e - x).detach()
    loss = (x.detach() - e).square().mean() + commitment * (x - e.detach()).square().mean()
    ((straight * weights).sum() + 3 * loss).backward()
    return x.grad, [part.grad for part in parts], loss.detach()


@pytest.mark.parametrize("commitment", [0.25, 0.0])
def test_gradients_are_those_of_vq_vae(commitment):
    book = make(commitment=commitment)
    VoteOptimizer(book)
    x, weights = inputs().requires_grad_(), torch.randn(40, DIM)
    code, ids, loss = book(x)
    ((code * weights).sum() + 3 * loss).backward()
    dx, dparts, expected = oracle(book, x.detach(), ids, weights, commitment)
    # fp32: some roundings of 2^-24 each, of sums of up to 40 rows.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-5, atol=1e-6)
    for table, gradient in zip(book.parts, dparts, strict=True):
        rows, sums = table.capture.touched()
        assert set(rows.tolist()) == set(gradient.any(-1).nonzero()[:, 0].tolist())
        torch.testing.assert_close(sums.double(), gradient[rows], rtol=1e-4, atol=1e-6)


def test_rows_get_nothing_from_what_comes_after_the_code():
    book = make()
    VoteOptimizer(book)
    x = inputs().requires_grad_()
    book(x).code.square().sum().backward()
    assert all(table.capture.empty for table in book.parts)
    assert torch.equal(x.grad, 2 * book(x).code.detach())


@each_state
def test_rows_learn_the_inputs(state):
    """Inputs around eight centres: the rows come to them, and the distance falls."""
    book = make(8, 16, 1, revive_after=10)
    optimizer = VoteOptimizer(book, state=state)
    centres = torch.randint(-1, 2, (8, 16), generator=torch.Generator().manual_seed(2)).float()

    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(8, (64,), generator=generator)
        return centres[which] + 0.1 * torch.randn(64, 16, generator=generator)

    losses = []
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 80)
        output = book(batch(step))
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[0] > 0.2
    # What is left is the inputs' own spread, 1.25 * 0.01, and a trit here and there.
    assert sum(losses[-10:]) / 10 < 0.03
    assert book(batch(99)).ids.unique().numel() == 8


# -- rows drawn anew ----------------------------------------------------------------------------------------


def trits_of(book, part):
    return trit_unpack(book.parts[part].T_packed, DIM // PARTS)


def spoiled_state(optimizer, book):
    """Every accumulator and momentum code at some value other than 0."""
    for table in book.parts:
        for tensor in optimizer.state[table.T_packed].values():
            tensor.fill_(0x99 if tensor.dtype == torch.uint8 else 5)


@each_state
def test_rows_without_use_are_drawn_from_the_inputs(state):
    book = make(revive_after=3)
    optimizer = VoteOptimizer(book, state=state, lr=0.0)
    for table in book.parts:
        table.E.fill_(-1)
    x = inputs(6)
    ids = book(x).ids
    used = [set((ids // 7).tolist()), set((ids % 7).tolist())]
    assert all(0 < len(u) < 7 for u in used)
    before = [trits_of(book, part) for part in range(PARTS)]
    for step in range(1, 3):
        book(x).loss.backward()
        optimizer.step()
        counts = [[0 if row in u else step for row in range(7)] for u in used]
        assert book.unused.tolist() == counts
    assert all(torch.equal(trits_of(book, part), before[part]) for part in range(PARTS))
    spoiled_state(optimizer, book)
    book(x).loss.backward()
    optimizer.step()
    assert book.unused.tolist() == [[0] * 7] * PARTS
    for part, chunk in enumerate(x.chunk(PARTS, dim=-1)):
        after, table = trits_of(book, part), book.parts[part]
        rounded = chunk.clamp(-1, 1).round().to(torch.int8).tolist()
        drawn = [after[row].tolist() for row in range(7) if row not in used[part]]
        assert all(row in rounded for row in drawn)
        assert len({tuple(row) for row in drawn}) == min(len(drawn), len({tuple(r) for r in rounded}))
        for row in range(7):
            fresh = row not in used[part]
            assert int(table.E[row]) == (0 if fresh else -1)
            for name, tensor in optimizer.state[table.T_packed].items():
                zero = 0x88 if tensor.dtype == torch.uint8 else 0
                assert bool((tensor[row] == zero).all()) == fresh, name
            if not fresh:
                assert torch.equal(after[row], before[part][row])


def test_a_drawn_row_is_the_one_that_its_input_takes_next():
    book = make(9, DIM, 1, revive_after=1)
    optimizer = VoteOptimizer(book, lr=0.0)
    x = inputs(3)
    before = book(x)
    before.loss.backward()
    optimizer.step()
    after = book(x)
    # Each input is now met by its own trits, the nearest there can be.
    assert torch.equal(after.code.detach(), x.clamp(-1, 1).round())
    assert after.loss.item() < before.loss.item()


def test_inputs_that_are_met_are_not_drawn():
    book = make(9, DIM, 1, revive_after=1)
    optimizer = VoteOptimizer(book, lr=0.0)
    x = book.rows(torch.tensor([4, 2, 4]))
    packed = book.parts[0].T_packed.clone()
    for step in range(1, 4):
        book(x).loss.backward()
        optimizer.step()
        assert torch.equal(book.parts[0].T_packed, packed)
        assert book.unused[0].tolist() == [0 if row in (2, 4) else step for row in range(9)]


def test_all_inputs_that_are_not_met_are_drawn_however_many_are():
    book = make(9, DIM, 1, revive_after=1)
    optimizer = VoteOptimizer(book, lr=0.0)
    fresh = inputs(3)
    x = torch.cat([book.rows(torch.arange(5)).repeat(8, 1), fresh])
    output = book(x)
    assert output.ids.unique().numel() <= 6
    output.loss.backward()
    optimizer.step()
    assert torch.equal(book(fresh).code.detach(), fresh.clamp(-1, 1).round())


def test_no_two_rows_are_drawn_equal():
    book = make(40, DIM, 1, revive_after=1)
    optimizer = VoteOptimizer(book, lr=0.0)
    before = [tuple(row) for row in trit_unpack(book.parts[0].T_packed, DIM).tolist()]
    kinds = inputs(4)
    output = book(kinds.repeat_interleave(torch.tensor([1, 2, 30, 30]), dim=0))
    output.loss.backward()
    optimizer.step()
    after = [tuple(row) for row in trit_unpack(book.parts[0].T_packed, DIM).tolist()]
    drawn = [new for new, old in zip(after, before, strict=True) if new != old]
    rounded = {tuple(row) for row in kinds.clamp(-1, 1).round().to(torch.int8).tolist()}
    assert len(drawn) == len(set(drawn))
    assert len(drawn) >= 2
    assert set(drawn) <= rounded


def test_the_longest_unused_come_first_and_no_more_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(codebook_module, "REVIVE_AT_ONCE", 3)
    book = make(30, DIM, 1, revive_after=2)
    optimizer = VoteOptimizer(book, lr=0.0)
    book.unused.copy_(torch.arange(30)[None] % 7)
    x = inputs(5)
    taken = set(book(x).ids.tolist())
    ages = {row: row % 7 + 1 for row in range(30) if row not in taken}
    due = sorted((row for row in ages if ages[row] >= 2), key=lambda row: (-ages[row], row))
    book(x).loss.backward()
    optimizer.step()
    expected = [0 if row in taken or row in due[:3] else ages[row] for row in range(30)]
    assert book.unused[0].tolist() == expected


def test_never_where_it_is_switched_off():
    book = make(revive_after=0)
    optimizer = VoteOptimizer(book, lr=0.0)
    before = [table.T_packed.clone() for table in book.parts]
    x = inputs(2)
    for _ in range(3):
        book(x).loss.backward()
        optimizer.step()
    assert all(torch.equal(a, t.T_packed) for a, t in zip(before, book.parts, strict=True))
    assert int(book.unused.max()) == 3


def test_uses_of_several_forwards_count_as_one_step():
    book = make(16, DIM, 1, revive_after=0)
    optimizer = VoteOptimizer(book, lr=0.0)
    uses = [book(inputs(3, seed=seed)) for seed in range(3)]
    sum(output.loss for output in uses).backward()
    optimizer.step()
    taken = {row for output in uses for row in output.ids.tolist()}
    assert book.unused[0].tolist() == [0 if row in taken else 1 for row in range(16)]
    optimizer.step()
    assert int(book.unused.max()) == 1, "what was noted counts once"
    book(inputs(3))
    for _ in range(2):
        book.advance(torch.tensor(True), lambda name, count: torch.zeros(count, dtype=torch.int32))
    assert int(book.unused.max()) == 2


def run(seed, steps=12):
    book = make(64, DIM, 2, revive_after=2)
    optimizer = VoteOptimizer(book, seed=seed)
    for step in range(steps):
        book(inputs(8, seed=step)).loss.backward()
        optimizer.step()
    return snapshot(book, optimizer)


def test_runs_repeat_bit_for_bit_and_differ_by_seed():
    assert changed(run(0), run(0)) == []
    assert "parts.0.T_packed" in changed(run(0), run(1))


def test_every_part_has_random_numbers_of_its_own():
    book, asked = make(), []
    VoteOptimizer(book)
    book(inputs(3))

    def bits(name, count):
        asked.append((name, count))
        return torch.zeros(count, dtype=torch.int32)

    book.advance(torch.tensor(True), bits)
    assert [count for _, count in asked] == [3, 3]
    assert len({name for name, _ in asked}) == PARTS


def test_under_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        assert changed(run(0), run(0)) == []
    finally:
        torch.use_deterministic_algorithms(False)


# -- state --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A linear into the codebook."""

    def __init__(self, **options):
        super().__init__()
        self.linear = TernaryLinear(10, DIM)
        self.book = make(**options)

    def forward(self, x):
        y = self.linear(x)
        return self.book(y / y.detach().square().mean(-1, keepdim=True).add(1e-6).sqrt())


def test_a_forward_changes_nothing():
    net = Net(revive_after=1)
    optimizer = VoteOptimizer(net)
    before = snapshot(net, optimizer)
    x = torch.randn(20, 10)
    first, second = net(x), net(x)
    (first.code.sum() + first.loss + second.loss).backward()
    assert torch.equal(first.code, second.code)
    assert torch.equal(first.loss, second.loss)
    assert changed(before, snapshot(net, optimizer)) == []
    net.eval()
    assert torch.equal(net(x).code, first.code)
    assert changed(before, snapshot(net, optimizer)) == []


def test_nothing_is_noted_in_evaluation_without_gradients_or_without_an_optimizer():
    book = make()
    x = inputs(3)
    book(x)
    optimizer = VoteOptimizer(book)
    with torch.no_grad():
        book(x)
    book.eval()
    book(x)
    optimizer.step()
    assert not book.unused.any()
    book.train()
    book(x)
    optimizer.zero_grad()
    optimizer.step()
    assert not book.unused.any()
    book(x)
    optimizer.step()
    assert book.unused.any()


@pytest.mark.parametrize("spoil", ["loss", "input"])
def test_a_dropped_step_keeps_every_bit(spoil):
    net = Net(revive_after=1)
    optimizer = VoteOptimizer(net)
    before = snapshot(net, optimizer)
    x = torch.randn(3, 10)
    if spoil == "input":
        x[1, 2] = float("nan")
    output = net(x)
    output.loss.backward()
    optimizer.note_loss(output.loss * float("nan") if spoil == "loss" else output.loss)
    optimizer.step()
    assert optimizer.dropped_steps == 1
    assert changed(before, snapshot(net, optimizer)) == []
    # On a device the flag is only known there: `advance` itself must hold still.
    net(torch.randn(3, 10))
    net.book.advance(torch.tensor(False), lambda name, count: torch.arange(count, dtype=torch.int32))
    assert changed(before, snapshot(net, optimizer)) == []
    net(torch.randn(3, 10))
    net.book.advance(torch.tensor(True), lambda name, count: torch.arange(count, dtype=torch.int32))
    assert changed(before, snapshot(net, optimizer)) != []


def test_all_state_is_integer_and_comes_back():
    net = Net(revive_after=2)
    optimizer = VoteOptimizer(net)
    for step in range(3):
        net(torch.randn(20, 10, generator=torch.Generator().manual_seed(step))).loss.backward()
        optimizer.step()
    state = net.state_dict()
    assert state["book.unused"].dtype == torch.int32
    assert state["book.unused"].any()
    assert not any(tensor.is_floating_point() for tensor in state.values())
    assert audit(net, optimizer).ok
    assert [name for name, _ in named_ternary(net)] == ["linear", "book.parts.0", "book.parts.1"]
    other = Net(seed=7)
    other.load_state_dict(state)
    assert changed(snapshot(net), snapshot(other)) == []
    copied = copy.deepcopy(net)
    x = torch.randn(4, 10)
    assert torch.equal(copied(x).code, net(x).code)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(PARTS, 7), "unused is torch.float32"),
        (torch.full((PARTS, 7), -1), "unused is torch.int64"),
    ],
)
def test_counts_of_another_type_are_refused(value, message):
    book = make()
    with pytest.raises(RuntimeError, match=message):
        book.load_state_dict({**book.state_dict(), "unused": value})


def test_damaged_counts_are_refused():
    book = make()
    state = {name: tensor.clone() for name, tensor in book.state_dict().items()}
    state["unused"][1, 3] = -1
    with pytest.raises(RuntimeError, match="unused holds a negative count"):
        book.load_state_dict(state)


def test_on_the_meta_device():
    book = TernaryVQCodebook(ROWS, DIM, parts=PARTS, device="meta")
    assert book.unused.is_meta
    assert repr(book).startswith("TernaryVQCodebook(\n  num_rows=49, dim=12, parts=2")
