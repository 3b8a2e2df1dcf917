"""Whether other programs keep cores busy that a run computes on, and what to do then."""

import os
import time
from collections.abc import Collection
from pathlib import Path

import torch

from arbitor.ops.compilers import cores
from arbitor.train.device import Device

SECONDS_TO_JUDGE = 5.0
CPU_TIMES = Path("/proc/stat")
IDLE_FIELDS = (3, 4)  # of a core's line: idle, and idle while a disk works
NOT_COUNTED_TWICE = 8  # fields from here on (guests) are part of the first ones


class CoreUse:
    """How much others use the cores that this process may use, from now on."""

    def __init__(self) -> None:
        self._began = _times()

    def seconds(self) -> float:
        """Since then; 0 where the system does not tell."""
        return 0.0 if self._began is None else time.monotonic() - self._began[0]

    def of_others(self) -> float:
        """Mean number of cores that other programs kept busy; 0 where the system does not tell."""
        now = _times()
        if self._began is None or now is None or now[0] <= self._began[0]:
            return 0.0
        wall, busy, own = (after - before for after, before in zip(now, self._began, strict=True))
        return max(0.0, (busy - own) / wall)


class Crowding:
    """Watches, from now on, whether others need the cores that a run's threads wait for each other on.

    Args:
        device: of the run; on a GPU nothing is watched.
    """

    def __init__(self, device: Device) -> None:
        self._use: CoreUse | None = None if device.is_cuda else CoreUse()

    def advice(self) -> str:
        """A line about it, once, when some seconds of watching say so; else empty."""
        if self._use is None or self._use.seconds() < SECONDS_TO_JUDGE:
            return ""
        line = busy_advice(self._use.of_others(), torch.get_num_threads(), cores())
        self._use = None if line else CoreUse()  # watch on
        return line


def busy_advice(load: float, threads: int, cores: int) -> str:
    """What to do on a machine whose other programs leave too few cores for the threads; empty if they do not.

    Args:
        load: cores that others keep busy.
        threads: that torch computes on.
        cores: logical cores that this process may use.
    """
    free = cores - load
    # Half a core of slack: what started this process leaves some load of its own.
    if threads <= 1 or threads <= free + 0.5:
        return ""
    fewer = max(1, int(free + 0.5))
    return (
        f"other programs keep about {load:.1f} of {cores} cores busy, and {threads} threads that wait for "
        f"each other make training many times slower; set OMP_NUM_THREADS={fewer}"
    )


def _times() -> tuple[float, float, float] | None:
    """Seconds by the clock, those that this process's cores were busy, and those of this process itself."""
    try:
        text = CPU_TIMES.read_text(encoding="ascii", errors="replace")
        busy = _busy_ticks(text, os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):  # not Linux, or hidden
        return None
    return time.monotonic(), busy, time.process_time()


def _busy_ticks(text: str, cores: Collection[int]) -> int:
    """Of `/proc/stat`, over some cores."""
    names = {f"cpu{core}" for core in cores}
    total = 0
    for line in text.splitlines():
        name, *fields = line.split()
        if name in names:
            ticks = list(map(int, fields[:NOT_COUNTED_TWICE]))
            total += sum(ticks) - sum(ticks[field] for field in IDLE_FIELDS)
    return total
