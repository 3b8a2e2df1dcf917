"""Documents read in order: every row of a batch walks through one in consecutive windows, then takes another.

A document is framed as three PAD, its bytes, EOS. Every byte and EOS is to be predicted once: a window begins
so far ahead of the end of the one before it that its first prediction is the byte after that one's last.

Shapes: B rows, L = ctx ids each.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

from arbitor.data.corpus import ByteCorpus
from arbitor.data.hub import HubExamples
from arbitor.data.stream import ByteStream
from arbitor.errors import UserError
from arbitor.model.sequencer import WINDOW
from arbitor.model.vocab import EOS, PAD

MAX_EMPTY = 100_000  # documents in a row, after which there is none to be expected
HELD_OUT_EXAMPLES = 100  # of a data set of the hub: its first ones


class Document(Protocol):
    """Bytes of one text."""

    def __len__(self) -> int: ...

    def read(self, first: int, last: int) -> np.ndarray:
        """uint8, from `first` to ahead of `last`."""


class Documents(Protocol):
    """Documents by their numbers, which rise without end: behind the last one comes the first again."""

    def document(self, number: int) -> Document:
        """One of them; rows ask for numbers that hardly differ."""

    def fingerprint(self) -> int:
        """A number below 2^63 that tells these documents from others."""


class Windows(NamedTuple):
    """What rows read next.

    Attributes:
        ids: int64 [B, L].
        counted: bool [B, L], which of them are to be predicted.
        context: int64 [B, L], the ids ahead of them in their documents, PAD where there are none.
    """

    ids: np.ndarray
    counted: np.ndarray
    context: np.ndarray


class _Bytes:
    def __init__(self, content: np.ndarray) -> None:
        self._content = content

    def __len__(self) -> int:
        return len(self._content)

    def read(self, first: int, last: int) -> np.ndarray:
        """See `Document`."""
        return self._content[first:last]


class _Stretch:
    def __init__(self, stream: ByteStream, first: int, length: int) -> None:
        self._stream, self._first, self._length = stream, first, length

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, last: int) -> np.ndarray:
        """See `Document`."""
        return self._stream.window(self._first + first, last - first)


class Stretches:
    """A byte stream in as many equal stretches as there are rows, so that all of it is read.

    Args:
        stream: the bytes; borders of files inside it are ignored.
        count: stretches.
    """

    def __init__(self, stream: ByteStream, count: int) -> None:
        self._stream, self._count = stream, count
        self._fingerprint = stream.fingerprint()
        if len(stream) < count:
            raise UserError(
                f"{len(stream)} bytes of data are too few for {count} rows; give a smaller --batch"
            )

    def document(self, number: int) -> Document:
        """See `Documents`."""
        place = number % self._count
        first, last = (len(self._stream) * n // self._count for n in (place, place + 1))
        return _Stretch(self._stream, first, last - first)

    def fingerprint(self) -> int:
        """See `Documents`."""
        return self._fingerprint


class HubDocuments:
    """Texts of a data set of the hub, those behind the first `skipped` examples; empty ones are passed over
    by the rows.

    Args:
        examples: of the data set.
        skipped: examples that are held out.
        fingerprint: of the held-out text, which stands for the data set: it is never read as a whole.
    """

    def __init__(self, examples: HubExamples, skipped: int, fingerprint: int) -> None:
        self._examples, self._skipped, self._fingerprint = examples, skipped, fingerprint
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._next = 0  # number of the document that the iterator gives next
        self._count: int | None = None  # documents that there are, once the end was seen
        self._kept: dict[int, Document] = {}

    def document(self, number: int) -> Document:
        """See `Documents`."""
        if number not in self._kept and (self._iterator is None or number < self._next):
            self._open(number)
        while number not in self._kept:
            self._kept[self._next] = self._read_one()
            self._next += 1
        return self._kept[number]

    def forget_before(self, number: int) -> None:
        """Let go of documents that no row needs any more."""
        self._kept = {n: document for n, document in self._kept.items() if n >= number}

    def fingerprint(self) -> int:
        """See `Documents`."""
        return self._fingerprint

    def news(self) -> list[str]:
        """Lines for the user about what happened to the data since they were last asked for."""
        return self._examples.news()

    def _open(self, number: int) -> None:
        if self._count is None:
            place = number
        else:
            place = number % self._count
        self._iterator = self._examples.from_number(self._skipped + place)
        self._next = number
        self._kept = {}

    def _read_one(self) -> Document:
        assert self._iterator is not None
        example = next(self._iterator, None)
        if example is None:
            if self._count is None:
                self._count = self._counted()
            self._iterator = self._examples.from_number(self._skipped + self._next % self._count)
            example = next(self._iterator)
        text = self._examples.text_of(example, ("text",)).encode("utf-8", "replace")
        return _Bytes(np.frombuffer(text, dtype=np.uint8))

    def _counted(self) -> int:
        """How many documents there are; read through once, when the end was met."""
        count = sum(1 for _ in self._examples.from_number(self._skipped))
        if not count:
            raise UserError(
                f"{self._examples.spec} holds no more than the {self._skipped} examples that are held out; "
                "give a larger data set"
            )
        return count


class DocumentSampler:
    """Rows that walk through documents.

    Args:
        documents: to read.
        batch: B.
        ctx: L.
        with_context: whether a window is read behind the ids ahead of it. It then overlaps the one before it
            by one id, else by three, which the first prediction needs.

    The state is the document and the place in it of every row, and the number of the next document.
    """

    def __init__(self, documents: Documents, batch: int, ctx: int, *, with_context: bool) -> None:
        self._documents = documents
        self._ctx = ctx
        self._overlap = 1 if with_context else WINDOW
        self._numbers = list(range(batch))
        self._places = [0] * batch
        self._next_number = batch

    def next(self) -> Windows:
        """The next window of every row."""
        self._documents.document(min(self._numbers))  # first, so that what is read goes forward alone
        rows = [self._row(row) for row in range(len(self._numbers))]
        if isinstance(self._documents, HubDocuments):
            self._documents.forget_before(min(self._numbers))
        return Windows(*(np.stack(parts) for parts in zip(*rows, strict=True)))

    def state(self) -> dict[str, Any]:
        """Where the rows stand, as plain integers."""
        return {
            "documents": list(self._numbers),
            "places": list(self._places),
            "next_document": self._next_number,
            "digest": self._documents.fingerprint(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, exactly.

        Raises:
            UserError: if `state` is not that of such a sampler, or was taken on other data.
        """
        numbers, places = state.get("documents"), state.get("places")
        following = state.get("next_document")
        count = len(self._numbers)
        if not _are_places(numbers, count) or not _are_places(places, count):
            raise UserError("the sampler state is not one of documents read in order (start a new run)")
        if type(following) is not int or following < 0:
            raise UserError(f"sampler state: next_document must be a number, got {following!r:.80}")
        if state.get("digest") != self._documents.fingerprint():
            raise UserError(
                "the training data is not what it was; an exact resume needs the same data (start a new run "
                "to train on other data)"
            )
        self._numbers, self._places, self._next_number = list(numbers), list(places), following

    def news(self) -> list[str]:
        """Lines for the user about what happened to the data since they were last asked for."""
        return self._documents.news() if isinstance(self._documents, HubDocuments) else []

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        document = self._documents.document(self._numbers[row])
        empty = 0
        while not len(document):
            if (empty := empty + 1) > MAX_EMPTY:
                raise UserError(f"{MAX_EMPTY:,} documents in a row are empty; give other data")
            document = self._take_next(row)
        place, length = self._places[row], len(document) + WINDOW + 1
        ids = self._framed(document, place, place + self._ctx)
        context = self._framed(document, place - self._ctx, place)
        targets = np.arange(place, place + self._ctx)
        first = max(WINDOW, place + self._overlap)
        counted = (targets >= first) & (targets < length)
        if place + self._ctx >= length:
            self._take_next(row)
        else:
            self._places[row] += self._ctx - self._overlap
        return ids, counted, context

    def _take_next(self, row: int) -> Document:
        self._numbers[row], self._places[row] = self._next_number, 0
        self._next_number += 1
        return self._documents.document(self._numbers[row])

    def _framed(self, document: Document, first: int, last: int) -> np.ndarray:
        """Ids `first` to ahead of `last` of a framed document, int64, PAD outside of it."""
        ids = np.full(last - first, PAD, dtype=np.int64)
        begin, end = (min(max(place - WINDOW, 0), len(document)) for place in (first, last))
        if begin < end:
            offset = begin + WINDOW - first
            ids[offset : offset + end - begin] = document.read(begin, end)
        if first <= (place := len(document) + WINDOW) < last:
            ids[place - first] = EOS
        return ids


