"""`metrics.jsonl`: one line of JSON for every optimizer step, and one for every evaluation.

Step lines have the keys of `STEP_KEYS`; evaluation lines have `EVALUATION_KEYS`. The last step of every
reading of the device also has the unweighted losses of the model's parts ("ponder", "commitment", "router")
and their metrics (see `ARBModel.part_metrics`), those that the model has. A number that is not finite is
written as null, since JSON has no other word for it.
"""

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
EVALUATION_KEYS = ("step", "held_out_bits_per_byte", "held_out_bytes", "seconds")


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
            self._file = open(self.path, "ab")  # noqa: SIM115 - open for as long as the run lasts
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        if not _lock(self._file):
            self._file.close()
            raise _busy(run)

    def cut_after(self, step: int) -> None:
        """Drop the lines of steps beyond `step`; they are about to be written again."""
        self._file.truncate(_length_up_to(self.path, step))

    def write(self, *lines: Mapping[str, Any]) -> None:
        """Append lines and hand them to the operating system."""
        for line in lines:
            finite = {key: _finite_or_none(value) for key, value in line.items()}
            self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file and let go of the run."""
        self._file.close()


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
    """The whole lines of a `metrics.jsonl`; a line that a killed process left unfinished ends it."""
    for line, _ in _whole_lines(path):
        yield line


def seconds_so_far(path: Path) -> float:
    """Time that the steps and evaluations of `path` took, from their own lines."""
    total, bytes_seen = 0.0, 0
    for line in read_metrics(path):
        if "held_out_bits_per_byte" in line:
            total += line.get("seconds") or 0.0
        else:
            total += (line["bytes_seen"] - bytes_seen) / line["bytes_per_second"]
            bytes_seen = line["bytes_seen"]
    return total


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Lines with the length in bytes that each takes in the file."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                return
            if not raw.endswith(b"\n") or not isinstance(line, dict):
                return
            yield line, len(raw)


def _length_up_to(path: Path, last_step: int) -> int:
    """Bytes of the leading lines whose step is at most `last_step`."""
    length = 0
    for line, size in _whole_lines(path):
        if not isinstance(line.get("step"), int) or line["step"] > last_step:
            break
        length += size
    return length


def _lock(file: io.BufferedIOBase) -> bool:
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
