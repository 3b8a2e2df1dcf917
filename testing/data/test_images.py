"""Images with captions from folders, JSON Lines, IDX files and scikit-learn; what is bad is counted."""

import gzip
import itertools
import json
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from arbitor.data.draw import ImageSampler, moved
from arbitor.data.images import Geometry, default_geometry, fit, open_images, read_image
from arbitor.data.sampler import random_bits
from arbitor.errors import UserError

GREY = Geometry(size=8, channels=1)
COLOUR = Geometry(size=8, channels=3)


@pytest.fixture(autouse=True)
def _no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(value=200, size=(8, 8), mode="L"):
    return Image.new(mode, size, value)


@pytest.fixture
def folder(tmp_path):
    """Twenty images with captions."""
    place = tmp_path / "images"
    place.mkdir()
    for n in range(20):
        picture(10 * n).save(place / f"{n:02}.png")
        (place / f"{n:02}.txt").write_text(f"grey {10 * n}\n")
    return place


def test_a_folder_of_images_with_captions(folder):
    corpus = open_images([str(folder)], None, GREY)
    assert corpus.held_out.captions == [b"grey 90", b"grey 190"]
    assert corpus.train.captions == [f"grey {10 * n}".encode() for n in range(20) if n not in (9, 19)]
    for part in (corpus.train, corpus.held_out):
        values = part.images(np.arange(len(part)))
        assert values.shape == (len(part), 1, 8, 8)
        for image, caption in zip(values, part.captions, strict=True):
            assert (image == int(caption.split()[1])).all()
    assert corpus.description.endswith(": 18 images to train on, 2 held out (one of 10)")


@pytest.mark.parametrize(
    ("held_out", "expected"), [("0.5", [*range(1, 20, 2)]), ("3", [17, 18, 19]), ("1", [19])]
)
def test_what_is_held_out(folder, held_out, expected):
    corpus = open_images([str(folder)], held_out, GREY)
    assert corpus.held_out.captions == [f"grey {10 * n}".encode() for n in expected]
    assert len(corpus.train) == 20 - len(expected)


def test_a_path_is_held_out(folder, tmp_path):
    apart = folder / "apart"
    apart.mkdir()
    for n in (3, 4):
        for suffix in (".png", ".txt"):
            (folder / f"{n:02}{suffix}").rename(apart / f"{n:02}{suffix}")
    corpus = open_images([str(folder)], str(apart), GREY)
    assert corpus.held_out.captions == [b"grey 30", b"grey 40"]
    assert len(corpus.train) == 18
    assert not set(corpus.train.captions) & set(corpus.held_out.captions)
    assert "2 also held out" in corpus.description


