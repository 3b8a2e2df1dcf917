"""The motif graph against a literal computation, and what it does to its list of edges and when."""

import copy
import itertools
import math
import zlib

import pytest
import torch
from torch import nn

from arbitor.config import ModelConfig
from arbitor.model.graph import MotifGraph
from arbitor.ops.edge_list import UNUSED, edge_list_merge
from arbitor.ops.random_bits import random_bits, stream_keys
from arbitor.ternary import VoteOptimizer
from testing.small_net import changed, snapshot

TRITS, CODE_DIM, DIM, HEADS = 3, 5, 24, 2
MOTIFS = 3**TRITS


def settings(**overrides):
    return ModelConfig(
        **{
            "dim": DIM,
            "motif_trits": TRITS,
            "graph_edges": 90,
            "graph_neighbours": 3,
            "graph_heads": HEADS,
            **overrides,
        }
    )


def make(seed=0, **overrides):
    torch.manual_seed(seed)
    return MotifGraph(settings(**overrides), CODE_DIM)


CODES = torch.randint(-1, 2, (MOTIFS, CODE_DIM), generator=torch.Generator().manual_seed(5)).float()


def code_vectors(ids):
    return CODES[ids]


def motifs(seed=0, batch=3, length=20):
    """Texts in which a motif's successors are few, and motif 26 never occurs."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 8, (batch, 1), generator=generator)
    steps = torch.randint(1, 4, (batch, length - 1), generator=generator)
    return torch.cat([start, start + steps.cumsum(1)], dim=1) % (MOTIFS - 1)


def states(rows, seed=1, dtype=torch.float32):
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def use(graph, motif_BN, seed=1):
    """Messages of a forward, one row a position."""
    neighbours = graph.look_up(motif_BN, code_vectors)
    return graph.messages(states(motif_BN.numel(), seed), neighbours)


def train(graph, optimizer, steps):
    for step in steps:
        use(graph, motifs(step), step).square().sum().backward()
        optimizer.step()


@pytest.fixture
def trained():
    """A graph after six steps, its optimizer detached; motif 26 has no edge."""
    graph = make()
    optimizer = VoteOptimizer(graph)
    train(graph, optimizer, range(6))
    optimizer.detach()
    return graph


def edges(graph):
    """{source: [(destination, score)]}, best first, from the buffers."""
    found = {}
    for source, target, score in zip(
        graph.src.tolist(), graph.dst.tolist(), graph.score.tolist(), strict=True
    ):
        if source != UNUSED:
            found.setdefault(source, []).append((target, score))
    return found


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def literal_messages(graph, s_MD, motif_M):
    query, out = (layer.decode(torch.float64) for layer in (graph.query, graph.out))
    rows = []
    for s, motif in zip(s_MD, motif_M.tolist(), strict=True):
        best = edges(graph).get(motif, [])[: graph.num_neighbours]
        heads = []
        for q in (query @ rms(s)).split(CODE_DIM):
            total = torch.zeros(CODE_DIM, dtype=torch.float64)
            weights = [
                math.exp(float(q @ CODES[target].double()) / math.sqrt(CODE_DIM)) * score / 127
                for target, score in best
            ]
            for (target, _), weight in zip(best, weights, strict=True):
                total += weight / sum(weights) * CODES[target].double()
            heads.append(total)
        rows.append(out @ rms(torch.cat(heads)))
    return torch.stack(rows)


def unrounded(graph):
    for layer in (graph.query, graph.out):
        weight = layer.decode(torch.float64)
        layer.forward = lambda x, weight=weight: rms(x) @ weight.T
    return graph


def test_messages_equal_the_literal_computation(trained):
    motif_BN = torch.arange(MOTIFS).view(3, 9)
    s_MD = states(MOTIFS, dtype=torch.float64)
    expected = literal_messages(trained, s_MD, motif_BN.flatten())
    found = unrounded(trained).messages(s_MD, trained.look_up(motif_BN, code_vectors))
    # The priors are fp32: two roundings of at most 2^-24 * log(127) each move a weight by their sum, and the
    # message is a mean of codes of size 1, normalised (factor of at most sqrt(HEADS * CODE_DIM) once more)
    # and multiplied with rows of HEADS * CODE_DIM weights.
    weights = float(trained.out.decode(torch.float64).abs().max())
    tolerance = 2 * 2**-24 * math.log(127) * 2 * (HEADS * CODE_DIM) ** 1.5 * weights
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_the_list_gives_each_motif_its_best_successors(trained):
    neighbours = trained.look_up(torch.arange(MOTIFS)[None], code_vectors)
    assert neighbours.valid.any(1).sum() > 5
    for motif in range(MOTIFS):
        best = edges(trained).get(motif, [])[:3]
        assert neighbours.valid[motif].tolist() == [True] * len(best) + [False] * (3 - len(best))
        for k, (target, score) in enumerate(best):
            assert torch.equal(neighbours.codes[motif, k], CODES[target])
            assert math.isclose(float(neighbours.prior[motif, k]), math.log(score / 127), abs_tol=1e-6)


def test_a_position_without_neighbours_hears_exactly_nothing(trained):
    motif_BN = torch.tensor([[26, 3, 26, 4]])
    s_MD = states(4).requires_grad_()
    messages = trained.messages(s_MD, trained.look_up(motif_BN, code_vectors))
    assert not messages[[0, 2]].any()
    assert messages[[1, 3]].any(1).all()
    messages.sum().backward()
    assert not s_MD.grad[[0, 2]].any()
    assert s_MD.grad[[1, 3]].any(1).all()
    assert not use(make(), motif_BN).any(), "an empty graph says nothing"


@pytest.mark.parametrize("code_dim", [5, 9, 40])
@pytest.mark.parametrize("neighbours", [1, 3, 4, 11])
def test_a_message_does_not_depend_on_other_rows(trained, neighbours, code_dim):
    torch.manual_seed(2)
    codes = torch.randn(MOTIFS, code_dim)
    graph = MotifGraph(settings(graph_neighbours=neighbours), code_dim)
    for name in ("src", "dst", "score"):
        getattr(graph, name).copy_(getattr(trained, name))
    motif_BN, s_MD = motifs(7), states(60)
    found = graph.look_up(motif_BN, lambda ids: codes[ids])
    whole = graph.messages(s_MD, found)
    for index in (torch.arange(60)[::7], torch.randperm(60), *torch.arange(12)[:, None]):
        assert torch.equal(graph.messages(s_MD[index], found.rows(index)), whole[index])
    assert graph.messages(s_MD[:0], found.rows(torch.arange(0))).shape == (0, DIM)
    for b, n in ((0, 0), (1, 13), (2, 19)):
        alone = graph.look_up(motif_BN[b : b + 1, n : n + 1], lambda ids: codes[ids])
        assert torch.equal(graph.messages(s_MD[20 * b + n][None], alone)[0], whole[20 * b + n])


def test_gradients_reach_the_state_the_codes_and_both_linears(trained):
    VoteOptimizer(trained)
    codes = CODES.clone().requires_grad_()
    s_MD = states(60).requires_grad_()
    trained.messages(s_MD, trained.look_up(motifs(3), lambda ids: codes[ids])).square().sum().backward()
    assert s_MD.grad.any()
    assert torch.isfinite(s_MD.grad).all()
    assert codes.grad.any()
    assert trained.query.capture.gradient().any()
    assert trained.out.capture.gradient().any()


# -- the list of edges --------------------------------------------------------------------------------------


def test_transitions_within_each_text_of_all_forwards_are_merged_in_a_step():
    graph = make()
    optimizer = VoteOptimizer(graph, seed=11)
    texts = motifs(0), motifs(1, batch=1, length=2), motifs(2, length=1)
    before = snapshot(graph)
    for step in range(2):
        for text in texts:
            use(graph, text).sum().backward()
        assert changed(before, snapshot(graph)) == [], "a forward changes nothing"
        expected = tuple(before[name].clone() for name in ("src", "dst", "score"))
        pairs = [pair for text in texts for row in text.tolist() for pair in itertools.pairwise(row)]
        keys = torch.tensor([stream_keys(11, step, zlib.crc32(b".score"))], dtype=torch.int32)
        bits = random_bits(keys, graph.capacity + len(pairs))[0]
        pair_src, pair_dst = torch.tensor(pairs, dtype=torch.int32).unbind(1)
        edge_list_merge(*expected, pair_src, pair_dst, bits, 4, torch.tensor(True))  # 1/16 a step
        optimizer.step()
        assert len(pairs) == 58
        for name, tensor in zip(("src", "dst", "score"), expected, strict=True):
            assert torch.equal(getattr(graph, name), tensor)
        before = snapshot(graph)
    optimizer.step()
    assert changed(before, snapshot(graph)) == [], "what was noted counts once"


def test_nothing_is_noted_in_evaluation_without_gradients_or_without_an_optimizer(trained):
    before = snapshot(trained)
    use(trained, motifs(9))
    optimizer = VoteOptimizer(trained)
    trained.eval()
    first, second = use(trained, motifs(9)), use(trained, motifs(9))
    trained.train()
    with torch.no_grad():
        use(trained, motifs(9))
    optimizer.step()
    assert changed(before, snapshot(trained)) == []
    assert torch.equal(first, second)
    use(trained, motifs(9))
    optimizer.zero_grad()
    optimizer.step()
    assert changed(before, snapshot(trained)) == [], "zero_grad drops what was noted"
    use(trained, motifs(9))
    optimizer.step()
    assert changed(before, snapshot(trained)) != []


def test_what_was_merged_is_merged_once():
    graph = make()
    graph.attached = True
    use(graph, motifs())

    def bits(use, count):
        return torch.zeros(count, dtype=torch.int32)

    graph.advance(torch.tensor(True), bits)
    before = snapshot(graph)
    assert edges(graph)
    graph.advance(torch.tensor(True), bits)
    assert changed(before, snapshot(graph)) == []


def test_a_dropped_step_keeps_every_bit(trained):
    optimizer = VoteOptimizer(trained)
    before = snapshot(trained, optimizer)
    use(trained, motifs(9)).sum().backward()
    trained.advance(torch.tensor(False), lambda use, count: torch.zeros(count, dtype=torch.int32))
    assert changed(before, snapshot(trained, optimizer)) == []
    use(trained, motifs(9)).sum().backward()
    optimizer.note_loss(torch.tensor(float("nan")))
    optimizer.step()
    assert optimizer.dropped_steps == 1
    assert changed(before, snapshot(trained, optimizer)) == []
    use(trained, motifs(8)).sum().backward()
    optimizer.step()
    assert changed(before, snapshot(trained, optimizer)) != []


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_runs_are_equal_bit_for_bit_and_go_on_after_loading(deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        graphs = [make(), make(), make(seed=1)]
        optimizers = [VoteOptimizer(graph) for graph in graphs]
        for graph, optimizer in zip(graphs[:2], optimizers[:2], strict=True):
            train(graph, optimizer, range(5))
        graphs[2].load_state_dict(graphs[0].state_dict())
        optimizers[2].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for graph, optimizer in zip(graphs, optimizers, strict=True):
            train(graph, optimizer, range(5, 8))
    finally:
        torch.use_deterministic_algorithms(False)
    first = snapshot(graphs[0], optimizers[0])
    for graph, optimizer in zip(graphs[1:], optimizers[1:], strict=True):
        assert changed(first, snapshot(graph, optimizer)) == []
    assert edges(graphs[0])


def test_the_list_never_exceeds_its_capacity_and_stays_sorted():
    graph = make(graph_edges=9)
    optimizer = VoteOptimizer(graph)
    for step in range(10):
        train(graph, optimizer, [step])
        graph.check()
    assert int(graph.metrics(graph.look_up(motifs(), code_vectors))["graph_edges"]) == 9


def test_metrics_count_edges_and_positions_with_a_neighbour(trained):
    trained.num_neighbours = 30  # more than any motif has
    neighbours = trained.look_up(torch.tensor([[26, 3, 26, 26]]), code_vectors)
    metrics = trained.metrics(neighbours)
    assert int(metrics["graph_edges"]) == sum(len(best) for best in edges(trained).values())
    assert float(metrics["graph_reach"]) == 0.25


def test_all_that_is_saved_is_integers(trained):
    assert {tensor.dtype for tensor in trained.state_dict().values()} == {
        torch.int8,
        torch.int32,
        torch.uint8,
    }
    assert sum(getattr(trained, name).nbytes for name in ("src", "dst", "score")) == 9 * 90


def test_a_copy_takes_the_edges_along(trained):
    twin = copy.deepcopy(trained)
    assert changed(snapshot(trained), snapshot(twin)) == []
    assert torch.equal(use(trained, motifs(4)), use(twin, motifs(4)))


def damage(graph, name, index, value):
    state = {key: tensor.clone() for key, tensor in graph.state_dict().items()}
    if index == "last edge":
        index = int((graph.src != UNUSED).sum()) - 1
    state[name][index] = value
    return state


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("src", 0, -1),
        ("src", "last edge", MOTIFS),
        ("src", -1, 0),
        ("dst", 3, MOTIFS),
        ("dst", 3, -1),
        ("score", "last edge", 0),
        ("score", 0, -5),
        ("score", -1, 3),
        ("dst", -1, 3),
    ],
)
def test_damaged_edges_are_refused(trained, name, index, value):
    with pytest.raises(RuntimeError, match="no sorted list of edges"):
        nn.ModuleDict({"graph": make()}).load_state_dict(
            {f"graph.{key}": tensor for key, tensor in damage(trained, name, index, value).items()}
        )


@pytest.mark.parametrize("name", ["src", "dst", "score"])
def test_edges_out_of_order_are_refused(trained, name):
    assert len(trained.src) > 2
    state = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    position = next(
        i
        for i in range(89)
        if state["src"][i] == state["src"][i + 1] != UNUSED and state["score"][i] != state["score"][i + 1]
    )
    names = ("src", "dst", "score") if name == "src" else ("dst", "score")
    i, j = (0, int((state["src"] != UNUSED).sum()) - 1) if name == "src" else (position, position + 1)
    if name == "dst":  # equal scores, destinations in the wrong order
        state["score"][j] = state["score"][i]
        state["dst"][i], state["dst"][j] = 5, 4
    else:
        for each in names:
            state[each][[i, j]] = state[each][[j, i]]
    with pytest.raises(RuntimeError, match="no sorted list of edges"):
        make().load_state_dict(state)


def test_float_edges_are_refused(trained):
    state = dict(trained.state_dict())
    with pytest.raises(RuntimeError, match=r"score is torch\.float32, expected torch\.int8"):
        make().load_state_dict({**state, "score": state["score"].float()})


def test_a_graph_on_the_meta_device_takes_saved_edges(trained):
    graph = MotifGraph(settings(), CODE_DIM, device=torch.device("meta"))
    graph.load_state_dict(trained.state_dict(), assign=True)
    assert changed(snapshot(trained), snapshot(graph)) == []
