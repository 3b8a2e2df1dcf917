"""What `--held-out` asks for, and how items are held out by a share or a number."""

from collections import Counter
from fractions import Fraction

from arbitor.errors import UserError


def spelled_number(held_out: str) -> float | None:
    """The number that `held_out` spells, or None if it is something else, such as a path."""
    try:
        return float(held_out)
    except ValueError:
        return None


def exact_share(number: float) -> Fraction:
    """A share between 0 and 1 as it is written, so that 0.1 of 1000 are 100."""
    return Fraction(repr(number))


def numbered_split(count: int, held_out: str, unit: str, choices: str) -> tuple[set[int], str]:
    """Items to hold out: the last ones, or a share that is spread evenly over all.

    Args:
        count: of all items.
        held_out: spells how many, from 1 on, or a share below 1, which is one item at least if there
            are two.
        unit: what they are, in the plural.
        choices: what else the user may give, for messages: "a path".

    Returns:
        Their numbers, and the rule in words.

    Raises:
        UserError: no such number or share, or it leaves nothing to train on.
    """
    number = float(held_out)
    if number >= 1 and number.is_integer():
        if number >= count:
            raise UserError(f"--held-out {held_out} holds out all of the {count:,} {unit}")
        return set(range(count - int(number), count)), f"the last {int(number):,}"
    if not 0 < number < 1:
        raise UserError(
            f"--held-out must be {choices}, a share above 0 and below 1 or a number of {unit}, "
            f"got {held_out!r}"
        )
    share = exact_share(number)
    out = {n for n in range(count) if int((n + 1) * share) > int(n * share)}
    if not out and count > 1:
        return {count - 1}, "the last one"
    return out, f"one of {float(1 / share):.3g}"


def told(skipped: Counter[str]) -> str:
    """The end of a line that describes data: what could not be used, by reason; empty if all could."""
    reasons = ", ".join(f"{count:,} {why}" for why, count in sorted(skipped.items()))
    return f"; skipped {reasons}" if reasons else ""
