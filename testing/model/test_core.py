"""The iterated core against adaptive computation time written out for one position after the other."""

import pytest
import torch
from torch import nn

from arbitor.config import ModelConfig
from arbitor.model.core import MoEGraph, StateDecay
from arbitor.ternary import TernaryExperts, TernaryLinear, VoteOptimizer, named_ternary
from testing.model import core_oracles as oracles

DIM, CODE_DIM, TRITS = 24, 5, 3
CODES = torch.randint(-1, 2, (3**TRITS, CODE_DIM), generator=torch.Generator().manual_seed(5)).float()
PARTS = {
    "experts": {"num_experts": 6},
    "graph": {"graph_edges": 60},
    "both": {"num_experts": 6, "graph_edges": 60},
}

each_part = pytest.mark.parametrize("part", PARTS)


def code_vectors(ids):
    return CODES[ids]


def make(part="experts", seed=0, **overrides):
    torch.manual_seed(seed)
    settings = {"dim": DIM, "motif_trits": TRITS, "expert_dim": 20, "graph_neighbours": 3, "graph_heads": 2}
    core = MoEGraph(ModelConfig(**{**settings, **PARTS[part], **overrides}), CODE_DIM)
    if core.graph is not None:  # edges from every other motif to three others
        src = torch.arange(0, 27, 2).repeat_interleave(3)
        count = len(src)
        core.graph.src[:count] = src
        core.graph.dst[:count] = (src * 5 + torch.arange(count) % 3) % 27
        core.graph.score[:count] = 90 - 30 * (torch.arange(count, dtype=torch.int8) % 3)
        core.graph.check()
    if core.max_iters > 1:
        core.decay.q.copy_(torch.randint(-95, 96, core.decay.q.shape))
    return core