def test_bad_images_are_skipped_and_counted(folder):
    whole = (folder / "00.png").read_bytes()
    bad = {
        "no_caption.png": (whole, None),
        "empty_caption.png": (whole, " \n"),
        "cut.png": (whole[:44], "cut"),
        "head.png": (whole[:20], "head"),
        "noise.png": (bytes(range(256)), "noise"),
        "empty.jpg": (b"", "empty"),
        "text.gif": (b"GIF89a is what this text is about", "text"),
        ".hidden.png": (whole, "hidden"),
    }
    for name, (content, caption) in bad.items():
        (folder / name).write_bytes(content)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_text(caption)
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32), "F").save(folder / "float.tiff")
    (folder / "float.txt").write_text("float")
    for _ in range(2):  # the second time from the cache
        corpus = open_images([str(folder)], "2", GREY)
        assert len(corpus.train) + len(corpus.held_out) == 20
        told = (
            "skipped 5 damaged, 2 hidden, 1 unusable (of floats), 1 with an empty caption, "
            "1 without a caption"
        )
        assert told in corpus.description


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("RGB", (200, 100, 50), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), (255, 255, 255)),
        ("LA", (90, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 90 * 256, (90, 90, 90)),
        ("I", 90, (90, 90, 90)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_modes(mode, value, expected):
    pixels = fit(picture(value, mode=mode), COLOUR)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == np.uint8
    assert tuple(pixels[:, 4, 4].tolist()) == expected


def test_a_palette_with_a_transparent_colour():
    image = picture((0, 204, 0), mode="RGB").convert("P")  # of the palette, so not dithered
    image.info["transparency"] = image.getpixel((0, 0))
    assert (fit(image, COLOUR) == 255).all()


@pytest.mark.parametrize(
    ("size", "inside"),
    [((8, 8), (8, 8)), ((16, 8), (4, 8)), ((4, 8), (8, 4)), ((3, 1), (3, 8)), ((500, 1), (1, 8))],
)
def test_the_longer_side_fills_the_square(size, inside):
    pixels = fit(picture(200, size), GREY)[0]
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    assert (len(rows), len(columns)) == inside
    assert abs((rows[0] + rows[-1]) / 2 - 3.5) <= 0.5, "in the middle"
    assert (pixels[rows][:, columns] == 200).all()


def test_a_turned_photograph_stands_upright(tmp_path):
    upright = np.zeros((8, 8), dtype=np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # stands on its head
    Image.fromarray(upright[::-1].copy()).save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png", GREY)[0] == upright).all()


def test_json_lines(folder):
    lines = [{"image": f"{n:02}.png", "text": f"number {n}"} for n in range(4)]
    lines.append({"file_name": "04.png", "caption": "number 4"})
    lines.append({"image": "nowhere.png", "text": "missing"})
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = open_images([str(folder / "list.jsonl")], "1", GREY)
    assert corpus.train.captions + corpus.held_out.captions == [f"number {n}".encode() for n in range(5)]
    assert "skipped 1 missing" in corpus.description
    whole = open_images([str(folder)], "1", GREY)
    assert len(whole.train) + len(whole.held_out) == 20, "what a list names is not taken a second time"
    with pytest.raises(UserError, match="line 5: no text in the field 'text'"):
        open_images([str(folder / "list.jsonl")], "1", GREY, "text")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": 3}', "line 2: no text in the field 'image' or 'file_name'"),
        ('{"image": "00.png"}', "line 2: no text in the field 'text' or 'caption'"),
        ("[1]", "line 2: a JSON object"),
        ("{", "line 2: not valid JSON"),
    ],
)
def test_bad_lines_are_named(folder, line, words):
    path = folder / "list.jsonl"
    path.write_text('{"image": "00.png", "text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"list\.jsonl") as caught:
        open_images([str(path)], "1", GREY)
    assert words in str(caught.value)


def write_idx(path, array):
    content = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    images = np.arange(12 * 64, dtype=np.uint32).astype(np.uint8).reshape(12, 8, 8)
    labels = np.array([*range(10), 10, 255], dtype=np.uint8)
    write_idx(tmp_path / f"some-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"some-labels-idx1-ubyte{suffix}", labels)
    assert default_geometry([str(tmp_path)]) == {"image_size": 8, "image_patch": 4, "image_channels": 1}
    corpus = open_images([str(tmp_path)], "2", GREY)
    assert (corpus.train.images(np.arange(10))[:, 0] == images[:10]).all()
    assert corpus.train.captions[:3] == [b"zero", b"one", b"two"]
    assert corpus.held_out.captions == [b"10", b"255"]
    alone = open_images([str(tmp_path / f"some-images-idx3-ubyte{suffix}")], "2", GREY)
    assert alone.train.fingerprint() == corpus.train.fingerprint()


def test_the_t10k_files_are_held_out(tmp_path):
    for name, count in (("train", 5), ("t10k", 3)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", np.full((count, 8, 8), count, dtype=np.uint8))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.zeros(count, dtype=np.uint8))
    corpus = open_images([str(tmp_path)], None, GREY)
    assert (len(corpus.train), len(corpus.held_out)) == (5, 3)
    assert (corpus.held_out.images(np.arange(3)) == 3).all()


def test_bad_idx_files_are_named(tmp_path):
    images, labels = tmp_path / "a-images-idx3-ubyte", tmp_path / "a-labels-idx1-ubyte"
    write_idx(images, np.zeros((4, 8, 8), dtype=np.uint8))
    with pytest.raises(UserError, match=r"labels of .* are missing"):
        open_images([str(tmp_path)], None, GREY)
    write_idx(labels, np.zeros(3, dtype=np.uint8))
    with pytest.raises(UserError, match="has 4 images, 'a-labels-idx1-ubyte' 3 labels"):
        open_images([str(tmp_path)], None, GREY)
    write_idx(labels, np.zeros(4, dtype=np.uint8))
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="does not hold the 256 bytes"):
        open_images([str(tmp_path)], None, GREY)
    images.write_bytes(b"\0\0\x0d\3" + whole[4:])
    with pytest.raises(UserError, match="is no IDX file"):
        open_images([str(tmp_path)], None, GREY)
    images.write_bytes(whole[:3] + b"\3" + b"\xff" * 12)
    with pytest.raises(UserError, match="does not hold"):
        open_images([str(tmp_path)], None, GREY)
    write_idx(tmp_path / "b-labels-idx1-ubyte", np.zeros(4, dtype=np.uint8))
    images.with_name("b-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(UserError, match="gzip"):
        open_images([str(images.with_name("b-images-idx3-ubyte.gz"))], None, GREY)


def test_what_gives_no_images_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_images([str(tmp_path / "imags")], None, GREY)
    (tmp_path / "note.txt").write_text("text")
    with pytest.raises(UserError, match=r"no data of images: give a folder"):
        open_images([str(tmp_path / "note.txt")], None, GREY)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no images in"):
        open_images([str(empty)], None, GREY)
    with pytest.raises(UserError, match="holds out all of the 20 images"):
        open_images([str(folder)], "20", GREY)
    for wrong in ("1.5", "-3", "0", "nan"):
        with pytest.raises(UserError, match="must be a path, a share"):
            open_images([str(folder)], wrong, GREY)
    with pytest.raises(UserError, match=r"missing\.png"):
        read_image(folder / "missing.png", GREY)
    with pytest.raises(UserError, match="damaged; give a whole image"):
        read_image(folder / "00.txt", GREY)


def test_the_digits_of_scikit_learn():
    pytest.importorskip("sklearn", reason="scikit-learn (extra `vision`) is not installed")
    corpus = open_images([], None, GREY)
    assert (len(corpus.train), len(corpus.held_out)) == (1618, 179)
    assert corpus.train.captions[:3] == [b"zero", b"one", b"two"]
    first = corpus.train.images(np.arange(1))[0, 0]
    assert first.max() <= 255
    assert first[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"extra vision: pip install '\.\[vision\]' in the clone, or give"):
        open_images([], None, GREY)


# -- drawing ------------------------------------------------------------------------------------------------


@pytest.fixture
def images(folder):
    return open_images([str(folder)], "3", GREY).train


def test_every_image_once_an_epoch_in_another_order(images):
    sampler = ImageSampler(images, 5, seed=4, augment=False)
    draws = [sampler.next()[0].tolist() for _ in range(17)]  # 85 draws of 17 images
    flat = list(itertools.chain.from_iterable(draws))
    epochs = [flat[n : n + 17] for n in range(0, 85, 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert ImageSampler(images, 17, seed=4, augment=False).next()[0].tolist() == epochs[0]
    assert ImageSampler(images, 17, seed=5, augment=False).next()[0].tolist() != epochs[0]


def test_a_restored_sampler_draws_what_the_other_would_have(images):
    one = ImageSampler(images, 6, seed=1)
    for _ in range(7):
        one.next()
    other = ImageSampler(images, 6, seed=2)
    other.restore(json.loads(json.dumps(one.state())))
    for _ in range(5):
        (numbers, pixels), (others, other_pixels) = one.next(), other.next()
        assert numbers.tolist() == others.tolist()
        assert torch.equal(pixels, other_pixels)


def test_other_images_are_refused(images, folder):
    state = ImageSampler(images, 6).state()
    fewer = images.part(range(16))
    with pytest.raises(UserError, match="17 then, 16 now"):
        ImageSampler(fewer, 6).restore(state)
    swapped = images.part([1, 0, *range(2, 17)])
    with pytest.raises(UserError, match="with other content"):
        ImageSampler(swapped, 6).restore(state)
    with pytest.raises(UserError, match="other data than images"):
        ImageSampler(images, 6).restore({"seed": 0, "drawn": 0, "stream_bytes": 9, "stream_digest": 9})
    with pytest.raises(UserError, match="non-negative integer"):
        ImageSampler(images, 6).restore({**state, "drawn": -1})


def test_moves_are_small_and_each_image_has_its_own():
    pixels = torch.zeros((200, 1, 16, 16), dtype=torch.uint8)
    pixels[:, :, 7:9, 7:9] = 200
    bits = random_bits(3, np.arange(200, dtype=np.uint64))
    found = moved(pixels, bits).float()
    total = found.sum((1, 2, 3))
    assert (total > 0.9 * 800).all()
    assert (total < 1.1 * 800).all()
    place = torch.arange(16.0)
    rows = (found.sum(3)[:, 0] * place).sum(1) / total - 7.5
    columns = (found.sum(2)[:, 0] * place).sum(1) / total - 7.5
    for shift in (rows, columns):
        # An eighth of 16 is 2, in directions that are turned by 10 degrees; pixels are rounded.
        assert shift.abs().max() < 2 * (math.cos(math.radians(10)) + math.sin(math.radians(10))) + 0.05
        assert shift.min() < -1.5
        assert shift.max() > 1.5
    middle = np.full(1, 0x7FFF_7FFF_7FFF, dtype=np.uint64)  # half a unit of 2^-15 from no move at all
    assert (moved(pixels[:1], middle).int() - pixels[:1].int()).abs().max() <= 1
    for one in (0, 57, 199):  # alone as among others
        assert torch.equal(moved(pixels[one : one + 1], bits[one : one + 1]).float(), found[one : one + 1])
