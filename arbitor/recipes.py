"""What the scripts in `training/` add to the commands behind them: larger settings where there is a GPU, and
the flag of their medium.
"""

import sys
from collections.abc import Sequence

from arbitor.cli import interrupted

GPU_PRESET = "small"
# With one of these, the settings are chosen already, or there are none to choose.
_CHOSEN = ("--preset", "--config", "--resume", "--base", "--reconstruct", "--hear", "--say", "--sample")
_ASKING = ("--help", "-h", "--version")


def with_preset(tokens: Sequence[str]) -> list[str]:
    """The arguments, with `--preset small` behind them if there is a GPU to use and they choose no settings.

    Without a GPU the commands begin with `tiny`.
    """
    given = list(tokens)
    names = {token.partition("=")[0] for token in given}
    if names.intersection((*_CHOSEN, *_ASKING)) or not _uses_gpu(given):
        return given
    return [*given, "--preset", GPU_PRESET]


def with_flag(tokens: Sequence[str], flag: str, *others: str) -> list[str]:
    """The arguments behind `flag`, unless they have it already, by its name or another one."""
    return [*tokens] if {flag, *others}.intersection(tokens) else [flag, *tokens]


def _uses_gpu(tokens: Sequence[str]) -> bool:
    device = "auto"
    for token, following in zip(tokens, [*tokens, ""][1:], strict=True):
        name, _, value = token.partition("=")
        if name == "--device":
            device = value or following
    if device not in ("auto", "cuda"):
        return False  # or a word that the command will refuse
    try:
        import torch

        return torch.cuda.is_available()
    except KeyboardInterrupt:  # the import takes a second, ahead of the command that would say so
        sys.exit(interrupted())