def stream(batch=3, count=7, seed=1, dtype=torch.float32):
    """A residual stream [B, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, DIM, generator=generator, dtype=torch.float64).to(dtype)


def motifs(batch=3, count=7):
    return torch.randint(0, 27, (batch, count), generator=torch.Generator().manual_seed(2))


def bias_to(core, value):
    core.halting.bias.q.fill_(round(value * 32))


def rows_seen(core):
    """Numbers of rows that the experts are called with, filled in as calls come."""
    rows = []
    core.moe.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    return rows


# -- against the oracle -------------------------------------------------------------------------------------

CASES = [  # bias, threshold, most iterations
    (0.0, 0.99, 4),
    (1.0, 0.99, 4),
    (-1.5, 0.6, 7),
    (-0.5, 1.0, 3),
    (2.5, 0.9, 4),
    (-2.9, 0.99, 2),
]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("bias", "threshold", "iters"), CASES)
def test_equals_the_oracle_with_every_gradient(unrounded, bias, threshold, iters, masks):
    core = unrounded(make(max_moe_iters=iters, halt_threshold=threshold))
    core.masks = masks
    bias_to(core, bias)
    VoteOptimizer(core)
    h = stream(dtype=torch.float64).requires_grad_()
    weights = oracles.dense_weights(core)
    experts = {name.removeprefix("moe."): w for name, w in weights.items() if name.startswith("moe.")}
    # The vectors' values and what is made of the decay are fp32, so their gradients are exact to fp32 only.
    value = (core.decay.q.float() / 32).requires_grad_()
    halt_bias = (core.halting.bias.q.float() / 32).requires_grad_()
    decay = (
        1 - torch.exp2(-(3 + value))
    ).double()  # the same function: powers differ by a last bit on some CPUs
    results, counts, ponders = [], [], []
    for row in h.flatten(0, 1):
        result, count, remainder = oracles.halt(
            lambda s: s + oracles.moe(experts, [0] * 6, 2, s),
            lambda s: torch.sigmoid(
                oracles.linear(weights["halting.linear"], s)[0] / 2 + halt_bias[0].double()
            ),
            decay,
            row,
            iters,
            threshold,
        )
        results.append(result)
        counts.append(count)
        ponders.append(count + remainder)
    expected, ponder = torch.stack(results).view_as(h), torch.stack(ponders).mean()
    dy = stream(seed=3, dtype=torch.float64)
    leaves = {**weights, "decay": value, "halting.bias": halt_bias}
    gradients = torch.autograd.grad(
        (expected * dy).sum() + 5 * ponder, [h, *leaves.values()], allow_unused=True
    )
    rows = rows_seen(core)
    output = core(h)
    assert rows == ([21] * iters if masks else [sum(c > n for c in counts) for n in range(max(counts))])
    assert output.metrics["mean_iterations"] == pytest.approx(sum(counts) / len(counts), rel=1e-6)
    assert output.ponder.dtype == torch.float32
    assert output.ponder.item() == pytest.approx(ponder.item(), rel=1e-6)
    torch.testing.assert_close(output.state, expected, rtol=1e-12, atol=1e-12)
    ((output.state * dy).sum() + 5 * output.ponder).backward()
    # Through the ponder cost, which is fp32, come gradients that are exact to fp32.
    torch.testing.assert_close(h.grad, gradients[0], rtol=1e-6, atol=1e-6)
    for name, gradient in zip(leaves, gradients[1:], strict=True):
        capture = core.get_submodule(name).capture
        if gradient is None or not gradient.any():
            assert capture.empty or not captured(capture).any(), name
            continue
        torch.testing.assert_close(
            captured(capture).view_as(gradient).to(gradient.dtype), gradient, rtol=1e-5, atol=1e-5
        )


@each_part
@pytest.mark.parametrize("bias", [-0.5, 0.0, 1.0])
def test_masked_rows_are_as_if_they_were_left_out(part, bias):
    """To the last bit in the forward and in what experts are balanced by, up to rounding in gradients."""
    results = []
    for masks in (False, True):
        core = make(part)
        core.masks = masks
        bias_to(core, bias)
        optimizer = VoteOptimizer(core, lr=0.01)
        h = stream().requires_grad_()
        output = core(h, motifs(), code_vectors)
        ((output.state * stream(seed=3)).sum() + output.ponder).backward()
        modules = {n: m for n, m in named_ternary(core) if not m.capture.empty}
        gradients = {n: captured(m.capture).clone() for n, m in modules.items()}
        optimizer.step()
        assert optimizer.last_step_applied
        results.append((output, h.grad, gradients, core.state_dict()))
    (left, left_dh, left_gradients, left_state), (masked, masked_dh, gradients, state) = results
    assert torch.equal(masked.state, left.state)
    assert left.metrics.keys() == masked.metrics.keys()
    assert all(
        float(masked.metrics[k]) == pytest.approx(float(left.metrics[k]), rel=1e-6) for k in left.metrics
    )
    assert 1 < float(masked.metrics["mean_iterations"]) < 4
    assert masked.ponder.item() == pytest.approx(left.ponder.item(), rel=1e-6)
    torch.testing.assert_close(masked_dh, left_dh, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == left_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, left_gradients[name], rtol=1e-4, atol=1e-5)
    same = [name for name in state if torch.equal(state[name], left_state[name])]
    assert {name for name in state if name.endswith(("balance.bias", "graph.score"))} <= set(same)


@each_part
@pytest.mark.parametrize("masks", [True, False])
def test_products_are_of_rows_that_go_on(part, masks, monkeypatch):
    """Whether those that have halted are left out or stand behind; none of them has a gradient there."""
    core = make(part)
    core.masks = masks
    bias_to(core, 0.0)
    VoteOptimizer(core)
    seen = {}

    def note(name):
        def hook(_, args, options, y):
            # Of the experts, the first rows are the uses of those that go on.
            count = options.get("count", args[1][-1:] if len(args) > 1 else None)
            count = len(y) if count is None else int(count)
            assert not y[count:].any()
            y.register_hook(lambda dy: seen.setdefault(name, []).append((count, bool(dy[count:].any()))))

        return hook

    for name, module in core.named_modules():
        if isinstance(module, TernaryLinear | TernaryExperts):
            module.register_forward_hook(note(name), with_kwargs=True)
    output = core(stream().requires_grad_(), motifs(), code_vectors)
    (output.state.sum() + output.ponder).backward()
    left = []
    monkeypatch.setattr(core, "masks", False)
    monkeypatch.setattr(core, "_halt", noting_rows(core._halt, left))
    core(stream(), motifs(), code_vectors)
    assert len(set(left)) > 2, "some go on longer than others"
    assert {"graph": "graph.out", "experts": "moe.down", "both": "moe.shared.up"}[part] in seen
    for name, uses in seen.items():
        rows = left[:-1] if name == "halting.linear" and len(left) == core.max_iters else left
        each = 2 if name in ("moe.up", "moe.down") else 1
        assert sorted(uses, reverse=True) == [(each * count, False) for count in rows], name


def noting_rows(halt, rows):
    def halt_and_note(s, *args, **options):
        rows.append(len(s))
        return halt(s, *args, **options)

    return halt_and_note


def captured(capture):
    if not hasattr(capture, "sorted_rows"):
        return capture.gradient()
    if capture.dense is not None:
        return capture.dense
    activations, gradients, ends = capture.sorted_rows()
    inner = ends.tolist()[:-1]
    parts = zip(activations.tensor_split(inner), gradients.tensor_split(inner), strict=True)
    return torch.stack([g.t() @ a.to(g.dtype) for a, g in parts])


def test_the_cases_halt_at_every_iteration(unrounded):
    """Or the comparison with the oracle would say little."""
    seen = set()
    for bias, threshold, iters in CASES:
        core = unrounded(make(max_moe_iters=iters, halt_threshold=threshold))
        bias_to(core, bias)
        rows = [*rows_seen_in(core, stream(dtype=torch.float64)), 0]
        seen |= {(n, iters) for n in range(1, len(rows)) if rows[n] < rows[n - 1]}
    assert {(1, 4), (2, 4), (3, 4), (4, 4), (5, 7), (7, 7), (2, 2), (3, 3)} <= seen


def rows_seen_in(core, h):
    rows = rows_seen(core)
    core(h)
    return rows


# -- what is done and what is left out ----------------------------------------------------------------------


@each_part
def test_one_iteration_needs_no_halting_and_no_decay(part):
    core = make(part, max_moe_iters=1)
    h, ids = stream(), motifs()
    output = core(h, ids, code_vectors)
    s = h.flatten(0, 1)
    if core.moe is not None:
        s = s + core.moe(s)[0]
    if core.graph is not None:
        s = s + core.graph.messages(s, core.graph.look_up(ids, code_vectors))
    assert torch.equal(output.state, s.view_as(h))
    assert output.ponder is None
    assert float(output.metrics["mean_iterations"]) == 1
    assert not any(name.startswith(("halting", "decay")) for name in core.state_dict())


def test_the_most_iterations_may_be_lowered_later():
    core = make(max_moe_iters=4)
    one = make(max_moe_iters=1)
    one.load_state_dict({k: v for k, v in core.state_dict().items() if k.startswith("moe.")})
    core.max_iters = 1
    assert torch.equal(core(stream()).state, one(stream()).state)


@pytest.mark.parametrize(("bias", "expected"), [(2.9, [21]), (-2.9, [21] * 4)])
def test_work_stops_when_all_have_halted(bias, expected):
    core = make(halt_threshold=0.9)
    core.halting.linear.set_trits(torch.zeros_like(core.halting.linear.trits()), core.halting.linear.E)
    bias_to(core, bias)
    rows = rows_seen(core)
    output = core(stream())
    assert rows == expected
    assert float(output.metrics["mean_iterations"]) == len(expected)


def test_equal_probabilities_halt_where_their_sum_reaches_the_threshold():
    for threshold, iterations in ((0.5, 1), (0.50001, 2), (1.0, 2)):
        core = make(halt_threshold=threshold)
        core.halting.linear.set_trits(torch.zeros_like(core.halting.linear.trits()), core.halting.linear.E)
        bias_to(core, 0.0)  # p = 1/2
        output = core(stream())
        assert float(output.metrics["mean_iterations"]) == iterations
        assert float(output.ponder) == iterations + (1.0 if iterations == 1 else 0.5)


@each_part
def test_a_position_does_not_depend_on_the_others(part):
    core = make(part)
    bias_to(core, 0.0)
    h, ids = stream(), motifs()
    rows = [] if core.moe is None else rows_seen(core)
    whole = core(h, ids, code_vectors).state
    assert len(set(rows)) > 1 or core.moe is None, "some halt before others"
    for b in range(3):
        for n in range(7):
            alone = core(h[b : b + 1, n : n + 1], ids[b : b + 1, n : n + 1], code_vectors).state
            assert torch.equal(alone[0, 0], whole[b, n])
    part_of_it = core(h[1:, 2:6], ids[1:, 2:6], code_vectors).state
    assert torch.equal(part_of_it, whole[1:, 2:6])


def test_the_injection_pulls_the_state_back_to_the_input():
    """With an update of zero the state is h in every iteration, and the weights of the states sum to 1."""
    core = make()

    class Nothing(nn.Module):
        def forward(self, s):
            return torch.zeros_like(s), torch.ones(6, dtype=torch.int32)

    core.moe = Nothing()
    h = stream()
    torch.testing.assert_close(core(h).state, h, rtol=8 * 2**-23, atol=0)


def test_the_decay_is_stable_for_all_integers():
    decay = StateDecay(191)
    decay.q.copy_(torch.arange(-95, 96))
    a = decay().double()
    expected = 1 - 2.0 ** -(3 + torch.arange(-95, 96, dtype=torch.float64) / 32)
    torch.testing.assert_close(a, expected, rtol=0, atol=4 * 2**-24)
    assert float(a.min()) > 0
    assert float(a.max()) < 1
    assert (a.diff() > 0).all()
    assert float(StateDecay(1)()) == 0.875


@pytest.mark.parametrize("seed", range(4))
def test_about_two_iterations_at_the_beginning(seed):
    core = make(seed=seed, dim=160)
    core.decay.q.zero_()
    h = torch.randn(4, 64, 160, generator=torch.Generator().manual_seed(seed))
    assert 1.9 < float(core(h).metrics["mean_iterations"]) < 2.5


def test_metrics_name_the_load_of_all_iterations():
    core = make("both")
    loads = []
    core.moe.register_forward_hook(lambda _, __, output: loads.append(output[1]))
    metrics = core(stream(), motifs(), code_vectors).metrics
    assert sorted(metrics) == ["expert_load", "graph_edges", "graph_reach", "mean_iterations"]
    total = sum(loads)
    assert len(loads) > 1
    assert float(metrics["expert_load"]) == pytest.approx(float(total.max()) * 6 / float(total.sum()))
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


# -- training -----------------------------------------------------------------------------------------------


def test_all_uses_are_noted_and_vote_once():
    core = make()
    optimizer = VoteOptimizer(core)
    rows = rows_seen(core)
    output = core(stream().requires_grad_())
    assert len(core.moe.router.balance._noted) == len(rows) > 1
    (output.state.sum() + output.ponder).backward()
    load = sum(core.moe.router.balance._noted).tolist()
    assert sum(load) == 2 * sum(rows)
    optimizer.step()
    mean = sum(load) / 6
    assert core.moe.router.balance.bias.tolist() == [(mean > n) - (mean < n) for n in load]
    moved = optimizer.named_state()
    assert all(moved[f"{name}.M"].any() for name in ("moe.up", "moe.shared.down", "decay", "halting.bias"))


@each_part
def test_repeats_bit_for_bit_under_deterministic_algorithms(part):
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            core = make(part)
            optimizer = VoteOptimizer(core)
            h = stream().requires_grad_()
            output = core(h, motifs(), code_vectors)
            (output.state.square().sum() + output.ponder).backward()
            optimizer.step()
            results.append([output.state.detach(), h.grad, *core.state_dict().values()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_ponder_cost_alone_makes_positions_halt_earlier():
    core = make()
    bias_to(core, -1.0)
    optimizer = VoteOptimizer(core, lr=0.02)
    h = stream(4, 20)
    iterations = []
    for _ in range(30):
        output = core(h)
        output.ponder.backward()
        optimizer.step()
        iterations.append(float(output.metrics["mean_iterations"]))
    assert iterations[0] > 3
    assert iterations[-1] <= 2


# -- a feed-forward part in place of experts -----------------------------------------------------------------


def test_a_feed_forward_part_stands_in_for_the_experts():
    core = make("graph", graph_edges=0, core_ffn_dim=16, max_moe_iters=1)
    assert core.moe is None
    h = stream()
    output = core(h)
    assert torch.equal(output.state, h + core.ffn(h))
    assert set(output.metrics) == {"mean_iterations"}


def test_a_feed_forward_part_is_iterated_like_experts():
    core = make("graph", graph_edges=0, core_ffn_dim=16, max_moe_iters=3, halt_threshold=1.0)
    bias_to(core, -2.9)
    rows = []
    core.ffn.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    assert core(stream(batch=2, count=5)).metrics["mean_iterations"] == 3
    assert rows == [10, 10, 10]
