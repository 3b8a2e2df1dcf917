"""One step of each way to learn: its rate, its clipping, what counts in its loss."""

import pytest
import torch

from arbitor.config import RunConfig
from arbitor.finetune.config import FinetuneConfig
from arbitor.finetune.instructions import Message, answer_losses, collate, frame
from arbitor.finetune.lora import named_adapters
from arbitor.finetune.methods import AdapterMethod, VoteMethod
from arbitor.train.checkpoint import Checkpoint
from testing.finetune.conftest import PARTS


@pytest.fixture
def batch():
    return collate([frame([Message("user", b"how"), Message("assistant", b"so")])])


def adapter_method(model, **settings):
    torch.manual_seed(0)
    return AdapterMethod(model, FinetuneConfig(base="", base_fingerprint="", rank=2, **settings))


def vote_method(model, tmp_path, **settings):
    config = RunConfig(preset="tiny", model=model.config)
    base = Checkpoint(
        folder=tmp_path,
        model_config=model.config,
        weights={},
        optimizer_state=None,
        hyperparameters=None,
        config=config,
        state={},
    )
    return VoteMethod(model, FinetuneConfig(base="", base_fingerprint="", full=True, **settings), base)


def loss_of(method, model, batch):
    ids, is_answer = batch
    logits, parts = method.forward(model, ids)
    return answer_losses(logits, ids, is_answer).mean(), parts


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_adapters_move_by_the_rate(make_model, batch, lr):
    model = make_model()
    method = adapter_method(model, lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in method.parameters.items()}
    assert method.step(loss_of(method, model, batch)[0], lr)
    moved = max(float((p.detach() - before[name]).abs().max()) for name, p in method.parameters.items())
    assert 0.9 * lr < moved < 1.001 * lr  # Adam's first step is one of the rate, whatever the gradient


def test_votes_take_the_rate(make_model, batch, tmp_path):
    model = make_model()
    method = vote_method(model, tmp_path, lr=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert method.step(loss_of(method, model, batch)[0], 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert method.step(loss_of(method, model, batch)[0], 0.5)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_gradients_are_clipped_to_norm_one(make_model, batch, factor):
    model = make_model()
    method = adapter_method(model)
    loss, _ = loss_of(method, model, batch)
    gradients = torch.autograd.grad(loss, list(method.parameters.values()), retain_graph=True)
    whole = factor * torch.cat([g.flatten() for g in gradients]).norm()
    method.step(factor * loss, 1e-3)
    moments = [method.optimizer.state[p]["exp_avg"].flatten() for p in method.parameters.values()]
    assert torch.cat(moments).norm() / 0.1 == pytest.approx(min(1.0, float(whole)), rel=1e-3)


def test_a_step_that_is_not_finite_changes_nothing(make_model, batch):
    model = make_model()
    method = adapter_method(model)
    before = {name: parameter.detach().clone() for name, parameter in method.parameters.items()}
    assert not method.step(loss_of(method, model, batch)[0] * float("inf"), 0.1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in method.parameters.items())
    assert not method.optimizer.state


def test_dropout_is_switched(make_model):
    model = make_model()
    method = adapter_method(model, dropout=0.5)
    for training in (True, False):
        method.set_training(training)
        assert {module.dropout.training for _, module in named_adapters(model)} == {training}
        assert not model.training


def test_the_losses_of_parts_count_in_votes_without_that_of_the_text(make_model, batch, tmp_path):
    ids, _ = batch
    model = make_model(**PARTS).train()
    _, parts = loss_of(vote_method(model, tmp_path), model, batch)
    output = model(ids, targets=ids)
    losses = dict(output.losses)
    losses.pop("text")
    assert {"ponder", "router"} <= losses.keys()
    expected = model.config.ponder_weight * losses["ponder"] + 0.01 * losses["router"]
    expected = expected + losses.get("commitment", 0) + 0.3 * losses.get("diversity", 0)
    torch.testing.assert_close(parts, expected, rtol=1e-3, atol=1e-5)
    plain = make_model()
    assert loss_of(vote_method(plain, tmp_path), plain, batch)[1] is None
    adapted = make_model(**PARTS)
    assert loss_of(adapter_method(adapted), adapted, batch)[1] is None
