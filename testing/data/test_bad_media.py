"""Every kind of bad medium beside good ones: skipped and counted by reason, or one line; never more."""

import io
import json
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arbitor.data.audio import open_audio
from arbitor.data.images import Geometry, open_images, read_image
from arbitor.data.media import UnusableTextError, cleaned, existing
from arbitor.data.video import ClipGeometry, load_video, open_videos
from arbitor.data.waves import UnusableError, load_content, usable_wave
from arbitor.errors import UserError

GEOMETRY = Geometry(size=8, channels=3)
CLIP = ClipGeometry(size=8, frames=4, channels=3)
SUFFIX = {"image": ".png", "audio": ".wav", "video": ".mkv"}
KINDS = list(SUFFIX)


def opened(kind, *items):
    """What is said about the data `items`."""
    data = [str(item) for item in items]
    if kind == "image":
        return open_images(data, "1", GEOMETRY).description
    if kind == "audio":
        pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")
        return open_audio(data, "1", 8000).description
    pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    return open_videos(data, "1", CLIP).description


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(picture, kind="PNG", **options):
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def sound(samples=None, kind="WAV", subtype=None, rate=8000):
    soundfile = pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")
    if samples is None:
        samples = 0.3 * np.random.default_rng(0).normal(size=16_000).clip(-2, 2)
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=kind, subtype=subtype)
    return content.getvalue()


