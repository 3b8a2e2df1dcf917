"""Which models may have their steps recorded; the recording itself needs a GPU."""

import pytest
import torch

from arbitor.config import preset
from arbitor.model import ARBModel
from arbitor.train.recorded import can_record


def test_no_step_is_recorded_on_a_cpu(make_trainer):
    assert make_trainer(1)._recorded is None


@pytest.mark.parametrize(
    ("settings", "can"),
    [
        ({}, True),
        ({"num_experts": 4, "expert_dim": 160, "max_moe_iters": 1}, True),
        ({"num_experts": 4, "expert_dim": 160, "max_moe_iters": 2}, False),
        ({"memory_rows": 16}, True),
        ({"memory_rows": 16, "memory_host": True}, False),
    ],
)
def test_what_asks_the_host_is_not_recorded(monkeypatch, settings, can):
    model = ARBModel(config=preset("tiny", **settings).model)
    assert not can_record(model), "it is on a CPU"
    monkeypatch.setattr(ARBModel, "device", torch.device("cuda"))
    assert can_record(model) == can


def test_a_trainer_says_whether_its_last_step_counted(make_trainer):
    trainer = make_trainer(2)
    trainer.take_step()
    assert bool(trainer.last_ok)
