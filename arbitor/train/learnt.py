"""What checkpoints have learnt, by the settings beside them, and what is said of one that does not fit."""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from arbitor.config import load_config
from arbitor.errors import UserError

WORDS = {
    "text": "to continue text",
    "chat": "to answer",
    "image": "to name images",
    "codec": "the codec of sounds",
    "listen": "to listen",
    "speak": "to speak",
    "autoencoder": "the autoencoder of clips",
    "flow": "to draw clips",
}
_TRIED = {
    "chat": "arbitor chat {}",
    "image": "arbitor generate {} --image FILE --temperature 0",
    "text": "arbitor generate {}",
    "speak": "arbitor audio --say TEXT --run {}",
    "listen": "arbitor audio --hear FILE --run {}",
    "codec": "arbitor audio --reconstruct FILE --run {}",
    "flow": "arbitor diffusion --sample TEXT --run {}",
    "autoencoder": "arbitor diffusion --task flow --base {}",
}
"""Of what a run has learnt, the first one here is what it is tried with."""
_MADE = {
    "text": "arbitor train",
    "image": "arbitor train --enable-vision",
    "codec": "arbitor audio",
    "listen": "arbitor audio --task listen",
    "speak": "arbitor audio --task speak",
    "flow": "arbitor diffusion",
}
_MADE_FROM = {
    "codec": {
        "listen": "arbitor audio --task listen --base {}",
        "speak": "arbitor audio --task speak --base {}",
    },
    "autoencoder": {"flow": "arbitor diffusion --task flow --base {}"},
}
_ADDED = {
    "codec": "arbitor audio --base {}",
    "autoencoder": "arbitor diffusion --task codec --base {}",
}
"""How a run without a part starts one that has it."""


def learnt_of(checkpoint: Path) -> tuple[str, ...] | None:
    """What a checkpoint has learnt, of `arbitor.config.LEARNT`; None if no settings beside it can be read."""
    try:
        return load_config(checkpoint / "config.toml").learnt
    except (UserError, OSError):
        return None


def tells_before(checkpoint: Path) -> bool:
    """Whether settings beside a checkpoint say what was learnt before; of earlier versions they do not."""
    try:
        return load_config(checkpoint / "config.toml").data.learnt_before is not None
    except (UserError, OSError):
        return False


def lacks(learnt: Collection[str] | None, wanted: Collection[str]) -> bool:
    """Whether it is known that nothing of what is `wanted` was learnt."""
    return bool(wanted) and learnt is not None and not set(wanted).intersection(learnt)


def try_command(name: str, learnt: Collection[str]) -> str:
    """A command line that tries a run, given by its name or path, that has learnt something."""
    return next(command for what, command in _TRIED.items() if what in learnt).format(shlex.quote(name))


def maker(wanted: Sequence[str]) -> str:
    """A command line that makes a run which has learnt the first of what is `wanted`; see `lacks`."""
    return _MADE[wanted[0]] if wanted else _MADE["text"]


def refusal(
    checkpoint: Path, name: str, learnt: Collection[str], wanted: Sequence[str], other: str | None
) -> str:
    """What is said of a checkpoint that has learnt nothing of what is `wanted`.

    Args:
        checkpoint: which one.
        name: its run, or its path, as commands take it.
        learnt: what it has learnt.
        wanted: see `lacks`; the first of them stands for all.
        other: name of a run that has learnt it, if there is one.
    """
    made = maker(wanted)
    for part, commands in _MADE_FROM.items():
        if part in learnt and wanted[0] in commands:
            made = commands[wanted[0]].format(shlex.quote(name))
    advice = f"`{made}` makes a run that has" if other is None else f"the run {other!r} has"
    return (
        f"{checkpoint} has learnt {_in_words(learnt)}, not {WORDS[wanted[0]]}: {advice}; what this one is "
        f"for: {try_command(name, learnt)}"
    )


def assumption(checkpoint: Path, learnt: Collection[str], wanted: Sequence[str]) -> str:
    """What is said of a checkpoint that may have learnt what is `wanted`, before its settings said so.

    Args:
        checkpoint: which one.
        learnt: what it is known to have learnt.
        wanted: see `refusal`.
    """
    return (
        f"{checkpoint} has learnt {_in_words(learnt)}; what it learnt before, the earlier version that made "
        f"it did not write down: going on as if it had learnt {WORDS[wanted[0]]}"
    )


def refusal_of_base(base: str, task: str, part: str) -> str:
    """What is said of a base, as --base names it, without the part of `_ADDED` that a task needs."""
    missing, command = WORDS[part].removeprefix("the "), _ADDED[part].format(shlex.quote(base))
    return (
        f"--task {task}: {base} has no {missing}; first train one that starts from it, with {command}, and "
        "give that run as --base"
    )


def _in_words(learnt: Collection[str]) -> str:
    return " and ".join(WORDS[what] for what in WORDS if what in learnt)
