"""Ctrl-C and SIGTERM, sent to a real process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arbitor.cli import main
from arbitor.train import session
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.signals import Interrupted, SignalGuard, unwinding

TOML = """
[model]
dim = 32
num_prelude_layers = 1
num_heads = 2
head_dim = 8
rope_dim = 8
value_dim = 16
kv_latent_dim = 32
ffn_dim = 64
ctx = 16
[train]
steps = 1000000
batch = 4
eval_interval = 0
save_interval = 0
device = "cpu"
"""


@pytest.fixture(autouse=True)
def _heeded():
    """SIGHUP as a terminal's child has it: under `nohup` it is ignored, also by what this process starts."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


@pytest.fixture
def start(workplace, repository):
    """start(*arguments) -> a process that trains, once it has written its first lines of metrics."""
    (workplace / "small.toml").write_text(TOML)
    processes = []

    def run(*arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "arbitor", "train", "--data", "data.txt", "--config", "small.toml"]
        process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        metrics = workplace / "runs" / "tiny-1" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size > 300):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the process does not get to its first step"
            time.sleep(0.05)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_leaves_with_the_conventional_code(start, number, code):
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == "\nstopping after this step and saving; once more stops at once, without saving\n"
    run = Path("runs/tiny-1")
    step = load_checkpoint(run / "latest").state["step"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == step
    assert f"stopped at step {step} of 1000000; saved runs/tiny-1/latest" in out
    assert not (run / "final").exists()
    assert not (run / "summary.json").exists()
    assert (run / "loss.png").exists()


def test_a_second_signal_ends_at_once(monkeypatch):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    with SignalGuard() as guard:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Left, match="143"):
            signal.raise_signal(signal.SIGTERM)
        assert guard.exit_code == 130


def test_a_terminal_that_closes_twice_is_no_second_signal():
    with SignalGuard() as guard:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert guard.exit_code == 129


def test_what_is_ignored_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwinding(), SignalGuard() as guard:
            signal.raise_signal(signal.SIGHUP)
            assert guard.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ahead_of_the_first_step_leaves_no_run(workplace, monkeypatch, number, code):
    seen = []

    def interrupted(*arguments):
        seen.append(Path("runs/tiny-1/config.toml").is_file())
        signal.raise_signal(number)
        pytest.fail("the signal did not end it")

    monkeypatch.setattr(session, "Trainer", interrupted)
    monkeypatch.setattr(session, "SignalGuard", contextlib.nullcontext)  # as if it were not open yet
    (workplace / "small.toml").write_text(TOML)
    with pytest.raises(SystemExit) as end:
        main(["train", "--data", "data.txt", "--config", "small.toml"])
    assert end.value.code == code
    assert seen == [True]
    assert not Path("runs/tiny-1").exists()


def test_a_section_without_consequences_is_left_at_once():
    with SignalGuard() as guard:
        with pytest.raises(Interrupted), guard.leaving_at_any_point():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), guard.leaving_at_any_point():
            pytest.fail("a signal that came before keeps it from starting")
        assert guard.exit_code == 143


def test_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with SignalGuard():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
