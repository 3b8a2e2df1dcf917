"""Clips of recordings for training: cut, placed and a little changed, as random bits say.

Shapes: N samples.
"""

import numpy as np

MAX_GAIN = 1.0  # octaves, up or down
MAX_SPEED = 0.3  # octaves, up or down
MAX_COLOUR = 1.0  # octaves of amplitude at each of some frequencies, up or down
NUM_COLOURS = 8
MAX_GAP = 0.15  # of the wave, silenced
# Octaves of amplitude of noise over the wave's largest sample: the softest, and the loudest of two kinds.
LEAST_NOISE, SOFT_NOISE, LOUD_NOISE = -12.0, -8.0, -4.0


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


def varied(wave: np.ndarray, bits: int, most_noise: float = SOFT_NOISE) -> np.ndarray:
    """A wave as another voice, place and microphone might give it.

    Faster or slower, and with that higher or lower, by up to 0.3 octaves; coloured by a smooth curve over
    frequency; louder or softer by up to an octave of amplitude; with some noise.

    Args:
        wave: fp32 [N] in -1...1.
        bits: 48 random bits, all that the result depends on.
        most_noise: the loudest noise, in octaves of amplitude over the wave's largest sample.

    Returns:
        fp32 in -1...1, of another length.
    """
    random = np.random.Generator(np.random.Philox(key=bits))
    speed, gain, noise = random.uniform(-1, 1, 3)
    factor = 2 ** (MAX_SPEED * speed)
    count = max(1, int(len(wave) / factor))
    # Straight lines between samples: what that adds is like the noise below.
    changed = np.interp(np.arange(count) * factor, np.arange(len(wave)), wave)
    changed = coloured(changed, random.uniform(-MAX_COLOUR, MAX_COLOUR, NUM_COLOURS))
    amplitude = np.abs(changed).max() * 2 ** (LEAST_NOISE + (most_noise - LEAST_NOISE) * (noise + 1) / 2)
    changed = (changed + amplitude * random.standard_normal(count)) * 2 ** (MAX_GAIN * gain)
    return np.clip(changed, -1, 1).astype(np.float32)


def coloured(wave: np.ndarray, octaves: np.ndarray) -> np.ndarray:
    """A wave [N], amplified by these octaves at frequencies evenly spaced up to half the rate."""
    spectrum = np.fft.rfft(wave)
    place = np.linspace(0, len(octaves) - 1, len(spectrum))
    return np.fft.irfft(spectrum * 2 ** np.interp(place, np.arange(len(octaves)), octaves), n=len(wave))


def with_gap(wave: np.ndarray, bits: int) -> np.ndarray:
    """A wave [N] of which a part, of up to `MAX_GAP`, is silent (as in Park et al. 2019, "SpecAugment", 2).

    Args:
        wave: fp32 [N].
        bits: 48 random bits.
    """
    random = np.random.Generator(np.random.Philox(key=bits ^ 1 << 60))
    size = int(random.uniform(0, MAX_GAP) * len(wave))
    first = int(random.integers(0, len(wave) - size + 1))
    silenced = wave.copy()
    silenced[first : first + size] = 0
    return silenced
