"""The text that a comparison trains on, the same for every contestant."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arbitor.data import open_corpus
from arbitor.errors import UserError
from benchmarks.learning.sizes import Size

MAX_BYTES = 64_000_000
MAX_FILE_BYTES = 1_000_000  # larger sources are generated tables
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Texts:
    """What is trained on and what is measured on, uint8 arrays, and a line about where they come from."""

    train: np.ndarray
    held_out: np.ndarray
    description: str


def load_texts(size: Size, data: Sequence[str] = (), held_out: str | None = None) -> Texts:
    """The texts of a size, or of the user's own `data` (files, folders, globs) if any is given.

    Raises:
        UserError: no data where the size needs some, or data that cannot be used.
    """
    if data or size.corpus == "library":
        corpus = open_corpus(data, held_out, "text", min_bytes=size.model.ctx)
        return Texts(corpus.train.as_array(), corpus.held_out.as_array(), corpus.description)
    if size.corpus == "given":
        raise UserError(f"--size {size.name} needs --data PATH, the text to train on")
    paths = sysconfig.get_paths()
    return python_sources([Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")])


def python_sources(folders: Sequence[Path], max_bytes: int = MAX_BYTES) -> Texts:
    """Python sources under `folders`, each distinct content once, in an order that hashes decide.

    The order of files is that of a hash of their path within the folder, and which ones are held out depends
    on a hash of their content, so one set of installed packages always gives the same texts, and two copies
    of a file never stand on both sides.

    Args:
        folders: searched in any depth; one inside another does no harm.
        max_bytes: where to stop.
    """
    files: dict[Path, bytes] = {}
    for name, path in _sources(folders):
        files.setdefault(path.resolve(), _digest(name.encode()))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    seen: set[bytes] = set()
    total = 0
    for path in sorted(files, key=lambda path: (files[path], str(path))):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        digest = _digest(content)
        if not content or len(content) > MAX_FILE_BYTES or digest in seen:
            continue
        seen.add(digest)
        total += len(content)
        parts[int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0].append(content)
        if total >= max_bytes:
            break
    train, held_out = (np.frombuffer(b"".join(parts[side]), dtype=np.uint8).copy() for side in (False, True))
    if not len(train) or not len(held_out):
        raise UserError("found no Python sources to train on; give your own text with --data")
    fingerprint = _digest(train.tobytes()).hex()[:12]
    description = (
        f"{len(seen):,} Python sources of the standard library and installed packages:"
        f" {len(train) / 1e6:.1f} MB to train on, {len(held_out) / 1e6:.1f} MB held out"
        f" (fingerprint {fingerprint})"
    )
    return Texts(train, held_out, description)


def _sources(folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    for folder in folders:
        for path in folder.rglob("*.py"):
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
