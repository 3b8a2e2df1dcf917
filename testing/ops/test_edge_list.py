"""The edge list against a dictionary of Python integers, bit for bit."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbitor.ops.edge_list import MAX_SCORE, UNUSED, edge_list_look_up, edge_list_merge
from testing import oracles

TRUE = torch.tensor(True)


def empty(capacity):
    unused = torch.full((capacity,), UNUSED, dtype=torch.int32)
    return unused, torch.zeros_like(unused), torch.zeros(capacity, dtype=torch.int8)


def vector(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def words(count, step=0):
    keys = oracles.stream_keys(7, step, 1)
    return [oracles.random_word(keys, i) for i in range(count)]


def merge(edges, pairs, random, rate_bits=4, ok=TRUE):
    bits = vector([oracles.signed(word) for word in random])
    sources, targets = ([pair[i] for pair in pairs] for i in (0, 1))
    edge_list_merge(*edges, vector(sources), vector(targets), bits, rate_bits, ok)


def literal_merge(scores, pairs, random, rate_bits, capacity):
    """New scores {(source, destination): score} of a list {...} after the pairs of a batch."""
    taken, left = Counter(pairs), Counter(source for source, _ in pairs)
    # Entries of list and pairs together in order; unused entries of the list come last.
    entries = sorted([*scores, *pairs])
    new = {}
    for edge in {*scores, *pairs}:
        score, c, n = scores.get(edge, 0), taken[edge], left[edge[0]]
        if n:
            step = ((127 * c - score * n) * 65536) // (n << rate_bits)
            score += (step + (random[entries.index(edge)] & 0xFFFF)) // 65536
        assert 0 <= score <= 127
        if score:
            new[edge] = score
    best = sorted(new, key=lambda edge: (-new[edge], edge))[:capacity]
    return {edge: new[edge] for edge in best}


def as_lists(scores, capacity):
    order = sorted(scores, key=lambda edge: (edge[0], -scores[edge], edge[1]))
    rest = capacity - len(order)
    return (
        [source for source, _ in order] + [UNUSED] * rest,
        [target for _, target in order] + [0] * rest,
        [scores[edge] for edge in order] + [0] * rest,
    )


def lists(edges):
    return tuple(buffer.tolist() for buffer in edges)


def transitions(count, nodes, seed):
    """Pairs in which few nodes are common and each has its own favourites."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(2, count, generator=generator).square()
    source = (u[0] * nodes).long()
    return list(zip(source.tolist(), ((source * 5 + (u[1] * nodes).long()) % nodes).tolist(), strict=True))


@pytest.mark.parametrize("rate_bits", [0, 1, 4])
@pytest.mark.parametrize(
    ("capacity", "pairs", "nodes"), [(200, 40, 9), (37, 63, 30), (12, 100, 25), (1, 7, 3), (5, 1, 2)]
)
def test_equals_the_oracle_over_many_steps(capacity, pairs, nodes, rate_bits):
    edges, scores = empty(capacity), {}
    full = 0
    for step in range(25):
        seen = transitions(pairs, nodes, step)
        random = words(capacity + pairs, step)
        merge(edges, seen, random, rate_bits)
        scores = literal_merge(scores, seen, random, rate_bits, capacity)
        assert lists(edges) == as_lists(scores, capacity)
        full += len(scores) == capacity
    if pairs > capacity:
        assert full > 5, "the capacity was never exceeded"


small = st.integers(0, 4)


@given(
    pairs=st.lists(st.tuples(small, small), min_size=1, max_size=30),
    scores=st.dictionaries(st.tuples(small, small), st.integers(1, 127), max_size=9),
    capacity=st.integers(1, 12),
    rate_bits=st.integers(0, 7),
    number=st.integers(0, 1000),
)
def test_equals_the_oracle_from_any_state(pairs, scores, capacity, rate_bits, number):
    scores = dict(itertools.islice(scores.items(), capacity))
    sources, targets, marks = as_lists(scores, capacity)
    edges = vector(sources), vector(targets), torch.tensor(marks, dtype=torch.int8)
    random = words(capacity + len(pairs), number)
    merge(edges, pairs, random, rate_bits)
    assert lists(edges) == as_lists(literal_merge(scores, pairs, random, rate_bits, capacity), capacity)


def test_the_largest_nodes_and_many_pairs_stay_exact():
    big = UNUSED - 1
    edges, scores = empty(3), {}
    pairs = [(big, big)] * 3000 + [(big, 0)] * 997 + [(0, big)]
    for step in range(3):
        random = words(3 + len(pairs), step)
        merge(edges, pairs, random, 1)
        scores = literal_merge(scores, pairs, random, 1, 3)
        assert lists(edges) == as_lists(scores, 3)
    assert edges[0].tolist() == [0, big, big]


def test_scores_settle_at_the_frequencies():
    edges = empty(8)
    pairs = [(1, 2)] * 3 + [(1, 3)] * 1 + [(4, 5)]
    sums = Counter()
    for step in range(2000):
        merge(edges, pairs, words(8 + len(pairs), step))
        for source, target, score in zip(*lists(edges), strict=True):
            sums[source, target] += score * (step >= 100)
    # An average over 1900 steps whose memory is 31 steps: 60 independent values of a spread of about 3.
    assert abs(sums[1, 2] / 1900 - 0.75 * 127) < 2
    assert abs(sums[1, 3] / 1900 - 0.25 * 127) < 2
    assert edges[2][edges[0] == 4].tolist() == [127]


