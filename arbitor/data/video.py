"""Clips of video with captions: folders of video files, their JSON Lines, and digits that move and bounce.

- A folder: every video beneath it whose caption stands beside it (`cat.mp4`, `cat.txt`) or in a `.jsonl` of
  the folder; hidden files are left out.
- `.jsonl`: a line is {"video": path relative to the file, "text": caption}; "file_name" and "caption" serve
  as well.
- A video file by itself, with its `.txt`.

Videos are decoded once (by PyAV), at most eight frames a second, fitted into the square and kept in memory,
so that what cannot be used is known and counted ahead of the first step.

Shapes: N films, B clips, F frames, C channels, S pixels a side.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from arbitor.data.contents import BadLineError, opened, parse_line
from arbitor.data.holding_out import numbered_split, spelled_number, told
from arbitor.data.images import DIGITS_SIDE, MAX_CAPTION_BYTES, OWN_SHARE, WORDS, Geometry, fit
from arbitor.data.media import (
    UnusableTextError,
    cleaned,
    existing,
    file_status,
    is_lines,
    listed,
    real_path,
    text_beside,
    why_no_file,
)
from arbitor.data.stream import ByteStream
from arbitor.errors import UserError, extra_command

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif", ".ogv")
# Demuxers of FFmpeg that read the one file that they are given.
_FORMATS = ("mov", "matroska", "webm", "avi", "mpeg", "mpegts", "mpegvideo", "gif", "ogg", "m4v")
FRAMES_PER_SECOND = 8
MAX_FRAMES = 8192  # that are decoded of a video, and
MAX_KEPT = 512  # that are kept
MAX_BYTES = 4 << 30  # of all films together, in memory
MAX_PIXELS = 1 << 26  # of a frame
MAX_SPEED = 2  # pixels a frame, of a digit in each direction


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipGeometry:
    """What every clip is made to fit.

    Attributes:
        size: S.
        frames: F.
        channels: 1 for grey, 3 for colour.
    """

    size: int
    frames: int
    channels: int

    @property
    def bytes(self) -> int:
        """Bytes of a clip."""
        return self.frames * self.channels * self.size**2


class Clips(Protocol):
    """Things that clips are made of, each with a caption."""

    @property
    def geometry(self) -> ClipGeometry:
        """Of the clips."""

    @property
    def captions(self) -> list[bytes]:
        """N texts."""

    def __len__(self) -> int:
        """N."""

    def clips(self, numbers: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Clips uint8 [B, F, C, S, S] of some things, int64 [B], as 64 random bits each, uint64 [B], say."""

    def part(self, numbers: Sequence[int]) -> "Clips":
        """Some of them, in that order."""

    def fingerprint(self) -> int:
        """A number below 2^63 made of all that clips depend on."""


