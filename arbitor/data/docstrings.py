"""Text that every machine with Python has: the docstrings of the standard library."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from arbitor.data.corpus import ByteCorpus, embedded_sources, is_held_out
from arbitor.data.sources import Source
from arbitor.data.store import Store
from arbitor.data.stream import ByteStream
from arbitor.errors import UserError

_FORMAT = 1


def open_docstrings(share: Fraction | None = None, *, min_bytes: int = 1) -> ByteCorpus:
    """The docstrings of the embedded corpus, each followed by an empty line.

    Those of the files that the corpus of sources holds out are held out here as well, so that neither is
    learnt from the other.

    Args:
        share: of the files, to hold out; None is a twentieth.
        min_bytes: that each part must have.

    Raises:
        UserError: this Python has no sources, or too few docstrings.
    """
    library = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[Source]] = {False: [], True: []}
    for source in embedded_sources(library):
        name = source.path.relative_to(library).as_posix()
        parts[is_held_out(name) if share is None else is_held_out(name, share)].append(source)
    store = Store(memory_bytes=0)  # reading all of them takes seconds: kept on the disk
    train, held_out = (
        ByteStream([store.keep(("docstrings", _FORMAT, *map(_identity, part)), _docstrings(part))])
        for part in parts.values()
    )
    for stream in (train, held_out):
        if len(stream) < min_bytes:
            raise UserError(
                "this Python's standard library has too few docstrings to train on; give text of your own "
                "with --text-data"
            )
    return ByteCorpus(
        train=train,
        held_out=held_out,
        description=f"docstrings of Python's standard library: {len(train) / 1e6:.2f} MB to train on; "
        f"{len(held_out) / 1e6:.2f} MB held out ({len(parts[True]):,} files)",
    )


def _identity(source: Source) -> tuple[str, int, int]:
    return os.path.realpath(source.path), source.size, source.mtime_ns


def _docstrings(sources: Sequence[Source]) -> Iterator[bytes]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what the library writes, not about its docstrings
                tree = ast.parse(source.path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text.encode("utf-8", "replace") + b"\n\n"
