import json

import numpy as np
import pytest
from PIL import Image

from arbitor.data.sampler import random_bits
from arbitor.data.video import (
    ClipGeometry,
    Films,
    MovingDigits,
    load_video,
    open_videos,
    sheet,
    velocities,
    write_clips,
)
from arbitor.errors import UserError

GEOMETRY = ClipGeometry(size=16, frames=8, channels=1)


def bits(count, seed=0):
    return random_bits(seed, np.arange(count, dtype=np.uint64))


def one_digit(**geometry):
    shape = ClipGeometry(**{"size": 16, "frames": 8, "channels": 1, **geometry})
    digit = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8)
    return MovingDigits(shape, [b"one"], digit), digit[0]


def places(clips):
    """Row and column of the digit in every frame [B, F], and that nothing else is there."""
    found = []
    for frame in clips.reshape(-1, *clips.shape[-2:]):
        rows, columns = np.nonzero(frame)
        assert len(rows) == 64
        found.append((rows.min(), columns.min()))
    return np.array(found).reshape(*clips.shape[:2], 2)


def test_digits_move_at_their_velocity_and_bounce():
    source, digit = one_digit(frames=12)
    given = bits(300)
    clips = source.clips(np.zeros(300, dtype=np.int64), given)
    assert (clips.shape, clips.dtype) == ((300, 12, 1, 16, 16), np.uint8)
    where = places(clips[:, :, 0])
    row, column = where[7, 3]
    assert (clips[7, 3, 0, row : row + 8, column : column + 8] == digit).all()
    moved = np.diff(where, axis=1)
    velocity = np.stack(velocities(given), axis=-1)
    assert (np.abs(velocity).max(axis=-1) >= 1).all()
    assert len(np.unique(velocity, axis=0)) == 24
    # Away from the edges every step is the velocity or its reverse; at an edge it is shorter.
    assert (np.abs(moved) <= np.abs(velocity)[:, None]).all()
    assert (np.abs(moved) == np.abs(velocity)[:, None]).mean() > 0.7
    first = (where[:, 0] >= 2) & (where[:, 0] <= 6)
    assert (moved[:, 0][first] == velocity[first]).all()
    assert len(np.unique(where[:, 0, 0])) == 9  # every place that there is


def test_a_digit_as_large_as_the_clip_stands_still():
    source, digit = one_digit(size=8, channels=3)
    clips = source.clips(np.zeros(5, dtype=np.int64), bits(5))
    assert (clips == digit).all()
    assert clips.shape == (5, 8, 3, 8, 8)


def test_embedded_digits_are_held_out_as_they_are():
    pytest.importorskip("sklearn", reason="scikit-learn (extra `video`) is not installed")
    corpus = open_videos([], None, GEOMETRY)
    train, held_out = corpus.train, corpus.held_out
    assert (len(train), len(held_out)) == (1618, 179)
    assert {c.decode() for c in held_out.captions} == {
        *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    }
    numbers = np.arange(len(train)) % 1618
    assert (train.clips(numbers, bits(1618)) == train.clips(numbers, bits(1618))).all()
    assert train.fingerprint() != held_out.fingerprint()
    again = open_videos([], None, GEOMETRY)
    assert again.train.fingerprint() == train.fingerprint()
    assert len(open_videos([], "100", GEOMETRY).held_out) == 100
    with pytest.raises(UserError, match="8 pixels a side"):
        open_videos([], None, ClipGeometry(size=4, frames=2, channels=1))


def test_a_clip_of_a_film_begins_where_the_bits_say():
    film = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), dtype=np.uint8)
    films = Films(ClipGeometry(size=4, frames=8, channels=1), [b"a"], [film])
    clips = films.clips(np.zeros(200, dtype=np.int64), bits(200))
    first = clips[:, 0, 0, 0, 0]
    assert set(first.tolist()) == {0, 1, 2}
    assert (clips[:, :, 0, 0, 0] == first[:, None] + np.arange(8)).all()


