import io
import sys
import wave

import numpy as np
import pytest

from arbitor.data.clips import clip, coloured, varied, with_gap
from arbitor.data.waves import (
    UnusableError,
    load_content,
    load_file,
    read_recording,
    resample,
    usable_wave,
    write_recording,
)
from arbitor.errors import UserError

soundfile = pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")


def sine(rate, frequency=440.0, seconds=0.5, phase=0.3):
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate + phase).astype(np.float32)


def content(samples, rate=8000, subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("rate", "wanted"), [(8000, 16000), (16000, 8000), (44100, 8000), (22051, 16000), (11025, 8000)]
)
def test_a_sine_stays_the_same_sine_at_another_rate(rate, wanted):
    made = resample(sine(rate), rate, wanted)
    right = sine(wanted)[: len(made)]
    assert abs(len(made) - 0.5 * wanted) <= 1
    # The filter's stop band is below -80 dB; its ends see zeros beyond the sound.
    assert np.abs(made[300:-300] - right[300 : len(made) - 300]).max() < 1e-4


def test_what_the_lower_rate_cannot_hold_is_filtered_out():
    made = resample(sine(16000, frequency=6000.0), 16000, 8000)
    assert np.abs(made[300:-300]).max() < 1e-3


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_short_waves_are_resampled_to_their_share(length):
    assert len(resample(np.ones(length, np.float32), 8000, 12000)) == -(-length * 3 // 2)


def test_resampling_in_parts_changes_nothing(monkeypatch):
    given = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    whole = resample(given, 16000, 7919)
    monkeypatch.setattr("arbitor.data.waves._CHUNK_TAPS", 1)
    assert np.array_equal(resample(given, 16000, 7919), whole)


def test_channels_are_mixed_down():
    left, right = sine(8000), sine(8000, 700.0)
    mixed = usable_wave(np.stack([left, right], axis=1), 8000, 8000)
    np.testing.assert_allclose(mixed, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "rate", "why"),
    [
        (np.zeros((0, 2), np.float32), 8000, "empty"),
        (np.zeros((5, 0), np.float32), 8000, "empty"),
        (np.array([0.1, np.nan, 0.2], np.float32), 8000, "no numbers"),
        (np.array([0.1, np.inf], np.float32), 8000, "no numbers"),
        (np.ones(9, np.float32), 1, "rate"),
    ],
)
def test_what_is_no_sound_is_unusable(samples, rate, why):
    with pytest.raises(UnusableError, match=why):
        usable_wave(samples, rate, 8000)


def test_floats_beyond_full_scale_are_limited():
    loud = usable_wave(3 * sine(8000), 8000, 8000)
    assert np.abs(loud).max() == 1


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT", "ULAW"])
def test_every_common_kind_of_wav_is_read(subtype):
    samples, rate = load_content(content(0.5 * sine(11025), 11025, subtype))
    assert rate == 11025
    np.testing.assert_allclose(samples[:, 0], 0.5 * sine(11025), atol=0.02)


def test_a_wav_that_was_cut_short_is_not_taken_for_a_shorter_one():
    whole = content(sine(8000))
    for size in (len(whole) - 2, len(whole) // 2, 60, 20, 3):
        with pytest.raises(UnusableError):
            load_content(whole[:size])


@pytest.mark.parametrize("junk", [b"", b"RIFF", b"\0" * 100, b"not audio at all", bytes(range(256)) * 8])
def test_junk_is_unusable(junk):
    with pytest.raises(UnusableError):
        load_content(junk)


def test_damaged_bytes_never_crash():
    whole = bytearray(content(sine(8000, seconds=0.05)))
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, 60, size=3):
            damaged[place] = random.integers(256)
        try:
            samples, rate = load_content(bytes(damaged))
            usable_wave(samples, rate, 8000)
        except UnusableError:
            continue


def test_a_recording_is_written_as_16_bit_wav_and_read_back(tmp_path):
    path = tmp_path / "a.wav"
    write_recording(path, 0.7 * sine(8000), 8000)
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 8000)
    np.testing.assert_allclose(read_recording(path, 8000), 0.7 * sine(8000), rtol=0, atol=0.5 / 32768 + 1e-7)


def test_a_missing_recording_and_an_unwritable_place_are_one_line(tmp_path):
    with pytest.raises(UserError, match="missing"):
        read_recording(tmp_path / "none.wav", 8000)
    with pytest.raises(UserError, match="cannot write"):
        write_recording(tmp_path / "no" / "a.wav", sine(8000), 8000)


def test_a_missing_reader_is_no_fault_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    write_recording(path, sine(8000), 8000)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for load in (load_file, lambda p: load_content(p.read_bytes()), lambda p: read_recording(p, 8000)):
        with pytest.raises(UserError, match="audio files need soundfile"):
            load(path)


@pytest.mark.parametrize("length", [1, 5, 100, 101, 250])
def test_clips_have_the_length_and_hold_the_wave_at_every_place(length):
    given = np.arange(1, length + 1, dtype=np.float32)
    places = set()
    for bits in (None, 0, 0xFFFF, *range(0, 1 << 16, 997)):
        made = clip(given, 100, bits)
        assert made.shape == (100,)
        inside = made[made > 0]
        assert len(inside) == min(length, 100)
        assert np.array_equal(inside, np.arange(inside[0], inside[0] + len(inside)))
        places.add(int(inside[0]) if length > 100 else int(np.argmax(made > 0)))
    assert len(places) > 1 or length == 100
    assert {min(places), max(places)} == {
        1 if length > 100 else 0,
        *([length - 99] if length > 100 else [100 - length]),
    }


def test_varied_waves_depend_on_their_bits_alone():
    given = 0.2 * sine(8000)
    for bits in (0, 1, (1 << 48) - 1, 0x123456789ABC):
        made = varied(given, bits)
        assert np.array_equal(made, varied(given, bits))
        assert made.dtype == np.float32
        assert np.abs(made).max() <= 1
        assert 2**-0.31 < len(made) / len(given) < 2**0.31
    many = [varied(given, bits) for bits in range(40)]
    lengths, peaks = [len(made) for made in many], [np.abs(made).max() for made in many]
    assert max(lengths) > 1.3 * min(lengths)
    assert max(peaks) > 3 * min(peaks)
    assert varied(given, 5, -2.0)[0] != varied(given, 5)[0]


def test_a_gap_is_silent_and_short():
    given = np.ones(1000, np.float32)
    gaps = [np.flatnonzero(with_gap(given, bits) == 0) for bits in range(50)]
    assert all(len(gap) == 0 or np.array_equal(gap, np.arange(gap[0], gap[0] + len(gap))) for gap in gaps)
    assert 100 < max(map(len, gaps)) <= 150


def test_colour_multiplies_frequencies_by_its_curve():
    given = sine(8000, 2000.0, 1.0, 0.0)
    np.testing.assert_allclose(coloured(given, np.array([0.0, 1.0, 0.0])), 2 * given, atol=1e-3)
    np.testing.assert_allclose(coloured(given, np.zeros(5)), given, atol=1e-6)
