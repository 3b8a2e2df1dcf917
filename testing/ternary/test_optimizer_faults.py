"""Steps that are not finite are dropped whole; extreme magnitudes that are finite are not."""

import pytest
import torch

from arbitor.ternary import named_ternary
from testing.small_net import backward, batch, changed, each_rule, each_state, loss_of, make, snapshot, train


def poison_loss(net):
    loss = loss_of(net, batch()) * torch.nan
    loss.backward()
    return loss


def poison_only_the_noted_loss(net):
    backward(net)
    return torch.tensor(torch.inf)


def poison_activation(net):
    hook = net.down[0].register_forward_hook(lambda module, args, y: y.masked_fill(y == y.max(), torch.nan))
    loss = backward(net)
    hook.remove()
    return loss


def poison_one_gradient(net):
    """A gradient that turns infinite on its way back, behind a loss that is finite."""

    def spoil(module, args, y):
        y.register_hook(lambda dy: dy.index_fill(0, torch.tensor([1]), torch.inf))

    hook = net.down[1].register_forward_hook(spoil)
    loss = backward(net)
    hook.remove()
    return loss


def poison_one_micro_batch(net):
    total = backward(net, batch(0))
    total = total + poison_activation(net)
    return total + backward(net, batch(2))


def poison_by_overflow(net):
    """Finite codes and finite output gradients whose product is not."""
    loss = backward(net)
    largest = torch.finfo(torch.float32).max
    net.up[0].capture.clear()
    net.up[0].capture.add_linear(
        torch.full((2, 20), 127, dtype=torch.int8), torch.full((2, 36), largest / 100)
    )
    return loss


POISONS = [
    poison_loss,
    poison_only_the_noted_loss,
    poison_activation,
    poison_one_gradient,
    poison_one_micro_batch,
    poison_by_overflow,
]


@each_state
@pytest.mark.parametrize("poison", POISONS, ids=lambda p: p.__name__)
def test_a_step_that_is_not_finite_is_dropped_whole(poison, state):
    net, optimizer = make(state=state, scale_lr=0.1)
    train(net, optimizer, range(2))
    before = snapshot(net, optimizer)
    optimizer.note_loss(poison(net))
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []
    assert not optimizer.last_step_applied
    assert (optimizer.dropped_steps, optimizer.step_count) == (1, 3)
    assert optimizer.flip_rate() == 0.0

    # The next step draws the numbers of its own number, as if the dropped one had only been counted.
    train(net, optimizer, range(5, 6))
    assert optimizer.last_step_applied
    assert (optimizer.dropped_steps, optimizer.step_count) == (1, 4)
    twin, twin_optimizer = make(state=state, scale_lr=0.1)
    train(twin, twin_optimizer, range(2))
    twin_optimizer.step_count += 1
    train(twin, twin_optimizer, range(5, 6))
    assert changed(snapshot(net, optimizer), snapshot(twin, twin_optimizer)) == []


@pytest.mark.parametrize("poison", [p for p in POISONS if p is not poison_only_the_noted_loss])
def test_gradients_are_checked_even_if_no_loss_is_noted(poison):
    net, optimizer = make()
    before = snapshot(net, optimizer)
    poison(net)
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.dropped_steps == 1


@pytest.mark.parametrize("order", [(torch.nan, 1.0), (1.0, torch.nan), (1.0, -torch.inf, 2.0)], ids=str)
def test_one_bad_loss_among_the_micro_batches_drops_the_step(order):
    net, optimizer = make()
    before = snapshot(net, optimizer)
    for loss in order:
        backward(net)
        optimizer.note_loss(torch.tensor(loss))
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.dropped_steps == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_one_bad_element_of_one_matrix_drops_every_matrix(bad):
    net, optimizer = make()
    before = snapshot(net, optimizer)
    backward(net)
    gradient = torch.zeros(36, 20)
    gradient[35, 19] = bad
    net.up[1].capture.add_dense(gradient)
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.dropped_steps == 1


def test_a_gradient_beyond_the_range_of_fp32_is_not_finite():
    net, optimizer = make()
    before = snapshot(net, optimizer)
    backward(net)
    gradient = torch.zeros(36, 20, dtype=torch.float64)
    gradient[35, 19] = 1e39
    net.up[1].capture.clear()
    net.up[1].capture.add_dense(gradient)
    optimizer.step()
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.dropped_steps == 1


@each_rule
@each_state
@pytest.mark.parametrize("factor", [1e-36, 1e-25, 1e25], ids=str)
def test_losses_of_any_magnitude_train(rule, state, factor):
    net, optimizer = make(rule=rule, state=state, scale_lr=0.1)
    before = snapshot(net)
    for seed in range(2):
        (loss_of(net, batch(seed)) * factor).backward()
        optimizer.step()
    assert optimizer.dropped_steps == 0
    assert "up.0.T_packed" in changed(before, snapshot(net))
    for name, module in named_ternary(net):
        module.check(name)


@each_state
def test_the_update_with_the_flag_down_changes_nothing(state):
    # A GPU does not wait for the flag: it runs the updates with everything inactive.
    net, optimizer = make(state=state, scale_lr=0.1)
    train(net, optimizer, range(2))
    before = snapshot(net, optimizer)
    poison_loss(net)
    ok = torch.zeros((), dtype=torch.bool)
    optimizer._update_all(dict(named_ternary(net)), ok)
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.flip_rate() == 0.0