@dataclass(frozen=True, slots=True)
class Films:
    """Videos; a clip is so many frames one after another, from where the bits say.

    Attributes:
        geometry, captions: see `Clips`.
        films: uint8 [frames, C, S, S] each, with F frames or more.
    """

    geometry: ClipGeometry
    captions: list[bytes]
    films: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.films)

    def clips(self, numbers: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """See `Clips`."""
        F = self.geometry.frames
        made = []
        for number, random in zip(numbers.tolist(), bits.tolist(), strict=True):
            film = self.films[number]
            first = (random & 0xFFFF) * (len(film) - F + 1) >> 16
            made.append(film[first : first + F])
        return np.stack(made)

    def part(self, numbers: Sequence[int]) -> "Films":
        """See `Clips`."""
        return Films(self.geometry, [self.captions[n] for n in numbers], [self.films[n] for n in numbers])

    def fingerprint(self) -> int:
        """See `Clips`."""
        films = [film.reshape(-1) for film in self.films]
        return _fingerprint(self.geometry, self.captions, films)


@dataclass(frozen=True, slots=True)
class MovingDigits:
    """Handwritten digits that move over black and bounce off the edges, one a clip, which the caption names.

    Place and velocity follow from the bits; velocities are whole pixels a frame, -2 to 2 each way, not both
    0.

    Attributes:
        geometry, captions: see `Clips`.
        digits: uint8 [N, 8, 8].
    """

    geometry: ClipGeometry
    captions: list[bytes]
    digits: np.ndarray

    def __len__(self) -> int:
        return len(self.digits)

    def clips(self, numbers: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """See `Clips`."""
        B, F, C, S = len(numbers), self.geometry.frames, self.geometry.channels, self.geometry.size
        room = S - DIGITS_SIDE
        places = []
        for shift, velocity in zip((0, 16), velocities(bits), strict=True):
            start = ((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64) * (room + 1) >> 16
            way = start[:, None] + velocity[:, None] * np.arange(F)
            # Reflected at both ends: a triangle wave of period 2 room.
            way = way % max(1, 2 * room)
            places.append(np.minimum(way, 2 * room - way))
        clips = np.zeros((B, F, S, S), dtype=np.uint8)
        side = np.arange(DIGITS_SIDE)
        rows = (places[0][:, :, None] + side)[:, :, :, None]
        columns = (places[1][:, :, None] + side)[:, :, None]
        each, frame = np.arange(B)[:, None, None, None], np.arange(F)[:, None, None]
        clips[each, frame, rows, columns] = self.digits[numbers][:, None]
        return np.repeat(clips[:, :, None], C, axis=2)

    def part(self, numbers: Sequence[int]) -> "MovingDigits":
        """See `Clips`."""
        return MovingDigits(self.geometry, [self.captions[n] for n in numbers], self.digits[list(numbers)])

    def fingerprint(self) -> int:
        """See `Clips`."""
        return _fingerprint(self.geometry, self.captions, [self.digits.reshape(-1)])


def velocities(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns a frame that `MovingDigits` moves by, int64 [B] in -2...2 each, of bits uint64 [B]."""
    ways = 2 * MAX_SPEED + 1
    choice = ((bits >> np.uint64(32)) & np.uint64(0xFFFF)).astype(np.int64) * (ways**2 - 1) >> 16
    choice += choice >= ways**2 // 2  # the middle one stands still
    return choice // ways - MAX_SPEED, choice % ways - MAX_SPEED


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoCorpus:
    """What a run learns from and what it is measured on.

    Attributes:
        train, held_out: clips with captions; no film, and no digit, is in both.
        description: one line for the user: what it is, how many, what was held out, what was skipped and why.
    """

    train: Clips
    held_out: Clips
    description: str


def open_videos(data: Sequence[str], held_out: str | None, geometry: ClipGeometry) -> VideoCorpus:
    """Read and decode `data` (none: moving digits) and hold a part out.

    Args:
        data: folders, videos or their JSON Lines.
        held_out: a path, the share to hold out (spread evenly), or how many of the last ones; None is a
            tenth.
        geometry: what every clip is made to fit.

    Raises:
        UserError: data that is missing, malformed or without one usable video; one line.
    """
    name = " ".join(data) if data else "moving digits"
    unit = "videos" if data else "digits"
    found = _find(data, geometry) if data else _Found(geometry)
    skipped = found.skipped
    whole: Clips = found.films() if data else moving_digits(geometry)
    train: Clips
    test: Clips
    if held_out is None or spelled_number(held_out) is not None:
        out: set[int] = set()
        rule = ""
        if len(whole):
            out, rule = numbered_split(len(whole), held_out or OWN_SHARE, unit, "a path")
        train = whole.part([n for n in range(len(whole)) if n not in out])
        test = whole.part(sorted(out))
    else:
        apart = _find([held_out], geometry)
        both = set(apart.keys)
        train = whole.part([n for n in range(len(whole)) if not data or found.keys[n] not in both])
        test, rule = apart.films(), held_out
        skipped = skipped + apart.skipped
        if len(train) < len(whole):
            skipped["also held out"] += len(whole) - len(train)
    reasons = told(skipped)
    for part, clips in (("to train on", train), ("held out", test)):
        if not len(clips):
            raise UserError(
                f"{name}: no video {part} can be used{reasons}; give more videos with captions, or another "
                "--held-out"
            )
    return VideoCorpus(
        train=train,
        held_out=test,
        description=f"{name}: {len(train):,} {unit} to train on, {len(test):,} held out ({rule}){reasons}; "
        f"clips of {geometry.frames} frames of {geometry.size} x {geometry.size}",
    )


def moving_digits(geometry: ClipGeometry) -> MovingDigits:
    """scikit-learn's digits, to be moved.

    Raises:
        UserError: scikit-learn is not installed, or the clips are smaller than a digit.
    """
    if geometry.size < DIGITS_SIDE:
        raise UserError(f"the built-in digits have {DIGITS_SIDE} pixels a side, clips only {geometry.size}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the built-in clips are made of scikit-learn's digits, of the extra video: "
            f"{extra_command('video')}, or give clips of your own"
        ) from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return MovingDigits(geometry, [WORDS[int(target)].encode() for target in digits.target], pixels)


@dataclass(slots=True)
class _Found:
    """Videos behind some names, those that cannot be used counted by reason."""

    geometry: ClipGeometry
    captions: list[bytes] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0

    def add(self, path: Path, caption: bytes) -> None:
        """Decode one, or count why not."""
        if not caption:
            self.skipped["with an empty caption"] += 1
            return
        if self.num_bytes >= MAX_BYTES:
            self.skipped["beyond what memory is to hold"] += 1
            return
        film, why = load_video(path, self.geometry)
        if film is None:
            self.skipped[why] += 1
            return
        self.captions.append(caption)
        self.frames.append(film)
        self.keys.append(real_path(path))
        self.num_bytes += film.nbytes

    def films(self) -> Films:
        """All of them."""
        return Films(self.geometry, self.captions, self.frames)


def load_video(path: Path, geometry: ClipGeometry) -> tuple[np.ndarray | None, str]:
    """A video file as uint8 [frames, C, S, S] of F frames or more, or None and why not.

    Frames are at least an eighth of a second apart, if enough are left then; else all are taken.

    Raises:
        UserError: PyAV is not installed.
    """
    av = _pyav()
    square = Geometry(size=geometry.size, channels=geometry.channels)
    frames: list[np.ndarray] = []
    times: list[float] = []
    try:
        if file_status(path) is None:
            return None, why_no_file(path)
        with open(path, "rb"):
            pass
    except OSError:
        return None, "not readable"
    try:
        # An absolute path is never taken for an address, and of the formats none leads to other files.
        with av.open(os.path.abspath(path), options={"format_whitelist": ",".join(_FORMATS)}) as container:
            if not container.streams.video:
                return None, "without frames"
            codec = container.streams.video[0].codec_context
            if codec.width * codec.height > MAX_PIXELS:
                return None, "too large"
            for number, frame in enumerate(container.decode(video=0)):
                if number >= MAX_FRAMES:
                    break
                if frame.is_corrupt:
                    return None, "damaged"
                frames.append(fit(frame.to_ndarray(format="rgb24"), square))
                times.append(number / FRAMES_PER_SECOND if frame.time is None else float(frame.time))
    # Decoders of damaged files raise whatever their own mistakes are.
    except Exception:
        return None, "damaged"
    if not frames:
        return None, "without frames"
    if len(frames) < geometry.frames:
        return None, f"of fewer than {geometry.frames} frames"
    apart = _apart(times)
    chosen = apart if len(apart) >= geometry.frames else list(range(len(frames)))
    return np.stack([frames[n] for n in chosen[:MAX_KEPT]]), ""


def _apart(times: Sequence[float]) -> list[int]:
    """Numbers of the first frame of every eighth of a second."""
    chosen: list[int] = []
    due = times[0]
    for number, time in enumerate(times):
        if time >= due - 1e-6:
            chosen.append(number)
            due = time + 1 / FRAMES_PER_SECOND
    return chosen


def _find(data: Sequence[str], geometry: ClipGeometry) -> _Found:
    found = _Found(geometry)
    for item in data:
        path = existing(item)
        before = len(found.keys) + found.skipped.total()
        if path.is_dir():
            _add_folder(path, found)
        elif is_lines(path):
            _add_lines(path, found)
        elif path.name.lower().endswith(SUFFIXES):
            _add_file(path, found)
        else:
            raise UserError(
                f"{item!r} is no data of videos: give a folder of videos with captions, a .jsonl of video "
                f"and text, or one of {', '.join(SUFFIXES)}"
            )
        if len(found.keys) + found.skipped.total() == before:
            raise UserError(f"no videos in {item!r}")
    return found


def _add_folder(folder: Path, found: _Found) -> None:
    lines, videos = listed(folder, SUFFIXES, found.skipped)
    named: set[str] = set()
    for path in lines:
        named |= _add_lines(path, found)
    for video in sorted(videos):
        if real_path(video) not in named:
            _add_file(video, found)


def _add_file(video: Path, found: _Found) -> None:
    try:
        caption = text_beside(video, MAX_CAPTION_BYTES)
    except UnusableTextError as error:
        found.skipped[str(error)] += 1
        return
    if caption is None:
        found.skipped["without a caption"] += 1
        return
    found.add(video, caption)


def _add_lines(path: Path, found: _Found) -> set[str]:
    """Add the videos of a JSON Lines file; returns their real paths."""
    named = set()
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{str(path)!r}, line {number}"
            try:
                record = parse_line(line, first=number == 1)
            except BadLineError as error:
                raise UserError(f"{where}: {error}") from error
            video, caption = _text(record, "video", "file_name"), _text(record, "text", "caption")
            if video is None or caption is None:
                raise UserError(f'{where}: an object {{"video": path, "text": caption}} is needed')
            target = path.parent / video
            named.add(real_path(target))
            found.add(target, cleaned(caption.encode("utf-8", "replace"), MAX_CAPTION_BYTES))
    return named


def _text(record: Any, *names: str) -> str | None:
    """The first of some fields that is a text."""
    fields = record if isinstance(record, dict) else {}
    values: Iterator[Any] = (fields.get(name) for name in names)
    return next((value for value in values if isinstance(value, str) and "\0" not in value), None)


def _fingerprint(geometry: ClipGeometry, captions: Sequence[bytes], arrays: Sequence[np.ndarray]) -> int:
    sizes = [geometry.size, geometry.frames, geometry.channels, *map(len, captions), *map(len, arrays)]
    text = np.array(sizes, dtype="<i8").tobytes() + b"".join(captions)
    return ByteStream([np.frombuffer(text, dtype=np.uint8), *arrays]).fingerprint()


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"video files are read by PyAV, of the extra video: {extra_command('video')}"
        ) from error
    return av


def sheet(clips: np.ndarray, zoom: int = 4) -> np.ndarray:
    """Clips uint8 [B, F, C, S, S] as one picture uint8 [height, width, 3]: a clip a row, a frame a column."""
    B, F, C, S, _ = clips.shape
    framed = np.full((B, F, C, S + 1, S + 1), 128, dtype=np.uint8)
    framed[..., :S, :S] = clips
    rows = framed.transpose(0, 3, 1, 4, 2).reshape(B * (S + 1), F * (S + 1), C)
    return np.repeat(rows, 3 // C, axis=2).repeat(zoom, axis=0).repeat(zoom, axis=1)


def write_clips(path: str | Path, clips: np.ndarray) -> None:
    """Write clips uint8 [B, F, C, S, S] as a GIF that plays them beside each other, else as a sheet.

    Args:
        path: ends in .gif, or in .png for a clip a row and a frame a column.
        clips: one or more.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    from PIL import Image

    path = Path(path)
    try:
        if path.suffix.lower() == ".png":
            Image.fromarray(sheet(clips)).save(path)
        elif path.suffix.lower() == ".gif":
            frames = [Image.fromarray(sheet(clips[:, f][None])) for f in range(clips.shape[1])]
            duration = 1000 // FRAMES_PER_SECOND
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
        else:
            raise UserError(f"clips are written as .png or .gif, not as {str(path)!r}")
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
