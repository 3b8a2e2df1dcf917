import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbitor.data import ByteStream
from arbitor.data import stream as module

pieces = st.lists(st.binary(max_size=9), max_size=8)


def as_arrays(parts: list[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(part, dtype=np.uint8) for part in parts]


@given(parts=pieces, data=st.data())
def test_windows_equal_the_concatenation(parts, data):
    stream, whole = ByteStream(as_arrays(parts)), b"".join(parts)
    assert len(stream) == len(whole)
    assert stream.as_array().tobytes() == whole
    length = data.draw(st.integers(0, len(whole)))
    offsets = data.draw(st.lists(st.integers(0, len(whole) - length), max_size=5))
    windows = stream.windows(np.array(offsets, dtype=np.int64), length)
    assert windows.shape == (len(offsets), length)
    assert [row.tobytes() for row in windows] == [whole[o : o + length] for o in offsets]
    assert [stream.window(o, length).tobytes() for o in offsets] == [whole[o : o + length] for o in offsets]


@given(
    whole=st.binary(min_size=1, max_size=60), cuts=st.lists(st.integers(0, 60), max_size=6), data=st.data()
)
def test_slices_of_one_buffer_in_any_order_equal_the_concatenation(whole, cuts, data):
    buffer = np.frombuffer(bytearray(whole), dtype=np.uint8)
    borders = sorted({0, len(whole), *(min(c, len(whole)) for c in cuts)})
    slices = [slice(a, b) for a, b in itertools.pairwise(borders)]
    order = data.draw(st.permutations(slices))
    assert ByteStream([buffer[s] for s in order]).as_array().tobytes() == b"".join(whole[s] for s in order)


def test_neighbouring_slices_need_no_copy():
    buffer = np.arange(30, dtype=np.uint8)
    stream = ByteStream([buffer[:10], buffer[10:20], buffer[20:]])
    assert np.shares_memory(stream.as_array(), buffer)
    assert np.shares_memory(ByteStream([buffer[5:10]]).as_array(), buffer)


def test_slices_that_only_look_like_neighbours_are_kept_apart():
    buffer = np.arange(40, dtype=np.uint8)
    strided = ByteStream([buffer[0:20:2], buffer[20:40:2]])
    assert strided.as_array().tolist() == list(range(0, 40, 2))
    wide = np.arange(8, dtype=np.uint16)
    halves = [wide[:4].view(np.uint8), wide[4:].view(np.uint8)]
    assert ByteStream(halves).as_array().tobytes() == wide.tobytes()


def test_as_array_stops_at_max_bytes():
    stream = ByteStream(as_arrays([b"abc", b"defg"]))
    assert stream.as_array(5).tobytes() == b"abcde"
    assert stream.as_array(100).tobytes() == b"abcdefg"


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (6, 2), (8, 0), (0, 8), (0, -1)])
def test_windows_outside_are_refused(offset, length):
    stream = ByteStream(as_arrays([b"abc", b"defg"]))
    with pytest.raises(IndexError):
        stream.window(offset, length)


def test_only_flat_bytes_are_taken():
    with pytest.raises(TypeError, match="int64"):
        ByteStream([np.zeros(3, dtype=np.int64)])


@settings(deadline=None)
@given(parts=pieces)
def test_fingerprint_follows_content_not_layout(parts):
    whole = b"".join(parts)
    fingerprint = ByteStream(as_arrays(parts)).fingerprint()
    assert 0 <= fingerprint < 1 << 63
    assert fingerprint == ByteStream(as_arrays([whole])).fingerprint()
    assert fingerprint != ByteStream(as_arrays([whole + b"\0"])).fingerprint()
    if whole:
        changed = bytes([whole[0] ^ 1]) + whole[1:]
        assert fingerprint != ByteStream(as_arrays([changed])).fingerprint()


def test_every_byte_counts_in_the_fingerprint():
    content = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8)
    fingerprint = ByteStream([content]).fingerprint()
    for index in np.random.default_rng(1).integers(0, content.size, 40):
        content[index] ^= 1
        assert ByteStream([content]).fingerprint() != fingerprint
        content[index] ^= 1
    assert ByteStream([content[:5], content[5:]]).fingerprint() == fingerprint


def test_a_long_stream_is_probed_at_its_ends_and_in_between(monkeypatch):
    monkeypatch.setattr(module, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(module, "_PROBES", 64)
    monkeypatch.setattr(module, "_PROBE_BYTES", 1024)
    content = np.zeros((1 << 20) + 1, dtype=np.uint8)
    fingerprints = {ByteStream([content]).fingerprint()}
    # Probe 32 of 0..63 starts at (2^20 + 1 - 1024) * 32 // 63.
    for index in (0, (content.size - 1024) * 32 // 63, content.size - 1):
        content[index] = 1
        fingerprints.add(ByteStream([content]).fingerprint())
        content[index] = 0
    assert len(fingerprints) == 4
    assert ByteStream([content[:-1]]).fingerprint() not in fingerprints
