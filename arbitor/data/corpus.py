"""Data to train on and data held out, from the embedded corpus or from the user's files.

The share f is held out (a tenth of own data, a twentieth of the embedded corpus, unless told otherwise):

- own data, n files with n*f >= 1: every (1/f)th file by sorted path, whole;
- own data in fewer files, so also a single one: the last share f of every file;
- embedded corpus: the files whose path hash falls into the lowest share f.

With a path instead of a share, that file, folder or glob is held out, and taken out of the training data if
it is part of it.
"""

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from arbitor.data.contents import is_jsonl, open_contents
from arbitor.data.holding_out import exact_share, spelled_number
from arbitor.data.sources import Skipped, Source, find_sources
from arbitor.data.store import Store
from arbitor.data.stream import ByteStream
from arbitor.errors import UserError

_OWN_SHARE = Fraction(1, 10)
_EMBEDDED_SHARE = Fraction(1, 20)
_NOT_EMBEDDED = ("site-packages", "dist-packages", "test*", "idlelib")


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteCorpus:
    """What a run learns from and what it is measured on.

    Attributes:
        train: Training data.
        held_out: Held-out data; no byte of a file range is in both.
        description: One line for the user: what it is, how much, what was held out and what was skipped.
        has_fields: Whether some of it came from .jsonl files.
    """

    train: ByteStream
    held_out: ByteStream
    description: str
    has_fields: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Split:
    """Files to train on and to hold out; `tail` is the share of every training file held out as well."""

    name: str
    train: list[Source]
    held_out: list[Source]
    rule: str
    tail: Fraction = Fraction(0)


def open_corpus(
    data: Sequence[str] = (), held_out: str | None = None, field: str = "text", *, min_bytes: int = 1
) -> ByteCorpus:
    """Open `data` (files, folders, globs; none of them: the embedded corpus) and hold a part out.

    `held_out` is a path or a share such as `0.1`; `field` names the text's field in .jsonl files. Both parts
    must have at least `min_bytes` bytes, the context length.

    Raises:
        UserError: for data that is missing, unreadable, malformed, empty or too short; one line.
    """
    share = None if held_out is None else held_out_share(held_out)
    held_out_path = held_out if share is None else None
    skipped = Skipped()
    if data:
        split = _own_split(data, held_out_path, share or _OWN_SHARE, skipped)
    else:
        split = _embedded_split(held_out_path, share or _EMBEDDED_SHARE, skipped)
    store = Store()
    train = open_contents(split.train, field, store)
    kept_out = open_contents(split.held_out, field, store)
    if split.tail:
        cuts = [len(content) - int(len(content) * split.tail) for content in train]
        kept_out += [content[cut:] for content, cut in zip(train, cuts, strict=True)]
        train = [content[:cut] for content, cut in zip(train, cuts, strict=True)]
    corpus = ByteCorpus(
        train=ByteStream(train),
        held_out=ByteStream(kept_out),
        description=_description(split, train, kept_out, skipped, store),
        has_fields=any(is_jsonl(source.path) for source in (*split.train, *split.held_out)),
    )
    larger_share = "" if held_out_path else "a larger --held-out "
    for part, stream, name, advice in (
        ("training", corpus.train, split.name, ""),
        ("held-out", corpus.held_out, held_out_path or split.name, larger_share),
    ):
        if len(stream) < min_bytes:
            raise UserError(
                f"{name}: the {part} data is {len(stream):,} bytes long, shorter than the context of"
                f" {min_bytes:,} bytes; give more data, {advice}or a smaller --ctx"
            )
    return corpus


def held_out_share(held_out: str) -> Fraction | None:
    """The share that `held_out` spells, or None if it is a path. Exact, so 0.1 of 1000 bytes are 100."""
    number = spelled_number(held_out)
    if number is None:
        return None
    if not 0 < number < 1:
        raise UserError(f"--held-out must be a path or a share above 0 and below 1, got {held_out!r}")
    return exact_share(number)


