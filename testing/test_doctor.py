"""The doctor describes the machine and tests that training works."""

import io

import pytest
import torch
from rich.console import Console

from arbitor import doctor


@pytest.fixture
def console():
    return Console(file=io.StringIO(), highlight=False)


def test_it_describes_the_machine_and_passes(console):
    assert doctor.examine(console) == 0
    printed = console.file.getvalue()
    for words in (
        "arbitor ",
        "python ",
        f"torch {torch.__version__}",
        "cyclopts ",
        "device ",
        "back end ",
        "threads ",
        "products ",
        "memory ",
        "disk ",
        "self-test: pack and decode: ok",
        "self-test: training step: ok",
    ):
        assert words in printed


@pytest.mark.parametrize("check", ["check_codec", "check_training_step"])
def test_a_failing_self_test_is_exit_code_1(console, monkeypatch, check):
    def broken(device):
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(doctor, check, broken)
    assert doctor.examine(console) == 1
    assert "FAILED: RuntimeError: no such thing" in console.file.getvalue()


def test_the_self_test_notices_training_that_does_nothing(monkeypatch):
    monkeypatch.setattr("arbitor.ternary.VoteOptimizer.step", lambda self: None)
    with pytest.raises(RuntimeError, match="changed nothing"):
        doctor.check_training_step(doctor.resolve_device("cpu"))


def test_the_self_test_notices_a_codec_that_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "trit_pack", lambda trits, pack=doctor.trit_pack: pack(-trits))
    with pytest.raises(RuntimeError, match="do not survive packing"):
        doctor.check_codec(doctor.resolve_device("cpu"))


@pytest.mark.parametrize(
    ("load", "threads", "cores", "fewer"),
    [
        (0.0, 2, 2, None),
        (0.4, 2, 2, None),
        (1.0, 2, 2, 1),
        (5.0, 2, 2, 1),
        (1.0, 1, 2, None),
        (4.0, 16, 16, 12),
    ],
)
def test_a_busy_machine_is_advised(load, threads, cores, fewer):
    advice = doctor.busy_advice(load, threads, cores)
    assert advice.endswith("" if fewer is None else f"; set OMP_NUM_THREADS={fewer}")
    assert bool(advice) is (fewer is not None)


@pytest.mark.parametrize(("load", "warned"), [(0.0, False), (99.0, True)])
def test_the_warning_is_printed(console, monkeypatch, load, warned):
    monkeypatch.setattr(doctor, "_load", lambda: load)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(doctor, "_cores", lambda: 2)
    assert doctor.examine(console) == 0
    printed = console.file.getvalue()
    assert ("warning: other programs keep about 99.0 of 2 cores busy" in printed) is warned
    assert f"2 on 2 logical cores; load {load:.1f} over the last minute" in printed
