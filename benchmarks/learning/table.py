"""Results as a CSV file that several processes may write."""

import csv
import fcntl
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

MEASURED = (
    "contestant",
    "lr",
    "seed",
    "trunk_weights",
    "bytes_seen",
    "bytes_per_weight",
    "held_out_bits_per_byte",
    "seconds",
    "device",
    "torch",
    "date",
)
PROVENANCE = ("text", "commit")  # fingerprint of the texts, and the code; behind all other columns
COLUMNS = (*MEASURED, *PROVENANCE)
KEY = ("contestant", "lr", "seed")

Row = Mapping[str, str]


class Table:
    """Rows of text under fixed columns, identified by some of them.

    A file without the columns of `PROVENANCE` is read as well: its rows' text is the one in the file
    `<name>.text` beside it, their commit is not known.

    The file itself is locked while it is read or written, so that runs which end at the same time in several
    processes do not lose each other's rows.
    """

    def __init__(self, path: Path, columns: Sequence[str] = COLUMNS, key: Sequence[str] = KEY) -> None:
        """`key`: the columns that identify a row."""
        self.path = path
        self.columns = tuple(columns)
        self.key = tuple(key)

    def rows(self) -> list[dict[str, str]]:
        """All rows, oldest first; none if there is no file."""
        if not self.path.exists():
            return []
        with self._locked() as file:
            return self._read(file)

    def put(self, row: Row) -> None:
        """Append a row, or replace the one with the same key in its place."""
        if set(row) != set(self.columns):
            raise ValueError(f"a row has the columns {self.columns}, got {tuple(row)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            rows: list[Row] = [*self._read(file)]
            same = [i for i, old in enumerate(rows) if self.identity(old) == self.identity(row)]
            if same:
                rows[same[0]] = row
                rows = [old for i, old in enumerate(rows) if i not in same[1:]]
            else:
                rows.append(row)
            self._write(file, rows)

    def keep_text(self, text: str) -> None:
        """Drop the rows that were measured on another text than the one with the fingerprint `text`."""
        if self.path.exists():
            with self._locked() as file:
                self._write(file, [row for row in self._read(file) if row["text"] == text])

    def identity(self, row: Row) -> tuple[str, ...]:
        """What tells a row from others; equal numbers are equal however they are spelt."""
        return tuple(_canonical(row[name]) for name in self.key)

    @contextmanager
    def _locked(self) -> Iterator[TextIO]:
        # Mode "a+" would create the file too, but ignores `seek` when it writes.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        with open(descriptor, "r+", newline="", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _read(self, file: TextIO) -> list[dict[str, str]]:
        file.seek(0)
        reader = csv.DictReader(file)
        rows = list(reader)
        if reader.fieldnames is None or tuple(reader.fieldnames) == self.columns:
            return rows
        if (*reader.fieldnames, *PROVENANCE) != self.columns:
            raise ValueError(f"{self.path} has the columns {reader.fieldnames}, expected {self.columns}")
        note = self.path.with_suffix(".text")
        text = note.read_text(encoding="utf-8").split()[0] if note.exists() else ""
        return [{**row, "text": text, "commit": ""} for row in rows]

    def _write(self, file: TextIO, rows: Sequence[Row]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.seek(0)
        file.write(text.getvalue())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _canonical(text: str) -> str:
    try:
        return format(float(text), "g")
    except ValueError:
        return text
