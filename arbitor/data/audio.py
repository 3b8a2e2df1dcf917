"""Recordings with labels: folders, tar archives, JSON Lines, and sounds that are synthesised.

- A folder, or a `.tar`, perhaps compressed: every audio file in it. Its label stands in a `.txt` beside it
  (`a.wav`, `a.txt`), or else begins its name: `seven_theo_4.wav` is "seven", spoken by "theo"; a label 0 to 9
  is its word.
- `.jsonl`: a line is {"audio": path relative to the file, "text": label}, perhaps with a "speaker".
- An audio file by itself.

All are decoded once, mixed down to one channel, brought to one rate and kept as 16-bit numbers in memory, so
that what cannot be used is known and counted ahead of the first step, and nothing that happens to the files
stops a run.

Shapes: N samples.
"""

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from arbitor.config import did_you_mean
from arbitor.data.contents import BadLineError, opened, parse_line
from arbitor.data.holding_out import numbered_split, spelled_number, told
from arbitor.data.hub import CAPTION_FIELDS, HubExamples, is_hub
from arbitor.data.hub_media import HubMedia, SkippedError
from arbitor.data.images import WORDS
from arbitor.data.media import (
    UnusableTextError,
    cleaned,
    existing,
    is_lines,
    is_unicode,
    listed,
    real_path,
    text_beside,
)
from arbitor.data.sources import reason
from arbitor.data.stream import ByteStream
from arbitor.data.waves import (
    MAX_FILE_BYTES,
    UNIT,
    UnusableError,
    codes_of,
    load_content,
    load_file,
    usable_wave,
)
from arbitor.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
OWN_SHARE = "0.1"
SPEAKER = "speaker:"
RATES = (8_000, 16_000)  # that recordings are brought to, unless told otherwise
MAX_SAMPLES = 1 << 30  # of all recordings together, in memory
MAX_LABEL_BYTES = 1 << 12
_SYNTHETIC_RATE = 8_000
_SYNTHETIC_COUNT = 480
SYNTHETIC_LABELS = ("low", "middle", "high", "rising", "falling", "warble")


@dataclass(frozen=True, slots=True)
class Recordings:
    """Recordings with their labels.

    Attributes:
        rate: samples a second, of all.
        waves: int16 [N] each, in units of 2^-15.
        labels: texts as bytes.
        speakers: who speaks; empty where it is not known.
    """

    rate: int
    waves: list[np.ndarray]
    labels: list[bytes]
    speakers: list[str]

    def __len__(self) -> int:
        return len(self.waves)

    @property
    def num_samples(self) -> int:
        """Samples of all recordings."""
        return sum(map(len, self.waves))

    def wave(self, number: int) -> np.ndarray:
        """Recording by number: fp32 [N] in -1...1."""
        return self.waves[number].astype(np.float32) / UNIT

    def part(self, numbers: Sequence[int]) -> "Recordings":
        """Some of them, in that order."""
        return Recordings(
            self.rate,
            [self.waves[n] for n in numbers],
            [self.labels[n] for n in numbers],
            [self.speakers[n] for n in numbers],
        )

    def fingerprint(self) -> int:
        """A number below 2^63 made of labels and samples, read as `ByteStream.fingerprint` reads bytes."""
        sizes = [self.rate, *map(len, self.labels), *map(len, self.waves)]
        text = np.array(sizes, dtype="<i8").tobytes() + b"".join(self.labels)
        parts = [np.frombuffer(text, dtype=np.uint8)]
        parts += [wave.astype("<i2", copy=False).view(np.uint8) for wave in self.waves]
        return ByteStream(parts).fingerprint()


Recording = tuple[bytes, np.ndarray]  # label, and samples int16 [N]


@dataclass(frozen=True, slots=True)
class RecordingStream:
    """Recordings of a data set of the hub, which are read while they are learnt from.

    Attributes:
        rate: samples a second, of all.
        media: where they are from.
    """

    rate: int
    media: HubMedia[Recording]


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioCorpus:
    """What a run learns from and what it is measured on.

    Attributes:
        train, held_out: recordings; none is in both.
        description: one line for the user: what it is, how many, what was held out, what was skipped and why.
    """

    train: Recordings
    held_out: Recordings
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedAudio:
    """The same of a data set of the hub, which is read while it is learnt from.

    Attributes:
        train: where recordings come from.
        held_out, description: see `AudioCorpus`.
    """

    train: RecordingStream
    held_out: Recordings
    description: str


