"""Which models may have their steps recorded, and how waiting is seen; the recording itself needs a GPU."""

import warnings

import pytest
import torch

from arbitor.cli import main
from arbitor.config import preset
from arbitor.model import ARBModel
from arbitor.train.loop import Trainer
from arbitor.train.recorded import WARM_UP, can_record, watched, why_not_recorded
from arbitor.train.report import how_steps_run
from arbitor.train.session import start_training

EXPERTS = {"num_experts": 4, "expert_dim": 160}


def test_no_step_is_recorded_on_a_cpu(make_trainer):
    trainer = make_trainer(1)
    assert trainer._recorded is None
    assert not trainer.waits
    assert how_steps_run(trainer) == "kernels are launched one by one: there is no GPU"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({**EXPERTS, "max_moe_iters": 1}, None),
        ({**EXPERTS, "max_moe_iters": 2}, None),
        ({"max_moe_iters": 2}, None),
        ({"memory_rows": 16}, None),
        ({"memory_rows": 16, "memory_host": True}, "memory is on the host"),
    ],
)
def test_what_asks_the_host_is_not_recorded(monkeypatch, settings, reason):
    model = ARBModel(config=preset("tiny", **settings).model)
    assert not can_record(model), "it is on a CPU"
    monkeypatch.setattr(ARBModel, "device", torch.device("cuda"))
    assert can_record(model) == (reason is None)
    assert why_not_recorded(model) is None if reason is None else reason in why_not_recorded(model)


def test_replays_can_be_turned_off(monkeypatch):
    model = ARBModel(config=preset("tiny").model)
    monkeypatch.setattr(ARBModel, "device", torch.device("cuda"))
    monkeypatch.setenv("ARB_REPLAY", "off")
    assert why_not_recorded(model) == "ARB_REPLAY is off"
    monkeypatch.setenv("ARB_REPLAY", "auto")
    assert can_record(model)


def test_an_unknown_choice_about_replays_is_one_line(monkeypatch, capsys, workplace):
    monkeypatch.setenv("ARB_REPLAY", "never")
    assert main(["train", "--data", "data.txt", "--steps", "1", "--device", "cpu"]) == 2
    assert (
        capsys.readouterr().err.strip()
        == "arbitor: error: ARB_REPLAY is 'never'; it must be one of auto, off"
    )


@pytest.fixture
def modes(monkeypatch):
    """The debug modes that were set, on top of the one that was there before."""
    seen = [2]

    def change(mode):
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)
        seen.append(mode)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: seen[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", change)
    return seen


def test_waiting_is_seen_and_other_warnings_are_passed_on(modes):
    with warnings.catch_warnings(record=True) as passed_on:
        warnings.simplefilter("always")
        with watched() as seen:
            assert modes == [2, "warn"]
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("beware", stacklevel=1)
    assert modes == [2, "warn", 2]
    assert seen == ["called a synchronizing CUDA operation (Triggered internally)"]
    assert [str(warning.message) for warning in passed_on] == ["beware"]


def test_the_mode_is_restored_after_an_error(modes):
    with pytest.raises(ValueError, match="broken"), watched():
        raise ValueError("broken")
    assert modes == [2, "warn", 2]


def test_a_run_tells_once_that_its_steps_are_not_replayed(monkeypatch, workplace, settings, capsys):
    monkeypatch.setattr(Trainer, "waits", property(lambda self: self.step >= WARM_UP))
    assert start_training(settings, run="r") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "the host waits for the GPU" in line]
    assert len(told) == 1
    assert f"step {WARM_UP}: " in told[0]


def test_a_trainer_says_whether_its_last_step_counted(make_trainer):
    trainer = make_trainer(2)
    trainer.take_step()
    assert bool(trainer.last_ok)
