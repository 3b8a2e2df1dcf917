"""Sets of instructions made of a text's lines."""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arbitor.data.sources import Skipped, find_sources
from arbitor.errors import UserError

HELD_OUT = 10  # one part in so many, the last one

Pair = tuple[str, str]  # prompt and answer


@dataclass(frozen=True, slots=True)
class Text:
    """A text in two parts that are cut between lines.

    Attributes:
        train: lines to learn from.
        held_out: lines that follow them, to measure on.
    """

    train: list[str]
    held_out: list[str]

    @property
    def fingerprint(self) -> str:
        """Digest of both parts, 12 hexadecimal digits."""
        whole = "\n".join(self.train) + "\0" + "\n".join(self.held_out)
        return hashlib.blake2b(whole.encode(), digest_size=6).hexdigest()


def read_text(data: str) -> Text:
    """The lines of a file, or of a folder's files one after another.

    Raises:
        UserError: there is nothing to read, or too little for two parts.
    """
    lines: list[str] = []
    for source in find_sources([data], Skipped()):
        lines += source.path.read_text(encoding="utf-8", errors="replace").splitlines()
    cut = len(lines) - len(lines) // HELD_OUT
    if cut == len(lines):
        raise UserError(f"{data} has {len(lines)} lines; at least {HELD_OUT} are needed")
    return Text(lines[:cut], lines[cut:])


def upper(lines: Sequence[str], fits: Callable[[str], bool]) -> list[Pair]:
    """Every line that fits, to be said in upper case."""
    return [(f"Shout: {line}", line.upper()) for line in lines if fits(line)]


def following(lines: Sequence[str], fits: Callable[[str], bool]) -> list[Pair]:
    """Every line that fits and whose next line fits, too; that one is the answer."""
    return [(line, after) for line, after in itertools.pairwise(lines) if fits(line) and fits(after)]


SETS = {"upper": upper, "next": following}


def make_set(name: str, lines: Sequence[str], shortest: int, longest: int) -> list[Pair]:
    """The pairs of a set, of lines of so many bytes.

    Raises:
        UserError: no line has such a length.
    """
    pairs = SETS[name](lines, lambda line: shortest <= len(line.encode()) <= longest)
    if not pairs:
        raise UserError(f"no lines of {shortest} to {longest} bytes for the set {name!r}")
    return pairs


def shuffled(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The same prompts and the same answers, each answer beside a prompt that chance picks."""
    answers = [answer for _, answer in pairs]
    random.Random(seed).shuffle(answers)
    return [(prompt, answer) for (prompt, _), answer in zip(pairs, answers, strict=True)]


def write_set(path: Path, pairs: Sequence[Pair]) -> None:
    """JSON Lines, as `arbitor finetune --data` reads them."""
    lines = [json.dumps({"prompt": prompt, "response": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