@dataclass(slots=True)
class _Found:
    """Recordings behind some names, those that cannot be used counted by reason."""

    rate: int
    waves: list[np.ndarray] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)
    speakers: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    num_samples: int = 0

    def add(self, load: Callable[[], tuple[np.ndarray, int]], label: bytes, speaker: str, key: str) -> None:
        """Decode one, or count why not.

        Args:
            load: gives samples fp32 [N, channels] and their rate, or raises UnusableError.
            label, speaker: of the recording.
            key: tells it from others.
        """
        if self.num_samples >= MAX_SAMPLES:
            self.skipped["beyond what memory is to hold"] += 1
            return
        try:
            wave = usable_wave(*load(), self.rate)
        except UnusableError as error:
            self.skipped[str(error)] += 1
            return
        if not label.strip():  # `_three.wav`
            self.skipped["without a label"] += 1
            return
        self.waves.append(codes_of(wave))
        self.labels.append(label)
        self.speakers.append(speaker)
        self.keys.append(key)
        self.num_samples += len(wave)

    def recordings(self) -> Recordings:
        """All of them."""
        return Recordings(self.rate, self.waves, self.labels, self.speakers)


def open_audio(data: Sequence[str], held_out: str | None, rate: int) -> AudioCorpus:
    """Read and decode `data` (none: synthesised sounds) and hold a part out.

    Args:
        data: folders, tar archives, recordings or their JSON Lines.
        held_out: a path, `speaker:NAME`, the share to hold out (spread evenly), or how many of the last ones;
            None is a tenth.
        rate: what every recording is brought to.

    Raises:
        UserError: data that is missing, malformed or without one usable recording; one line.
    """
    found = _find(data, rate) if data else _synthesised(rate)
    name = " ".join(data) if data else "synthesised tones and chirps"
    skipped = found.skipped
    whole = found.recordings()
    speaker = held_out.removeprefix(SPEAKER) if held_out and held_out.startswith(SPEAKER) else None
    if held_out is None or speaker is not None or spelled_number(held_out) is not None:
        out, rule = _split(whole, speaker, held_out) if len(whole) else (set[int](), "")
        train = whole.part([n for n in range(len(whole)) if n not in out])
        test = whole.part(sorted(out))
    else:
        apart = _find([held_out], rate)
        both = set(apart.keys)
        train = whole.part([n for n, key in enumerate(found.keys) if key not in both])
        test, rule = apart.recordings(), held_out
        skipped = skipped + apart.skipped
        if len(train) < len(whole):
            skipped["also held out"] += len(whole) - len(train)
    reasons = told(skipped)
    for part, recordings in (("to train on", train), ("held out", test)):
        if not len(recordings):
            raise UserError(
                f"{name}: no recording {part} can be used{reasons}; give more recordings, or "
                "another --held-out"
            )
    minutes = train.num_samples / rate / 60
    return AudioCorpus(
        train=train,
        held_out=test,
        description=f"{name}: {len(train):,} recordings to train on ({minutes:.1f} minutes at {rate:,} Hz), "
        f"{len(test):,} held out ({rule}){reasons}",
    )


def open_training_audio(data: Sequence[str], held_out: str | None, rate: int) -> AudioCorpus | StreamedAudio:
    """As `open_audio`, but a data set of the hub, of which that takes the first `MAX_MEDIA`, is a stream.

    Of that, `held_out` is a path, a share of its first examples, or how many of the first ones.
    """
    if not any(map(is_hub, data)):
        return open_audio(data, held_out, rate)
    if len(data) > 1:
        raise UserError("a data set of the hub stands alone: give one, or files without it")
    if held_out is not None and held_out.startswith(SPEAKER):
        raise UserError(f"--held-out {held_out}: the speakers of a data set of the hub are not known")
    path = held_out if held_out is not None and spelled_number(held_out) is None else None

    def load(content: bytes, label: bytes) -> Recording:
        try:
            return label, codes_of(usable_wave(*load_content(content), rate))
        except UnusableError as error:
            raise SkippedError(str(error)) from error

    media: HubMedia[Recording] = HubMedia(
        data[0], "Audio", load, lambda item: item[1].nbytes, MAX_LABEL_BYTES, "0" if path else held_out
    )
    description = media.description
    if path is not None:
        apart = _find([path], rate)
        test = apart.recordings()
        description += f"; {len(test):,} held out ({path}){told(apart.skipped)}"
    else:
        test = recordings_of(media.held_out, rate)
    if not len(test):
        raise UserError(f"{description}: no recording that is held out can be used; give another --held-out")
    return StreamedAudio(train=RecordingStream(rate, media), held_out=test, description=description)


