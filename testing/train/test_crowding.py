"""Other programs on the cores of a run are noticed, and its own work is not taken for theirs."""

import os
import subprocess
import sys
import time

import pytest
import torch

from arbitor.train import crowding
from arbitor.train.crowding import CoreUse, Crowding, busy_advice
from arbitor.train.device import resolve_device
from arbitor.train.session import start_training

STAT = """cpu  600 60 6000 99 99 99 99 99 99 99
cpu0 100 10 1000 50 70 1 2 3 4 5
cpu1 200 20 2000 50 70 1 2 3 4 5
cpu2 300 30 3000 50 70 1 2 3 4 5
cpu10 7 7 7 7 7 7 7 7 7 7
intr 1 2 3
"""


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
    advice = busy_advice(load, threads, cores)
    assert advice.endswith("" if fewer is None else f"; set OMP_NUM_THREADS={fewer}")
    assert bool(advice) is (fewer is not None)


@pytest.mark.parametrize(("cores", "ticks"), [({0}, 1116), ({1}, 2226), ({0, 2}, 1116 + 3336), ({3}, 0)])
def test_busy_ticks_are_those_of_the_own_cores_without_idle_ones(cores, ticks):
    assert crowding._busy_ticks(STAT, cores) == ticks


def test_what_others_use_is_what_is_busy_less_what_this_process_used(monkeypatch):
    samples = iter([(10.0, 100.0, 7.0), (12.0, 103.5, 9.5), (14.0, 107.0, 16.0)])
    monkeypatch.setattr(crowding, "_times", lambda: next(samples))
    use = CoreUse()
    assert use.of_others() == pytest.approx(0.5)  # of 3.5 busy seconds in 2 s, 2.5 were our own
    assert use.of_others() == 0.0  # never less


def test_a_system_that_does_not_tell_keeps_nobody_busy(monkeypatch, tmp_path):
    monkeypatch.setattr(crowding, "CPU_TIMES", tmp_path / "none")
    use = CoreUse()
    assert (use.seconds(), use.of_others()) == (0.0, 0.0)


@pytest.mark.skipif(not crowding.CPU_TIMES.exists(), reason="the system does not tell")
def test_the_system_s_own_file_is_understood():
    core = min(os.sched_getaffinity(0))
    tick = 1 / os.sysconf("SC_CLK_TCK")

    def busy():
        return tick * crowding._busy_ticks(crowding.CPU_TIMES.read_text(), {core})

    work = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        began, before = time.monotonic(), busy()
        time.sleep(0.5)
        wall, used = time.monotonic() - began, busy() - before
        other.kill()
    assert 0.8 * wall - 3 * tick < used < 1.1 * wall + 3 * tick  # all of the core, and no idle time on top


def test_it_goes_on_watching_until_it_has_spoken(monkeypatch):
    monkeypatch.setattr(crowding, "SECONDS_TO_JUDGE", 0.0)
    monkeypatch.setattr(crowding, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    loads = iter([0.1, 0.2, 1.5, 1.5])
    monkeypatch.setattr(CoreUse, "of_others", lambda self: next(loads))
    crowding_of = Crowding(resolve_device("cpu"))
    lines = [crowding_of.advice() for _ in range(5)]
    assert [bool(line) for line in lines] == [False, False, True, False, False]
    assert "about 1.5 of 2 cores busy" in lines[2]


@pytest.mark.parametrize(("threads", "notes"), [(2, 1), (1, 0)])
def test_a_run_says_once_that_it_waits_for_others(workplace, settings, monkeypatch, capsys, threads, notes):
    monkeypatch.setattr("arbitor.train.crowding.SECONDS_TO_JUDGE", 0.0)
    monkeypatch.setattr("arbitor.train.crowding.cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(CoreUse, "of_others", lambda self: 1.0)
    assert start_training({**settings, "steps": 4}, run="r") == 0
    printed = capsys.readouterr().out
    assert printed.count("other programs keep about 1.0 of 2 cores busy") == notes
