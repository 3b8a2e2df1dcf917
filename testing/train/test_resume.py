"""A resumed run equals an uninterrupted one: losses, flips, evaluations, and its checkpoints to the byte."""

import json
import math
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

from arbitor.cli import main
from arbitor.errors import UserError
from arbitor.train import device
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.loop import Trainer
from arbitor.train.metrics import EVALUATION_KEYS, STEP_KEYS, MetricsLog
from arbitor.train.session import start_training
from arbitor.train.tensorfile import dump_document

RUNS = Path("runs")
VARYING = {"bytes_per_second", "memory", "seconds"}
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.toml")


class Killed(BaseException):
    """Stands for SIGKILL."""


def lines_of(run: str) -> list[dict]:
    return [json.loads(line) for line in (RUNS / run / "metrics.jsonl").read_text().splitlines()]


def figures_of(run: str) -> list[dict]:
    """What must not depend on interruptions."""
    return [{key: value for key, value in line.items() if key not in VARYING} for line in lines_of(run)]


def assert_equal_runs(one: str, two: str) -> None:
    assert figures_of(one) == figures_of(two)
    for checkpoint in ("latest", "best", "final"):
        for name in FILES:
            ours, theirs = (RUNS / run / checkpoint / name for run in (one, two))
            assert ours.read_bytes() == theirs.read_bytes(), f"{checkpoint}/{name}"
    assert (RUNS / one / "sample.txt").read_bytes() == (RUNS / two / "sample.txt").read_bytes()


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(method, step, how): `how()` runs after `method` of a trainer that has taken `step` steps."""

    def arrange(method, step, how):
        original = getattr(Trainer, method)

        def wrapped(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            if self.step == step:
                monkeypatch.setattr(Trainer, method, original)
                how()
            return result

        monkeypatch.setattr(Trainer, method, wrapped)

    return arrange


def kill():
    raise Killed


@pytest.fixture
def whole_run(workplace, settings):
    assert start_training(settings, run="whole") == 0
    return "whole"


@pytest.mark.parametrize("state", ["full", "compact", "lean"])
def test_interrupted_at_three_steps(workplace, settings, interrupt, state):
    settings |= {"state": state, "accum": 2}
    assert start_training(settings, run="whole") == 0
    interrupt("take_step", 3, lambda: signal.raise_signal(signal.SIGINT))
    assert start_training(settings, run="cut") == 130
    for step in (4, 9):
        interrupt("take_step", step, lambda: signal.raise_signal(signal.SIGTERM))
        assert start_training({}, run="cut", resume=True) == 143
        state_file = json.loads((RUNS / "cut" / "latest" / "state.json").read_text())
        assert state_file["step"] == step
        assert not (RUNS / "cut" / "final").exists()
    assert start_training({}, resume=True, run="cut") == 0
    assert_equal_runs("cut", "whole")
    assert [line["step"] for line in lines_of("cut") if "loss" in line] == list(range(1, 13))


@pytest.mark.parametrize(("method", "step"), [("evaluate", 4), ("evaluate", 12), ("take_step", 12)])
def test_interrupted_in_an_evaluation_or_after_the_last_step(whole_run, settings, interrupt, method, step):
    interrupt(method, step, lambda: signal.raise_signal(signal.SIGINT))
    assert start_training(settings, run="cut") == 130
    assert not (RUNS / "cut" / "final").exists()
    assert start_training({}, run="cut", resume=True) == 0
    assert_equal_runs("cut", whole_run)


@pytest.mark.parametrize("step", [5, 6, 11])
def test_killed_between_saves(whole_run, settings, interrupt, step):
    interrupt("take_step", step, kill)
    with pytest.raises(Killed):
        start_training(settings, run="cut")
    metrics = RUNS / "cut" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 99, "lo')  # what a torn write leaves
    assert start_training({}, run="cut", resume=True) == 0
    assert_equal_runs("cut", whole_run)


def test_killed_at_the_end(whole_run, settings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("arbitor.train.session.plot_loss", lambda *_: kill())
        with pytest.raises(Killed):
            start_training(settings, run="cut")
    assert not (RUNS / "cut" / "summary.json").exists()
    assert start_training({}, run="cut", resume=True) == 0
    assert_equal_runs("cut", whole_run)


def test_a_damaged_latest_falls_back_to_the_one_before_and_says_so(whole_run, settings, interrupt, capsys):
    interrupt("take_step", 10, lambda: signal.raise_signal(signal.SIGINT))
    assert start_training(settings, run="cut") == 130
    damaged = RUNS / "cut" / "latest" / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-9] ^= 4
    damaged.write_bytes(data)
    capsys.readouterr()
    assert start_training({}, run="cut", resume=True) == 0
    printed = capsys.readouterr().out
    assert "warning: runs/cut/latest/model.safetensors is damaged: the checksum of tensor" in printed
    assert "resuming from the checkpoint of step 8 in runs/cut/.latest.previous" in printed
    assert_equal_runs("cut", whole_run)


def spoil_format(folder):
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 3'))  # one bit


def spoil_header(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"arbitor"', b'"arbitos"', 1))


def put_another_kind(folder):
    shutil.copy(folder / "optimizer.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize("spoil", [spoil_format, spoil_header, put_another_kind])
def test_whatever_keeps_latest_from_loading_the_one_before_serves(
    whole_run, settings, interrupt, capsys, spoil
):
    interrupt("take_step", 10, lambda: signal.raise_signal(signal.SIGINT))
    assert start_training(settings, run="cut") == 130
    spoil(RUNS / "cut" / "latest")
    capsys.readouterr()
    assert start_training({}, run="cut", resume=True) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: runs/cut/latest/")
    assert_equal_runs("cut", whole_run)


def test_work_of_a_later_version_is_not_replaced_by_older_work(workplace, settings, interrupt):
    interrupt("take_step", 10, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    path = RUNS / "cut" / "latest" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(
        dump_document({key: value for key, value in state.items() if key != "checksum"} | {"format": 2})
    )
    later = path.read_text()
    with pytest.raises(UserError, match="has format 2, this arbitor reads up to 1: update arbitor"):
        start_training({}, run="cut", resume=True)
    assert path.read_text() == later


def test_without_any_latest_best_serves(whole_run, settings, interrupt, capsys):
    interrupt("take_step", 10, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    for name in ("latest", ".latest.previous"):
        (RUNS / "cut" / name / "state.json").unlink()
    assert start_training({}, run="cut", resume=True) == 0
    assert_equal_runs("cut", whole_run)


def test_nothing_whole_left_is_one_clear_error(workplace, settings, interrupt):
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    (RUNS / "cut" / "latest" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(
        UserError, match=r"^cannot resume: .*model\.safetensors is damaged.* --run cut --reset$"
    ):
        start_training({}, run="cut", resume=True)
    shutil.rmtree(RUNS / "cut" / "latest")
    with pytest.raises(UserError, match="cannot resume: runs/cut holds no checkpoint"):
        start_training({}, run="cut", resume=True)


def test_a_checkpoint_of_another_run_is_refused(workplace, settings, interrupt):
    for name, changes in (("one", {}), ("two", {"ffn_dim": 96})):
        interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
        start_training({**settings, **changes}, run=name)
    shutil.rmtree(RUNS / "one" / "latest")
    shutil.copytree(RUNS / "two" / "latest", RUNS / "one" / "latest")
    with pytest.raises(UserError, match="checkpoint of another model: ffn_dim is 96 there, 64 in this run"):
        start_training({}, run="one", resume=True)


def test_resume_takes_the_newest_run_and_a_finished_one_says_so(workplace, settings, interrupt, capsys):
    assert start_training(settings, run="older") == 0
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    assert start_training(settings) == 130
    command = capsys.readouterr().out.rpartition("go on with: ")[2]
    assert command == "arbitor train --resume --run tiny-1\n"
    assert start_training({}, resume=True) == 0
    assert (RUNS / "tiny-1" / "summary.json").exists()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in RUNS.rglob("*")}
    assert start_training({}, resume=True) == 0
    assert "the run 'tiny-1' is finished with" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in RUNS.rglob("*")} == before
    # The command that was printed means the same run when there is a newer one.
    shutil.copytree(RUNS / "older", RUNS / "later", copy_function=shutil.copy)
    capsys.readouterr()
    assert main(shlex.split(command)[1:]) == 0
    assert "the run 'tiny-1' is finished with" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"steps": "12"}', "[" * 100_000, "\0"])
def test_a_damaged_summary_is_made_again(whole_run, capsys, damage):
    path = RUNS / whole_run / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(damage)
    assert start_training({}, run=whole_run, resume=True) == 0
    again = json.loads(path.read_text())
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def test_damaged_metrics_do_not_keep_a_run_from_going_on(whole_run, settings, interrupt):
    interrupt("take_step", 10, lambda: signal.raise_signal(signal.SIGINT))
    assert start_training(settings, run="cut") == 130
    path = RUNS / "cut" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"step": 3, "bytes_seen": "\xff"}\n'
    path.write_bytes(b"".join(lines))
    assert start_training({}, run="cut", resume=True) == 0
    kept = path.read_bytes().splitlines(keepends=True)
    assert kept[: len(lines)] == lines
    assert len(kept) == len(lines_of(whole_run))


def test_resume_refuses_what_contradicts_the_run(workplace, settings, interrupt):
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    (workplace / "other.toml").write_text("[train]\nseed = 7\n")
    contradictions = [
        ({"settings": {"lr": 0.5}}, r"--lr 0\.5 contradicts the run's lr = 0\.05"),
        (
            {"settings": {"steps": 11}},
            r"--steps 11 contradicts the run's steps = 12 \(it can only be raised\)",
        ),
        ({"settings": {"ctx": 32}}, "--ctx 32 contradicts"),
        ({"settings": {"data": ["else.txt"]}}, r"--data else\.txt contradicts the run's data = data\.txt"),
        ({"settings": {"save": False}}, "--no-save contradicts"),
        ({"settings": {}, "preset": "small"}, "--preset small contradicts"),
        ({"settings": {}, "config_file": "other.toml"}, r"--config other\.toml contradicts"),
    ]
    for arguments, message in contradictions:
        with pytest.raises(UserError, match=message):
            start_training(**arguments, run="cut", resume=True)
    agreeing = {"steps": 12, "data": ["data.txt"], "device": "cpu", "lr": 0.05}
    assert start_training(agreeing, preset="tiny", run="cut", resume=True) == 0
    # What was learnt before says nothing of how to train: a file of a run that grew may be given again.
    (workplace / "grown.toml").write_text('[data]\nlearnt_before = ["codec"]\n')
    assert start_training({}, config_file="grown.toml", run="cut", resume=True) == 0


def test_settings_that_do_not_say_what_was_learnt_before_resume_and_stay_so(workplace, settings, interrupt):
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    path = RUNS / "cut/config.toml"
    path.write_text(path.read_text().replace("learnt_before = []\n", ""))  # as an earlier version wrote it
    assert start_training({}, run="cut", resume=True) == 0
    assert "learnt_before" not in path.read_text()
    assert "learnt_before" not in (RUNS / "cut/final/config.toml").read_text()


@pytest.mark.parametrize(("place", "part"), [(0, "training"), (0.5, "training"), (-1, "held-out")])
def test_a_byte_that_changed_is_noticed_wherever_it_stands(workplace, settings, interrupt, place, part):
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    data = bytearray(Path("data.txt").read_bytes())
    data[int(place * len(data)) if place == 0.5 else place] ^= 1
    Path("data.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"the {part} data is not what it was: .*, with other content"):
        start_training({}, run="cut", resume=True)


def test_held_out_data_of_another_length_is_noticed(workplace, settings, interrupt):
    Path("held-out.txt").write_text("something to be measured on " * 9)
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training({**settings, "held_out": "held-out.txt"}, run="cut")
    Path("held-out.txt").write_text("something to be measured on " * 8)
    with pytest.raises(UserError, match="held-out data is not what it was: 252 bytes then, 224 now;"):
        start_training({}, run="cut", resume=True)


def test_a_finished_run_is_trained_longer_by_the_schedule_of_its_new_length(workplace, settings):
    assert start_training(settings, run="r") == 0
    before = lines_of("r")
    assert start_training({"steps": 20}, run="r", resume=True) == 0
    lines = lines_of("r")
    assert lines[: len(before)] == before
    rates = {line["step"]: line["lr"] for line in lines if "loss" in line}
    assert list(rates) == list(range(1, 21))
    # One step of 20 warms up, and the cosine of the other 19 is entered after step 12.
    for step in range(13, 21):
        expected = 0.05 / 2 * (1 + math.cos(math.pi * (step - 2) / 19))
        assert rates[step] == pytest.approx(expected, rel=1e-9)
    assert rates[13] > rates[12]
    summary = json.loads((RUNS / "r" / "summary.json").read_text())
    assert (summary["steps"], summary["bytes_seen"]) == (20, 20 * 4 * 16)
    assert "steps = 20\n" in (RUNS / "r" / "config.toml").read_text()
    assert load_checkpoint(RUNS / "r" / "final").state["step"] == 20


def test_an_interrupted_run_may_get_more_steps(workplace, settings, interrupt):
    interrupt("take_step", 6, lambda: signal.raise_signal(signal.SIGINT))
    assert start_training(settings, run="r") == 130
    assert start_training({"steps": 16}, run="r", resume=True) == 0
    assert json.loads((RUNS / "r" / "summary.json").read_text())["steps"] == 16


@pytest.mark.parametrize("step", [13, 17])
def test_a_longer_run_that_is_killed_goes_on_to_its_new_end(workplace, settings, interrupt, step):
    for name in ("whole", "cut"):
        assert start_training(settings, run=name) == 0
    assert start_training({"steps": 20}, run="whole", resume=True) == 0
    interrupt("take_step", step, kill)
    with pytest.raises(Killed):
        start_training({"steps": 20}, run="cut", resume=True)
    assert not (RUNS / "cut" / "summary.json").exists()
    assert start_training({}, run="cut", resume=True) == 0
    assert_equal_runs("cut", "whole")


def test_a_run_that_cannot_be_trained_longer_stays_as_it_is(workplace, settings):
    assert start_training({**settings, "save": False}, run="r") == 0
    before = {path: path.read_bytes() for path in (RUNS / "r").iterdir()}
    with pytest.raises(UserError, match="runs/r holds no checkpoint"):
        start_training({"steps": 20}, run="r", resume=True)
    assert {path: path.read_bytes() for path in (RUNS / "r").iterdir()} == before


def test_a_config_that_was_edited_is_refused(workplace, settings, interrupt):
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    config = RUNS / "cut" / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("steps = 12", "steps = 6"))
    with pytest.raises(UserError, match=r"config\.toml is not what .*latest was trained with; put it back"):
        start_training({}, run="cut", resume=True)
    config.write_text(text)
    assert start_training({}, run="cut", resume=True) == 0


def test_defaults_of_the_state_are_written_out(workplace, settings):
    start_training({**settings, "steps": 1, "state": "lean"}, run="lean")
    text = (RUNS / "lean" / "config.toml").read_text()
    assert "lr = 0.15" in text
    assert "accum_threshold = 80" in text


def test_the_newest_run_that_can_be_resumed_is_taken(workplace, settings, interrupt):
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    (RUNS / "empty").mkdir()
    (RUNS / "empty" / "config.toml").write_text((RUNS / "cut" / "config.toml").read_text())
    assert start_training({}, resume=True) == 0
    assert (RUNS / "cut" / "summary.json").is_file()


def test_the_thread_count_of_the_run_is_used(workplace, settings, interrupt, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    torch.set_num_threads(2)
    assert start_training({}, run="cut", resume=True) == 0
    assert "using 1 threads, as before" in capsys.readouterr().out
    assert torch.get_num_threads() == 2
    assert json.loads((RUNS / "cut" / "summary.json").read_text())["threads"] == 1


def test_another_thread_count_is_used_where_it_is_set(workplace, settings, interrupt, capsys, monkeypatch):
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)  # which torch does at its start
    assert start_training({}, run="cut", resume=True) == 0
    assert "warning: the run had threads 1, now 2: losses may differ" in capsys.readouterr().out
    assert json.loads((RUNS / "cut" / "summary.json").read_text())["threads"] == 2


def test_a_run_in_use_is_left_alone(whole_run, settings):
    log = MetricsLog(RUNS / whole_run)
    (RUNS / whole_run / "summary.json").unlink()
    for arguments in ({"resume": True}, {"reset": True}):
        with pytest.raises(UserError, match="'whole' is being trained by another process"):
            start_training({} if "resume" in arguments else settings, run=whole_run, **arguments)
    log.close()
    assert start_training({}, run=whole_run, resume=True) == 0


@pytest.mark.parametrize("log_interval", [5, 100])
def test_reading_losses_rarely_changes_none_of_them(whole_run, settings, log_interval):
    assert start_training({**settings, "log_interval": log_interval}, run="rare") == 0
    steps, rare = ([line for line in figures_of(run) if "loss" in line] for run in (whole_run, "rare"))
    assert [{**line, "flip_rate": None} for line in steps] == [{**line, "flip_rate": None} for line in rare]
    assert [line for line in figures_of("rare") if "loss" not in line] == [
        line for line in figures_of(whole_run) if "loss" not in line
    ]


def test_metrics_have_exactly_the_named_keys(whole_run):
    lines = lines_of(whole_run)
    for line in lines:
        assert tuple(line) == (STEP_KEYS if "loss" in line else EVALUATION_KEYS)
    assert [line["step"] for line in lines if "loss" not in line] == [4, 8, 12]


@pytest.mark.gpu
@pytest.mark.parametrize("state", ["full", "compact", "lean"])
def test_interrupted_at_three_steps_on_a_gpu(workplace, settings, interrupt, state):
    settings |= {"state": state, "accum": 2, "device": "cuda", "dim": 160, "ffn_dim": 320, "ctx": 64}
    assert start_training(settings, run="whole") == 0
    interrupt("take_step", 3, lambda: signal.raise_signal(signal.SIGINT))
    assert start_training(settings, run="cut") == 130
    for step in (4, 9):
        interrupt("take_step", step, lambda: signal.raise_signal(signal.SIGTERM))
        assert start_training({}, run="cut", resume=True) == 143
    assert start_training({}, resume=True, run="cut") == 0
    assert_equal_runs("cut", "whole")


def test_gradients_that_are_rounded_otherwise_are_told(workplace, settings, interrupt, capsys, monkeypatch):
    monkeypatch.setattr(device, "has_bf16_products", lambda: False)
    interrupt("take_step", 2, lambda: signal.raise_signal(signal.SIGINT))
    start_training(settings, run="cut")
    monkeypatch.setattr(device, "has_bf16_products", lambda: True)
    assert start_training({}, run="cut", resume=True) == 0
    assert "warning: the run had gradients fp32, now bf16" in capsys.readouterr().out
