"""The n-gram memory against a literal computation, its causality, and a table that stays in host memory."""

import copy
import dataclasses
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.model.memgram import MemGram, MemoryTable, collisions
from arbitor.model.vocab import PAD
from arbitor.ops.ngram_hash import ngram_hash
from arbitor.ternary import VoteOptimizer
from testing.small_net import changed, each_state, snapshot

ROWS, HEADS, WIDTH, DIM, TRITS = 11, 3, 7, 24, 4
TABLES = 2 * HEADS
EPS64 = torch.finfo(torch.float64).eps


def settings(**overrides):
    return ModelConfig(
        **{
            "dim": DIM,
            "motif_trits": TRITS,
            "memory_rows": ROWS,
            "memory_heads": HEADS,
            "memory_dim": WIDTH,
            **overrides,
        }
    )


def make(seed=0, host=False, device=None, **overrides):
    """A memory with rows of random trits, as if it were trained."""
    torch.manual_seed(seed)
    memory = MemGram(settings(**overrides), device, host=host)
    if not memory.table.T_packed.is_meta:
        super(MemoryTable, memory.table).reset_parameters()
    return memory


def text(seed=0, batch=3, length=14):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def stream(batch=3, count=12, seed=1, dtype=torch.float32):
    """A residual stream [B, N, D]."""
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def unrounded(memory):
    for layer in (memory.key, memory.value):
        weight = layer.decode(torch.float64)
        layer.forward = lambda x, weight=weight: rms(x.double()) @ weight.T
    return memory


def literal_memory(memory, h_ND, ids_L):
    """One text, position by position in fp64."""
    table, key, value = (part.decode(torch.float64) for part in (memory.table, memory.key, memory.value))
    rows_NT = ngram_hash(ids_L, HEADS, memory.num_rows).tolist()
    positions = []
    for h, rows in zip(h_ND, rows_NT, strict=True):
        e = torch.cat([table[row] for row in rows])
        match = float(rms(h) @ rms(key @ rms(e))) / math.sqrt(DIM)
        positions.append(value @ rms(e) / (1 + math.exp(-match)))
    return torch.stack(positions)


@pytest.mark.parametrize("tscale", ["ROW", "T4"])
def test_equals_the_literal_computation(tscale):
    memory = make(tscale=tscale)
    memory.table.E.random_(-3, 3)
    ids_BL, h_BND = text(), stream(dtype=torch.float64)
    expected = torch.stack([literal_memory(memory, h, ids) for h, ids in zip(h_BND, ids_BL, strict=True)])
    found = unrounded(memory)(h_BND, ids_BL)
    # fp64 throughout: sums over at most TABLES * WIDTH products, some of them nested.
    tolerance = 16 * EPS64 * TABLES * WIDTH * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("over", ["bytes", "motifs"])
def test_a_position_depends_on_its_own_state_and_its_last_three_ids(over):
    memory = make(memory_over=over, memory_rows=4001)
    ids_BL, h_BND = text(), stream()
    before = memory(h_BND, ids_BL)
    for t, other in itertools.product(range(14), (0, 80)):
        moved_ids = ids_BL.clone()
        moved_ids[1, t] = other if ids_BL[1, t] != other else 1
        moved = (memory(h_BND, moved_ids) != before).any(-1)
        assert not moved[[0, 2]].any()
        assert moved[1].nonzero().flatten().tolist() == [p for p in (t - 2, t - 1, t) if 0 <= p < 12]
    for n in range(12):
        moved_h = h_BND.clone()
        moved_h[1, n] += 1
        assert (memory(moved_h, ids_BL) != before).any(-1).nonzero().tolist() == [[1, n]]


@pytest.mark.parametrize("dim", [24, 160, 161])
@pytest.mark.parametrize("host", [False, True])
def test_pieces_equal_the_whole_text_bit_for_bit(host, dim):
    memory = make(host=host, dim=dim)
    h_BND = torch.randn(3, 12, dim, generator=torch.Generator().manual_seed(1))
    ids_BL = text()
    whole = memory(h_BND, ids_BL)
    for sizes in ([1] * 12, [5, 1, 6], [2, 10]):
        ends = list(itertools.accumulate(sizes))
        pieces = [
            memory(h_BND[:, end - size : end], ids_BL[:, end - size : end + 2])
            for size, end in zip(sizes, ends, strict=True)
        ]
        assert torch.equal(torch.cat(pieces, dim=1), whole)
    for b in range(3):
        assert torch.equal(memory(h_BND[b : b + 1], ids_BL[b : b + 1])[0], whole[b])


