"""The entry points of the earlier system, on a model that knows nothing of it."""

import copy
import gc
import warnings
import weakref

import pytest
import torch

from arbitor.errors import UserError
from arbitor.ternary import TernaryLinear, VoteOptimizer
from arbitor.ternary.runtime import (
    attached_optimizer,
    configure_ternary_training,
    prepare_ternary_backward,
    ternary_update_memory,
)
from testing.small_net import SmallNet, backward, batch, changed, loss_of, make, snapshot


def fresh():
    torch.manual_seed(0)
    return SmallNet()


def test_prepare_attaches_a_lean_optimizer_once():
    net = fresh()
    assert attached_optimizer(net) is None
    optimizer = prepare_ternary_backward(net)
    assert optimizer.state_name == "lean"
    assert attached_optimizer(net) is optimizer
    assert prepare_ternary_backward(net) is optimizer


def test_prepare_keeps_the_optimizer_that_is_there():
    net, optimizer = make(state="full")
    assert prepare_ternary_backward(net) is optimizer


def test_the_attached_optimizer_stays_alive_and_is_no_part_of_the_model():
    net = fresh()
    prepare_ternary_backward(net)
    gc.collect()
    assert attached_optimizer(net) is not None
    assert set(net.state_dict()) == set(fresh().state_dict())


def test_an_update_takes_the_step_that_an_optimizer_would():
    net, optimizer = make(state="lean")
    other = fresh()
    prepare_ternary_backward(other)
    for seed in range(3):
        loss = backward(net, batch(seed))
        optimizer.note_loss(loss)
        optimizer.step()
        prepare_ternary_backward(other)
        loss = backward(other, batch(seed))
        assert ternary_update_memory(other, loss) is True
    assert changed(snapshot(net, optimizer), snapshot(other, attached_optimizer(other))) == []


@pytest.mark.parametrize("form", ["signal", "components", "signal without a graph beside components"])
def test_without_captures_a_loss_with_a_graph_runs_backward_first(form):
    net, optimizer = make()
    backward(net)
    optimizer.step()
    expected = snapshot(net, optimizer)

    net, optimizer = make()
    loss = loss_of(net, batch())
    if form == "signal":
        assert ternary_update_memory(net, loss)
    elif form == "components":
        assert ternary_update_memory(net, loss_components={"half": loss / 2, "rest": loss / 2})
    else:
        assert ternary_update_memory(net, loss.detach(), {"half": loss / 2, "rest": loss / 2})
    assert changed(expected, snapshot(net, optimizer)) == []


def test_with_captures_the_loss_is_not_run_backward_again():
    net, optimizer = make()
    loss = loss_of(net, batch())
    loss.backward(retain_graph=True)
    assert ternary_update_memory(net, loss)
    after_one = snapshot(net, optimizer)
    net, optimizer = make()
    backward(net)
    optimizer.step()
    assert changed(after_one, snapshot(net, optimizer)) == []


@pytest.mark.parametrize("loss", [None, torch.tensor(1.0)])
def test_with_neither_nothing_changes(loss):
    net, optimizer = make()
    before = snapshot(net, optimizer)
    assert ternary_update_memory(net, loss) is False
    assert optimizer.step_count == 0
    assert changed(before, snapshot(net, optimizer)) == []
    assert ternary_update_memory(fresh(), loss) is False


def test_a_loss_signal_that_is_not_finite_drops_the_step_and_only_that():
    net, optimizer = make()
    prepare_ternary_backward(net, torch.tensor(float("nan")))
    backward(net)
    before = snapshot(net, optimizer)
    assert ternary_update_memory(net)
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.dropped_steps == 1
    backward(net)
    ternary_update_memory(net)
    assert optimizer.dropped_steps == 1


def test_nothing_stale_survives_a_step_that_was_skipped():
    net, optimizer = make()
    prepare_ternary_backward(net, torch.tensor(float("nan")), update_scales=False)
    prepare_ternary_backward(net, torch.tensor(1.0))
    backward(net)
    assert ternary_update_memory(net)
    assert optimizer.dropped_steps == 0
    assert optimizer.update_scales is True


@pytest.mark.parametrize("form", ["no loss", "a value", "a graph without the model's weights"])
def test_an_update_that_takes_no_step_forgets_what_was_noted(form):
    losses = {"no loss": None, "a value": torch.tensor(1.0), "a graph without the model's weights": None}
    if form.startswith("a graph"):
        losses[form] = torch.ones(1, requires_grad=True).sum() * float("inf")
    net, optimizer = make()
    before = snapshot(net, optimizer)
    prepare_ternary_backward(net, torch.tensor(float("nan")), update_scales=False)
    assert ternary_update_memory(net, losses[form]) is False
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.step_count == 0
    assert optimizer.update_scales is True
    backward(net)
    optimizer.step()
    assert optimizer.last_step_applied


def test_a_backward_that_fails_leaves_nothing_for_the_next_step():
    net, optimizer = make()
    loss = loss_of(net, batch()) * float("nan")
    loss.backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        ternary_update_memory(net, loss, update_scales=False)
    backward(net)
    optimizer.step()
    assert optimizer.last_step_applied
    assert optimizer.update_scales is True


def test_micro_batches_that_are_each_prepared_add_up():
    net, optimizer = make()
    for seed in range(2):
        backward(net, batch(seed))
    optimizer.step()
    expected = snapshot(net, optimizer)
    net, optimizer = make()
    for seed in range(2):
        prepare_ternary_backward(net)
        backward(net, batch(seed))
    assert ternary_update_memory(net)
    assert changed(expected, snapshot(net, optimizer)) == []


