"""Where files lie that can be made anew."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/arbitor`, or `~/.cache/arbitor`.

    Raises:
        RuntimeError: there is no home.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()) / "arbitor"
