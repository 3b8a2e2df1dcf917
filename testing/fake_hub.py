"""A data set of the hub of images and recordings, without the hub and without the library `datasets`."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from arbitor.data.waves import codes_of


class FakeStream:
    """What `datasets.load_dataset(..., streaming=True)` returns, as far as it is used.

    Attributes:
        read: numbers of the examples that were read, in order.
        failing: raises, or does not, when the example of a number is read.
    """

    def __init__(self, rows, features):
        self.rows, self.features = rows, features
        self.read, self.failing = [], lambda number: None

    def __iter__(self):
        return self.skip(0)

    def skip(self, count):
        for number in range(count, len(self.rows)):
            self.failing(number)
            self.read.append(number)
            yield self.rows[number]

    def cast_column(self, name, feature):
        return self


def png(value):
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(content, "PNG")
    return content.getvalue()


def wav(seed):
    soundfile = pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")
    content = io.BytesIO()
    noise = codes_of(0.1 * np.random.default_rng(seed).normal(size=300).clip(-3, 3))
    soundfile.write(content, noise, 2000, format="WAV")
    return content.getvalue()


def rows_of(count):
    return [
        {
            "image": {"bytes": png(n), "path": None},
            "audio": {"bytes": wav(n), "path": None},
            "text": f"number {n}",
        }
        for n in range(count)
    ]


def install(monkeypatch, rows):
    """Let the hub have one data set, of these rows; waiting takes no time. Returns its stream.

    Its attribute `slept` holds the seconds that were waited.
    """
    kinds = {
        name: type(name, (), {"__init__": lambda self, decode=True: None}) for name in ("Image", "Audio")
    }
    stream = FakeStream(rows, {"image": kinds["Image"](), "audio": kinds["Audio"](), "text": None})
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *_, **__: stream
    module.Value = str
    monkeypatch.setitem(sys.modules, "datasets", module)
    stream.slept = []
    monkeypatch.setattr("arbitor.data.hub.time.sleep", stream.slept.append)
    return stream


def failing_at(number, times, error):
    """A hook of `FakeStream` that raises so many times when example `number` is read."""
    left = [times]

    def failing(read):
        if read == number and left[0]:
            left[0] -= 1
            raise error

    return failing
