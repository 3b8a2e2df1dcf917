"""SIGINT and SIGTERM: the first one ends the run after the step in hand, a second one at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
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
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if sys.stdout.isatty():
                    os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the cursor that a progress bar hides
            _say("stopped at once: what was trained since the last checkpoint is lost\n")
            os._exit(128 + number)
        self.received = number
        _say("\nstopping after this step and saving; once more stops at once, without saving\n")
        if self._may_leave:
            raise Interrupted


def _say(text: str) -> None:
    """Write to stderr without a lock or a buffer, as a signal handler must."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), text.encode())