@pytest.mark.parametrize(("over", "start"), [("bytes", PAD), ("motifs", 3**TRITS)])
def test_what_is_missing_ahead_of_a_text_is_no_motif_or_pad(over, start):
    memory = make(memory_over=over)
    motif_BN = text(length=12) % 3**TRITS
    ids_BL = memory.preceded(motif_BN)
    assert ids_BL.tolist() == [[start, start, *row] for row in motif_BN.tolist()]
    whole = memory(stream(), ids_BL)
    first = memory.preceded(motif_BN[:, :7])
    rest = memory.preceded(motif_BN[:, 7:], first[:, -2:])
    parts = [memory(stream()[:, :7], first), memory(stream()[:, 7:], rest)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_a_learned_codebook_has_its_own_start():
    assert make(motif_trits=0, codebook_rows=50, memory_over="motifs").start == 50


def test_an_untrained_memory_adds_nothing_and_learns_from_its_first_step():
    torch.manual_seed(0)
    memory = MemGram(settings(memory_rows=500))
    memory.table.check()
    assert not memory.table.trits().any()
    assert not memory.table.E.any()
    assert not memory(stream(), text()).any()
    residual = memory.table.T_residual
    counts = torch.bincount(residual.flatten().long() + 63, minlength=127).double()
    assert len(counts) == 127
    expected = residual.numel() / 127
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 126) < 6 * (2 * 126) ** 0.5
    wanted = torch.randn(DIM, generator=torch.Generator().manual_seed(3))
    optimizer = VoteOptimizer(memory, lr=0.1)
    (memory(stream(), text()) * -wanted).sum().backward()
    optimizer.step()
    # Steps of 0.1 trits of RMS 1 flip a trit with a probability of 0.1 * 0.8.
    used = ngram_hash(text(), HEADS, 500).unique()
    assert 0.06 < float(memory.table.trits()[used].abs().float().mean()) < 0.1
    assert (
        not memory.table.trits().abs().sum(1)[[r for r in range(3000) if r not in set(used.tolist())]].any()
    )
    assert float((memory(stream(), text()).detach() * wanted).sum()) > 0


# -- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [False, True])
def test_gradients_of_rows_equal_those_of_a_dense_table(host):
    memory = make(host=host)
    VoteOptimizer(memory)
    for seed in range(2):
        memory(stream(seed=seed), text(seed)).square().sum().backward()
    ids, sums = memory.table.capture.touched()
    twin = make()
    dense = twin.table.decode().requires_grad_()
    twin.table.fetch = lambda rows, device: dense[rows]
    for seed in range(2):
        twin(stream(seed=seed), text(seed)).square().sum().backward()
    # Both sum the same fp32 numbers, 2 * 3 * 12 * TABLES at most into one row, in different orders.
    tolerance = 72 * TABLES * 2**-24 * float(dense.grad.abs().max())
    torch.testing.assert_close(sums, dense.grad[ids], rtol=0, atol=tolerance)
    untouched = torch.ones(TABLES * ROWS, dtype=torch.bool)
    untouched[ids] = False
    assert not dense.grad[untouched].any()
    assert sums.any(dim=1).all()


def test_gradients_of_the_stream_equal_finite_differences():
    memory = unrounded(make())
    h_BND = stream(batch=1, count=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: memory(h, text(batch=1, length=5)), (h_BND,))


def train(memory, optimizer, steps):
    for step in steps:
        memory(stream(seed=step), text(step)).square().sum().backward()
        optimizer.step()


@each_state
def test_only_rows_that_were_looked_up_move(state):
    memory = make(memory_rows=500)
    optimizer = VoteOptimizer(memory, state=state, lr=0.3)
    before = memory.table.decode()
    train(memory, optimizer, range(3))
    moved = (memory.table.decode() != before).any(1)
    used = torch.cat([ngram_hash(text(step), HEADS, 500).flatten() for step in range(3)]).unique()
    assert set(moved.nonzero().flatten().tolist()) <= set(used.tolist())
    assert moved.sum() > 100


