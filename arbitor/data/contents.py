"""What files hold, as uint8 arrays: plain files, gzip, and one field of JSON Lines.

The text of a JSON Lines file is its records' fields, each followed by a newline. A lone surrogate escape,
which no UTF-8 can hold, becomes a question mark.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from arbitor.data.sources import Source, reason
from arbitor.data.store import Store, map_file
from arbitor.errors import UserError

_MAPPED_FROM = 1 << 20
"""Smaller files are read together into one array: a map costs system calls and at least a page each."""
_CHUNK_BYTES = 1 << 20
_CACHE_FORMAT = 1


def open_contents(sources: Sequence[Source], field: str, store: Store) -> list[np.ndarray]:
    """The content of every source, uint8 [number of bytes], in the order of `sources`.

    Raises:
        UserError: for a file that cannot be read, is not the gzip or JSON Lines that its name promises, lacks
            `field` or holds no text; the message names the file, and the line where there is one.
    """
    contents: dict[Path, np.ndarray] = {}
    small: list[Source] = []
    for source in sources:
        if _is_encoded(source.path):
            decoded_key = ("decoded", _CACHE_FORMAT, *_identity(source), field)
            contents[source.path] = store.keep(decoded_key, _decoded(source.path, field))
            if not len(contents[source.path]):
                raise UserError(f"{str(source.path)!r} holds no text")
        elif source.size >= _MAPPED_FROM:
            _check_readable(source.path)
            contents[source.path] = map_file(source.path, source.size)
        else:
            small.append(source)
    if small:
        packed_key = ("packed", _CACHE_FORMAT, *(_identity(source) for source in small))
        packed = store.keep(packed_key, (_whole(source) for source in small))
        start = 0
        for source in small:
            contents[source.path] = packed[start : start + source.size]
            start += source.size
    return [contents[source.path] for source in sources]


def is_jsonl(path: Path) -> bool:
    """Whether a file is read as JSON Lines, packed or not."""
    return path.name.lower().removesuffix(".gz").endswith(".jsonl")


def unused_field(field: str) -> str:
    """What is said about a field that was given where no file has fields."""
    return f"--field {field} has no effect: no .jsonl file is among the data"


def _identity(source: Source) -> tuple[str, int, int]:
    return os.path.realpath(source.path), source.size, source.mtime_ns


def _is_encoded(path: Path) -> bool:
    return path.name.lower().endswith((".gz", ".jsonl"))


def _check_readable(path: Path) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {reason(error)}") from error


def _whole(source: Source) -> bytes:
    try:
        with open(source.path, "rb") as file:
            raw = file.read(source.size + 1)
    except OSError as error:
        raise UserError(f"cannot read {str(source.path)!r}: {reason(error)}") from error
    if len(raw) != source.size:
        raise UserError(f"{str(source.path)!r} changed while it was read; run again when it is complete")
    return raw


def _decoded(path: Path, field: str) -> Iterator[bytes]:
    with opened(path) as file:
        if is_jsonl(path):
            yield from _field_of_lines(file, path, field)
        else:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """A file to read, uncompressed if it ends in .gz.

    Raises:
        UserError: on opening or inside, for a file that cannot be read or is no whole gzip file.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for a writer
            raise UserError(f"{str(path)!r} is not a regular file; copy its content to one first")
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            yield file
    except EOFError as error:
        raise UserError(f"{str(path)!r} is a truncated gzip file; copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{str(path)!r} is not a valid gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {reason(error)}") from error


class BadLineError(Exception):
    """What is wrong with a line of JSON Lines."""


def parse_line(line: bytes, *, first: bool) -> Any:
    """The value of a line of JSON Lines; the `first` one of a file may begin with a byte order mark.

    Raises:
        BadLineError: it is not UTF-8 or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise BadLineError(f"not valid JSON: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        raise BadLineError("not usable JSON: nested too deeply or a number too long") from error


def _field_of_lines(file: IO[bytes] | gzip.GzipFile, path: Path, field: str) -> Iterator[bytes]:
    chunk = bytearray()
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            record = parse_line(line, first=number == 1)
        except BadLineError as error:
            raise UserError(f"{where}: {error}") from error
        chunk += _text(record, field, where).encode("utf-8", "replace") + b"\n"
        if len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    yield bytes(chunk)


def _text(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a JSON object with the field {field!r} is needed, got a {type(record).__name__}"
        )
    if field not in record:
        names = ", ".join(repr(name) for name in list(record)[:20]) or "none"
        raise UserError(f"{where}: no field {field!r}; the fields are {names[:300]}; choose one with --field")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} must be a string, got a {type(text).__name__}")
    return text
