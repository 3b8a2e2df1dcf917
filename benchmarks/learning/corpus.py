"""The text that a comparison trains on, the same for every contestant."""

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arbitor.data import open_corpus
from arbitor.data.corpus import embedded_sources
from arbitor.errors import UserError
from benchmarks.learning.sizes import Size
from benchmarks.learning.table import Row, Table

MAX_BYTES = 64_000_000
MAX_FILE_BYTES = 1_000_000  # larger sources are generated tables
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Texts:
    """What is trained on and what is measured on, uint8 arrays, and a line about where they come from."""

    train: np.ndarray
    held_out: np.ndarray
    description: str

    @property
    def fingerprint(self) -> str:
        """Digest of both texts, 12 hexadecimal digits."""
        return _digest(_digest(self.train.tobytes()) + _digest(self.held_out.tobytes())).hex()[:12]


def load_texts(size: Size, data: Sequence[str] = (), held_out: str | None = None) -> Texts:
    """The texts of a size, or of the user's own `data` (files, folders, globs) if any is given.

    Raises:
        UserError: no data where the size needs some, or data that cannot be used.
    """
    if data:
        corpus = open_corpus(data, held_out, "text", min_bytes=size.model.ctx)
        return Texts(corpus.train.as_array(), corpus.held_out.as_array(), corpus.description)
    if size.corpus == "given":
        raise UserError(f"--size {size.name} needs --data PATH, the text to train on")
    library = Path(sysconfig.get_path("stdlib"))
    if size.corpus == "library":
        return distinct_sources((library, source.path) for source in embedded_sources(library))
    folders = [library, *(Path(sysconfig.get_path(name)) for name in ("platstdlib", "purelib", "platlib"))]
    return distinct_sources((folder, path) for folder in folders for path in folder.rglob("*.py"))


def distinct_sources(files: Iterable[tuple[Path, Path]], max_bytes: int = MAX_BYTES) -> Texts:
    """Python sources, each distinct content once, in an order that hashes decide.

    The order of files is that of a hash of their path within their folder, and which ones are held out
    depends on a hash of their content. So one set of files always gives the same texts, any stretch of a text
    is a fair mixture, and two copies of a file never stand on both sides.

    Args:
        files: pairs of a folder and a file in it; of a file that comes several times the first counts.
        max_bytes: where to stop.
    """
    order: dict[Path, bytes] = {}
    for folder, path in files:
        order.setdefault(path, _digest(str(path)[len(str(folder)) :].encode("utf-8", "surrogateescape")))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    seen: set[bytes] = set()
    total = 0
    for path in sorted(order, key=lambda path: (order[path], str(path))):
        if not path.is_file() or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
            continue
        content = path.read_bytes()
        digest = _digest(content)
        if digest in seen:
            continue
        seen.add(digest)
        total += len(content)
        parts[int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0].append(content)
        if total >= max_bytes:
            break
    train, held_out = (np.frombuffer(b"".join(parts[side]), dtype=np.uint8).copy() for side in (False, True))
    if not len(train) or not len(held_out):
        raise UserError("found no Python sources to train on; give your own text with --data")
    description = (
        f"{len(seen):,} distinct Python sources of this machine: {len(train) / 1e6:.2f} MB to train on,"
        f" {len(held_out) / 1e6:.2f} MB held out"
    )
    return Texts(train, held_out, description)


def keep_to_one_text(table: Table, texts: Texts, kept: Sequence[Row]) -> None:
    """Refuse to put rows of one text beside rows of another; the text is noted in `<results>.text`.

    Args:
        table: that rows go to. Rows of another text that are not kept leave it.
        texts: what the coming runs read.
        kept: the rows that are there and will not be measured again.

    Raises:
        UserError: some of them come from another text; nothing was changed then.
    """
    others = sorted({row["text"] for row in kept} - {texts.fingerprint})
    if others:
        raise UserError(
            f"{table.path} has rows of another text ({others[0] or 'unknown'}, this is {texts.fingerprint});"
            " give that text, another --results folder, or --force for all contestants"
        )
    table.keep_text(texts.fingerprint)
    note = table.path.with_suffix(".text")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(
        f"{texts.fingerprint} {len(texts.train)} bytes to train on, {len(texts.held_out)} held out\n"
    )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