def test_evaluation_and_forwards_change_nothing():
    memory = make()
    optimizer = VoteOptimizer(memory)
    before = snapshot(memory, optimizer)
    memory(stream(), text())
    memory.eval()
    assert torch.equal(memory(stream(), text()), memory(stream(), text()))
    assert changed(before, snapshot(memory, optimizer)) == []


def test_a_dropped_step_keeps_every_bit():
    memory = make()
    optimizer = VoteOptimizer(memory)
    before = snapshot(memory, optimizer)
    (memory(stream(), text()) * float("inf")).sum().backward()
    optimizer.step()
    assert optimizer.dropped_steps == 1
    assert changed(before, snapshot(memory, optimizer)) == []
    train(memory, optimizer, [0])
    assert changed(before, snapshot(memory, optimizer)) != []


@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_are_equal_bit_for_bit_wherever_the_table_is(deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        states = []
        for host in (False, False, True):
            memory = make(host=host)
            optimizer = VoteOptimizer(memory)
            train(memory, optimizer, range(4))
            states.append(snapshot(memory, optimizer))
    finally:
        torch.use_deterministic_algorithms(False)
    assert changed(states[0], states[1]) == []
    assert changed(states[0], states[2]) == []
    assert not any(tensor.is_floating_point() for tensor in states[0].values())


# -- a table in host memory ---------------------------------------------------------------------------------


def to_accelerator(tensor):
    """`tensor.to("cuda")` where there is none: small tensors pass, a table may not."""
    assert tensor.numel() == 0, "a whole table was moved"
    return SimpleNamespace(device=torch.device("cuda"))


def test_a_table_in_host_memory_does_not_move():
    table = MemoryTable(50, 7, tscale="ROW", host=True)
    before = {"T_packed": table.T_packed, "E": table.E, "T_residual": table.T_residual}
    table._apply(to_accelerator)
    assert all(getattr(table, name) is tensor for name, tensor in before.items())
    with pytest.raises(AssertionError, match="a whole table was moved"):
        MemoryTable(50, 7, tscale="ROW", host=False)._apply(to_accelerator)


def test_other_calls_of_modules_work_on_a_table_in_host_memory():
    memory = make(host=True)
    before = snapshot(memory)
    assert changed(before, snapshot(memory.to("cpu").double().share_memory())) == []
    assert memory.table.T_packed.is_shared()
    assert memory.to("meta").table.T_packed.is_meta
    assert memory.to_empty(device="cpu").table.T_packed.device.type == "cpu"


def test_a_table_made_on_the_meta_device_comes_to_life_in_host_memory():
    memory = make(host=True, device=torch.device("meta"))
    assert memory.table.T_packed.is_meta
    assert memory.table.T_residual is None
    filled = make()

    def to_empty(tensor):
        return to_accelerator(tensor)

    memory.table._apply(to_empty)
    assert memory.table.T_packed.device.type == "cpu"
    memory = make(host=True, device=torch.device("meta"))
    memory.load_state_dict(filled.state_dict(), assign=True)
    assert changed(snapshot(filled), snapshot(memory)) == []
    assert torch.equal(memory(stream(), text()), filled(stream(), text()))


def test_weights_that_are_assigned_come_to_host_memory(monkeypatch):
    memory, given = make(host=True), make(seed=1).state_dict()
    asked = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: asked.append(id(tensor)) or tensor.clone())
    memory.load_state_dict(given, assign=True)
    assert sorted(asked) == sorted(id(given[name]) for name in ("table.T_packed", "table.E"))
    assert memory.table.T_packed.data_ptr() != given["table.T_packed"].data_ptr()
    assert memory.key.T_packed.data_ptr() == given["key.T_packed"].data_ptr()
    assert changed(given, snapshot(memory)) == []


def test_a_copy_stays_in_host_memory():
    twin = copy.deepcopy(make(host=True))
    assert twin.table.host
    twin.table._apply(to_accelerator)
    assert torch.equal(twin(stream(), text()), make()(stream(), text()))


