"""`metrics.jsonl`: one line of JSON for every optimizer step, and one for every evaluation.

Step lines have the keys of `STEP_KEYS`; evaluation lines have `EVALUATION_KEYS`. The last step of every
reading of the device also has the unweighted losses of the model's parts ("ponder", "commitment",
"diversity", "router") and their metrics (see `ARBModel.part_metrics`), those that the model has; evaluations
of media with captions have "captions_right", the share that was written right. A number that is not finite
is written as null, since JSON has no other word for it.
"""

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arbitor.errors import UserError
from arbitor.train.runs import METRICS_FILE

try:
    import fcntl
except ImportError:  # Windows: two processes in one run are then not noticed
    fcntl = None  # type: ignore[assignment]

STEP_KEYS = (
    "step",
    "bytes_seen",
    "loss",  # nats per byte, mean over the step's micro-batches
    "bits_per_byte",
    "lr",  # trits per step
    "bytes_per_second",
    "memory",  # bytes
    "flip_rate",  # share of all trits that flipped in this step
)
HELD_OUT = "held_out_"
# What held-out data may be measured in, in words; of each, less is better.
FIGURES = {
    "bits_per_byte": "bits per byte",
    "bits_per_code": "bits per code",
    "log_mel_distance": "nats of log-mel distance",
    "pixel_error": "of RMS error of pixels",
    "velocity_loss": "of velocity loss",
    "mixed_bits": "bits per byte or code, weighted mean",
    "mixed": "bits per byte or code, or of velocity loss, weighted mean",
}


def evaluation_keys(figure: str) -> tuple[str, ...]:
    """Keys of a line about an evaluation that measured this one of `FIGURES`."""
    return ("step", HELD_OUT + figure, "held_out_bytes", "seconds")


EVALUATION_KEYS = evaluation_keys("bits_per_byte")


class MetricsLog:
    """Writes `metrics.jsonl` of one run, and is the lock that keeps a second process out of that run.

    Args:
        run: folder of the run.

    Raises:
        UserError: another process trains this run, or the file cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS_FILE
        try:
            # Open for as long as the run lasts; without a buffer, so that what was written is known.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        if not _lock(self._file):
            self._file.close()
            raise _busy(run)
        self._unwritten = bytearray()
        self._told = False

    def cut_after(self, step: int) -> None:
        """Drop what stands behind the last line of step `step`; it is about to be written again."""
        self._file.truncate(_length_up_to(self.path, step))

    def write(self, *lines: Mapping[str, Any]) -> str | None:
        """Append lines and hand them to the operating system.

        Returns:
            Why the disk does not take them, once for every time that it stops to; None otherwise. Lines that
            could not be written are, ahead of others, when it takes some again.
        """
        for line in lines:
            finite = {key: _finite_or_none(value) for key, value in line.items()}
            self._unwritten += json.dumps(finite, allow_nan=False).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            told, self._told = self._told, True
            return None if told else error.strerror or str(error)
        self._told = False
        return None

    def close(self) -> None:
        """Close the file and let go of the run.

        Raises:
            UserError: there are lines that the disk does not take.
        """
        try:
            self._flush()
        except OSError as error:
            raise UserError(
                f"cannot write the last lines of {self.path}: {error.strerror or error}"
            ) from error
        finally:
            self._file.close()

    def _flush(self) -> None:
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]


def refuse_busy(run: Path) -> None:
    """Raise UserError if another process trains `run`."""
    path = run / METRICS_FILE
    if path.is_file():
        with open(path, "rb") as file:
            if not _lock(file):
                raise _busy(run)


def _busy(run: Path) -> UserError:
    return UserError(
        f"the run {run.name!r} is being trained by another process; wait for it, or choose another --run"
    )


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that are whole; damaged ones and a torn last one are passed over."""
    for line, _ in _whole_lines(path):
        yield line


def seconds_so_far(path: Path) -> float:
    """Time that the steps and evaluations of `path` took, from their own lines."""
    total, bytes_seen = 0.0, 0
    for line in read_metrics(path):
        if "held_out_bytes" in line:
            total += line["seconds"]
        else:
            total += max(0, line["bytes_seen"] - bytes_seen) / line["bytes_per_second"]
            bytes_seen = line["bytes_seen"]
    return total


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Lines that are what they should be, each with the offset in the file at which it ends."""
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for raw in file:
            end += len(raw)
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(raw)
                if raw.endswith(b"\n") and _is_reading(line):
                    yield line, end


def _is_reading(line: Any) -> bool:
    """Whether it is a line of a step or of an evaluation, with numbers where they belong."""
    if not isinstance(line, dict):
        return False
    figure = next((figure for figure in FIGURES if HELD_OUT + figure in line), None)
    keys = STEP_KEYS if figure is None else evaluation_keys(figure)
    if not all(key in line and _is_number_or_none(line[key]) for key in keys):
        return False
    counts = ("step", "bytes_seen") if figure is None else ("step", "held_out_bytes")
    if not all(type(line[key]) is int and line[key] >= 0 for key in counts):
        return False
    if figure is not None:
        return line["seconds"] is not None
    return line["bytes_per_second"] is not None and line["bytes_per_second"] > 0


def _is_number_or_none(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _length_up_to(path: Path, last_step: int) -> int:
    """Bytes up to the end of the last line whose step is at most `last_step`."""
    return max((end for line, end in _whole_lines(path) if line["step"] <= last_step), default=0)


def _lock(file: io.IOBase) -> bool:
    """Take the lock of an open file for as long as it stays open; False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
