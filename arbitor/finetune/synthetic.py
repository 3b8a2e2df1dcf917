"""The embedded instruction set: small tasks with one right answer each, drawn by code.

Adding and subtracting numbers below 100, reversing and repeating a made-up word, upper case, its first and
last letter, and its length. There is nothing to download, and what is learnt shows at once.
"""

import random
from collections.abc import Callable

from arbitor.finetune.instructions import Message

NUM_CONVERSATIONS = 4000
DESCRIPTION = "embedded instructions (arithmetic, reversing, copying)"
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvz"


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 3)))


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"What is {a} + {b}?", str(a + b)


def _subtract(rng: random.Random) -> tuple[str, str]:
    a, b = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
    return f"What is {a} - {b}?", str(a - b)


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"Reverse {word}.", word[::-1]


def _repeat(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"Say {word}.", word


def _upper(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"Say {word} loudly.", word.upper() + "!"


def _first(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"First letter of {word}?", word[0]


def _last(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"Last letter of {word}?", word[-1]


def _length(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"How many letters has {word}?", str(len(word))


_TASKS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    *(_add, _subtract, _reverse, _repeat, _upper, _first, _last, _length),
)


def synthetic_conversations(count: int = NUM_CONVERSATIONS, seed: int = 0) -> list[list[Message]]:
    """`count` different conversations of one question and its answer, equal for equal seeds everywhere."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = _TASKS[len(found) % len(_TASKS)](rng)
        found.setdefault(question, answer)
    return [[Message("user", q.encode()), Message("assistant", a.encode())] for q, a in found.items()]
