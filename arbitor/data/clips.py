"""Clips of recordings for training: cut, placed and a little changed, as random bits say.

Shapes: N samples.
"""

import numpy as np

MAX_GAIN = 1.0  # octaves, up or down
MAX_SPEED = 0.25  # octaves, up or down
NOISE_FLOOR, NOISE_RANGE = -14.0, 6.0  # octaves of amplitude, below full scale and from there up


def clip(wave: np.ndarray, samples: int, bits: int | None = None) -> np.ndarray:
    """fp32 of exactly `samples`: a part of a longer wave, a shorter one among zeros.

    Args:
        wave: fp32 [N].
        samples: of the clip.
        bits: 16 random bits that choose the place; None takes the middle of what there is to choose.
    """
    slack = abs(len(wave) - samples)
    place = slack // 2 if bits is None else (bits & 0xFFFF) * (slack + 1) >> 16
    if len(wave) >= samples:
        return wave[place : place + samples]
    return np.pad(wave, (place, slack - place))


def varied(wave: np.ndarray, bits: int) -> np.ndarray:
    """A wave faster or slower by up to a quarter of an octave, louder or softer by up to one, with noise.

    Args:
        wave: fp32 [N] in -1...1.
        bits: 48 random bits.

    Returns:
        fp32 in -1...1, of another length.
    """
    speed, gain, noise = (((bits >> (16 * n)) & 0xFFFF) / 32767.5 - 1 for n in range(3))
    factor = 2 ** (MAX_SPEED * speed)
    count = max(1, int(len(wave) / factor))
    # Straight lines between samples: what that adds is like the noise below.
    changed = np.interp(np.arange(count) * factor, np.arange(len(wave)), wave)
    amplitude = 2.0 ** (NOISE_FLOOR + NOISE_RANGE * (noise + 1) / 2)
    random = np.random.Generator(np.random.Philox(key=bits))
    changed = changed * 2 ** (MAX_GAIN * gain) + amplitude * random.standard_normal(count)
    return np.clip(changed, -1, 1).astype(np.float32)