def recordings_of(items: Sequence[Recording], rate: int) -> Recordings:
    """Labels and samples of a stream; their speakers are not known."""
    waves, labels = [wave for _, wave in items], [label for label, _ in items]
    return Recordings(rate, waves, labels, [""] * len(items))


def default_rate(data: Sequence[str]) -> int:
    """8,000 where the first recordings have no more than that, else 16,000 samples a second.

    Raises:
        UserError: data that is missing.
    """
    if not data:
        return _SYNTHETIC_RATE
    rates: list[int] = []
    for load, *_ in _listed(data, Counter()):
        try:
            rates.append(load()[1])
        except UnusableError:
            continue
        if len(rates) == 9:
            break
    return RATES[0] if not rates or sorted(rates)[len(rates) // 2] <= RATES[0] else RATES[1]


def label_of(name: str) -> tuple[bytes, str]:
    """Label and speaker in a file's name: `7_theo_12.wav` -> (b"seven", "theo")."""
    label, *rest = PurePosixPath(name).stem.replace("-", "_").split("_")
    if label.isascii() and label.isdecimal() and int(label) < len(WORDS):
        label = WORDS[int(label)]
    speaker = rest[0] if rest and not rest[0].isdecimal() else ""
    return label.encode("utf-8", "replace")[:MAX_LABEL_BYTES], speaker


def _split(whole: Recordings, speaker: str | None, held_out: str | None) -> tuple[set[int], str]:
    """Numbers of the recordings to hold out, and the rule in words."""
    if speaker is not None:
        out = {n for n, name in enumerate(whole.speakers) if name == speaker}
        if not out:
            known = sorted(set(whole.speakers) - {""})
            raise UserError(
                f"--held-out {SPEAKER}{speaker}: nobody of that name speaks{did_you_mean(speaker, known)}; "
                f"there are {', '.join(known[:20]) or 'no names of speakers'}"
            )
        return out, f"all of {speaker}"
    return numbered_split(len(whole), held_out or OWN_SHARE, "recordings", f"a path, {SPEAKER}NAME")


_Entry = tuple[Callable[[], tuple[np.ndarray, int]], bytes, str, str]  # loader, label, speaker, key


def _find(data: Sequence[str], rate: int) -> _Found:
    found = _Found(rate)
    for entry in _listed(data, found.skipped):
        found.add(*entry)
    return found


def _listed(data: Sequence[str], skipped: Counter[str]) -> Iterator[_Entry]:
    """Everything behind some names, in a fixed order; a loader is to be called ahead of the next entry."""
    for item in data:
        if is_hub(item):
            yield from _of_hub(item)
            continue
        path = existing(item)
        name = path.name.lower()
        if path.is_dir():
            entries = _of_folder(path, skipped)
        elif name.endswith(TAR_SUFFIXES):
            entries = _of_tar(path, skipped)
        elif is_lines(path):
            entries = _of_lines(path)
        elif name.endswith(SUFFIXES):
            entries = iter([_of_file(path)])
        else:
            raise UserError(
                f"{item!r} is no data of sounds: give a folder or .tar of recordings, a .jsonl of audio and "
                f"text, or one of {', '.join(SUFFIXES)}"
            )
        before = skipped.total()
        count = 0
        for entry in entries:
            count += 1
            yield entry
        if not count and skipped.total() == before:
            raise UserError(f"no recordings in {item!r}")


def _of_hub(item: str) -> Iterator[_Entry]:
    """The first examples of a data set of the hub."""
    examples = HubExamples(item)
    for number, (content, text) in enumerate(examples.media("Audio", CAPTION_FIELDS)):
        label = text.strip().encode("utf-8", "replace")[:MAX_LABEL_BYTES]
        key = f"{examples.spec}:{number}"
        yield lambda content=content: load_content(content), label, "", key  # type: ignore[misc]


def _of_file(path: Path, label: bytes | None = None, speaker: str | None = None) -> _Entry:
    named, named_speaker = label_of(path.name)
    why = ""
    if label is None:
        try:
            label = text_beside(path, MAX_LABEL_BYTES)
        except UnusableTextError as error:
            why = str(error)
    if not label and not is_unicode(path.name):
        why = why or "with a name that is not UTF-8"

    def load() -> tuple[np.ndarray, int]:
        if why:
            raise UnusableError(why)
        return load_file(path)

    return load, label or named, named_speaker if speaker is None else speaker, real_path(path)


def _of_folder(folder: Path, skipped: Counter[str]) -> Iterator[_Entry]:
    lines, paths = listed(folder, SUFFIXES, skipped)
    named: set[str] = set()
    for path in lines:
        for entry in _of_lines(path):
            named.add(entry[3])
            yield entry
    for path in paths:
        if real_path(path) not in named:
            yield _of_file(path)


def _of_lines(path: Path) -> Iterator[_Entry]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{str(path)!r}, line {number}"
            try:
                record = parse_line(line, first=number == 1)
            except BadLineError as error:
                raise UserError(f"{where}: {error}") from error
            fields = record if isinstance(record, dict) else {}
            audio, text, speaker = (fields.get(key) for key in ("audio", "text", "speaker"))
            if not isinstance(audio, str) or not isinstance(text, str) or not _is_text(audio, text):
                raise UserError(f'{where}: an object {{"audio": path, "text": label}} is needed')
            label = cleaned(text.encode("utf-8", "replace"), MAX_LABEL_BYTES)
            spoken = str(speaker) if isinstance(speaker, str | int) else None
            yield _of_file(path.parent / audio, label, spoken)


def _is_text(*values: str) -> bool:
    return all(value.strip() and "\0" not in value for value in values)


def _of_tar(path: Path, skipped: Counter[str]) -> Iterator[_Entry]:
    """The members in the order of their names; nothing is unpacked onto the disk."""
    real = os.path.realpath(path)
    try:
        with tarfile.open(path) as archive:
            members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
            _refuse_cut_short(archive)
            texts = {m.name: m for m in members if m.name.lower().endswith(".txt")}
            for member in members:
                name = PurePosixPath(member.name)
                if not name.name.lower().endswith(SUFFIXES):
                    continue
                if name.name.startswith("."):
                    skipped["hidden"] += 1
                    continue
                label, speaker = label_of(name.name)
                beside = texts.get(str(name.with_suffix(".txt")))
                text, why = b"", ""
                try:
                    if beside is not None:
                        text = cleaned(_member(archive, beside, MAX_LABEL_BYTES + 1), MAX_LABEL_BYTES)
                except UnusableTextError as error:
                    why = str(error)
                if not text and not is_unicode(name.name):
                    why = why or "with a name that is not UTF-8"
                label = text or label

                def load(member: tarfile.TarInfo = member, why: str = why) -> tuple[np.ndarray, int]:
                    if why:
                        raise UnusableError(why)
                    if member.size > MAX_FILE_BYTES:
                        raise UnusableError("too large")
                    return load_content(_member(archive, member, MAX_FILE_BYTES))

                yield load, label, speaker, f"{real}:{member.name}"
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{str(path)!r} is no tar archive, damaged or cut short; copy or make it again"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {reason(error)}") from error