def write_video(path, frames=12, rate=8, size=(32, 24), level=None):
    av = pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            value = 20 * number if level is None else level
            picture = np.full((size[1], size[0], 3), value, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_videos_are_fitted_and_thinned_to_eight_frames_a_second(tmp_path):
    write_video(tmp_path / "a.mp4", frames=48, rate=24, level=200)
    film, why = load_video(tmp_path / "a.mp4", GEOMETRY)
    assert why == ""
    assert film.shape == (16, 1, 16, 16)
    # 32 x 24 becomes 16 x 12, with black above and below.
    assert film[:, :, :2].max() < 8
    assert abs(int(film[0, 0, 8, 8]) - 200) < 8
    short, _ = load_video(tmp_path / "a.mp4", ClipGeometry(size=16, frames=40, channels=3))
    assert short.shape == (48, 3, 16, 16)  # all frames, as eight a second would be too few


def test_folders_of_videos(tmp_path):
    for name in ("a", "b", "c", "d"):
        write_video(tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}\n")
    corpus = open_videos([str(tmp_path)], "0.5", GEOMETRY)
    assert corpus.train.captions == [b"caption of a", b"caption of c"]
    assert corpus.held_out.captions == [b"caption of b", b"caption of d"]
    level = corpus.train.films[0][:, 0, 8, 8].astype(int)
    assert (np.diff(level) > 10).all()
    apart = open_videos([str(tmp_path)], str(tmp_path / "d.mp4"), GEOMETRY)
    assert (len(apart.train), len(apart.held_out)) == (3, 1)
    assert "1 also held out" in apart.description


def test_what_cannot_be_used_is_counted(tmp_path):
    for name in ("good", "other", "cut", "empty", "text", "short", "silent", "blank"):
        write_video(tmp_path / f"{name}.mp4", frames=3 if name == "short" else 12)
        (tmp_path / f"{name}.txt").write_text("caption")
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "silent.txt").unlink()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".hidden.mp4").write_bytes(whole)
    corpus = open_videos([str(tmp_path)], "1", GEOMETRY)
    assert (len(corpus.train), len(corpus.held_out)) == (1, 1)
    assert (
        "skipped 2 damaged, 1 hidden, 1 of fewer than 8 frames, 1 with an empty caption, "
        "1 without a caption, 1 without frames"
    ) in corpus.description


def test_a_film_without_frames_is_named(tmp_path):
    av = pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    assert load_video(tmp_path / "sound.mkv", GEOMETRY) == (None, "without frames")
    assert load_video(tmp_path / "none.mkv", GEOMETRY) == (None, "missing")


def test_json_lines_name_videos(tmp_path):
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4")
    lines = [
        {"video": "a.mp4", "text": "first"},
        {"file_name": "b.mp4", "caption": "second"},
        {"video": "gone.mp4", "text": "third"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for given in (tmp_path, tmp_path / "list.jsonl"):
        corpus = open_videos([str(given)], "1", GEOMETRY)
        assert corpus.train.captions + corpus.held_out.captions == [b"first", b"second"]
        assert "1 missing" in corpus.description
    (tmp_path / "list.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(UserError, match="line 1: an object"):
        open_videos([str(tmp_path)], "1", GEOMETRY)


@pytest.mark.parametrize(
    ("given", "held_out", "why"),
    [
        ("gone", None, "no such file or folder"),
        ("note.md", None, "no data of videos"),
        (".", None, "no videos in"),
        (".", "2", "no videos in"),
    ],
)
def test_bad_data_is_one_line(given, held_out, why, tmp_path):
    (tmp_path / "note.md").write_text("no video")
    with pytest.raises(UserError, match=why) as error:
        open_videos([str(tmp_path / given)], held_out, GEOMETRY)
    assert "\n" not in str(error.value)


def test_clips_are_written_as_sheets_and_playing(tmp_path):
    source, _ = one_digit()
    clips = source.clips(np.zeros(3, dtype=np.int64), bits(3))
    picture = sheet(clips, zoom=1)
    assert picture.shape == (3 * 17, 8 * 17, 3)
    assert (picture[17:33, 34:50, 0] == clips[1, 2, 0]).all()
    write_clips(tmp_path / "a.png", clips)
    assert Image.open(tmp_path / "a.png").size == (4 * 8 * 17, 4 * 3 * 17)
    write_clips(tmp_path / "a.gif", clips)
    with Image.open(tmp_path / "a.gif") as playing:
        assert playing.n_frames == 8
        assert playing.size == (4 * 3 * 17, 4 * 17)
    for path, why in ((tmp_path / "a.mp4", "as .png or .gif"), (tmp_path / "no" / "a.png", "cannot write")):
        with pytest.raises(UserError, match=why):
            write_clips(path, clips)
