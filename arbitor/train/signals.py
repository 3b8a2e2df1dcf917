"""SIGINT, SIGTERM and SIGHUP: the first one ends the run after the step in hand, a second one at once.

A terminal that closes may send SIGHUP more than once, so that one never counts as the second. Where it is
ignored (`nohup`), it stays ignored.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):  # noqa: N818 - it is a request, not an error
    """A signal arrived in a section that may be left at any point."""


class SignalGuard:
    """While open, remembers the first signal instead of dying of it.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Attributes:
        received: number of the signal that asked for the end, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._may_leave = False
        self._former: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells have it; 0 without a signal."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> "SignalGuard":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in _heeded(SIGNALS)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def leaving_at_any_point(self) -> Iterator[None]:
        """A section that changes nothing: a first signal, also one from before, raises Interrupted in it."""
        try:
            self._may_leave = True
            if self.received is not None:
                raise Interrupted
            yield
        finally:
            self._may_leave = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGHUP:
                return
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if sys.stdout.isatty():
                    os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the cursor that a progress bar hides
            _say("stopped at once: what was trained since the last checkpoint is lost\n")
            os._exit(128 + number)
        self.received = number
        _say("\nstopping after this step and saving; once more stops at once, without saving\n")
        if self._may_leave:
            raise Interrupted


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP raise SystemExit(128 + number), as SIGINT raises KeyboardInterrupt.

    So whoever cleans up on an exception does so at a signal as well; without it, the process would just end.
    """
    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = _heeded((signal.SIGTERM, signal.SIGHUP))
        former = {number: signal.signal(number, _exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those that the process was not told to ignore."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _say(text: str) -> None:
    """Write to stderr without a lock or a buffer, as a signal handler must."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), text.encode())