@pytest.mark.gpu
def test_a_model_on_a_gpu_trains_a_table_in_host_memory():
    outputs = []
    for host in (False, True):
        memory = make(host=host).to("cuda")
        assert memory.table.T_packed.is_cuda is not host
        assert memory.key.T_packed.is_cuda
        optimizer = VoteOptimizer(memory)
        outputs.append(memory(stream().cuda(), text().cuda()).detach())
        for step in range(4):
            memory(stream(seed=step).cuda(), text(step).cuda()).square().sum().backward()
            optimizer.step()
            assert optimizer.flip_rate() > 0
        trained = memory(stream().cuda(), text().cuda())
        assert not torch.equal(trained, outputs[-1])
        reloaded = make(seed=1, host=host).to("cuda")
        reloaded.load_state_dict({k: v.cuda() for k, v in memory.state_dict().items()}, assign=True)
        assert reloaded.table.T_packed.is_cuda is not host
        assert torch.equal(reloaded(stream().cuda(), text().cuda()), trained)
        assert torch.equal(memory(stream().cuda(), text()), trained), "ids may lie in host memory"
    assert torch.equal(outputs[0], outputs[1])


# -- collisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 5, 40, 3000])
def test_collisions_equal_a_literal_count(num_rows):
    config = settings(memory_rows=num_rows)
    data = b"the cat sat on the mat; the dog sat on the log. " * 3 + bytes([*range(256), 0])
    for found in collisions(data, config):
        grams = {data[i - found.n + 1 : i + 1] for i in range(2, len(data))}
        rows = {}
        for gram in grams:
            ids = torch.tensor([[0] * (3 - found.n) + list(gram)])
            tables = ngram_hash(ids, HEADS, num_rows)[0, 0].tolist()
            rows[gram] = tuple(tables[:HEADS] if found.n == 2 else tables[HEADS:])
        uses = Counter(row for mine in rows.values() for row in mine)
        shared = [[uses[row] > 1 for row in mine] for mine in rows.values()]
        assert found.distinct == len(grams)
        assert math.isclose(found.in_one_head, sum(map(sum, shared)) / len(grams) / HEADS)
        assert math.isclose(found.in_all_heads, sum(map(all, shared)) / len(grams))
        same = Counter(rows.values())
        assert math.isclose(found.indistinct, sum(same[mine] > 1 for mine in rows.values()) / len(grams))
        one = 1 - (1 - 1 / num_rows) ** (len(grams) - 1)
        assert math.isclose(found.expected[0], one, rel_tol=1e-9)
        assert math.isclose(found.expected[1], one**HEADS, rel_tol=1e-9)
        assert math.isclose(found.expected[2], 1 - (1 - num_rows**-HEADS) ** (len(grams) - 1), rel_tol=1e-4)


def test_collisions_of_motifs_are_those_of_their_ids():
    generator = torch.Generator().manual_seed(0)
    big = torch.randint(3**15 - 6, 3**15, (400,), generator=generator)
    figures = [dataclasses.asdict(f) for f in collisions(big, settings(memory_rows=1 << 20))]
    assert [f["distinct"] for f in figures] == [
        36,
        len(set(itertools.pairwise(itertools.pairwise(big.tolist())))),
    ]
    assert figures[0]["in_one_head"] == 0


def test_kernels_give_what_torch_gives(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = make().to(device)
    optimizer = VoteOptimizer(memory, state="full")
    ids, h = text().to(device), stream().to(device)
    dy = torch.randn(3, 12, DIM, generator=torch.Generator().manual_seed(2)).to(device)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        y = memory(h, ids)
        y.backward(dy)
        rows, sums = memory.table.capture.touched()
        results.append(
            (rows, y.detach(), sums, memory.key.capture.gradient(), memory.value.capture.gradient())
        )
        optimizer.zero_grad()
    assert torch.equal(results[0][0], results[1][0])
    for expected, found in zip(results[0][1:], results[1][1:], strict=True):
        # Sums in another order, of the norms' squares, of a row's gradients and of two linears' ones.
        error = (found - expected).norm() / expected.norm()
        assert error <= 2**-23 * (8 + (TABLES * WIDTH) ** 0.5 + DIM**0.5)