def _are_places(value: Any, count: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == count and all(type(n) is int and n >= 0 for n in value)


def open_hub_corpus(item: str, min_bytes: int) -> tuple[ByteCorpus, HubDocuments]:
    """A data set of the hub: its first examples held out, the others as documents to train on.

    Args:
        item: `hf:NAME[:SPLIT[:FIELD]]`.
        min_bytes: that the held-out text must have.

    Returns:
        A corpus without training data, and the documents.

    Raises:
        UserError: it cannot be read, or is too small.
    """
    examples = HubExamples(item)
    texts = []
    for example in examples.from_number(0):
        texts.append(examples.text_of(example, ("text",)).encode("utf-8", "replace") + b"\n")
        if len(texts) == HELD_OUT_EXAMPLES:
            break
    held_out = ByteStream([np.frombuffer(text, dtype=np.uint8) for text in texts])
    if len(held_out) < min_bytes:
        raise UserError(
            f"{examples.spec}: its first {HELD_OUT_EXAMPLES} examples, which are held out, have "
            f"{len(held_out):,} bytes, fewer than the context of {min_bytes:,}; give a smaller --ctx"
        )
    documents = HubDocuments(examples, len(texts), held_out.fingerprint())
    documents.document(0)  # one at least is there
    corpus = ByteCorpus(
        train=ByteStream([]),
        held_out=held_out,
        description=f"{examples.spec}: read in order from example {len(texts)} on; the first {len(texts)} "
        f"({len(held_out):,} bytes) held out",
    )
    return corpus, documents
