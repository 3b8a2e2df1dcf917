"""Experts: forward and gradients against single matrices, captures, and steps of those with tokens."""

import pytest
import torch
from torch.nn import functional as F

from arbitor.ops.backend import has_triton
from arbitor.ternary import TernaryExperts, TernaryLinear, VoteOptimizer
from arbitor.ternary import step as step_module
from testing.small_net import each_rule, each_state

EXPERTS, IN, OUT = 5, 34, 21
OFFSETS = [4, 4, 11, 12, 20]  # expert 1 has no rows


def experts(seed=0, **options):
    torch.manual_seed(seed)
    return TernaryExperts(EXPERTS, IN, OUT, **options)


def single(layer, expert):
    """The matrix of one expert as a linear of its own."""
    linear = TernaryLinear(IN, OUT, tscale=layer.tscale, input_norm=layer.input_norm)
    linear.load_state_dict({"T_packed": layer.T_packed[expert], "E": layer.E[expert]})
    return linear


def rows(seed=0, count=OFFSETS[-1]):
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(seed))


def offsets(values=OFFSETS):
    return torch.tensor(values, dtype=torch.int32)


def parts(tensor, ends=OFFSETS):
    return [tensor[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


@pytest.mark.parametrize("tscale", ["ROW", "T32", "T6"])
@pytest.mark.parametrize("input_norm", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_every_expert_acts_on_its_rows_as_a_linear_of_its_own(tscale, input_norm, quantize):
    layer = experts(tscale=tscale, input_norm=input_norm)
    layer.E.copy_(torch.randint(-5, 0, layer.E.shape, generator=torch.Generator().manual_seed(1)))
    x = rows()
    y = layer(x, offsets(), quantize)
    expected = [single(layer, e)(part, quantize) for e, part in enumerate(parts(x))]
    if quantize:  # sums of integers: exact in whatever order
        assert torch.equal(y, torch.cat(expected))
    else:
        torch.testing.assert_close(y, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workspace", [1, 16 * IN * 4 * EXPERTS, 1 << 26])
def test_slices_of_output_rows_change_nothing(workspace, monkeypatch):
    from arbitor.ops.expert_linear import reference

    layer = TernaryExperts(EXPERTS, IN, 70)
    x = rows().requires_grad_()
    whole = layer(x, offsets())
    (whole_dx,) = torch.autograd.grad(whole.sum(), x)
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", workspace)
    sliced = layer(x, offsets())
    (sliced_dx,) = torch.autograd.grad(sliced.sum(), x)
    assert torch.equal(sliced, whole)
    torch.testing.assert_close(sliced_dx, whole_dx, rtol=1e-5, atol=1e-6)


def test_decoded_weights_may_take_as_much_as_the_largest_of_rows():
    from arbitor.ops.expert_linear.reference import WORKSPACE_BYTES, slices

    narrow, wide = torch.empty(1 << 16, 8), torch.empty(1 << 16, 8192, device="meta")
    assert list(slices([narrow], 1024, 100, 16, 4)) == list(slices([narrow[:1]], 1024, 100, 16, 4))
    assert list(slices([narrow], 1024, 2 * WORKSPACE_BYTES // 1024 // 64, 16, 4)) == [(0, 256), (256, 512)]
    for beside in ([narrow, wide], [wide, narrow]):
        assert list(slices(beside, 1024, 4096, 16, 4)) == [(0, 4096)]


@pytest.mark.parametrize("ends", [[1, 1, 1, 1, 1], [0, 0, 0, 0, 2], [0, 1, 1, 3, 3], [0, 0, 0, 0, 0]])
def test_few_rows(ends):
    layer = experts()
    x = rows(count=ends[-1]).requires_grad_()
    y = layer(x, offsets(ends))
    expected = torch.cat([single(layer, e)(part) for e, part in enumerate(parts(x, ends))])
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_gradcheck_of_the_input():
    layer = experts(input_norm=True)
    x = rows().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, offsets(), False), x)


def test_input_gradient_equals_that_of_single_matrices():
    layer = experts()
    x, one_by_one = rows().requires_grad_(), rows().requires_grad_()
    weights = torch.randn(OFFSETS[-1], OUT, generator=torch.Generator().manual_seed(3))
    (layer(x, offsets()) * weights).sum().backward()
    outputs = [single(layer, e)(part) for e, part in enumerate(parts(one_by_one))]
    (torch.cat(outputs) * weights).sum().backward()
    torch.testing.assert_close(x.grad, one_by_one.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [offsets([4, 4, 11, 20]), offsets().long()])
def test_wrong_offsets_are_refused(bad):
    with pytest.raises(ValueError, match="int32 offsets"):
        experts()(rows(), bad)


def backward(layer, seed, ends):
    x = rows(seed, ends[-1])
    weights = torch.randn(ends[-1], OUT, generator=torch.Generator().manual_seed(seed + 100))
    (layer(x, offsets(ends)) * weights).sum().backward()


def gradient_oracle(layer, uses):
    """dW of every expert over all uses, from single matrices with captures of their own."""
    total = torch.zeros(EXPERTS, OUT, IN)
    for seed, ends in uses:
        x = rows(seed, ends[-1])
        weights = torch.randn(ends[-1], OUT, generator=torch.Generator().manual_seed(seed + 100))
        for expert, (x_part, w_part) in enumerate(zip(parts(x, ends), parts(weights, ends), strict=True)):
            linear = single(layer, expert)
            VoteOptimizer(linear)
            if len(x_part):
                (linear(x_part) * w_part).sum().backward()
                total[expert] += linear.capture.gradient()
    return total


def form(activations, gradients, ends):
    """dW [E, O, I] from rows sorted by expert."""
    pairs = zip(parts(activations, ends), parts(gradients, ends), strict=True)
    return torch.stack([b.t() @ a.float() for a, b in pairs])


USES = [(0, OFFSETS), (1, [0, 3, 3, 9, 9]), (2, [7, 7, 7, 7, 8])]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_captured_gradients_add_up_over_uses(count):
    layer = experts()
    optimizer = VoteOptimizer(layer)
    for seed, ends in USES[:count]:
        backward(layer, seed, ends)
    assert layer.capture.dense is None, "so few rows are kept as pairs"
    activations, gradients, ends = layer.capture.sorted_rows()
    formed = form(activations, gradients, ends.tolist())
    expected = gradient_oracle(layer, USES[:count])
    torch.testing.assert_close(formed, expected, rtol=1e-5, atol=1e-5)
    for repeat in range(30):
        backward(layer, repeat + 50, OFFSETS)
    expected += gradient_oracle(layer, [(repeat + 50, OFFSETS) for repeat in range(30)])
    assert layer.capture.dense is not None, "many rows are folded into dW"
    torch.testing.assert_close(layer.capture.dense, expected, rtol=1e-4, atol=1e-4)
    optimizer.zero_grad()
    assert layer.capture.empty


def step_with(layer, optimizer, gradient, form):
    """A step from this gradient [E, O, I], given dense or as rows."""
    if form == "dense":
        layer.capture.add_dense(gradient.clone())
    else:
        # Rows of the identity as activations make dW = B^T for every expert.
        used = [bool(g.any()) for g in gradient]
        counts = torch.tensor([IN if u else 0 for u in used])
        a = torch.cat([torch.eye(IN) for u in used if u])
        b = torch.cat([g.t() for g, u in zip(gradient, used, strict=True) if u])
        layer.capture._pairs.append((a, b, counts.cumsum(0).to(torch.int32)))
    optimizer.step()


@each_state
@each_rule
@pytest.mark.parametrize("form", ["dense", "rows"])
@pytest.mark.parametrize("workspace", [1, 1 << 20])
def test_a_step_moves_every_expert_as_a_matrix_of_its_own(state, rule, form, workspace, monkeypatch):
    layer = experts()
    optimizer = VoteOptimizer(layer, state=state, rule=rule, lr=0.3, seed=5)
    monkeypatch.setattr(step_module.Step, "_batch_size", lambda *_: workspace)
    gradients = torch.randn(3, EXPERTS, OUT, IN, generator=torch.Generator().manual_seed(2))
    gradients[:, 1] = 0
    gradients[1, 4] = 0
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    flat = TernaryLinear(IN, EXPERTS * OUT)
    flat.load_state_dict({k: v.flatten(0, 1) for k, v in before.items()})
    state_before = {k: t.clone() for k, t in optimizer.named_state().items()}
    for gradient in gradients:
        step_with(layer, optimizer, gradient, form)
    assert torch.equal(layer.T_packed[1], before["T_packed"][1]), "no tokens, no move"
    for key, tensor in optimizer.named_state().items():
        assert torch.equal(tensor[1], state_before[key][1]), f"{key} of an expert without tokens"
    for expert in (0, 2, 3, 4):
        assert not torch.equal(layer.T_packed[expert], before["T_packed"][expert])

    # One matrix after the other by the oracle: the element's number in the whole tensor chooses its bits.
    from arbitor.ops.momentum import momentum_fold
    from arbitor.ops.random_bits import random_bits, stream_keys
    from arbitor.ops.state_update import state_update
    from arbitor.ternary.rules import get_rule

    packed = before["T_packed"].clone()
    kept = {k.lstrip("."): t.clone() for k, t in state_before.items()}
    for number, gradient in enumerate(gradients):
        keys = torch.tensor([stream_keys(5, number, 0)], dtype=torch.int32)
        bits = random_bits(keys, layer.numel()).view(EXPERTS, OUT, IN)
        for e in range(EXPERTS):
            if not gradient[e].any():
                continue
            on = torch.ones(1, 1, dtype=torch.bool)
            direction = gradient[e]
            if "M" in kept:
                direction = momentum_fold(
                    direction, kept["M"][e], kept["M_exp"][e], bits[e], on, *momentum_of(optimizer)
                )
            direction = get_rule(rule)(direction)
            step = 1.0 if rule == "sign" else 0.3 * optimizer.span
            state_update(
                packed[e], kept["T_accum"][e], direction, bits[e], on, step,
                optimizer.span, optimizer.accum_threshold, optimizer.rail, rule == "sign",
            )  # fmt: skip
    if rule == "spectral":  # batched products may round differently; only the last bits of votes differ
        different = (optimizer.named_state()[".T_accum"] != kept["T_accum"]).float().mean()
        assert different < 0.01
    else:
        assert torch.equal(layer.T_packed, packed)
        assert torch.equal(optimizer.named_state()[".T_accum"], kept["T_accum"])


def momentum_of(optimizer):
    return optimizer.kind.momentum_bits, optimizer.kind.beta, 0.95


@pytest.mark.long
@pytest.mark.parametrize("rule", ["spectral", "row"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("ends", [[2, 2, 5, 6, 8], [11, 11, 30, 30, 40]], ids=["few", "more"])
def test_few_tokens_vote_like_the_gradient_that_is_formed(rule, backend, ends, monkeypatch):
    # With few tokens lean state votes by two thin factors; the direction is the same up to rounding.
    if backend == "triton" and not has_triton():
        pytest.skip("needs Triton, which the extra `test` installs on Linux")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
    results = []
    for formed in (False, True):
        layer = experts()
        optimizer = VoteOptimizer(layer, state="lean", rule=rule, seed=3)
        before = optimizer.named_state()[".T_accum"].clone()
        for seed in range(3 if backend == "torch" else 1):
            backward(layer, seed, ends)
            a, b, _ = layer.capture.sorted_rows()
            layer.capture.clear()
            if formed:
                layer.capture.add_dense(form(a, b, ends))
            else:  # behind the last expert's, rows that belong to none
                a, b = (torch.cat([t, torch.full_like(t[:3], 7)]) for t in (a, b))
                layer.capture._pairs.append((a, b, offsets(ends)))
            optimizer.step()
        results.append(optimizer.named_state()[".T_accum"].int())
        assert torch.equal(results[-1][1], before[1].int()), "no tokens, no votes"
    difference = (results[0] - results[1]).abs()
    assert (results[0] != 0).float().mean() > 0.5
    assert (difference > 0).float().mean() < 0.02, "votes differ only where rounding did"


@pytest.mark.parametrize("rule", ["spectral", "row"])
def test_kernels_form_no_gradient_of_few_tokens(rule, monkeypatch):
    if not has_triton():
        pytest.skip("needs Triton, which the extra `test` installs on Linux")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    monkeypatch.setattr(step_module, "update_dense", None)
    layer = experts()
    optimizer = VoteOptimizer(layer, state="lean", rule=rule)
    monkeypatch.setattr(step_module.Step, "_batch_size", lambda *_: 1)  # no workspace holds two experts
    backward(layer, 0, [2, 2, 5, 6, 11])
    optimizer.step()
    assert optimizer.named_state()[".T_accum"].any()
    assert optimizer.last_step_applied


def test_a_dropped_step_keeps_every_bit():
    layer = experts()
    optimizer = VoteOptimizer(layer)
    before = {**layer.state_dict(), **optimizer.named_state()}
    before = {key: t.clone() for key, t in before.items()}
    backward(layer, 0, OFFSETS)
    optimizer.note_loss(torch.tensor(float("nan")))
    optimizer.step()
    assert optimizer.dropped_steps == 1
    after = {**layer.state_dict(), **optimizer.named_state()}
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


def test_experts_learn():
    torch.manual_seed(0)
    layer = TernaryExperts(2, 32, 16, input_norm=True)
    optimizer = VoteOptimizer(layer, lr=0.05)
    targets = torch.randn(2, 16, 32) / 32**0.5
    losses = []
    for step in range(60):
        x = torch.randn(128, 32, generator=torch.Generator().manual_seed(step))
        x = F.rms_norm(x, (32,))
        expected = torch.cat([x[:50] @ targets[0].t(), x[50:] @ targets[1].t()])
        loss = (layer(x, torch.tensor([50, 128], dtype=torch.int32)) - expected).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_opcheck():
    layer, x, dy = experts(), rows(), torch.randn(OFFSETS[-1], OUT)
    arguments = (x, offsets(), layer.T_packed, layer.E, layer.group, True, True, torch.bfloat16, True)
    torch.library.opcheck(torch.ops.arbitor.expert_linear, arguments)
    rstd = torch.ops.arbitor.expert_linear(*arguments)[3]
    backward = (dy, x, rstd, offsets(), layer.T_packed, layer.E, layer.group, True, True)
    torch.library.opcheck(torch.ops.arbitor.expert_linear_backward, backward)
