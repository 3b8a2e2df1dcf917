import io
import json
import tarfile

import numpy as np
import pytest

from arbitor.data.audio import SYNTHETIC_LABELS, default_rate, label_of, open_audio
from arbitor.data.images import WORDS
from arbitor.data.waves import write_recording
from arbitor.errors import UserError
from testing.fake_hub import install, rows_of

soundfile = pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")


def tone(seed=0, size=400):
    return 0.3 * np.random.default_rng(seed).normal(size=size).astype(np.float32).clip(-2, 2)


@pytest.fixture
def folder(tmp_path):
    """Ten digits by two speakers, and things that are no recordings."""
    path = tmp_path / "words"
    path.mkdir()
    for number in range(10):
        write_recording(path / f"{number}_{'anna' if number % 2 else 'bert'}_0.wav", tone(number), 8000)
    (path / "notes.md").write_text("nothing")
    return path


def test_the_embedded_sounds_need_no_file_and_are_always_the_same():
    a, b = open_audio([], None, 8000), open_audio([], None, 8000)
    assert a.train.fingerprint() == b.train.fingerprint()
    assert set(a.train.labels) == {label.encode() for label in SYNTHETIC_LABELS} == set(a.held_out.labels)
    assert len(a.held_out) == 48
    seconds = [len(wave) / 16000 for wave in open_audio([], None, 16000).train.waves]
    assert 0.25 <= min(seconds) < max(seconds) <= 0.6
    assert all(2000 < np.abs(wave.astype(int)).max() < 32767 for wave in a.train.waves)


@pytest.mark.parametrize(
    ("name", "label", "speaker"),
    [
        ("7_theo_12.wav", b"seven", "theo"),
        ("a/b/yes-mary-3.flac", b"yes", "mary"),
        ("hello.wav", b"hello", ""),
        ("10_x.wav", b"10", "x"),
        ("3_17.wav", b"three", ""),
    ],
)
def test_labels_and_speakers_in_names(name, label, speaker):
    assert label_of(name) == (label, speaker)


