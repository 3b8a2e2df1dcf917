"""The loop: dropped steps, the divergence stop, saving, the lines that a person sees."""

import dataclasses
import io
import json
import shlex
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from arbitor.config import preset
from arbitor.errors import UserError
from arbitor.evaluate import Evaluation
from arbitor.model import ARBModel
from arbitor.train import loop, report
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.loop import MAX_DROPPED_IN_A_ROW, Trainer
from arbitor.train.metrics import MetricsLog
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


def test_a_loss_that_is_not_finite_drops_a_step_whose_gradients_are(make_trainer, monkeypatch):
    trainer = make_trainer(0)
    before, output = [t.clone() for t in trainer.model.state_dict().values()], trainer.task.output

    def spoilt(*args):
        # Finite gradients: the infinity is added behind what they come of.
        given = output(*args)
        return dataclasses.replace(given, loss=given.loss + torch.inf)

    monkeypatch.setattr(trainer.task, "output", spoilt)
    trainer.take_step()
    assert trainer.optimizer.dropped_steps == 1
    assert all(map(torch.equal, before, trainer.model.state_dict().values()))


def test_steps_dropped_in_a_row_are_counted_on_by_a_trainer_that_resumes(make_trainer, tmp_path):
    trainer = make_trainer(1)
    trainer.dropped_in_a_row = 7
    trainer.save(tmp_path / "kept")
    resumed = Trainer(trainer.config, trainer.task.corpus, trainer.device, load_checkpoint(tmp_path / "kept"))
    assert (resumed.step, resumed.dropped_in_a_row) == (1, 7)


def test_a_dropped_step_changes_nothing_but_counters(make_trainer, spoil):
    spoil(2)
    trainer = make_trainer(1)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    before |= {f"state.{name}": t.clone() for name, t in trainer.optimizer.named_state().items()}
    lr, drawn = trainer.next_lr(), trainer.task.sampler.state()["drawn"]
    trainer.take_step()
    after = dict(trainer.model.state_dict())
    after |= {f"state.{name}": t for name, t in trainer.optimizer.named_state().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (trainer.step, trainer.optimizer.dropped_steps) == (2, 1)
    assert trainer.next_lr() != lr
    assert trainer.task.sampler.state()["drawn"] == drawn + trainer.config.train.batch


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
    assert one.task.sampler.state()["drawn"] == two.task.sampler.state()["drawn"]
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


@pytest.mark.parametrize(
    ("prompt", "given"),
    [
        (b"it's a line\nand another", "it's a line"),
        (b"\r\n  indented\r\n", "  indented"),
        ("日本語のテキスト".encode()[:-1], "日本語のテキス"),
        (b"text\xff\xfe\0", "text"),
        (b"\xff\xfe\0text", None),
        (b" \n", None),
        (b"", None),
    ],
)
def test_the_command_that_is_printed_can_be_pasted(prompt, given):
    command = report._next_command(Path("runs/a run"), preset("tiny"), prompt)
    assert shlex.split(command) == ["arbitor", "generate", "a run", *(["--prompt", given] if given else [])]
    assert "\N{REPLACEMENT CHARACTER}" not in command


@pytest.mark.parametrize("log_interval", [1, 4, 50])
def test_when_a_run_has_diverged_does_not_depend_on_how_often_losses_are_read(
    workplace, settings, spoil, log_interval
):
    spoil(*range(5, 5 + MAX_DROPPED_IN_A_ROW))  # good steps follow before a reading of 50
    settings |= {"steps": 60, "log_interval": log_interval, "eval_interval": 0, "save_interval": 0}
    assert start_training(settings, run="bad") == 1


@pytest.mark.parametrize("log_interval", [1, 4, 50])
def test_a_step_that_counts_starts_the_row_anew_however_often_losses_are_read(
    workplace, settings, spoil, log_interval
):
    bad = [*range(2, 1 + MAX_DROPPED_IN_A_ROW), *range(2 + MAX_DROPPED_IN_A_ROW, 40)]
    spoil(*bad)
    settings |= {"steps": 39, "log_interval": log_interval, "eval_interval": 0, "save_interval": 0}
    assert start_training(settings, run="lucky") == 0
    assert json.loads((RUNS / "lucky" / "summary.json").read_text())["dropped_steps"] == len(bad)
    assert load_checkpoint(RUNS / "lucky" / "latest").state["dropped_in_a_row"] == 40 - 22


def fail_at(monkeypatch, *saves: int) -> None:
    """The disk takes no more at these saves of a checkpoint, counted from 1."""
    save, count = loop.save_checkpoint, 0

    def failing(*args, **rest):
        nonlocal count
        count += 1
        if count in saves:
            raise OSError(28, "No space left on device")
        save(*args, **rest)

    monkeypatch.setattr(loop, "save_checkpoint", failing)


def test_a_full_disk_in_between_costs_a_checkpoint_and_not_the_run(workplace, settings, monkeypatch, capsys):
    """Saves are best 4, latest 4, best 8, latest 8, best 12, latest 12, final."""
    assert start_training(settings, run="whole") == 0
    fail_at(monkeypatch, 3, 4)
    capsys.readouterr()
    assert start_training(settings, run="full") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert told == [
        f"warning: step 8: cannot save runs/full/{name}: No space left on device; "
        "what was saved before stays as it was; training goes on"
        for name in ("best", "latest")
    ]
    for name in ("best", "latest", "final"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (RUNS / run / name / file for run in ("full", "whole"))
            assert ours.read_bytes() == theirs.read_bytes()


def test_what_could_not_be_saved_is_not_the_best(workplace, settings, monkeypatch):
    figures = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, max_windows=None: Evaluation(next(figures), 9, 1))
    monkeypatch.setattr("arbitor.train.session._finish", stop_here)
    fail_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        start_training(settings, run="full")
    best = load_checkpoint(RUNS / "full" / "best").state
    assert best["best"] == {"step": 12, "bits_per_byte": 2.5}


@pytest.mark.parametrize("save", [5, 6, 7])
def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(workplace, settings, monkeypatch, save):
    fail_at(monkeypatch, *range(save, 20))
    told = r"^cannot save runs/full/\w+: No space left on device; .*; make room, then go on with --resume"
    with pytest.raises(UserError, match=told):
        start_training(settings, run="full")
    assert load_checkpoint(RUNS / "full" / "latest").state["step"] == (12 if save == 7 else 8)
    assert not (RUNS / "full" / "summary.json").exists()
    monkeypatch.undo()


def test_a_run_without_any_checkpoint_is_started_anew(workplace, settings, monkeypatch, capsys):
    fail_at(monkeypatch, *range(1, 20))
    with pytest.raises(UserError, match=r"; make room, then start anew with --reset --run full$"):
        start_training(settings, run="full")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.endswith("; training goes on") for line in told] == 4 * [True] + [False]  # best of step 12


