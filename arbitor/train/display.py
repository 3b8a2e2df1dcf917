"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REFRESH_SECONDS = 0.125
PLAIN_LINES = 20  # in a whole run


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Figures of one step, in the units of `metrics.jsonl`."""

    step: int
    loss: float
    bits_per_byte: float
    bytes_per_second: float
    memory: int
    flip_rate: float
    seconds_left: float

    def line(self) -> str:
        """All figures but the step, in words."""
        return (
            f"loss {self.loss:.3f}  {self.bits_per_byte:.3f} bits/byte  "
            f"{format_bytes(self.bytes_per_second)}/s  ETA {format_seconds(self.seconds_left)}  "
            f"memory {format_bytes(self.memory)}  flips {100 * self.flip_rate:.2f} %"
        )


class Display:
    """Shows the progress of a run of `steps` steps.

    Args:
        console: where to.
        steps: of the whole run.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self._live: Live | None = None
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
                self._live.update(self._bar(reading), refresh=True)
        elif last or reading.step >= self._next_plain_step:
            interval = max(1, self.steps // PLAIN_LINES)
            self._next_plain_step = (reading.step // interval + 1) * interval
            width = len(str(self.steps))
            self.note(f"step {reading.step:>{width}}/{self.steps}  {reading.line()}")

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(Text(text), soft_wrap=True)

    def _bar(self, reading: Reading) -> Group:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        share = f"{100 * reading.step / self.steps:.0f} %"
        row.add_row(f"step {reading.step}/{self.steps}", ProgressBar(self.steps, reading.step), share)
        return Group(row, Text(reading.line(), no_wrap=True, overflow="ellipsis"))


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