def test_a_folder_gives_labels_of_names_of_text_files_and_of_lines(folder):
    (folder / "3_anna_0.txt").write_text(" tres \n", encoding="utf-8")
    write_recording(folder / "x.wav", tone(50), 8000)
    lines = [{"audio": "x.wav", "text": "listed", "speaker": "carl"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = open_audio([str(folder)], "1", 8000)
    labels = [*corpus.train.labels, *corpus.held_out.labels]
    assert sorted(labels) == sorted(
        [b"listed", b"zero", b"one", b"two", b"tres", *(b"four five six seven eight nine".split())]
    )
    assert "carl" in corpus.train.speakers + corpus.held_out.speakers


def test_a_tar_gives_what_a_folder_gives(folder, tmp_path):
    archive = tmp_path / "words.tar.gz"
    (folder / "3_anna_0.txt").write_text("tres")
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "words")
    a, b = open_audio([str(folder)], "2", 8000), open_audio([str(archive)], "2", 8000)
    assert a.train.fingerprint() == b.train.fingerprint()
    assert a.held_out.fingerprint() == b.held_out.fingerprint()


def test_everything_is_brought_to_one_channel_and_one_rate(tmp_path):
    stereo = np.stack([tone(1, 4410), tone(2, 4410)], axis=1)
    soundfile.write(tmp_path / "a_x_0.wav", stereo, 44100)
    soundfile.write(tmp_path / "b_x_0.wav", tone(3, 2205), 22050)
    corpus = open_audio([str(tmp_path)], "1", 8000)
    assert [len(w) for w in corpus.train.waves + corpus.held_out.waves] == [800, 800]


def test_what_cannot_be_used_is_counted_by_reason(folder):
    whole = (folder / "0_bert_0.wav").read_bytes()
    (folder / "short_x_0.wav").write_bytes(whole[:300])
    (folder / "empty_x_0.wav").write_bytes(b"")
    (folder / "junk_x_0.wav").write_bytes(b"junk" * 50)
    soundfile.write(folder / "nan_x_0.wav", np.array([0.1, np.nan], np.float32), 8000, subtype="FLOAT")
    soundfile.write(folder / "none_x_0.wav", np.zeros(0, np.float32), 8000)
    (folder / ".hidden.wav").write_bytes(whole)
    corpus = open_audio([str(folder)], None, 8000)
    assert len(corpus.train) + len(corpus.held_out) == 10
    assert corpus.description.endswith(
        "; skipped 1 cut short, 1 damaged, 2 empty, 1 hidden, 1 with samples that are no numbers"
    )


def test_recordings_without_a_label_are_counted(folder, tmp_path, monkeypatch):
    for name in ("_three", "-x", "named"):
        write_recording(folder / f"{name}.wav", tone(60), 8000)
    write_recording(folder / "_beside.wav", tone(61), 8000)
    (folder / "_beside.txt").write_text("beside")
    archive = tmp_path / "words.tar"
    with tarfile.open(archive, "w") as file:
        file.add(folder, "words")
    lines = [{"audio": f"words/{name}.wav", "text": "\ufeff"} for name in ("_three", "named")]
    lines += [{"audio": f"words/{name}.wav", "text": "said"} for name in ("-x", "_beside")]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = rows_of(4)
    rows[2]["text"] = "  "
    install(monkeypatch, rows)
    for data, usable, skipped in (
        (str(folder), 12, 2),
        (str(archive), 12, 2),
        (str(tmp_path / "list.jsonl"), 3, 1),
        ("hf:some/media", 3, 1),
    ):
        corpus = open_audio([data], "1", 8000)
        labels = [*corpus.train.labels, *corpus.held_out.labels]
        assert len(labels) == usable
        assert all(labels)
        assert corpus.description.endswith(f"; skipped {skipped} without a label")


def test_a_speaker_is_held_out(folder):
    corpus = open_audio([str(folder)], "speaker:anna", 8000)
    assert set(corpus.held_out.speakers) == {"anna"}
    assert set(corpus.train.speakers) == {"bert"}
    with pytest.raises(UserError, match=r"nobody of that name speaks \(did you mean 'anna'\?\).*anna, bert"):
        open_audio([str(folder)], "speaker:ana", 8000)


def test_what_is_held_out_by_path_is_not_trained_on(folder):
    corpus = open_audio([str(folder)], str(folder / "4_bert_0.wav"), 8000)
    assert corpus.held_out.labels == [b"four"]
    assert b"four" not in corpus.train.labels
    assert len(corpus.train) == 9


@pytest.mark.parametrize(("count", "held_out", "out"), [(2, None, [1]), (5, None, [4]), (9, "0.1", [8])])
def test_a_share_of_few_recordings_is_one(tmp_path, count, held_out, out):
    for number in range(count):
        write_recording(tmp_path / f"{number}_x.wav", tone(number), 8000)
    corpus = open_audio([str(tmp_path)], held_out, 8000)
    words = [corpus.held_out.labels, corpus.train.labels]
    assert words == [
        [WORDS[n].encode() for n in out],
        [WORDS[n].encode() for n in range(count) if n not in out],
    ]
    assert "1 held out (the last one)" in corpus.description


def test_one_recording_cannot_be_learnt_from_and_held_out(tmp_path):
    write_recording(tmp_path / "0_x.wav", tone(), 8000)
    with pytest.raises(UserError, match="no recording held out can be used"):
        open_audio([str(tmp_path)], None, 8000)


@pytest.mark.parametrize("held_out", ["10", "nonsense/none", "-1", "nan", "1.5", "0"])
def test_a_held_out_part_that_cannot_be_is_refused(folder, held_out):
    with pytest.raises(UserError):
        open_audio([str(folder)], held_out, 8000)


def test_bad_data_is_one_line(tmp_path, folder):
    bad_tar = tmp_path / "bad.tar"
    bad_tar.write_bytes(b"junk" * 300)
    no_lines = tmp_path / "a.jsonl"
    no_lines.write_text('{"audio": 3, "text": "x"}\n')
    only_text = tmp_path / "b.jsonl"
    only_text.write_text("[1, 2]\n")
    (tmp_path / "none").mkdir()
    for item, why in [
        (tmp_path / "missing", "no such file or folder"),
        (tmp_path / "none", "no recordings in"),
        (bad_tar, "no tar archive, damaged or cut short"),
        (no_lines, "line 1: an object"),
        (only_text, "line 1: an object"),
        (folder / "notes.md", "no data of sounds"),
    ]:
        with pytest.raises(UserError, match=why) as caught:
            open_audio([str(item)], None, 8000)
        assert "\n" not in str(caught.value)


def test_a_tar_that_ends_in_the_middle_is_one_line_or_what_there_is(folder, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.add(folder, "words")
    whole = buffer.getvalue()
    archive = tmp_path / "cut.tar"
    for size in range(0, len(whole), 1111):
        archive.write_bytes(whole[:size])
        outcome = ""
        try:
            corpus = open_audio([str(archive)], "1", 8000)
        except UserError as error:
            outcome = str(error)
        assert "\n" not in outcome
        assert outcome or 2 <= len(corpus.train) + len(corpus.held_out) <= 10


@pytest.mark.parametrize(("rates", "rate"), [([8000], 8000), ([8000, 44100, 44100], 16000)])
def test_the_rate_follows_the_recordings(tmp_path, rates, rate):
    for number, own in enumerate(rates):
        write_recording(tmp_path / f"{number}_x_0.wav", tone(number), own)
    assert default_rate([str(tmp_path)]) == rate


def test_labels_of_any_length_are_bounded(folder):
    (folder / "3_anna_0.txt").write_bytes(b"x" * 100_000)
    corpus = open_audio([str(folder)], "1", 8000)
    assert max(map(len, corpus.train.labels)) == 4096


def test_spoken_digits(data_folder):
    path = data_folder / "fsdd" / "recordings.tar"
    if not path.is_file():
        pytest.skip(f"no spoken digits at {path}")
    corpus = open_audio([str(path)], "speaker:theo", 8000)
    assert (len(corpus.train), len(corpus.held_out)) == (2000, 500)
    assert len(set(corpus.train.labels)) == 10
    assert default_rate([str(path)]) == 8000