def _own_split(data: Sequence[str], held_out_path: str | None, share: Fraction, skipped: Skipped) -> _Split:
    sources = find_sources(data, skipped)
    name = data[0] if len(data) == 1 else f"{data[0]} and {len(data) - 1} more"
    if held_out_path is not None:
        return _path_split(name, sources, held_out_path, skipped)
    if len(sources) * share < 1:
        each = "of every file " if len(sources) > 1 else ""
        rule = f"the last {_percent(share)} {each}held out"
        return _Split(name=name, train=sources, held_out=[], rule=rule, tail=share)
    # File i is the last of a (1/share)th of the files exactly where the running share passes an integer.
    is_out = [int((i + 1) * share) > int(i * share) for i in range(len(sources))]
    return _Split(
        name=name,
        train=[source for source, out in zip(sources, is_out, strict=True) if not out],
        held_out=[source for source, out in zip(sources, is_out, strict=True) if out],
        rule=f"{sum(is_out):,} of {len(sources):,} files held out",
    )


def _embedded_split(held_out_path: str | None, share: Fraction, skipped: Skipped) -> _Split:
    library = Path(sysconfig.get_path("stdlib"))
    sources = embedded_sources(library)
    if not sources:
        raise UserError(
            "this Python has no sources of its standard library to train on; give your own with --data"
        )
    name = f"embedded corpus ({len(sources):,} files of Python's standard library)"
    if held_out_path is not None:
        return _path_split(name, sources, held_out_path, skipped)
    is_out = [is_held_out(source.path.relative_to(library).as_posix(), share) for source in sources]
    return _Split(
        name=name,
        train=[source for source, out in zip(sources, is_out, strict=True) if not out],
        held_out=[source for source, out in zip(sources, is_out, strict=True) if out],
        rule=f"{sum(is_out):,} files held out",
    )


def _path_split(name: str, sources: list[Source], held_out_path: str, skipped: Skipped) -> _Split:
    held_out = find_sources([held_out_path], skipped)
    real = {os.path.realpath(source.path) for source in held_out}
    train = [source for source in sources if os.path.realpath(source.path) not in real]
    if not train:
        raise UserError(f"--held-out {held_out_path!r} holds out all of {name}; nothing is left to train on")
    return _Split(name=name, train=train, held_out=held_out, rule=f"held out: {held_out_path}")


def embedded_sources(library: Path) -> list[Source]:
    """The `*.py` files under `library` but for tests, idlelib and installed packages, sorted by path."""
    sources = []
    for root, folders, names in os.walk(library):
        folders[:] = [name for name in folders if not _is_left_out(name)]
        for name in names:
            if not name.endswith(".py") or _is_left_out(name):
                continue
            path = Path(root, name)
            if path.is_file() and os.access(path, os.R_OK) and (status := path.stat()).st_size:
                sources.append(Source(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns))
    return sorted(sources, key=lambda source: source.path.as_posix())


def is_held_out(relative_path: str, share: Fraction = _EMBEDDED_SHARE) -> bool:
    """Whether a file of the embedded corpus is held out: by a hash of its path, alike on every machine."""
    digest = hashlib.blake2b(relative_path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return Fraction(int.from_bytes(digest, "little"), 1 << 64) < share


def _is_left_out(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_EMBEDDED)


def _description(
    split: _Split, train: list[np.ndarray], held_out: list[np.ndarray], skipped: Skipped, store: Store
) -> str:
    parts = [
        f"{split.name}: {_size(train)} to train on",
        f"{_size(held_out)} held out ({split.rule})",
        str(skipped),
        f"kept in memory, the cache cannot be written ({store.unwritable})" if store.unwritable else "",
    ]
    return "; ".join(part for part in parts if part)


def _size(contents: list[np.ndarray]) -> str:
    count = sum(len(content) for content in contents)
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count:,} bytes"


def _percent(share: Fraction) -> str:
    return f"{float(share):.4g}" if share < Fraction(1, 100) else f"{float(100 * share):.3g} %"
