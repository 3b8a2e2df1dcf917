"""Framing of conversations, and that only answers count in the loss."""

import pytest
import torch

from arbitor.errors import UserError
from arbitor.finetune.instructions import Message, answer_losses, collate, fitted, frame, frame_prompt
from arbitor.model.vocab import CONTROL_IDS, PAD, STOP

SYSTEM, USER, ASSISTANT = (CONTROL_IDS[name] for name in ("SYSTEM", "USER", "ASSISTANT"))
TALK = [
    Message("system", b"s"),
    Message("user", b"ab"),
    Message("assistant", b"xy"),
    Message("user", b""),
    Message("assistant", b"z"),
]
IDS = [PAD, PAD, SYSTEM, *b"s", USER, *b"ab", ASSISTANT, *b"xy", STOP, USER, ASSISTANT, *b"z", STOP]


def test_the_frame():
    example = frame(TALK)
    assert example.ids.tolist() == IDS
    learnt = [i for i, answer in zip(IDS, example.is_answer, strict=True) if answer]
    assert learnt == [*b"xy", STOP, *b"z", STOP]
    assert example.num_answer_ids == 5


def test_a_prompt_is_the_beginning_of_the_conversation_that_it_leads_to():
    for end in (2, 4):
        prompt = frame_prompt(TALK[:end])
        assert prompt == IDS[: len(prompt)]
        assert prompt[-1] == ASSISTANT
        assert frame(TALK).is_answer[len(prompt)]


def test_what_is_too_long_is_cut_on_the_right():
    example = frame(TALK)
    assert fitted(example, len(IDS)) is example
    cut = fitted(example, 9)
    assert cut.ids.tolist() == IDS[:9]
    assert cut.num_answer_ids == 1
    assert fitted(example, 8) is None


def test_batches_are_filled_on_the_right():
    short = frame(TALK[1:3])
    ids, is_answer = collate([frame(TALK), short])
    assert ids.tolist() == [IDS, [*short.ids, *[PAD] * (len(IDS) - len(short.ids))]]
    assert is_answer.shape == (2, len(IDS) - 3)
    assert ids[:, 3:][is_answer].tolist() == [*b"xy", STOP, *b"z", STOP, *b"xy", STOP]


@pytest.fixture
def losses_of(make_model):
    """losses_of(ids, is_answer) -> losses and the gradient of the logits."""
    model = make_model(motif_trits=4, num_experts=3, expert_dim=32)

    def run(ids, is_answer, targets=None):
        logits = model(ids).logits.detach().requires_grad_()
        losses = answer_losses(logits, ids if targets is None else targets, is_answer)
        losses.sum().backward()
        return losses.detach(), logits.grad

    return run


def test_filling_changes_no_loss(losses_of):
    short = frame(TALK[1:3])
    alone, _ = losses_of(*collate([short]))
    together, _ = losses_of(*collate([frame(TALK), short]))
    assert torch.equal(together[-3:], alone)


def test_a_target_of_the_prompt_changes_nothing_and_one_of_the_answer_does(losses_of):
    ids, is_answer = collate([frame(TALK)])
    losses, gradient = losses_of(ids, is_answer)
    for position in range(3, len(IDS)):
        other = ids.clone()
        other[0, position] = 7
        changed, changed_gradient = losses_of(ids, is_answer, targets=other)
        same = torch.equal(changed, losses) and torch.equal(changed_gradient, gradient)
        assert same != bool(frame(TALK).is_answer[position]), position


def test_rows_of_the_prompt_get_no_gradient(losses_of):
    ids, is_answer = collate([frame(TALK)])
    _, gradient = losses_of(ids, is_answer)
    touched = (gradient[0] != 0).any(dim=-1)
    assert touched[:-1].tolist() == is_answer[0].tolist()
    assert not touched[-1]


def test_a_batch_without_answers_is_refused(losses_of):
    ids, is_answer = collate([frame(TALK)])
    with pytest.raises(UserError, match="no answer"):
        losses_of(ids, torch.zeros_like(is_answer))