def test_a_bad_micro_batch_is_not_forgotten_when_the_next_is_prepared():
    net, optimizer = make()
    for value in (float("inf"), 1.0):
        prepare_ternary_backward(net, torch.tensor(value))
        backward(net)
    assert ternary_update_memory(net)
    assert optimizer.dropped_steps == 1


def test_a_loss_from_before_the_optimizer_trains_nothing_and_says_so():
    net = fresh()
    before = snapshot(net)
    loss = loss_of(net, batch())
    with pytest.warns(UserWarning, match="ahead of the first forward"):
        prepare_ternary_backward(net, loss)
    loss.backward()
    assert ternary_update_memory(net, loss) is False
    assert changed(before, snapshot(net)) == []
    loss = loss_of(net, batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_ternary_backward(net, loss)
    loss.backward()
    assert ternary_update_memory(net, loss) is True
    assert changed(before, snapshot(net)) != []


def test_values_alone_raise_no_warning():
    net, _ = make()
    value = torch.tensor(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_ternary_backward(net, value)
        prepare_ternary_backward(fresh())
    assert not value.requires_grad


def test_an_optimizer_that_takes_over_frees_the_one_before():
    net = fresh()
    first = weakref.ref(prepare_ternary_backward(net))
    second = VoteOptimizer(net)
    assert prepare_ternary_backward(net) is second
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("form", ["signal", "components"])
def test_a_loss_given_to_the_update_drops_the_step_if_it_is_not_finite(form):
    bad = torch.tensor(float("inf"))
    net, optimizer = make()
    backward(net)
    before = snapshot(net, optimizer)
    assert (
        ternary_update_memory(net, bad) if form == "signal" else ternary_update_memory(net, None, {"a": bad})
    )
    assert not optimizer.last_step_applied
    assert changed(before, snapshot(net, optimizer)) == []


def test_a_signal_with_a_graph_goes_before_components():
    net, optimizer = make()
    backward(net)
    optimizer.step()
    expected = snapshot(net, optimizer)
    net, optimizer = make()
    assert ternary_update_memory(net, loss_of(net, batch()), {"other": loss_of(net, batch(1)) * 100})
    assert changed(expected, snapshot(net, optimizer)) == []


def test_scales_that_prepare_froze_stay_frozen():
    net, _ = make(scale_lr=1.0)
    before = net.up[0].E.clone()
    for seed in range(3):
        prepare_ternary_backward(net, update_scales=False)
        backward(net, batch(seed))
        assert ternary_update_memory(net)
    assert torch.equal(net.up[0].E, before)


def test_a_copy_of_the_model_does_not_keep_the_optimizer_alive():
    net = fresh()
    optimizer = weakref.ref(prepare_ternary_backward(net))
    other = copy.deepcopy(net)
    del net
    gc.collect()
    assert optimizer() is None
    assert attached_optimizer(other) is None


def test_a_loss_signal_is_kept_without_its_graph():
    net, optimizer = make()
    loss = loss_of(net, batch())
    prepare_ternary_backward(net, loss)
    assert optimizer._loss_ok.grad_fn is None


def test_scales_move_only_where_they_may():
    for update_scales in (True, False):
        net, optimizer = make(scale_lr=2.0)
        before = net.up[0].E.clone()
        for seed in range(3):
            backward(net, batch(seed))
            ternary_update_memory(net, update_scales=update_scales)
        assert torch.equal(net.up[0].E, before) is not update_scales
        prepare_ternary_backward(net, update_scales=update_scales)
        backward(net)
        before = net.up[0].E.clone()
        optimizer.step()
        assert torch.equal(net.up[0].E, before) is not update_scales


def test_thresholds_are_configured_and_returned():
    net = fresh()
    assert configure_ternary_training(net) == 32
    optimizer = attached_optimizer(net)
    assert (optimizer.accum_threshold, optimizer.span, optimizer.rail) == (32, 51, 26)
    assert configure_ternary_training(net, accum_threshold=16, e_accum_threshold=8) == 16
    assert optimizer.e_accum_threshold == 8
    with pytest.raises(UserError, match="accum_threshold"):
        configure_ternary_training(net, accum_threshold=1)


def test_whole_steps_of_the_scale_accumulator_are_applied_on_demand():
    torch.manual_seed(0)
    layer = TernaryLinear(8, 3)
    assert layer.update_E() == 0, "nothing waits without an optimizer"
    optimizer = VoteOptimizer(layer)
    start = layer.E.clone()
    optimizer.state[layer.T_packed]["E_accum"].copy_(torch.tensor([[70], [-33], [31]]))
    assert layer.update_E() == 2
    assert (layer.E - start).flatten().tolist() == [2, -1, 0]
    assert optimizer.state[layer.T_packed]["E_accum"].flatten().tolist() == [6, -1, 31]
    layer.E.fill_(31)
    optimizer.state[layer.T_packed]["E_accum"].fill_(32)
    assert layer.update_E() == 0, "31 is the largest exponent"


@pytest.mark.parametrize(
    ("value", "message"), [("cuda", "must be one of auto"), ("triton", "Triton is not installed")]
)
def test_a_back_end_that_there_is_not_is_refused(monkeypatch, value, message):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", value)
    monkeypatch.setattr("arbitor.ops.backend.has_triton", lambda: False)
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("value", ["", "auto", "torch"])
def test_back_ends_that_there_are(monkeypatch, value):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", value)
    make()
