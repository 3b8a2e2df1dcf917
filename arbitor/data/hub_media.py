"""Images or recordings of a data set of the hub, read as a stream and shuffled block by block.

Of the first `OPENING` examples some are held out. All others are learnt from in blocks of consecutive
examples, each in a random order of its own that follows from the seed and from where the block begins. So at
most two blocks are in memory, the one that is drawn from and the one that is read meanwhile, and a position
is where a block begins and a place in it, which a later process finds again. Behind the last example comes
the first, in other orders.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, TypeVar

import numpy as np

from arbitor.data.holding_out import exact_share, spelled_number, told
from arbitor.data.hub import CAPTION_FIELDS, HubExamples
from arbitor.data.media import UnusableTextError, cleaned
from arbitor.data.sampler import random_bits
from arbitor.errors import UserError

OPENING = 1000  # examples, of which some are held out
BLOCK_ITEMS = 512
BLOCK_BYTES = 128 << 20  # of what a block's items are decoded to
MAX_UNUSABLE = 10_000  # examples in a row, after which no usable one is to be expected
OWN_SHARE = "0.1"
_AUGMENT_KEY = 0x5EED
_STATE_KEYS = ("seed", "drawn", "epoch", "block", "place", "block_digest", "digest")

Item = TypeVar("Item")


class SkippedError(Exception):
    """Why an example cannot be used, in words that follow "skipped 3"."""


@dataclass(frozen=True, slots=True)
class _Block(Generic[Item]):
    """Items of consecutive examples.

    Attributes:
        epoch: how often the data set was read through before.
        first: number of the example that it begins with.
        items: one or more.
        digest: of the examples, below 2^63.
    """

    epoch: int
    first: int
    items: list[Item]
    digest: int


class HubMedia(Generic[Item]):
    """What of a data set can be learnt from, and what is held out.

    Args:
        name: `hf:NAME[:SPLIT[:FIELD]]`.
        kind: "Image" or "Audio".
        load: an item of encoded content and a text, or SkippedError.
        size_of: bytes of an item in memory.
        limit: bytes of a text that count.
        held_out: the share of the first `OPENING` examples to hold out (spread evenly; None is a tenth), how
            many of the first ones, or "0" for none.

    Attributes:
        examples: of the data set.
        held_out: items.
        description: one line for the user, of what is held out and what of it was skipped.

    Raises:
        UserError: it cannot be read, or there is nothing to learn from.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        load: Callable[[bytes, bytes], Item],
        size_of: Callable[[Item], int],
        limit: int,
        held_out: str | None,
    ) -> None:
        self.examples = HubExamples(name)
        self._kind, self._decode, self._limit = kind, load, limit
        self.size_of = size_of
        self._is_out, last, rule = _rule(held_out)
        self.held_out: list[Item] = []
        skipped: Counter[str] = Counter()
        digest = hashlib.blake2b(digest_size=8)
        count = out = 0
        # One beyond those among which some are held out, so that there is one to learn from.
        for count, example in enumerate(self.examples.from_number(0), 1):
            if self._is_out(count - 1):
                out += 1
                try:
                    self.held_out.append(self.load(example, digest))
                except SkippedError as error:
                    skipped[str(error)] += 1
            if count > last:
                break
        if count <= out:
            raise UserError(
                f"{self.examples.spec} has no more than the {count:,} examples that are held out; give a "
                "larger data set, or a smaller --held-out"
            )
        self.fingerprint = int.from_bytes(digest.digest(), "little") >> 1
        self.description = f"{self.examples.spec}: a stream, shuffled {BLOCK_ITEMS:,} at a time"
        if rule:
            self.description += f"; {len(self.held_out):,} held out ({rule}){told(skipped)}"

    def load(self, example: dict[str, Any], digest: Any) -> Item:
        """The item of an example, which the digest takes in.

        Raises:
            SkippedError: it cannot be used.
        """
        text = self.examples.text_of(example, CAPTION_FIELDS)
        content = self.examples.medium_of(example, self._kind) or b""
        encoded = text.encode("utf-8", "replace")
        digest.update(len(encoded).to_bytes(8, "little") + encoded + len(content).to_bytes(8, "little"))
        digest.update(content)
        try:
            caption = cleaned(encoded, self._limit)
        except UnusableTextError as error:
            raise SkippedError(str(error)) from error
        if not caption:
            raise SkippedError("with an empty caption")
        if not content:
            raise SkippedError("without content")
        return self._decode(content, caption)

    def blocks(self, epoch: int, first: int, skipped: "Skips") -> Iterator[_Block[Item] | None]:
        """Blocks from the one that begins with example `first` on, without end.

        Yields:
            A block when its last example was read, None for every other example.
        """
        while True:
            items: list[Item] = []
            size = unusable = 0
            found = False
            digest = hashlib.blake2b(digest_size=8)
            for number, example in enumerate(self.examples.from_number(first), first):
                if not self._is_out(number):
                    try:
                        items.append(self.load(example, digest))
                    except SkippedError as error:
                        skipped.count(number, str(error))
                        unusable += 1
                    else:
                        size += self.size_of(items[-1])
                        unusable, found = 0, True
                if unusable > MAX_UNUSABLE:
                    raise UserError(
                        f"{self.examples.spec}: {unusable:,} examples in a row cannot be used"
                        f"{skipped.reasons}; give other data"
                    )
                if len(items) == BLOCK_ITEMS or size >= BLOCK_BYTES:
                    yield _made(epoch, first, items, digest)
                    items, size, first, digest = [], 0, number + 1, hashlib.blake2b(digest_size=8)
                else:
                    yield None
            if items:
                yield _made(epoch, first, items, digest)
            if not found and not first:
                raise UserError(f"{self.examples.spec}: no example can be used to train on{skipped.reasons}")
            epoch, first = epoch + 1, 0