def test_metrics_that_the_disk_does_not_take_are_written_later(workplace, settings, monkeypatch, capsys):
    """The file takes nothing from step 3 to 6; no line is lost, and it is told once."""
    assert start_training(settings, run="whole") == 0
    flush = MetricsLog._flush

    def full(self):
        steps = [json.loads(line)["step"] for line in self._unwritten.splitlines()]
        if steps and 3 <= max(steps) <= 6:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(MetricsLog, "_flush", full)
    capsys.readouterr()
    assert start_training(settings, run="full") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert told == [
        "warning: step 3: cannot write runs/full/metrics.jsonl: No space left on device; "
        "its lines are kept until there is room, and training goes on"
    ]
    assert [line["step"] for line in lines_of("full")] == [line["step"] for line in lines_of("whole")]


class Stopped(BaseException):
    """Ends a run where a test wants it to end."""


def stop_here(*_):
    raise Stopped


@pytest.mark.parametrize("order", [[3.0, 2.0, 2.5], [2.0, 3.0, 2.5], [3.0, 2.5, 2.0], [2.0, 2.0, 2.0]])
def test_the_best_is_the_first_lowest_evaluation_wherever_it_stands(
    workplace, settings, monkeypatch, capsys, order
):
    figures = iter(order)
    monkeypatch.setattr(Trainer, "evaluate", lambda self, max_windows=None: Evaluation(next(figures), 9, 1))
    monkeypatch.setattr("arbitor.train.session._finish", stop_here)
    with pytest.raises(Stopped):
        start_training(settings, run="r")
    best = load_checkpoint(RUNS / "r" / "best").state
    step = 4 * (1 + order.index(min(order)))
    assert (best["step"], best["best"]) == (step, {"step": step, "bits_per_byte": 2.0})
    assert load_checkpoint(RUNS / "r" / "latest").state["best"] == best["best"]
    marked = [line for line in capsys.readouterr().out.splitlines() if "the best so far" in line]
    assert len(marked) == 1 + sum(value < min(order[:i]) for i, value in enumerate(order) if i)


def test_the_best_of_before_an_interruption_stays_the_best(workplace, settings, monkeypatch):
    figures = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, max_windows=None: Evaluation(next(figures), 9, 1))
    monkeypatch.setattr("arbitor.train.session._finish", stop_here)
    take_step = Trainer.take_step

    def interrupted(self):
        if self.step == 8:
            signal.raise_signal(signal.SIGINT)
        return take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted)
        assert start_training(settings, run="r") == 130
    with pytest.raises(Stopped):
        start_training({}, run="r", resume=True)
    assert load_checkpoint(RUNS / "r" / "latest").state["best"] == {"step": 8, "bits_per_byte": 2.0}
    assert load_checkpoint(RUNS / "r" / "best").state["step"] == 8


@pytest.mark.parametrize(
    ("size", "windows"), [({}, 480), ({"steps": 1}, 40), ({"accum": 3}, 1440), ({"eval_steps": 500}, 500)]
)
def test_the_last_evaluation_is_in_proportion_to_the_training(make_trainer, size, windows):
    """Ten windows for each one trained on, and never fewer than an evaluation in between reads."""
    assert make_trainer(0, **size).last_windows == windows


@pytest.mark.parametrize(("steps", "whole"), [(1, False), (40, True)])
def test_a_short_run_is_measured_on_a_part_and_says_so(workplace, settings, capsys, steps, whole):
    settings |= {"steps": steps, "batch": 1, "eval_interval": 0, "save_interval": 0}
    assert start_training(settings, run="short") == 0
    summary = json.loads((RUNS / "short" / "summary.json").read_text())
    size = (Path("data.txt").stat().st_size) // 10
    # Windows of 16 bytes overlap by half, and the first predicts 13 bytes and no less: 8 n + 5 bytes.
    assert summary["held_out_bytes"] == (size if whole else 8 * 10 + 5)
    assert summary["held_out_whole"] is whole
    assert ("of what is held out)" in capsys.readouterr().out) is not whole
