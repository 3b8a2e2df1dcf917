"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

REFRESH_SECONDS = 0.125
PLAIN_LINES = 20  # in a whole run
PLAIN_SECONDS = 10.0  # between lines about something that has no steps


class Pace:
    """How long steps take, those of late counting most."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def note(self, seconds: float) -> None:
        """What a step took, or each of the last few on average."""
        self._seconds += (seconds - self._seconds) * (0.2 if self._seconds else 1.0)

    def seconds_of(self, steps: int) -> float:
        """What so many more will take."""
        return self._seconds * steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Figures of one step, in the units of `metrics.jsonl`."""

    step: int
    loss: float
    bits_per_byte: float | None
    bytes_per_second: float
    memory: int
    flip_rate: float
    seconds_left: float

    def line(self) -> str:
        """All figures but the step, in words."""
        bits = "" if self.bits_per_byte is None else f"{self.bits_per_byte:.3f} bits/byte  "
        return (
            f"loss {self.loss:.3f}  {bits}"
            f"{format_bytes(self.bytes_per_second)}/s  ETA {format_seconds(self.seconds_left)}  "
            f"memory {format_bytes(self.memory)}  flips {100 * self.flip_rate:.2f} %"
        )


class Display:
    """Shows the progress of a run of `steps` steps, or of something else.

    Args:
        console: where to.
        steps: of the whole run.
    """

    def __init__(self, console: Console, steps: int = 0) -> None:
        self.console = console
        self.steps = steps
        self._live: Live | None = None
        self._steps_bar: Group | None = None
        self._next_refresh = 0.0
        self._next_plain_step = 0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, reading: Reading) -> None:
        """Show the newest figures, if it is time to."""
        last = reading.step == self.steps
        if self._live is not None:
            now = time.monotonic()
            if last or now >= self._next_refresh:
                self._next_refresh = now + REFRESH_SECONDS
                label = f"step {reading.step}/{self.steps}"
                self._steps_bar = _bar(label, reading.step, self.steps, reading.line())
                self._live.update(self._steps_bar, refresh=True)
        elif last or reading.step >= self._next_plain_step:
            interval = max(1, self.steps // PLAIN_LINES)
            self._next_plain_step = (reading.step // interval + 1) * interval
            width = len(str(self.steps))
            self.note(f"step {reading.step:>{width}}/{self.steps}  {reading.line()}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far something other than steps is, e.g. `measuring`, if it is time to."""
        now = time.monotonic()
        if now < self._next_refresh and done < total:
            return
        waited = self._next_refresh > 0.0
        self._next_refresh = now + (PLAIN_SECONDS if self._live is None else REFRESH_SECONDS)
        if self._live is not None:
            bar = _bar(f"{what} {done}/{total}", done, total)
            self._live.update(
                bar if done < total or self._steps_bar is None else self._steps_bar, refresh=True
            )
        elif waited and done < total:  # what takes no longer than a line's time needs none
            self.note(f"{what} {done}/{total}")

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(Text(text), soft_wrap=True)


def _bar(label: str, done: int, total: int, line: str = "") -> Group:
    """A bar with its label and share, and a line of text below it."""
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(label, ProgressBar(total, done), f"{100 * done / total:.0f} %")
    return Group(row, Text(line, no_wrap=True, overflow="ellipsis"))


class PatientOutput:
    """Stands for stdout where work shall not end because nobody takes the output any more.

    The first write that fails (a full disk, a pipe without a reader) is told on stderr; from then on output
    is dropped, also what the stream itself still holds.

    Args:
        stream: the stdout that it stands for.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._works = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, if it can be written."""
        return self._try(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        """Hand what was written to the operating system, if it takes it."""
        self._try(self._stream.flush, None)

    def _try(self, work: Callable[[], T], otherwise: T) -> T:
        if not self._works:
            return otherwise
        try:
            return work()
        except OSError as error:
            self._works = False
            print(f"arbitor: note: cannot write to stdout: {error.strerror}; going on", file=sys.stderr)
            drop_output(self._stream)
            return otherwise


def drop_output(stream: TextIO) -> None:
    """Let what is written to a stream end nowhere, what it holds already included."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def format_bytes(count: float) -> str:
    """A number of bytes in three digits or so."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def printable(text: str) -> str:
    """`text` with control characters, which could move a terminal's cursor, replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