class Skips:
    """Examples of a stream that could not be used, each counted once.

    Args:
        name: of the data set.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._skipped: Counter[str] = Counter()
        self._seen = 0
        self._told = 0

    def count(self, number: int, why: str) -> None:
        """Note the example of that number unless it, or a later one, was seen before."""
        if number >= self._seen:
            self._skipped[why] += 1
            self._seen = number + 1

    @property
    def reasons(self) -> str:
        """The end of a line: what was skipped, by reason."""
        return told(self._skipped)

    def news(self) -> list[str]:
        """A line where there are twice as many as when it was last asked for one."""
        if (total := self._skipped.total()) < max(1, 2 * self._told):
            return []
        self._told = total
        return [f"{self._name}{self.reasons} so far"]


class StreamSampler(Generic[Item]):
    """Draws items of a stream; what comes next is a function of the seed and the position.

    Args:
        media: where they are from.
        batch: items a draw.
        seed: any non-negative integer below 2^63.
    """

    def __init__(self, media: HubMedia[Item], batch: int, seed: int) -> None:
        self._media, self._batch, self._seed = media, batch, seed
        self._skips = Skips(str(media.examples.spec))
        self._drawn = self._epoch = self._first = self._place = 0
        self._digest: int | None = None  # of the block that the position is in
        self._block: _Block[Item] | None = None
        self._order = np.empty(0, dtype=np.int64)
        self._blocks: Iterator[_Block[Item] | None] = iter(())
        self._ahead: _Block[Item] | None = None

    def next_items(self) -> tuple[list[Item], np.ndarray]:
        """The next items, and 64 random bits for each, uint64 [B]."""
        counters = np.arange(self._drawn, self._drawn + self._batch, dtype=np.uint64)
        items = [self._next() for _ in range(self._batch)]
        self._drawn += self._batch
        return items, random_bits(self._seed ^ _AUGMENT_KEY, counters)

    def state(self) -> dict[str, int]:
        """Where the sampler stands, as plain integers."""
        block_digest = self._digest or 0
        values = (self._seed, self._drawn, self._epoch, self._first, self._place, block_digest)
        return dict(zip(_STATE_KEYS, (*values, self._media.fingerprint), strict=True))

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from `state`, exactly.

        Raises:
            UserError: if `state` is not that of such a sampler, or was taken on other data.
        """
        if sorted(state) != sorted(_STATE_KEYS):
            raise UserError(
                f"the sampler state is not that of a stream: the run was trained on other data than "
                f"{self._media.examples.spec} (start a new run)"
            )
        for key in _STATE_KEYS:
            if type(state[key]) is not int or not 0 <= state[key] < 1 << 63:
                raise UserError(
                    f"sampler state: {key} must be a non-negative integer, got {state[key]!r:.80}"
                )
        if state["digest"] != self._media.fingerprint:
            raise self._other_data()
        self._seed, self._drawn = state["seed"], state["drawn"]
        self._epoch, self._first, self._place = state["epoch"], state["block"], state["place"]
        self._digest = state["block_digest"] if self._drawn else None
        self._block = None

    def news(self) -> list[str]:
        """Lines for the user about what happened since they were last asked for."""
        return self._media.examples.news() + self._skips.news()

    def _next(self) -> Item:
        if self._block is None:
            self._open()
        elif self._ahead is None:
            self._ahead = next(self._blocks)
        assert self._block is not None
        if self._place == len(self._block.items):
            while self._ahead is None:
                self._ahead = next(self._blocks)
            self._take(self._ahead)
            self._place = 0
        item = self._block.items[self._order[self._place]]
        self._place += 1
        return item

    def _open(self) -> None:
        """Read the block that the position is in."""
        self._blocks = self._media.blocks(self._epoch, self._first, self._skips)
        block = None
        while block is None:
            block = next(self._blocks)
        changed = self._digest is not None and self._digest != block.digest
        if changed or (block.epoch, block.first) != (self._epoch, self._first):
            raise self._other_data()
        self._take(block)

    def _take(self, block: _Block[Item]) -> None:
        self._block, self._ahead = block, None
        self._epoch, self._first, self._digest = block.epoch, block.first, block.digest
        generator = np.random.Generator(np.random.Philox(key=[self._seed, block.epoch << 40 | block.first]))
        self._order = generator.permutation(len(block.items))

    def _other_data(self) -> UserError:
        return UserError(
            f"{self._media.examples.spec} is not what it was; an exact resume needs the same data (start a "
            "new run to train on other data)"
        )


def _made(epoch: int, first: int, items: list[Item], digest: Any) -> _Block[Item]:
    return _Block(epoch, first, items, int.from_bytes(digest.digest(), "little") >> 1)


def _rule(held_out: str | None) -> tuple[Callable[[int], bool], int, str]:
    """Whether the example of a number is held out, how many the first are among which some are, and the rule
    in words; empty if none is.

    Raises:
        UserError: no such share or number.
    """
    if held_out == "0":
        return lambda number: False, 0, ""
    given = OWN_SHARE if held_out is None else held_out
    value = spelled_number(given)
    if value is not None and value.is_integer() and 1 <= value < OPENING:
        most = int(value)
        return lambda number: number < most, most, f"the first {most:,}"
    if value is None or not 0 < value < 1:
        raise UserError(
            f"--held-out of a data set of the hub must be a path, a share above 0 and below 1 or a number of "
            f"examples below {OPENING:,}, got {given!r}"
        )
    share: Fraction = exact_share(value)

    def spread(number: int) -> bool:
        return number < OPENING and int((number + 1) * share) > int(number * share)

    return spread, OPENING, f"one of {float(1 / share):.3g} of its first {OPENING:,}"
