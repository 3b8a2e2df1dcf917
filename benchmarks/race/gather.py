"""All text of a machine in one folder, for races that are longer than a package or two.

`python -m benchmarks.race.gather FOLDER [MORE ...]` copies the text files of Python's library, the installed
packages, C headers, documentation and of MORE folders, each distinct content once. Files are named by a hash
of what is in them, so their order, and which of them are held out, is that of no folder.
"""

import argparse
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

SOURCES = (".py", ".pyi", ".h", ".hpp", ".cuh", ".cpp", ".cu", ".c", ".inl", ".cmake")
SUFFIXES = frozenset((*SOURCES, ".md", ".rst", ".txt"))
MAX_FILE_BYTES = 1_500_000  # larger ones are generated
SYSTEM = ("/usr/include", "/usr/share/doc", "/usr/lib/python3", "/usr/share/perl", "/usr/local/lib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the folder; exit code 2: it is there already, or cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race.gather", description=__doc__)
    parser.add_argument("folder", type=Path, help="to make")
    parser.add_argument("more", nargs="*", help="folders beside those of the machine")
    options = parser.parse_args(arguments)
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), *SYSTEM, *options.more]
    try:
        options.folder.mkdir(parents=True)
        files, size = gather(roots, options.folder)
    except OSError as error:
        print(f"benchmarks.race.gather: error: {options.folder}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{files:,} files, {size / 1e6:.1f} MB in {options.folder}")
    return 0


def gather(roots: Iterable[str], folder: Path) -> tuple[int, int]:
    """Copy each distinct text below the roots into a folder that is there; how many, and their bytes."""
    size = 0
    seen = set()
    for path in _candidates(roots):
        try:
            content = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b""
        except OSError:  # gone, or not ours to read
            continue
        name = hashlib.blake2b(content, digest_size=16).hexdigest()
        if not content or b"\0" in content or name in seen:
            continue
        seen.add(name)
        size += len(content)
        (folder / f"{name}.txt").write_bytes(content)
    return len(seen), size


def _candidates(roots: Iterable[str]) -> Iterator[Path]:
    for root in roots:
        for place, _, names in os.walk(root):
            for name in names:
                path = Path(place, name)
                if path.suffix in SUFFIXES and path.is_file():  # no pipe, no dangling link
                    yield path


if __name__ == "__main__":
    sys.exit(main())
