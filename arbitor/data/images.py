"""Images with captions: folders, JSON Lines, IDX files (MNIST's format), scikit-learn's handwritten digits.

- A folder: every image beneath it whose caption stands beside it (`cat.png`, `cat.txt`) or in a `.jsonl` of
  the folder; hidden files are left out.
- `.jsonl`: a line is {"image": path relative to the file, "text": caption}; "file_name" and "caption" serve
  as well.
- IDX: `...images-idx3-ubyte` with `...labels-idx1-ubyte` beside it, both perhaps `.gz`; the caption of a
  label 0 to 9 is its word ("seven"), of a larger one its number.

All are decoded once, fitted into the model's square and kept as bytes (`arbitor.data.store`), so that what
cannot be used is known and counted ahead of the first step, and nothing that happens to the files stops a
run.

Shapes: N images, C channels, S pixels a side.
"""

import hashlib
import io
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arbitor.data.contents import BadLineError, opened, parse_line
from arbitor.data.holding_out import numbered_split, spelled_number, told
from arbitor.data.hub import CAPTION_FIELDS, HubExamples, is_hub
from arbitor.data.hub_media import HubMedia, SkippedError
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
from arbitor.data.sources import expanded, reason
from arbitor.data.store import MappedBytes, Store
from arbitor.data.stream import ByteStream
from arbitor.errors import UserError, extra_command

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
DIGITS_SIDE = 8
OWN_SHARE = "0.1"
MAX_CAPTION_BYTES = 1 << 16
_FORMATS = (
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "WEBP",
    "TIFF",
    "PPM",
)  # of Pillow's, those that run no other program
_CACHE_FORMAT = 1
_MAX_PIXELS = 1 << 27
_MAX_FILE_BYTES = 1 << 30
_FOR_NOW = ("missing", "not readable", "too large for the memory")  # what the same file may not be next time


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The square that images are fitted into.

    Attributes:
        size: S.
        channels: 1 for grey, 3 for colour.
    """

    size: int
    channels: int

    @property
    def bytes(self) -> int:
        """Bytes of an image."""
        return self.channels * self.size**2


@dataclass(frozen=True, slots=True)
class CaptionedImages:
    """Images with their captions.

    Attributes:
        geometry: of all.
        captions: N texts as bytes.
        pixels: uint8 [records, 1 + C S S], a byte that says whether the image could be used ahead of each;
            perhaps memory-mapped.
        records: int64 [N], the records of the captions' images.
    """

    geometry: Geometry
    captions: list[bytes]
    pixels: np.ndarray
    records: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, numbers: np.ndarray) -> np.ndarray:
        """Images by number, int64 [B] -> uint8 [B, C, S, S], a copy.

        Raises:
            UserError: the cache file that holds them was cut short.
        """
        if isinstance(self.pixels.base, MappedBytes):
            self.pixels.base.check()
        chosen = np.asarray(self.pixels)[self.records[numbers], 1:]
        return chosen.reshape(-1, self.geometry.channels, self.geometry.size, self.geometry.size)

    def image(self, number: int) -> np.ndarray:
        """One image, uint8 [C, S, S], a view of where it is kept."""
        side = self.geometry.size
        return np.asarray(self.pixels)[self.records[number], 1:].reshape(-1, side, side)

    def part(self, numbers: Sequence[int]) -> "CaptionedImages":
        """Some of them, in that order."""
        return CaptionedImages(
            self.geometry, [self.captions[n] for n in numbers], self.pixels, self.records[list(numbers)]
        )

    def fingerprint(self) -> int:
        """A number below 2^63 made of captions and images, read as `ByteStream.fingerprint` reads bytes."""
        lengths = np.array([len(caption) for caption in self.captions], dtype="<i8")
        text = np.frombuffer(lengths.tobytes() + b"".join(self.captions), dtype=np.uint8)
        if isinstance(self.pixels.base, MappedBytes):
            self.pixels.base.check()
        rows = [np.asarray(self.pixels)[record] for record in self.records.tolist()]
        return ByteStream([text, *rows]).fingerprint()


CaptionedImage = tuple[bytes, np.ndarray]  # caption, and pixels uint8 [C, S, S]


@dataclass(frozen=True, slots=True)
class ImageStream:
    """Images with captions of a data set of the hub, which are read while they are learnt from.

    Attributes:
        geometry: of all.
        media: where they are from.
    """

    geometry: Geometry
    media: HubMedia[CaptionedImage]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCorpus:
    """What a run learns from and what it is measured on.

    Attributes:
        train, held_out: images with captions; no file is in both.
        description: one line for the user: what it is, how many, what was held out, what was skipped and why.
    """

    train: CaptionedImages
    held_out: CaptionedImages
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedImages:
    """The same of a data set of the hub, which is read while it is learnt from.

    Attributes:
        train: where images come from.
        held_out, description: see `ImageCorpus`.
    """

    train: ImageStream
    held_out: CaptionedImages
    description: str


@dataclass(slots=True)
class _Found:
    """What stands behind some names: an entry is a caption, and the key and number of its image."""

    captions: list[bytes] = field(default_factory=list)
    keys: list[tuple[Any, ...]] = field(default_factory=list)
    loaders: list[Any] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    name: str = ""

    def add(self, caption: bytes, key: tuple[Any, ...], loader: Any) -> None:
        """`loader`: a path, the content of a file, or a uint8 array [H, W]."""
        self.captions.append(caption)
        self.keys.append(key)
        self.loaders.append(loader)


def default_geometry(data: Sequence[str]) -> dict[str, int]:
    """Fields of `ModelConfig` that suit the data: small ones for the digits and for small IDX files.

    Raises:
        UserError: an IDX file that cannot be read, or the home of nobody.
    """
    if not data:
        return {"image_size": DIGITS_SIDE, "image_patch": 4, "image_channels": 1}
    for item in data:
        if is_hub(item):
            continue
        for path in _idx_images(expanded(item)):
            height, width = _idx_header(path)[1:]
            patch = 4 if max(height, width) <= 64 else 16
            side = -(-max(height, width) // patch) * patch
            return {"image_size": side, "image_patch": patch, "image_channels": 1}
    return {}


def open_images(
    data: Sequence[str], held_out: str | None, geometry: Geometry, text_field: str | None = None
) -> ImageCorpus:
    """Read and decode `data` (none: scikit-learn's digits) and hold a part out.

    Args:
        data: folders, images' JSON Lines or IDX files.
        held_out: a path, the share of the images to hold out (spread evenly over them), or how many of the
            last ones; None is a tenth, or the files of `t10k` among IDX files.
        geometry: what every image is fitted into.
        text_field: field of the caption in .jsonl files.

    Raises:
        UserError: data that is missing, malformed or without one usable image; one line.
    """
    found = _find(data, text_field) if data else _digits()
    path = None if held_out is None or spelled_number(held_out) is not None else held_out
    store = Store()
    if path is not None:
        apart = _find([path], text_field)
        taken = {key for key in apart.keys if key}
        kept = [n for n, key in enumerate(found.keys) if key not in taken]
        both = len(found.keys) - len(kept)
        train = _decoded(found, geometry, store)
        train = train.part(_positions(train, kept))
        test = _decoded(apart, geometry, store)
        if both:
            found.skipped["also held out"] += both
        skipped = found.skipped + apart.skipped
        rule = f"held out: {path}"
    else:
        whole = _decoded(found, geometry, store)
        skipped = found.skipped
        out, rule = _split(whole, found, held_out) if len(whole) else (set[int](), "")
        train = whole.part([n for n in range(len(whole)) if n not in out])
        test = whole.part(sorted(out))
    reasons = told(skipped)
    for part, images in (("to train on", train), ("held out", test)):
        if not len(images):
            raise UserError(
                f"{found.name}: no image {part} can be used{reasons}; give more images with captions, or "
                "another --held-out"
            )
    cache = f"; kept in memory, the cache cannot be written ({store.unwritable})" if store.unwritable else ""
    return ImageCorpus(
        train=train,
        held_out=test,
        description=f"{found.name}: {len(train):,} images to train on, {len(test):,} held out ({rule})"
        f"{reasons}{cache}",
    )


def open_training_images(
    data: Sequence[str], held_out: str | None, geometry: Geometry, text_field: str | None = None
) -> ImageCorpus | StreamedImages:
    """As `open_images`, but a data set of the hub, of which that takes the first `MAX_MEDIA`, is a stream.

    Of that, `held_out` is a path, a share of its first examples, or how many of the first ones.
    """
    if not any(map(is_hub, data)):
        return open_images(data, held_out, geometry, text_field)
    if len(data) > 1:
        raise UserError("a data set of the hub stands alone: give one, or files without it")
    if text_field is not None:
        raise UserError(f"--field {text_field} is for files; of the hub: {data[0]}:SPLIT:{text_field}")
    path = held_out if held_out is not None and spelled_number(held_out) is None else None

    def load(content: bytes, caption: bytes) -> CaptionedImage:
        pixels, why = _load(content, geometry)
        if pixels is None:
            raise SkippedError(why)
        return caption, pixels

    media: HubMedia[CaptionedImage] = HubMedia(
        data[0], "Image", load, lambda item: item[1].nbytes, MAX_CAPTION_BYTES, "0" if path else held_out
    )
    description = media.description
    if path is not None:
        apart = _find([path], None)
        test = _decoded(apart, geometry, Store())
        description += f"; {len(test):,} held out ({path}){told(apart.skipped)}"
    else:
        rows = [b"\1" + pixels.tobytes() for _, pixels in media.held_out]
        pixels = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 1 + geometry.bytes)
        captions = [caption for caption, _ in media.held_out]
        test = CaptionedImages(geometry, captions, pixels, np.arange(len(captions)))
    if not len(test):
        raise UserError(f"{description}: no image that is held out can be used; give another --held-out")
    return StreamedImages(train=ImageStream(geometry, media), held_out=test, description=description)


def fit(image: Any, geometry: Geometry) -> np.ndarray:
    """An image as uint8 [C, S, S]: its longer side becomes S, the rest is black on both sides.

    Args:
        image: a Pillow image of any mode, or uint8 [H, W] or [H, W, 3]. What is transparent becomes white.
        geometry: size and channels.

    Raises:
        ValueError: it is empty, or of a mode that stands for no brightness.
    """
    from PIL import Image, ImageOps

    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else ImageOps.exif_transpose(image)
    if not picture.width or not picture.height:
        raise ValueError("no pixels")
    picture = _plain(picture).convert("L" if geometry.channels == 1 else "RGB")
    longer = max(picture.size)
    if longer != geometry.size:
        wanted = tuple(max(1, round(side * geometry.size / longer)) for side in picture.size)
        picture = picture.resize(wanted, Image.Resampling.LANCZOS)
    square = Image.new(picture.mode, (geometry.size, geometry.size))
    square.paste(picture, ((geometry.size - picture.width) // 2, (geometry.size - picture.height) // 2))
    pixels = np.array(square, dtype=np.uint8)
    return pixels[None] if geometry.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_image(path: str | Path, geometry: Geometry) -> np.ndarray:
    """An image file as uint8 [C, S, S].

    Raises:
        UserError: it is missing, damaged or no image.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {reason(error)}") from error
    pixels, why = _load(content, geometry)
    if pixels is None:
        raise UserError(f"{str(path)!r} is {why}; give a whole image, one of {', '.join(_FORMATS)}")
    return pixels


def _plain(picture: Any) -> Any:
    """Without transparency, and with 8 bits a channel."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits, or 32 of which images use 16
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray((values >> 8 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("of floats")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return picture


def _load(source: Path | bytes, geometry: Geometry) -> tuple[np.ndarray | None, str]:
    """The pixels of a file or of its content, or None and why not."""
    from PIL import Image

    path = io.BytesIO(source) if isinstance(source, bytes) else source

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as picture:
                if picture.width * picture.height > _MAX_PIXELS:
                    return None, "too large"
                picture.load()
                return fit(picture, geometry), ""
    except FileNotFoundError:
        return None, "missing"
    except MemoryError:
        return None, "too large for the memory"
    except ValueError as error:
        return None, f"unusable ({error})" if str(error) in ("no pixels", "of floats") else "damaged"
    except Image.DecompressionBombError:
        return None, "too large"
    # Decoders of damaged files raise whatever their own mistakes are; those of the system have a number.
    except Exception as error:
        return None, "not readable" if getattr(error, "errno", None) else "damaged"


def _decoded(found: _Found, geometry: Geometry, store: Store) -> CaptionedImages:
    """The usable ones among what was found; the others are counted."""

    for_now: list[str] = []

    def records() -> Iterator[bytes]:
        for loader in found.loaders:
            if isinstance(loader, np.ndarray):
                pixels: np.ndarray | None = fit(loader, geometry)
            else:
                pixels, why = _load(loader, geometry)
                if why in _FOR_NOW:
                    for_now.append(why)
            usable = b"\1" if pixels is not None else b"\0"
            yield usable + (bytes(geometry.bytes) if pixels is None else pixels.tobytes())

    if not found.loaders:
        empty = np.zeros((0, 1 + geometry.bytes), dtype=np.uint8)
        return CaptionedImages(geometry, [], empty, np.zeros(0, dtype=np.int64))
    key = ("images", _CACHE_FORMAT, geometry.size, geometry.channels, *found.keys)
    pixels = store.keep(key, records(), lambda: not for_now).reshape(-1, 1 + geometry.bytes)
    usable = np.asarray(pixels)[:, 0] == 1
    for number in np.flatnonzero(~usable).tolist():
        found.skipped[_load(found.loaders[number], geometry)[1] or "not readable"] += 1
    chosen = np.flatnonzero(usable)
    return CaptionedImages(geometry, [found.captions[n] for n in chosen.tolist()], pixels, chosen)


def _positions(images: CaptionedImages, kept: Sequence[int]) -> list[int]:
    """Numbers, among the usable images, of those whose records are kept."""
    wanted = set(kept)
    return [n for n, record in enumerate(images.records.tolist()) if record in wanted]


def _split(images: CaptionedImages, found: _Found, held_out: str | None) -> tuple[set[int], str]:
    """Numbers of the images to hold out, and the rule in words."""
    if held_out is None:
        keys = [found.keys[record] for record in images.records.tolist()]
        t10k = {n for n, key in enumerate(keys) if key and Path(str(key[0])).name.startswith("t10k")}
        if t10k and len(t10k) < len(images):
            return t10k, "the t10k files"
    return numbered_split(len(images), held_out or OWN_SHARE, "images", "a path")


def _digits() -> _Found:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the built-in images are scikit-learn's digits, of the extra vision: "
            f"{extra_command('vision')}, or give images of your own"
        ) from error
    digits = load_digits()
    found = _Found(name="scikit-learn's handwritten digits")
    for number, (image, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = np.rint(image * (255 / 16)).astype(np.uint8)
        found.add(WORDS[int(target)].encode(), ("digits", number), pixels)
    return found


def _find(data: Sequence[str], text_field: str | None) -> _Found:
    found = _Found(name=" ".join(data))
    for item in data:
        if is_hub(item):
            _add_hub(item, found)
            continue
        path = existing(item)
        before = len(found.keys) + found.skipped.total()
        if idx := _idx_images(path):
            for images in idx:
                _add_idx(images, found)
        elif path.is_dir():
            _add_folder(path, text_field, found)
        elif is_lines(path):
            _add_lines(path, text_field, found)
        else:
            raise UserError(
                f"{item!r} is no data of images: give a folder of images with captions, a .jsonl of image "
                "and text, or an IDX file ...images-idx3-ubyte"
            )
        if len(found.keys) + found.skipped.total() == before:
            raise UserError(f"no images in {item!r}")
    return found


def _add_hub(item: str, found: _Found) -> None:
    """The first examples of a data set of the hub, kept in memory as they are encoded."""
    examples = HubExamples(item)
    for content, text in examples.media("Image", CAPTION_FIELDS):
        caption = text.strip().encode("utf-8", "replace")
        if not content or not caption or len(caption) > MAX_CAPTION_BYTES:
            found.skipped["without an image or a caption that can be used"] += 1
            continue
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        found.add(caption, (str(examples.spec), digest, len(found.keys)), content)


def _add_folder(folder: Path, text_field: str | None, found: _Found) -> None:
    lines, images = listed(folder, SUFFIXES, found.skipped)
    named: set[str] = set()
    for path in lines:
        named |= _add_lines(path, text_field, found)
    for image in sorted(images):
        if real_path(image) in named:
            continue
        try:
            caption = text_beside(image, MAX_CAPTION_BYTES)
        except UnusableTextError as error:
            found.skipped[str(error)] += 1
            continue
        if caption is None:
            found.skipped["without a caption"] += 1
            continue
        _add_file(image, caption, found)


def _add_file(image: Path, caption: bytes, found: _Found) -> None:
    if not caption:
        found.skipped["with an empty caption"] += 1
        return
    try:
        status = file_status(image)
    except PermissionError:
        found.skipped["not readable"] += 1
        return
    if status is None:
        found.skipped[why_no_file(image)] += 1
        return
    found.add(caption, (real_path(image), status.st_size, status.st_mtime_ns), image)


def _add_lines(path: Path, text_field: str | None, found: _Found) -> set[str]:
    """Add the images of a JSON Lines file; returns their real paths."""
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
            image = _field(record, ("image", "file_name"), where)
            caption = _field(record, (text_field,) if text_field else ("text", "caption"), where)
            target = path.parent / image
            named.add(real_path(target))
            _add_file(target, cleaned(caption.encode("utf-8", "replace"), MAX_CAPTION_BYTES), found)
    return named


def _field(record: Any, names: Sequence[str], where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON object with an image and a text is needed")
    for name in names:
        if isinstance(record.get(name), str) and "\0" not in record[name]:
            return record[name]
    raise UserError(f"{where}: no text in the field {' or '.join(map(repr, names))}")


def _idx_images(path: Path) -> list[Path]:
    """The IDX files of images that a path means: itself, or those directly in the folder."""
    try:
        names = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise UserError(f"cannot read the folder {str(path)!r}: {reason(error)}") from error
    return [p for p in names if "idx3-ubyte" in p.name and not p.name.startswith(".") and os.path.isfile(p)]


def _idx_header(path: Path) -> tuple[int, ...]:
    """Sizes of the dimensions of an IDX file of bytes.

    Raises:
        UserError: it is none.
    """
    with opened(path) as file:
        head = file.read(16)
    dimensions = head[3] if len(head) >= 4 else 0
    if head[:3] != b"\0\0\x08" or dimensions not in (1, 3) or len(head) < 4 + 4 * dimensions:
        raise UserError(f"{str(path)!r} is no IDX file of bytes with 1 or 3 dimensions")
    return struct.unpack(f">{dimensions}I", head[4 : 4 + 4 * dimensions])


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """The content of an IDX file, uint8."""
    sizes = _idx_header(path)
    if len(sizes) != dimensions:
        raise UserError(f"{str(path)!r} has {len(sizes)} dimensions, needed are {dimensions}")
    count = int(np.prod(np.array(sizes, dtype=object)))
    with opened(path) as file:
        file.read(4 + 4 * dimensions)
        content = file.read(count + 1) if count < 1 << 34 else b""
    if len(content) != count or not count:
        raise UserError(f"{str(path)!r} does not hold the {count:,} bytes that its header promises")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)


def _add_idx(path: Path, found: _Found) -> None:
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    choices = [path.with_name(name), path.with_name(name.removesuffix(".gz")), path.with_name(name + ".gz")]
    labels_path = next((choice for choice in choices if choice.is_file() and choice != path), None)
    if labels_path is None:
        raise UserError(f"the labels of {str(path)!r} are missing: {name!r} is needed beside it")
    images, labels = _idx(path, 3), _idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{str(path)!r} has {len(images):,} images, {labels_path.name!r} {len(labels):,} labels"
        )
    files = [path.stat(), labels_path.stat()]
    stamp = tuple((status.st_size, status.st_mtime_ns) for status in files)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        caption = WORDS[label] if label < len(WORDS) else str(label)
        found.add(caption.encode(), (os.path.realpath(path), number, *stamp), image)