def _refuse_cut_short(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless an archive, all of whose members were listed, ends behind one of them."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("cut short")


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read(size)


def _synthesised(rate: int) -> _Found:
    """Tones of three pitches, chirps up and down, and warbles, each with overtones, an envelope and noise."""
    found = _Found(rate)
    random = np.random.Generator(np.random.Philox(key=0))
    labels = random.permutation(SYNTHETIC_LABELS * (_SYNTHETIC_COUNT // len(SYNTHETIC_LABELS))).tolist()
    for number in range(_SYNTHETIC_COUNT):
        label = labels[number]
        wave = _sound(label, rate, random)
        found.add(lambda wave=wave: (wave, rate), label.encode(), "", str(number))  # type: ignore[misc]
    return found


def _sound(label: str, rate: int, random: np.random.Generator) -> np.ndarray:
    """One of `SYNTHETIC_LABELS`, fp32 [N], 0.25 to 0.6 s."""
    seconds = random.uniform(0.25, 0.6)
    time = np.arange(int(seconds * rate)) / rate
    middle = {"low": 180.0, "middle": 420.0, "high": 1000.0}.get(label, 500.0) * 2 ** random.uniform(
        -0.3, 0.3
    )
    octaves = {"rising": 1.2, "falling": -1.2}.get(label, 0.0) * (time / seconds - 0.5)
    if label == "warble":
        octaves = 0.25 * np.sin(2 * np.pi * random.uniform(7, 11) * time)
    phase = 2 * np.pi * np.cumsum(middle * 2**octaves) / rate + random.uniform(0, 2 * np.pi)
    wave = sum(np.sin(n * phase) / n**1.5 for n in (1, 2, 3))
    edge = np.minimum(time, seconds - time) / 0.02
    wave = wave * np.minimum(1, edge) * random.uniform(0.1, 0.5)
    return (wave + random.normal(0, 0.003, len(time))).astype(np.float32)
