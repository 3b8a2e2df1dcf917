"""The loop: dropped steps, the divergence stop, saving, the lines that a person sees."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.loop import MAX_DROPPED_IN_A_ROW, Trainer
from arbitor.train.session import start_training

RUNS = Path("runs")


def lines_of(run: str) -> list[dict]:
    return [json.loads(line) for line in (RUNS / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def spoil(monkeypatch):
    """spoil(*steps): the loss of these steps (counted from 1) is not a number."""

    def arrange(*steps: int) -> None:
        take_step, forward = Trainer.take_step, ARBModel.forward
        bad = False

        def noted(self):
            nonlocal bad
            bad = self.step + 1 in steps
            try:
                return take_step(self)
            finally:
                bad = False

        def spoiled(self, ids, targets=None, **rest):
            output = forward(self, ids, targets, **rest)
            if not bad:
                return output
            loss = output.loss * float("nan")
            return dataclasses.replace(output, loss=loss, losses={"text": loss})

        monkeypatch.setattr(Trainer, "take_step", noted)
        monkeypatch.setattr(ARBModel, "forward", spoiled)

    return arrange


def test_a_dropped_step_is_logged_counted_and_told(workplace, settings, spoil, capsys):
    spoil(3, 7)
    assert start_training(settings, run="drops") == 0
    steps = [line for line in lines_of("drops") if "loss" in line]
    assert [line["step"] for line in steps if line["loss"] is None] == [3, 7]
    assert [line["flip_rate"] for line in steps if line["loss"] is None] == [0.0, 0.0]
    assert json.loads((RUNS / "drops" / "summary.json").read_text())["dropped_steps"] == 2
    printed = capsys.readouterr().out
    assert "step 3: dropped, a loss or gradient was not finite (1 so far)" in printed
    assert "step 7: dropped, a loss or gradient was not finite (2 so far)" in printed


def test_a_dropped_step_changes_nothing_but_counters(make_trainer, spoil):
    spoil(2)
    trainer = make_trainer(1)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    before |= {f"state.{name}": t.clone() for name, t in trainer.optimizer.named_state().items()}
    lr, drawn = trainer.next_lr(), trainer.sampler.state()["drawn"]
    trainer.take_step()
    after = dict(trainer.model.state_dict())
    after |= {f"state.{name}": t for name, t in trainer.optimizer.named_state().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (trainer.step, trainer.optimizer.dropped_steps) == (2, 1)
    assert trainer.next_lr() != lr
    assert trainer.sampler.state()["drawn"] == drawn + trainer.config.train.batch


@pytest.mark.parametrize("log_interval", [1, 8])
def test_too_many_dropped_steps_end_the_run_with_a_checkpoint(
    workplace, settings, spoil, capsys, log_interval
):
    spoil(*range(5, 100))
    settings |= {"steps": 60, "log_interval": log_interval}
    assert start_training(settings, run="bad") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "the loss or a gradient was not finite in 20 steps in a row; saved runs/bad/latest" in captured.err
    step = load_checkpoint(RUNS / "bad" / "latest").state["step"]
    assert 4 + MAX_DROPPED_IN_A_ROW <= step < 4 + MAX_DROPPED_IN_A_ROW + log_interval
    assert not (RUNS / "bad" / "final").exists()
    assert not (RUNS / "bad" / "summary.json").exists()
    assert start_training({}, run="bad", resume=True) == 1  # the same steps fail again


def test_no_save_writes_no_checkpoint_at_all(workplace, settings, capsys):
    assert start_training({**settings, "save": False}, run="light") == 0
    names = {path.name for path in (RUNS / "light").iterdir()}
    assert names == {"config.toml", "metrics.jsonl", "summary.json", "loss.png", "sample.txt"}
    assert "no checkpoints: --no-save" in capsys.readouterr().out


def test_a_full_disk_is_one_error_and_keeps_the_checkpoint_before(workplace, settings, monkeypatch):
    from arbitor.train import checkpoint

    write, count = checkpoint.write_tensors, 0

    def full(*args, **kwargs):
        nonlocal count
        count += 1
        if count > 6:
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match=r"cannot save runs/full/\w+: No space left on device"):
        start_training(settings, run="full")
    assert load_checkpoint(RUNS / "full" / "latest").state["step"] == 4
    monkeypatch.undo()


def test_best_is_the_lowest_evaluation(workplace, settings):
    assert start_training(settings, run="r") == 0
    evaluations = {
        line["step"]: line["held_out_bits_per_byte"] for line in lines_of("r") if "loss" not in line
    }
    best = load_checkpoint(RUNS / "r" / "best").state
    assert best["best"] == {"step": best["step"], "bits_per_byte": min(evaluations.values())}
    assert evaluations[best["step"]] == min(evaluations.values())


def test_micro_batches_add_up_to_the_same_data(make_trainer):
    one, two = make_trainer(0, batch=4, accum=1), make_trainer(0, batch=2, accum=2)
    losses = [one.take_step(), two.take_step()]
    assert one.sampler.state()["drawn"] == two.sampler.state()["drawn"]
    assert one.bytes_per_step == two.bytes_per_step
    # The mean of two means over halves; fp32 sums in another order.
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


def test_intervals_of_zero_mean_at_the_end_only(workplace, settings):
    assert start_training({**settings, "eval_interval": 0, "save_interval": 0}, run="r") == 0
    assert [line["step"] for line in lines_of("r") if "loss" not in line] == [12]
    assert not (RUNS / "r" / ".latest.previous").exists()


def test_plain_lines_are_few_and_the_bar_is_for_terminals(workplace, settings):
    plain = Console(file=io.StringIO(), highlight=False)
    settings |= {"steps": 100, "eval_interval": 0, "save_interval": 0}
    assert start_training(settings, run="plain", console=plain) == 0
    progress = [line for line in plain.file.getvalue().splitlines() if " ETA " in line]
    assert 20 <= len(progress) <= 22
    assert progress[-1].startswith("step 100/100  loss ")
    for word in ("bits/byte", "/s  ETA", "memory", "flips"):
        assert word in progress[-1]
    bar = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    assert start_training({**settings, "steps": 3}, run="bar", console=bar) == 0
    assert "step 3/3" in bar.file.getvalue()
    assert "100 %" in bar.file.getvalue()
    assert "\x1b[?25h" in bar.file.getvalue()  # the cursor is back


def test_the_start_says_what_is_trained_on_what(workplace, settings, capsys):
    assert start_training(settings) == 0
    printed = capsys.readouterr().out
    for words in (
        "runs/tiny-1",
        "device    cpu, 1 threads: asked for",
        "back end  torch: the reference operations",
        "12,032 ternary weights",
        "full: 2.3",
        "data      data.txt: ",
        "12 steps of 4 x 16 bytes",
        "held out  ",
        "sample after",
        "next: arbitor generate tiny-1 --prompt",
    ):
        assert words in printed
