"""On a GPU the contestants of the learning benchmark replay their steps, with the results of other steps."""

import dataclasses

import pytest
import torch

from arbitor.train.device import deterministic
from arbitor.train.recorded import WARM_UP, RecordedStep
from benchmarks.learning import training
from benchmarks.learning.contestants import CONTESTANTS, build
from testing.benchmarks.test_learning_contestants import MICRO, run_of, text_tensor

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
SIZE = dataclasses.replace(MICRO, steps=WARM_UP + 5)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_replayed_steps_equal_others(monkeypatch, name):
    recorders = []

    class Noted(RecordedStep):
        def __init__(self, *args):
            super().__init__(*args)
            recorders.append(self)

    monkeypatch.setattr(training, "RecordedStep", Noted)
    results = []
    for can_record in (lambda _: False, training.can_record):
        monkeypatch.setattr(training, "can_record", can_record)
        with deterministic(0, GPU):
            trainee = build(run_of(name), SIZE.model, GPU)
            assert training.train(trainee, SIZE, text_tensor().to(GPU), 0, lambda: False)
        results.append(trainee.model.state_dict())
    assert [recorder.recorded for recorder in recorders] == [True]
    plain, replayed = results
    assert [key for key in plain if not torch.equal(plain[key], replayed[key])] == []
