"""Waveforms: audio files read and written, mixed down to one channel, brought to another rate.

Shapes: N samples, R taps.
"""

import io
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np

from arbitor.data.media import file_status, why_no_file
from arbitor.data.sources import reason
from arbitor.errors import UserError, extra_command

UNIT = 1 << 15  # of 16-bit samples, as libsndfile has it
MIN_RATE, MAX_RATE = 1_000, 768_000
MAX_SECONDS = 600.0  # of a recording; what follows is left out
MAX_FILE_BYTES = 1 << 30
_ZERO_CROSSINGS = 16  # of the resampling filter on each side
_ROLLOFF = 0.95  # of the lower rate's band that resampling keeps
_CHUNK_TAPS = 1 << 22  # that are multiplied at once
_STREAMED = (0, 0xFFFFFFFF)  # sizes in headers of files that were written without going back
MAX_VALUES = 1 << 28  # of all channels of a recording, before it is mixed down
_LEAST_READ = 0.9  # of the samples that a file's headers promise
_W64 = b"riff.\x91\xcf\x11\xa5\xd6(\xdb\x04\xc1\0\0"
_LOUDEST = 64.0  # what is above is of another scale than -1...1


class UnusableError(Exception):
    """Why a recording cannot be used, in words that follow "skipped 3"."""


def read_recording(path: str | Path, rate: int) -> np.ndarray:
    """An audio file as fp32 [N] in -1...1 at `rate`.

    Raises:
        UserError: it is missing, damaged or no audio.
    """
    try:
        return usable_wave(*load_file(Path(path)), rate)
    except UnusableError as error:
        raise UserError(f"{str(path)!r} is {error}; give a whole recording, such as a .wav file") from error


def write_recording(path: str | Path, samples: np.ndarray, rate: int) -> None:
    """Write fp32 [N] in -1...1 as a 16-bit WAV file.

    Raises:
        UserError: the disk did not take it.
    """
    codes = codes_of(samples).astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(codes.tobytes())
    try:
        Path(path).write_bytes(content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {reason(error)}") from error


def codes_of(samples: np.ndarray) -> np.ndarray:
    """Samples in -1...1 as int16, in units of 2^-15; what is 1 loses one unit."""
    return np.rint(samples * UNIT).clip(1 - UNIT, UNIT - 1).astype(np.int16)


def usable_wave(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples mixed down, resampled and limited to -1...1: fp32 [N], N >= 1.

    Args:
        samples: float [N] or [N, channels].
        rate: of the samples.
        wanted: of the result.

    Raises:
        UnusableError: nothing is in it, it holds no numbers, numbers of another scale, or its rate is none.
    """
    if samples.ndim == 2:
        if not samples.shape[1]:
            raise UnusableError("empty")
        samples = samples.mean(axis=1, dtype=np.float32)
    if not len(samples):
        raise UnusableError("empty")
    if not np.isfinite(samples).all():
        raise UnusableError("with samples that are no numbers")
    if np.abs(samples).max() > _LOUDEST:
        raise UnusableError("with samples far beyond full scale")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UnusableError(f"of a rate outside {MIN_RATE}...{MAX_RATE} Hz")
    return np.clip(resample(samples.astype(np.float32), rate, wanted), -1, 1)


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """fp32 [N] at `rate` -> fp32 [ceil(N * wanted / rate)], band-limited below the lower of both rates.

    Interpolation with a windowed sinc (Smith and Gossett 1984, "A flexible sampling-rate conversion method"):
    16 zero crossings on each side under a Hann window. Every ratio of integers is met exactly.
    """
    if rate == wanted:
        return samples
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    count = -(-len(samples) * up // down)
    cutoff = _ROLLOFF * min(1.0, up / down)  # of half the given rate
    reach = math.ceil(_ZERO_CROSSINGS / cutoff)
    offsets_R = np.arange(-reach + 1, reach + 1)
    padded = np.pad(samples.astype(np.float64), (reach, reach + 1))
    result = np.empty(count, dtype=np.float32)
    chunk = max(1, _CHUNK_TAPS // len(offsets_R))
    for first in range(0, count, chunk):
        place = np.arange(first, min(first + chunk, count), dtype=np.int64) * down
        whole, part = place // up, place % up
        phases, index = np.unique(part, return_inverse=True)  # few, where the ratio is simple
        time = offsets_R - phases[:, None] / up
        taps = cutoff * np.sinc(cutoff * time) * np.cos(np.pi / 2 * np.clip(time / reach, -1, 1)) ** 2
        rows = padded[whole[:, None] + (offsets_R + reach)]
        result[first : first + chunk] = (rows * taps[index]).sum(axis=1)
    return result


def load_file(path: Path) -> tuple[np.ndarray, int]:
    """As `load_content`, of a file.

    Raises:
        UnusableError: it is missing, too large or not readable, or its content cannot be used.
        UserError: soundfile is not installed.
    """
    try:
        status = file_status(path)
        if status is None:
            raise UnusableError(why_no_file(path))
        if status.st_size > MAX_FILE_BYTES:
            raise UnusableError("too large")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UnusableError("not readable") from error
    return load_content(content)  # its UserError, a ValueError, is none of the file


def load_content(content: bytes) -> tuple[np.ndarray, int]:
    """Samples fp32 [N, channels] and rate of the content of an audio file.

    Raises:
        UnusableError: it is empty, damaged, or of no known format.
        UserError: soundfile is not installed.
    """
    if not content:
        raise UnusableError("empty")
    soundfile = _soundfile()
    if _promised_size(content) > len(content) + 1:  # the last odd byte may be missing
        raise UnusableError("cut short")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = int(file.samplerate)
            if not MIN_RATE <= rate <= MAX_RATE:
                raise UnusableError(f"of a rate outside {MIN_RATE}...{MAX_RATE} Hz")
            wanted = min(file.frames, int(MAX_SECONDS * rate))
            if wanted * file.channels > MAX_VALUES:
                raise UnusableError("too large")
            samples = file.read(wanted, dtype="float32", always_2d=True)
    # libsndfile's errors are RuntimeErrors; damaged headers may lead to any of the others.
    except (RuntimeError, OSError, ValueError, TypeError, MemoryError, OverflowError) as error:
        raise UnusableError("damaged") from error
    if len(samples) < _LEAST_READ * wanted:  # of compressed sounds the number may be an estimate
        raise UnusableError("cut short")
    return samples, rate


def _promised_size(content: bytes) -> int:
    """Bytes that a file should have by its own headers; 0 where they do not tell."""
    kind = content[:4]
    if kind == b"RIFF":
        size = int.from_bytes(content[4:8], "little")
        return 0 if size in _STREAMED else size + 8
    if kind == b"FORM":  # AIFF
        return int.from_bytes(content[4:8], "big") + 8
    if kind == b"RF64" and content[12:16] == b"ds64":
        return int.from_bytes(content[20:28], "little") + 8
    if content[:16] == _W64:
        return int.from_bytes(content[16:24], "little")
    if kind == b".snd":  # AU
        size = int.from_bytes(content[8:12], "big")
        return 0 if size in _STREAMED else int.from_bytes(content[4:8], "big") + size
    if kind == b"OggS":
        page = content.rfind(b"OggS")
        lengths = content[page + 27 : page + 27 + content[page + 26]] if page + 26 < len(content) else b""
        return page + 27 + len(lengths) + sum(lengths) if lengths else len(content) + 2
    return 0


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise UserError(
            f"audio files need soundfile, of the extra audio: {extra_command('audio')}"
        ) from error
    return soundfile
