"""Data sets of the Hugging Face hub, read example by example through the library `datasets`.

`hf:NAME[:SPLIT[:FIELD]]`: NAME as on the hub, with a configuration as a third part if it has several
(`hf:HuggingFaceFW/fineweb/sample-10BT:train:text`), or a local folder that `datasets` reads. SPLIT is "train"
unless it is given, FIELD the one that holds the text. Nothing is downloaded but what is read, in the data
set's own order, so an example's number is a position that a later process finds again. What fails to be read,
as a network does, is tried again a few times.
"""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from arbitor.config import did_you_mean
from arbitor.errors import UserError, extra_command

PREFIX = "hf:"
MAX_MEDIA = 4096  # images or recordings of a data set that are read into memory
MEDIA_KINDS = ("Image", "Audio")
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds, ahead of each time that an example is tried again
# What is wrong with the data itself is so the next time as well.
_LASTING = (ValueError, TypeError, LookupError, AssertionError, FileNotFoundError, ImportError)
CAPTION_FIELDS = ("text", "caption", "label")


@dataclass(frozen=True, slots=True)
class HubSpec:
    """A data set of the hub.

    Attributes:
        name: on the hub, or a folder.
        configuration: of the data set; None is its own.
        split: which of its parts.
        field: what holds the text; None is the usual one.
    """

    name: str
    configuration: str | None
    split: str
    field: str | None

    def __str__(self) -> str:
        configuration = f"/{self.configuration}" if self.configuration else ""
        return f"{PREFIX}{self.name}{configuration}:{self.split}"


def is_hub(item: str) -> bool:
    """Whether what the user named is a data set of the hub."""
    return item.startswith(PREFIX)


def parse_spec(item: str) -> HubSpec:
    """`hf:NAME[:SPLIT[:FIELD]]` in its parts.

    Raises:
        UserError: it is no such name.
    """
    name, *rest = item.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise UserError(
            f"{item!r} is no data set of the hub: give hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:FIELD"
        )
    configuration = None
    if not os.path.isdir(name) and name.count("/") == 2:
        name, _, configuration = name.rpartition("/")
    split, field = [*rest, None, None][:2]
    return HubSpec(name, configuration, split or "train", field)


class HubExamples:
    """The examples of a data set, in its order.

    Images and sounds are not decoded: their values are mappings of "bytes" and "path".

    Attributes:
        spec: which data set.
        features: kinds of the fields by their names; empty if the data set does not tell.

    Args:
        item: `hf:NAME[:SPLIT[:FIELD]]`.

    Raises:
        UserError: `datasets` is missing, or the data set, its split or its network cannot be reached.
    """

    def __init__(self, item: str) -> None:
        self.spec = spec = parse_spec(item)
        self._news: list[str] = []
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{item!r} is read by the library datasets, of the extra hub: {extra_command('hub')}, or "
                "give files"
            ) from error
        self._stream = self._tried(
            lambda: datasets.load_dataset(spec.name, spec.configuration, split=spec.split, streaming=True)
        )
        self.features: dict[str, Any] = dict(getattr(self._stream, "features", None) or {})
        for name, feature in self.features.items():
            if type(feature).__name__ in MEDIA_KINDS:
                self._stream = self._tried(
                    lambda name=name, feature=feature: _undecoded(datasets, self._stream, name, feature)
                )

    def from_number(self, first: int) -> Iterator[dict[str, Any]]:
        """The examples from number `first` on.

        Raises:
            UserError: while they are read, if that fails, and again after each of `PAUSES`.
        """
        number, failed, end = first, 0, object()
        stream: Iterator[Any] | None = None
        while True:
            try:
                if stream is None:
                    stream = iter(self._stream.skip(number) if number else self._stream)
                example = next(stream, end)
            except Exception as error:
                if failed == len(PAUSES) or isinstance(error, _LASTING):
                    tried = f" (tried {failed + 1} times)" if failed else ""
                    raise UserError(
                        f"cannot read example {number:,} of the data set {self.spec}: {_why(error)}{tried}"
                    ) from error
                time.sleep(PAUSES[failed])
                failed, stream = failed + 1, None
                continue
            if failed:
                self._news.append(f"{self.spec}: example {number:,} was read after {failed} failures")
            number, failed = number + 1, 0
            if example is end:
                return
            if not isinstance(example, dict):
                raise UserError(
                    f"{self.spec}: an example is a {type(example).__name__}, not a mapping of fields"
                )
            yield example

    def text_of(self, example: dict[str, Any], fields: Sequence[str]) -> str:
        """The text in the field that the user named, or else in the first of `fields` that there is; of one
        without a value, it is empty.

        Raises:
            UserError: there is none, or it is no text.
        """
        names = (self.spec.field,) if self.spec.field else fields
        name = next((name for name in names if name in example), None)
        if name is None:
            known = ", ".join(map(repr, list(example)[:20]))
            hint = did_you_mean(names[0], list(example))
            raise UserError(
                f"{self.spec} has no field {' or '.join(map(repr, names))}{hint}; the fields are {known}; "
                f"name one with {self.spec}:FIELD"
            )
        value = example[name]
        if value is None:
            return ""
        if type(value) is int and hasattr(self.features.get(name), "int2str"):
            value = self.features[name].int2str(value)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise UserError(f"{self.spec}: the field {name!r} must hold text, got a {type(value).__name__}")
        return value

    def medium_of(self, example: dict[str, Any], kind: str) -> bytes | None:
        """The encoded image or sound of an example; None if it has none there.

        Args:
            example: one of these.
            kind: "Image" or "Audio".

        Raises:
            UserError: no field holds such media.
        """
        usual = kind.lower()
        names = [name for name, feature in self.features.items() if type(feature).__name__ == kind]
        name = next(iter(names), usual if usual in example else None)
        if name is None:
            raise UserError(f"{self.spec} has no field of {usual}s; the fields are {', '.join(example)}")
        value = example[name]
        if not isinstance(value, dict):
            return value if isinstance(value, bytes) else None
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        try:
            with open(value.get("path") or "", "rb") as file:
                return file.read()
        except (OSError, ValueError, TypeError):
            return None

    def media(self, kind: str, fields: Sequence[str]) -> Iterator[tuple[bytes, str]]:
        """The first `MAX_MEDIA` examples as encoded media and texts; without a medium, it is empty."""
        for example in itertools.islice(self.from_number(0), MAX_MEDIA):
            yield self.medium_of(example, kind) or b"", self.text_of(example, fields)

    def _tried(self, work: Any) -> Any:
        """What `work` returns; whatever the library raises becomes one line."""
        try:
            return work()
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise UserError(f"cannot read the data set {self.spec}: {_why(error)}") from error

    def news(self) -> list[str]:
        """Lines about what was tried again since they were last asked for."""
        told, self._news = self._news, []
        return told


def _why(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _undecoded(datasets: Any, stream: Any, name: str, feature: Any) -> Any:
    """A data set whose field of images or sounds gives what is encoded.

    Stored media are mappings already. Those of folders are paths, of which only the library's own kind of
    field makes mappings; for sounds that wants a decoder to be installed, so it comes second.
    """
    mapping = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    plain = stream.cast_column(name, mapping)
    try:
        next(iter(plain), None)
    except Exception:
        return stream.cast_column(name, getattr(datasets, type(feature).__name__)(decode=False))
    return plain