def test_the_step_is_unbiased_over_all_random_numbers():
    # 127 / 3 in the batch, from 10: the step is (127 / 3 - 10) / 16 = 2.0208..., so 10 becomes 12 or 13.
    counts = Counter()
    for number in range(0, 65536, 64):
        edges = vector([5]), vector([6]), torch.tensor([10], dtype=torch.int8)
        merge(edges, [(5, 6), (5, 7), (5, 7)], [number] * 4)
        counts[int(edges[2][0]) if edges[1][0] == 6 else None] += 1
    assert set(counts) == {12, 13}
    assert counts[13] == round(1024 * (97 / 48 - 2))


def test_a_step_downwards_is_rounded_downwards_to_its_fraction():
    # (127 * 1 - 127 * 3) / (3 * 16) * 2^16 = -346794.67 is -346795; with a number of 19114, -327681 / 2^16.
    for number, score in ((19114, 127 - 6), (19115, 127 - 5)):
        edges = vector([5]), vector([6]), torch.tensor([127], dtype=torch.int8)
        merge(edges, [(5, 6), (5, 7), (5, 7)], [number] * 4)
        assert lists(edges) == ([5], [6], [score])


def test_edges_of_nodes_that_do_not_occur_keep_their_scores():
    edges = vector([1, 1, 8]), vector([2, 3, 1]), torch.tensor([90, 1, 30], dtype=torch.int8)
    merge(edges, [(8, 1)], words(4))
    assert lists(edges)[:2] == ([1, 1, 8], [2, 3, 1])
    assert edges[2][:2].tolist() == [90, 1]
    assert edges[2][2] > 30


def test_an_edge_that_is_not_taken_decays_and_goes():
    edges = vector([1, UNUSED]), vector([2, 0]), torch.tensor([2, 0], dtype=torch.int8)
    merge(edges, [(1, 3)], [0, 0, 0], rate_bits=0)
    assert lists(edges) == ([1, UNUSED], [3, 0], [MAX_SCORE, 0])


def test_of_equal_scores_the_larger_key_goes():
    edges = empty(2)
    merge(edges, [(3, 1), (2, 9), (2, 8), (3, 0)], [0] * 6, rate_bits=0)
    # Scores are floor(127 / 2) each.
    assert lists(edges) == ([2, 2], [8, 9], [63, 63])


def test_the_order_of_the_pairs_does_not_matter():
    pairs = transitions(80, 11, 3)
    first, second = empty(40), empty(40)
    merge(first, pairs, words(120))
    merge(second, pairs[::-1], words(120))
    assert lists(first) == lists(second)


def test_nothing_changes_unless_ok():
    edges = empty(20)
    merge(edges, transitions(50, 6, 0), words(70))
    before = lists(edges)
    merge(edges, transitions(50, 6, 1), words(70, 1), ok=torch.tensor(False))
    assert lists(edges) == before
    merge(edges, transitions(50, 6, 1), words(70, 1))
    assert lists(edges) != before


def test_without_pairs_the_list_stays():
    edges = empty(20)
    merge(edges, transitions(50, 6, 0), words(70))
    before = lists(edges)
    merge(edges, [], words(20, 1))
    assert lists(edges) == before


@pytest.mark.parametrize("count", [1, 3, 8, 50])
def test_look_up_gives_the_best_edges_of_each_node(count):
    edges, scores = empty(25), {}
    for step in range(6):
        pairs, random = transitions(60, 9, step), words(85, step)
        merge(edges, pairs, random)
        scores = literal_merge(scores, pairs, random, 4, 25)
    ids = torch.tensor([[0, 1, 2, 3], [8, 7, 100, 0]])
    targets, found = edge_list_look_up(*edges, ids, count)
    assert targets.dtype == torch.int64
    assert found.dtype == torch.int8
    for node, target, score in zip(
        ids.flatten().tolist(), targets.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True
    ):
        mine = sorted((-s, edge[1]) for edge, s in scores.items() if edge[0] == node)[:count]
        rest = [0] * (count - len(mine))
        assert target == [t for _, t in mine] + rest
        assert score == [-s for s, _ in mine] + rest
    assert int((found > 0).sum()) > 0


def test_look_up_in_an_empty_and_in_a_full_list():
    targets, found = edge_list_look_up(*empty(3), torch.tensor([0, 5, UNUSED - 1]), 2)
    assert not targets.any()
    assert not found.any()
    edges = vector([4, 4, 9]), vector([1, 2, 4]), torch.tensor([7, 6, 5], dtype=torch.int8)
    targets, found = edge_list_look_up(*edges, torch.tensor([9, 4, 10]), 2)
    assert targets.tolist() == [[4, 0], [1, 2], [0, 0]]
    assert found.tolist() == [[5, 0], [7, 6], [0, 0]]
    assert edge_list_look_up(*edges, torch.empty(0, 3, dtype=torch.int64), 2)[0].shape == (0, 3, 2)


def test_wrong_arguments_are_refused():
    edges = empty(3)
    pairs = vector([1, 2]), vector([2, 3])
    with pytest.raises(ValueError, match=r"bits must be vectors of length 5"):
        edge_list_merge(*edges, *pairs, vector([0] * 4), 4, TRUE)
    with pytest.raises(ValueError, match=r"torch.int64 \[2\]"):
        edge_list_merge(*edges, pairs[0], pairs[1].long(), vector([0] * 5), 4, TRUE)
    with pytest.raises(ValueError, match="src, dst and score"):
        edge_list_look_up(*edges[:2], edges[2].int(), torch.tensor([1]), 2)


def test_opcheck():
    edges = vector([4, 9, UNUSED]), vector([1, 4, 0]), torch.tensor([7, 5, 0], dtype=torch.int8)
    arguments = (*edges, vector([4, 4]), vector([1, 2]), vector([0] * 5), 4, TRUE)
    torch.library.opcheck(torch.ops.arbitor.edge_list_merge, arguments)
    torch.library.opcheck(torch.ops.arbitor.edge_list_look_up, (*edges, torch.tensor([[4, 1]]), 2))