def video(path, frames=12, kind="mpeg4", size=(32, 24)):
    av = pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(kind, rate=8)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for picture in noise(frames, size[1], size[0], 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def content_of(kind, folder):
    """A good file of a kind."""
    if kind == "image":
        return encoded(Image.fromarray(noise(9, 9, 3)))
    return sound() if kind == "audio" else video(folder / "made.mkv")


@pytest.fixture
def good(tmp_path):
    """good(kind): a folder of two good media with captions."""

    def make(kind):
        folder = tmp_path / "good"
        folder.mkdir()
        content = content_of(kind, tmp_path)
        for name in ("a", "b"):
            (folder / f"{name}{SUFFIX[kind]}").write_bytes(content)
            (folder / f"{name}.txt").write_text("a caption")
        return folder

    return make


def in_time(work):
    """What `work` gives; fails where it waits for something that never comes."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert outcome, "still waiting"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


# --- captions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "caption", ["café".encode("latin-1"), "a cat".encode("utf-16"), b"a\0cat"], ids=["latin", "utf16", "zero"]
)
def test_captions_of_another_encoding_are_counted(kind, caption, good):
    folder = good(kind)
    bad = folder / f"c{SUFFIX[kind]}"
    bad.write_bytes((folder / f"a{SUFFIX[kind]}").read_bytes())
    bad.with_suffix(".txt").write_bytes(caption)
    assert "skipped 1 with a caption that is not UTF-8" in opened(kind, folder)


def test_a_long_caption_is_cut_between_two_characters():
    assert cleaned("é".encode() * 10, 7) == "é".encode() * 3
    assert cleaned(b"\xef\xbb\xbf a b \n", 100) == b"a b"
    for bad in (b"abc\xc3", b"\xc3(" * 9, b"a\0"):
        with pytest.raises(UnusableTextError, match="UTF-8"):
            cleaned(bad, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_that_cannot_be_read_is_counted(kind, good, monkeypatch):
    folder = good(kind)
    whole = Path.stat

    def stat(path, **options):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return whole(path, **options)

    (folder / f"c{SUFFIX[kind]}").write_bytes((folder / f"a{SUFFIX[kind]}").read_bytes())
    (folder / "c.txt").write_text("third")
    monkeypatch.setattr(Path, "stat", stat)
    assert "skipped 1 with a caption that cannot be read" in opened(kind, folder)


# --- what is no file, or cannot be read


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_read_is_counted(kind, good, monkeypatch):
    folder = good(kind)
    whole = Path.stat

    def stat(path, **options):
        if path.name == f"c{SUFFIX[kind]}":
            raise PermissionError(13, "Permission denied")
        return whole(path, **options)

    (folder / f"c{SUFFIX[kind]}").write_bytes((folder / f"a{SUFFIX[kind]}").read_bytes())
    (folder / "c.txt").write_text("third")
    monkeypatch.setattr(Path, "stat", stat)
    assert "skipped 1 not readable" in opened(kind, folder)


def test_an_image_that_the_system_does_not_open_is_not_called_damaged(good, monkeypatch):
    folder = good("image")
    whole = Image.open

    def refusing(path, **options):
        if Path(path).name == "c.png":
            raise OSError(5, "Input/output error")
        return whole(path, **options)

    (folder / "c.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "c.txt").write_text("third")
    monkeypatch.setattr(Image, "open", refusing)
    assert "skipped 1 not readable" in opened("image", folder)


def test_what_could_not_be_read_once_is_not_remembered(good, monkeypatch, cache):
    folder = good("image")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "c.txt").write_text("third")
    monkeypatch.setattr("arbitor.data.store.MEMORY_BYTES", 0)
    monkeypatch.setattr("arbitor.data.store.Store.__init__.__defaults__", (0,))
    whole = Image.open
    with monkeypatch.context() as patched:

        def refusing(path, **options):
            if Path(path).name == "c.png":
                raise OSError(5, "Input/output error")
            return whole(path, **options)

        patched.setattr(Image, "open", refusing)
        corpus = open_images([str(folder)], "1", GEOMETRY)
        assert "skipped 1 not readable" in corpus.description
        assert corpus.train.images(np.array([0])).any()  # the file without a name still gives its pages
    assert not list(cache.glob("*"))
    corpus = open_images([str(folder)], "1", GEOMETRY)
    assert "skipped" not in corpus.description
    assert list(cache.glob("*.bytes"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["pipe", "circle", "device", "folder"])
def test_what_is_no_file_is_counted(kind, what, good):
    folder = good(kind)
    path = folder / f"c{SUFFIX[kind]}"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        (folder / "real").mkdir()
        path.symlink_to("real")
    else:
        path.symlink_to(path.name if what == "circle" else "/dev/zero")
    (folder / "c.txt").write_text("third")
    told = in_time(lambda: opened(kind, folder))
    if what == "folder":  # a link to one is not followed
        assert "skipped" not in told
    else:
        assert f"skipped 1 {'missing' if what == 'circle' else 'no regular file'}" in told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_caption_that_is_no_file_is_none(kind, what, good):
    folder = good(kind)
    (folder / f"c{SUFFIX[kind]}").write_bytes((folder / f"a{SUFFIX[kind]}").read_bytes())
    if what == "pipe":
        os.mkfifo(folder / "c.txt")
    else:
        (folder / "c.txt").symlink_to("/dev/zero")
    told = in_time(lambda: opened(kind, folder))
    # A recording's name serves as well.
    assert ("skipped" not in told) if kind == "audio" else ("skipped 1 without a caption" in told)


@pytest.mark.parametrize("kind", KINDS)
def test_lines_that_are_a_pipe_are_one_line(kind, good):
    folder = good(kind)
    os.mkfifo(folder / "list.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        in_time(lambda: opened(kind, folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["\ud800x", "a" * 5000, "a/" * 3000, "..", "/"])
def test_names_that_no_file_has_are_counted(kind, name, good):
    folder = good(kind)
    lines = [{kind: f"../good/a{SUFFIX[kind]}", "text": "first"}] * 2 + [{kind: name, "text": "third"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = opened(kind, folder / "list.jsonl")
    expected = "no regular file" if name in ("..", "/") else "missing"
    assert f"skipped 1 {expected}" in told


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_read_is_one_line(kind, good, monkeypatch):
    folder = good(kind)
    (folder / "inner").mkdir()
    whole = os.scandir

    def scandir(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read the folder '.*inner': Permission denied"):
        opened(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_folder_without_media_is_told_beside_others(kind, good, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no (images|recordings|videos) in '.*empty'"):
        opened(kind, good(kind), tmp_path / "empty")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_which_nothing_can_be_used_says_why(kind, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}{SUFFIX[kind]}").write_bytes(b"no medium at all" * 9)
        (tmp_path / f"{name}.txt").write_text("caption")
    with pytest.raises(UserError, match="can be used; skipped 2 damaged; give more") as caught:
        opened(kind, tmp_path)
    assert "\n" not in str(caught.value)


def test_nobodys_home_is_no_such_file():
    with pytest.raises(UserError, match="no such file or folder"):
        existing("~nobody-of-that-name/images")


# --- images


def test_a_piped_image_is_read_whole(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    content = encoded(Image.fromarray(noise(8, 8, 3)))
    writer = threading.Thread(target=lambda: path.write_bytes(content), daemon=True)
    writer.start()
    assert np.array_equal(in_time(lambda: read_image(path, GEOMETRY)), noise(8, 8, 3).transpose(2, 0, 1))


# --- recordings


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        *((kind, None) for kind in ("WAV", "AIFF", "AU", "RF64", "W64", "FLAC", "MP3")),
        *(("OGG", subtype) for subtype in ("VORBIS", "OPUS")),
    ],
)
def test_a_recording_cut_short_is_not_taken_for_a_shorter_one(kind, subtype):
    whole = sound(kind=kind, subtype=subtype)
    assert len(load_content(whole)[0]) == 16_000
    for size in (len(whole) // 2, len(whole) * 3 // 4):
        with pytest.raises(UnusableError):
            load_content(whole[:size])


def test_a_small_file_of_huge_silence_is_too_large(monkeypatch):
    monkeypatch.setattr("arbitor.data.waves.MAX_VALUES", 20_000)
    content = sound(np.zeros((8000, 8), np.int16), "FLAC")
    assert len(content) < 20_000
    with pytest.raises(UnusableError, match="too large"):
        load_content(content)


def test_floats_of_another_scale_are_not_squared():
    with pytest.raises(UnusableError, match="far beyond full scale"):
        usable_wave(np.array([0.0, 30_000.0, -5_000.0], np.float32), 8000, 8000)
    assert usable_wave(np.array([0.5, 3.0], np.float32), 8000, 8000).tolist() == [0.5, 1.0]


def test_names_of_recordings_of_another_encoding_are_counted(good, tmp_path):
    folder = good("audio")
    with open(os.fsencode(folder) + b"/caf\xe9.wav", "wb") as file:
        file.write(sound())
    assert "skipped 1 with a name that is not UTF-8" in opened("audio", folder)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(folder, "words")
        info = tarfile.TarInfo("words/a.txt")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"\xff\xfe"))
    told = opened("audio", folder, tmp_path / "all.tar")
    assert "1 with a caption that is not UTF-8, 2 with a name that is not UTF-8" in told


def test_a_tar_cut_inside_a_header_is_no_shorter_tar(good, tmp_path):
    archive = tmp_path / "all.tar"
    with tarfile.open(archive, "w") as file:
        file.add(good("audio"), "words")
    with tarfile.open(archive) as file:
        last = file.getmembers()[-1]
    assert last.offset
    archive.write_bytes(archive.read_bytes()[: last.offset + 300])
    with pytest.raises(UserError, match="damaged or cut short"):
        opened("audio", archive)


def test_numbers_are_names_of_speakers(good):
    folder = good("audio")
    lines = [{"audio": f"{name}.wav", "text": "x", "speaker": n} for n, name in enumerate("ab", 84)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert open_audio([str(folder)], "speaker:85", 8000).train.speakers == ["84"]


# --- videos


def test_a_video_with_a_damaged_frame_is_counted(good, tmp_path):
    folder = good("video")
    whole = video(tmp_path / "whole.avi", frames=24)
    (folder / "c.avi").write_bytes(whole[:9000] + bytes(noise(400)) + whole[9400:])
    (folder / "c.txt").write_text("third")
    assert "skipped 1 damaged" in opened("video", folder)


def test_a_video_never_leads_to_other_files(tmp_path):
    content = video(tmp_path / "other.mkv")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'other.mkv'\n")
    assert load_video(tmp_path / "list.mp4", CLIP) == (None, "damaged")
    inner = tmp_path / "a:b"
    inner.mkdir()
    (inner / "c.mkv").write_bytes(content)
    assert load_video(inner / "c.mkv", CLIP)[1] == ""


def test_frames_that_are_too_large_are_not_decoded(tmp_path, monkeypatch):
    video(tmp_path / "a.mkv")
    monkeypatch.setattr("arbitor.data.video.MAX_PIXELS", 700)
    assert load_video(tmp_path / "a.mkv", CLIP) == (None, "too large")
